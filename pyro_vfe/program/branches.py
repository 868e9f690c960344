"""Programs that branch on a latent: one run per value, put together as one more axis of the tables.

    table[z = k, ...]  =  the table of the run in which z was k

A run is a path of choices; the paths form a tree, because a branch may sample sites that another lacks. A site that a
branch lacks has log-probability 0 there (an observation) or is pinned to its first value (a latent).
"""

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from time import perf_counter

import torch
from torch import Tensor

from pyro_vfe.engine.factors import Table
from pyro_vfe.errors import CostError, VFEWarning

MAX_RUNS = 4096

PATIENCE = 10.0
"""Seconds of runs after which a user is told where many more are to come."""


@dataclass
class Choice:
    """The value that one sequentially enumerated site takes in a run, or all latents of a group."""

    name: str | int
    """The site; the number of a group of latents whose values are taken one by one, no two of them read together."""
    index: int
    size: int


@dataclass
class Paths:
    """Walks through all paths of choices, depth first; a site joins a path when the run reaches it."""

    path: list[Choice] = field(default_factory=list)
    warns: bool = False
    """Whether to warn where the walk takes long."""

    def __iter__(self) -> Iterator[int]:
        """Yields once per run; between runs the last choice moves on."""
        self.path = []
        started = perf_counter()
        for run in range(MAX_RUNS + 1):
            if run == MAX_RUNS:
                names = self._names()
                raise CostError(
                    f"The program branches on so many latents ({names}, ...) that it would have to run more than "
                    f"{MAX_RUNS} times.",
                    hint="Write the branch as an indexed table or torch.where: then its values share one run.",
                    sites=[choice.name for choice in self.path if isinstance(choice.name, str)],
                )
            yield run
            if self.warns and perf_counter() - started > PATIENCE:
                self._warn_if_far(run + 1, perf_counter() - started)
            while self.path and self.path[-1].index + 1 == self.path[-1].size:
                self.path.pop()
            if not self.path:
                return
            self.path[-1].index += 1

    def _warn_if_far(self, runs: int, seconds: float) -> None:
        """Warns once where many runs are to come, if the tree of paths goes on as it began."""
        self.warns = False
        done, share = 0.0, 1.0
        for choice in self.path:
            share /= choice.size
            done += choice.index * share
        total = runs / (done + share)
        if seconds * total / runs > 2 * PATIENCE:
            names = self._names()
            warnings.warn(
                f"The program branches on latents ({names}{', ...' * (len(self.path) > 5)}) and runs once for each of "
                f"perhaps {total:,.0f} joint values of theirs; {runs:,} took {seconds:.1f} seconds. Write the branch "
                "as torch.where(z == 1, a, b) or as an indexed table, table[z]: then all values share one run.",
                VFEWarning,
                stacklevel=2,
            )

    def _names(self) -> str:
        """The first few sites of the path."""
        return ", ".join([f"'{choice.name}'" for choice in self.path if isinstance(choice.name, str)][:5])

    def choose(self, name: str | int, size: int) -> int:
        """The index that a site, or a group of latents, takes in this run."""
        for choice in self.path:
            if choice.name == name:
                return choice.index
        self.path.append(Choice(name, 0, size))
        return 0

    def assignment(self) -> "Assignment":
        """The choices of this run, in order."""
        return tuple((choice.name, choice.index) for choice in self.path)


Assignment = tuple[tuple[str | int, int], ...]


def deciding(path: Assignment) -> list[tuple[str, int]]:
    """Returns the choices of sites on a path, without those of groups.

    Args:
        path: The choices of a run.
    """
    return [(name, index) for name, index in path if isinstance(name, str)]


NO_READS: Mapping[int, str] = {}

_MOST_ENTRIES = 2**24
"""The most entries of a table over more joint values than there may be runs: most of them belong to no path."""


def joined(
    tables: Mapping[Assignment, Table | None],
    since: int,
    sizes: Mapping[str, int],
    absent: Table,
    read: Mapping[int, str] = NO_READS,
) -> Table:
    """One table over the choices of all runs.

    Args:
        tables: By the path of the run; None where the run lacks the site.
        since: How many leading choices of sites had been made before the site was sampled in every run; only those
            and the choices before them can have touched it.
        sizes: The number of values of each sequentially enumerated site.
        absent: What stands where a run lacks the site.
        read: The latent that the site reads of each group of latents whose values are taken one by one.
    """

    def join(group: Sequence[Assignment], depth: int, met: int) -> Table:
        first = group[0]
        if depth >= len(first):
            return tables[first] or absent
        choice = first[depth][0]
        name = read.get(choice) if isinstance(choice, int) else choice
        met += not isinstance(choice, int)
        count = 1 if name is None else sizes[name]
        parts = [join([path for path in group if path[depth][1] == k], depth + 1, met) for k in range(count)]
        if name is None or all(part is parts[0] for part in parts):
            return parts[0]
        is_one = _are_equal(parts) if isinstance(choice, int) else met > since
        if not is_one:
            _check_size(parts, name, tables)
        return parts[0] if is_one else stacked(parts, name)

    return join(list(tables), 0, 0)


def _are_equal(parts: Sequence[Table]) -> bool:
    """Whether tables that say what exists say the same; others keep the axes of what they read."""
    first = parts[0]
    return first.values.dtype == torch.bool and all(
        part.axes == first.axes and torch.equal(part.values, first.values) for part in parts[1:]
    )


def _check_size(parts: Sequence[Table], name: str, paths: Collection[Assignment]) -> None:
    sizes = {name: len(parts), **{axis: size for part in parts for axis, size in part.sizes.items()}}
    if prod(sizes.values()) <= _MOST_ENTRIES:
        return
    names = {decider for path in paths for decider, _ in deciding(path)}
    found = [axis for axis in sizes if axis in names]
    if prod(sizes[axis] for axis in found) > MAX_RUNS:
        shown = ", ".join(f"'{axis}'" for axis in found[:5])
        raise CostError(
            f"A table over the latents that the programs branch on ({shown}{', ...' * (len(found) > 5)}) would have "
            f"more than {_MOST_ENTRIES:,} entries, most of them for latents that are absent.",
            hint="Leave these latents out of the guide and out of poutine.scale: then each path of choices is summed "
            "by itself; or give latents of one role one name in all branches.",
            sites=found,
        )


def stacked(parts: Sequence[Table], name: str) -> Table:
    """The tables of one axis `name`, brought to common axes."""
    axes: tuple[str, ...] = ()
    sizes: dict[str, int] = {}
    for part in parts:
        axes += tuple(axis for axis in part.axes if axis not in axes)
        sizes.update(zip(part.axes, part.values.shape, strict=True))
    shape = [sizes[axis] for axis in axes]
    aligned: list[Tensor] = [part.aligned(axes).expand(shape) for part in parts]
    return Table(torch.stack(aligned, -1), (*axes, name))
