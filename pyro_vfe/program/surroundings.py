"""Which step of a sequential plate a site is, and which of the plates around it are subsampled."""

from typing import Any

from pyro_vfe.engine.factors import Subsample


def steps_around(msg: Any) -> dict[str, int]:
    """The step of each sequential plate around a site.

    Args:
        msg: Pyro's message of the site.
    """
    # Pyro counts the steps of a sequential plate from 1.
    return {frame.name: frame.counter - 1 for frame in msg["cond_indep_stack"] if frame.dim is None}


def subsampled_around(msg: Any) -> frozenset[Subsample]:
    """The plates around a site, vectorised and sequential, of which some elements are present.

    Args:
        msg: Pyro's message of the site.
    """
    sizes = ((f.name, int(f.size), int(f.full_size or f.size)) for f in msg["cond_indep_stack"])
    return frozenset(Subsample(name, size, full_size) for name, size, full_size in sizes if size != full_size)
