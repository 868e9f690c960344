"""What `import pyro_vfe` adds to `import pyro`."""

from collections.abc import Callable

from contest import Case, Contestant, added_seconds


def test_import(contest: Callable[[str, Case], None]) -> None:
    """Fresh interpreters, in turn."""
    ours = Contestant("contestants.fresh_imports", "imported", {"modules": "pyro, pyro_vfe"})
    peer = Contestant("contestants.fresh_imports", "imported", {"modules": "pyro"})
    targets = {"import pyro": (added_seconds(0.3),)}
    contest("import pyro, pyro_vfe", Case(ours, {"import pyro": peer}, targets, budget=30.0))
