"""Who is measured: each module prepares one library, and is imported in a process of its own."""
