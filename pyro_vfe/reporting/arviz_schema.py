"""ArviZ's schema: needs xarray and NumPy alone."""
