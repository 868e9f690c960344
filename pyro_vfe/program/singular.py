r"""Tables whose gradient is right where autograd's is not finite: at single values of latents, or at a parameter's end.

    table(theta)[z = k]        is constant at some k:    its derivative is 0      (autograd: 0 * inf = NaN, for all k)
                               has a one-sided derivative there:                  that one
                               has none:                                          an error

`Poisson(rate * (1 - z))` says the same of z = 1 whatever the rate. Autograd multiplies by the infinite slope of its
logarithm, and the NaN spreads over all values, since they were computed together. So where a table's backward pass is
not finite, the programs run at one joint value of its latents at a time, and each value is asked by itself whether it
moves when the parameters move.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cached_property, partial
from itertools import product

import pyro
import torch
from torch import Tensor

from pyro_vfe.engine.factors import Factor, Table
from pyro_vfe.errors import NotFiniteError
from pyro_vfe.program.branches import stacked
from pyro_vfe.program.enumeration import Enumeration, SiteKey
from pyro_vfe.program.path_axis import not_finite_on_a_path
from pyro_vfe.program.zeros import filled_zeros, tiny

TablesAt = Callable[[Mapping[str, int]], Mapping[SiteKey, Factor]]
"""Runs the programs with one value of some latents, and returns their factors."""

_MOST_ENTRIES = 256
"""Entries of parameters by each of which a value is differentiated, where it moves."""

_STEP = {torch.float64: 2.0**-20}
"""The first step of one-sided differences, relative to a parameter; of other types, half as many digits."""

_AGREES = 1e-3
"""How much of itself a difference may change when its step is halved, where there is a derivative."""

_moving: ContextVar[bool] = ContextVar("whether parameters are moved to see what moves with them", default=False)


def is_moving() -> bool:
    """Returns whether parameters are being moved: what was computed from them before is not what they are now."""
    return _moving.get()


def leaves_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns the leaves that tensors were computed from, whose gradients a backward pass writes.

    Args:
        tensors: With a graph or without.
    """
    found: dict[int, Tensor] = {}
    waiting, seen = [], set()
    for tensor in tensors:
        if tensor.grad_fn is not None:
            waiting.append(tensor.grad_fn)
        elif tensor.requires_grad:
            found[id(tensor)] = tensor
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        for parent, _ in node.next_functions:
            leaf = getattr(parent, "variable", None)
            if leaf is not None:
                found[id(leaf)] = leaf
            elif parent is not None:
                waiting.append(parent)
    return list(found.values())


def parameter_leaves(runs: Iterable[Enumeration]) -> list[Tensor]:
    """Returns what the gradients of runs are written to, each tensor once.

    Args:
        runs: With the graph to the parameters.
    """
    read = (value for run in runs for value in run.read)
    leaves = (value.unconstrained() if hasattr(value, "unconstrained") else value for value in read)
    return list({id(leaf): leaf for leaf in leaves if leaf is not None and leaf.requires_grad}.values())


def other_leaves(run: Enumeration) -> list[Tensor]:
    """Returns the leaves of a run's tables that are no parameters that Pyro handed out.

    Args:
        run: With the graph to the parameters.
    """
    known = set(map(id, parameter_leaves([run])))
    found = leaves_of(values for factor in run.factors.values() for values in _with_graph(factor))
    return [leaf for leaf in found if id(leaf) not in known]


def singular_tables(enumeration: Enumeration) -> frozenset[SiteKey]:
    """Returns the sites of whose tables the backward pass is not finite at the present parameters.

    Args:
        enumeration: A run with the graph to the parameters.
    """
    tables = {key: _with_graph(factor) for key, factor in enumeration.factors.items()}
    return frozenset(_not_finite([(key, own) for key, own in tables.items() if own]))


def _not_finite(tables: Sequence[tuple[SiteKey, list[Tensor]]]) -> list[SiteKey]:
    if not tables or _is_sound([tensor for _, own in tables for tensor in own]):
        return []
    if len(tables) == 1:
        return [tables[0][0]]
    half = len(tables) // 2
    return _not_finite(tables[:half]) + _not_finite(tables[half:])


def _is_sound(tensors: Sequence[Tensor]) -> bool:
    """Whether the backward pass is finite where every possible entry counts, and no impossible one."""
    leaves = leaves_of(tensors)
    weights = [tensor.isfinite().to(tensor.dtype) for tensor in tensors]
    found = torch.autograd.grad(tensors, leaves, weights, retain_graph=True, allow_unused=True) if leaves else ()
    return all(bool(gradient.isfinite().all()) for gradient in found if gradient is not None)


def _with_graph(factor: Factor) -> list[Tensor]:
    return [table.values for table in factor.tables if table.values.requires_grad]


def with_sound_gradients(run: Enumeration, singular: Collection[SiteKey], tables_at: TablesAt) -> Enumeration:
    """Returns a run with tables of the same numbers whose gradients are right.

    Args:
        run: With the graph to the parameters.
        singular: The sites whose tables are not to be differentiated as they are.
        tables_at: Runs the same programs at the same draws with one value of some latents.

    Raises:
        NotFiniteError: A value has no derivative, or too many parameters move it.
    """
    if run.choices and singular:
        raise not_finite_on_a_path(min(singular)[1], len(run.choices))
    axes = {key: _read(key, run) for key in singular if key in run.factors}
    values: dict[SiteKey, dict[tuple[int, ...], _Value]] = {key: {} for key in axes}
    for only, keys in _assignments(axes, run):
        look = _Look(only, keys, tables_at, run)
        for key in keys:
            own = {axis: only[axis] for axis in axes[key]}
            values[key][tuple(own.values())] = _Value(key, own, look)
    exact, limits = (
        {
            key: _joined(key, axes[key], {index: getattr(value, which) for index, value in own.items()}, run)
            for key, own in values.items()
        }
        for which in ("exact", "limit")
    )
    same = [key for key, own in values.items() if all(value.limit is value.exact for value in own.values())]
    limits |= {key: exact[key] for key in same}
    return replace(run.with_factors({**run.factors, **exact}, run.variables), limits=limits)


def _read(key: SiteKey, run: Enumeration) -> tuple[str, ...]:
    """The latents that a table reads, but for the one whose own values it lists."""
    return tuple(axis for axis in run.factors[key].axes if axis in run.supports and axis != key[1])


def _assignments(
    axes: Mapping[SiteKey, tuple[str, ...]], run: Enumeration
) -> Iterator[tuple[dict[str, int], list[SiteKey]]]:
    """Values of latents at which to run, and the tables to be had there: few runs that show every joint value."""
    waiting = [
        (key, dict(zip(own, index, strict=True)))
        for key, own in axes.items()
        for index in product(*(range(run.variables[axis].size) for axis in own))
    ]
    while waiting:
        only: dict[str, int] = {}
        free: set[str] = set()
        taken: list[SiteKey] = []
        left = []
        for key, wanted in waiting:
            fits = key not in taken and key[1] not in only and free.isdisjoint(wanted)
            if fits and all(only.get(axis, index) == index for axis, index in wanted.items()):
                only |= wanted
                free.add(key[1])
                taken.append(key)
            else:
                left.append((key, wanted))
        waiting = left
        yield only, taken


def _joined(key: SiteKey, axes: Sequence[str], parts: Mapping[tuple[int, ...], Factor], run: Enumeration) -> Factor:
    """The factor of all joint values."""

    def join(index: tuple[int, ...], tables: Callable[[Factor], Table]) -> Table:
        if len(index) == len(axes):
            return tables(parts[index])
        name = axes[len(index)]
        return stacked([join((*index, k), tables) for k in range(run.variables[name].size)], name)

    factor = run.factors[key]
    return _of(factor, [_laid_as(join((), partial(_table, n)), own) for n, own in enumerate(factor.tables)])


def _table(number: int, factor: Factor) -> Table:
    return factor.tables[number]


def _laid_as(table: Table, like: Table) -> Table:
    return Table(table.aligned(like.axes).expand(like.values.shape), like.axes)


class _Look:
    """The programs at single values of latents: as they are, with zeros filled, and with parameters moved."""

    def __init__(
        self, only: Mapping[str, int], keys: Collection[SiteKey], tables_at: TablesAt, run: Enumeration
    ) -> None:
        self.run, self.only, self.tables_at = run, only, tables_at
        self.found = tables_at(only)
        graphs = [(key, _with_graph(self.found[key])) for key in keys if key in self.found]
        self.unsound = frozenset(_not_finite([(key, own) for key, own in graphs if own]))
        """The sites whose tables cannot be differentiated here either."""

    @cached_property
    def filled(self) -> Mapping[SiteKey, Factor]:
        """The factors with probabilities of zero filled."""
        with filled_zeros():
            return self.tables_at(self.only)

    @cached_property
    def elsewhere(self) -> Mapping[SiteKey, Factor] | None:
        """The factors where all parameters are others; None where the programs refuse them."""
        moving = self.moving(self.unsound)
        generator = torch.Generator().manual_seed(0)
        for sign in (1.0, -1.0):
            steps = [sign * _steps(one) * (0.5 + torch.rand(one.shape, generator=generator)).to(one) for one in moving]
            found = self.moved(moving, steps)
            if found is not None:
                return found
        return None

    def moving(self, keys: Iterable[SiteKey]) -> list[Tensor]:
        """What may move the tables of some sites: leaves, and draws that carry a gradient."""
        draws = [value for value in self.run.drawn.values() if value.requires_grad]
        return [*leaves_of(values for key in keys for values in _with_graph(self.found[key])), *draws]

    def moved(self, moving: Sequence[Tensor], steps: Sequence[Tensor]) -> Mapping[SiteKey, Factor] | None:
        """The factors where parameters are moved by so much; None where the programs refuse that."""
        try:
            with _moved(moving, steps), torch.no_grad():
                return self.tables_at(self.only)
        except ValueError:
            return None


class _Value:
    """A table at one joint value of the latents that it reads."""

    def __init__(self, key: SiteKey, only: Mapping[str, int], look: _Look) -> None:
        self.key, self.only, self.look = key, only, look
        if key not in look.found:  # What a branch lacks has no slope.
            self.exact = self.limit = _constant(look.run.factors[key], only)
            return
        self.exact = self.limit = factor = self._own(look.found)
        if key in look.unsound:
            self.exact = self.limit = _constant(factor)
            if self._moves():
                self._differentiate(look.moving([key]))
        elif any(bool(values.isneginf().any()) for values in _with_graph(factor)):
            self.limit = self._own(look.filled)

    def _own(self, found: Mapping[SiteKey, Factor]) -> Factor:
        return found[self.key].mapped(lambda table: table.without(self.only))

    def _moves(self) -> bool:
        """Whether any entry is another when all parameters are others."""
        if self.look.elsewhere is None:
            return True
        pairs = zip(self._own(self.look.elsewhere).tables, self.exact.tables, strict=True)
        return any(not torch.equal(new.values, old.values) for new, old in pairs)

    def _differentiate(self, moving: Sequence[Tensor]) -> None:
        """Gives the entries their one-sided derivatives: in the linear domain, where they are impossible."""
        entries = [(one, entry) for one in moving for entry in _steps(one).flatten().nonzero().flatten().tolist()]
        if len(entries) > _MOST_ENTRIES:
            raise self._no_derivative(moving, f"and more than {_MOST_ENTRIES} numbers may move it")
        columns = [self._slopes(one, entry) for one, entry in entries]
        change = torch.stack([(one - one.detach()).flatten()[entry] for one, entry in entries])
        exact, limit = [], []
        for table, *slopes in zip(self.exact.tables, *columns, strict=True):
            slope, impossible = torch.stack(slopes, -1), table.values.isneginf()
            moves, moved_by = (slope != 0).any(-1), (slope * change.to(slope)).sum(-1)
            fill = tiny(table.values.dtype)
            exact.append(Table(torch.where(impossible, table.values, table.values + moved_by), table.axes))
            filled = math.log(fill) + moved_by / fill
            limit.append(Table(torch.where(impossible & moves, filled, exact[-1].values), table.axes))
        self.exact, self.limit = _of(self.exact, exact), _of(self.exact, limit)

    def _slopes(self, one: Tensor, entry: int) -> list[Tensor]:
        """The one-sided derivative of each table by one entry of a parameter."""
        sides = []
        for side in (1.0, -1.0):
            found = [self._quotients(one, entry, side / 2**halvings) for halvings in range(3)]
            if found[-1] is not None:
                sides.append([_tends_to(*own) for own in zip(*(one or found[-1] for one in found), strict=True)])
        if not sides or any(slope is None for side in sides for slope in side):
            raise self._no_derivative([one], "and has no finite derivative there")
        left, right = sides[0], sides[-1]
        if not all(torch.allclose(a, b, rtol=_AGREES, atol=_AGREES) for a, b in zip(left, right, strict=True)):  # type: ignore[arg-type]
            raise self._no_derivative([one], "and its derivatives to the left and to the right differ")
        return left  # type: ignore[return-value]

    def _quotients(self, one: Tensor, entry: int, part: float) -> list[Tensor] | None:
        """Differences over a step: of probabilities where they are zero, of log-probabilities elsewhere."""
        steps = torch.zeros_like(one.detach()).flatten()
        steps[entry] = h = part * float(_steps(one).flatten()[entry])
        moved = self.look.moved([one], [steps.reshape(one.shape)])
        tables = () if moved is None else self._own(moved).tables
        if not tables or any(bool(table.values.isnan().any()) for table in tables):
            return None
        return [
            torch.where(old.values.isneginf(), new.values.exp(), new.values - old.values) / h
            for new, old in zip(tables, self.exact.tables, strict=True)
        ]

    def _no_derivative(self, moving: Sequence[Tensor], fact: str) -> NotFiniteError:
        role, name = self.key
        values = ", ".join(
            f"{latent} = {self.look.run.supports[latent][k].tolist()}" for latent, k in self.only.items()
        )
        return NotFiniteError(
            f"The log-probability of site '{name}' of the {role}{f' at {values}' if values else ''} moves with "
            f"{named(moving)}, autograd's derivative is not finite there, {fact}.",
            hint="Move the parameter off that point, by a constraint say (constraints.greater_than(1e-3)).",
        )


def _tends_to(coarse: Tensor, fine: Tensor, finest: Tensor) -> Tensor | None:
    """What quotients tend to as the step is halved; None where they tend to nothing."""
    tolerance = _AGREES * (1 + finest.abs())
    if not bool(((fine - finest).abs() <= tolerance).all() & ((coarse - fine).abs() <= 2 * tolerance).all()):
        return None
    return 2 * finest - fine


def _constant(factor: Factor, at: Mapping[str, int] | None = None) -> Factor:
    """The factor without a graph, at single values of latents."""

    def constant(table: Table) -> Table:
        for axis, index in (at or {}).items():
            table = table.selected(axis, index)
        return Table(table.values.detach(), table.axes)

    return factor.mapped(constant)


def _of(factor: Factor, tables: Sequence[Table]) -> Factor:
    left = iter(tables)
    return factor.mapped(lambda _: next(left))


def named(moving: Sequence[Tensor]) -> str:
    """Returns in words which parameters tensors are, by their names in Pyro's store.

    Args:
        moving: Leaves of a graph.
    """
    known = {id(value): name for name, value in pyro.get_param_store()._params.items()}
    names = [f"'{known[id(one)]}'" for one in moving if id(one) in known]
    return f"parameter {', '.join(names[:5])}" if names else "a parameter that is not in Pyro's store"


def _steps(one: Tensor) -> Tensor:
    """By how much each entry of a parameter is moved; what is infinite stays."""
    size = one.detach().abs()
    size = torch.where(size == 0, 1.0, size)
    return _STEP.get(one.dtype, 2.0**-10) * torch.where(size.isfinite(), size, 0.0)


@contextmanager
def _moved(tensors: Sequence[Tensor], steps: Sequence[Tensor]) -> Iterator[None]:
    """Runs a block with parameters moved; afterwards they are exactly what they were, and for torch never changed."""
    before = [tensor.data.clone() for tensor in tensors]
    token = _moving.set(True)
    try:
        for tensor, step in zip(tensors, steps, strict=True):
            tensor.data.add_(step)
        yield
    finally:
        _moving.reset(token)
        for tensor, value in zip(tensors, before, strict=True):
            tensor.data.copy_(value)
