r"""The joint table of a seeded program in the linear domain, element by element, from its specification alone.

    P(v, u)  =  prod_f f(v)^{s_f}          sum over a latent of weight c:   ( sum_v prod_f f(v)^{s_f / c} )^c
    F        =  sum_v Q(v) [ sum_i c_i log q_i(v) - log P(v, u) ]        P(v, u): summed over what only the model has

Probabilities enter as products and powers, never through a clamp or a log of zero, so that autograd gives the gradient
of the sum also at entries that are exactly zero. Where all weights are equal, sums may be taken in any order. Where
they are not, a latent inside a plate comes before what is outside of it, and all orders that this leaves are tried: a
quantity that depends on the order is not defined. Nor is one in which a latent is summed above a subsample: the product
over B elements to the power of N / B is not the product over N of them.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from itertools import islice, permutations, product
from math import prod

import torch
from seeded_programs import (
    SIZES,
    ProgramSpec,
    SiteSpec,
    beginning,
    change_mask,
    datum,
    fixed_mask,
    means,
    rates,
    running_mask,
    scale_of,
    table,
    tilt,
)
from torch import Tensor

Index = tuple[tuple[str, int], ...]
"""An element's place in each plate around it."""

Element = tuple[str, Index]
"""One element of a site."""

MAX_ORDERS = 12


@dataclass(frozen=True, eq=False)
class Weight:
    """The weight of an element or factor: a product of scales, each with a name."""

    parts: tuple[tuple[str, float | Tensor], ...] = ()

    @property
    def key(self) -> frozenset[str]:
        """Equal for equal weights."""
        return frozenset(name for name, _ in self.parts)

    @property
    def value(self) -> Tensor:
        """The product."""
        return reduce(torch.mul, (torch.as_tensor(part) for _, part in self.parts), torch.ones(()))


@dataclass(frozen=True, eq=False)
class Block:
    """Nonnegative numbers over some latent elements, with a weight."""

    axes: tuple[Element, ...]
    values: Tensor
    weight: Weight = Weight()
    site: str = ""
    index: Index = ()

    def over(self, axes: Sequence[Element]) -> Tensor:
        """The values with dims of size 1 for the axes that they lack."""
        own = [axis for axis in axes if axis in self.axes]
        values = self.values.permute([self.axes.index(axis) for axis in own])
        shape = iter(values.shape)
        return values.reshape([next(shape) if axis in self.axes else 1 for axis in axes])

    def power(self, weight: Weight) -> "Block":
        """The values to the power that they have inside a sum of this weight."""
        if weight.key == self.weight.key:
            return self
        return Block(self.axes, self.values ** (self.weight.value / weight.value), weight)


def multiplied(blocks: Sequence[Block], weight: Weight) -> Block:
    """The product inside a sum of a weight."""
    axes = tuple(dict.fromkeys(axis for block in blocks for axis in block.axes))
    values = reduce(torch.mul, (block.power(weight).over(axes) for block in blocks), torch.ones([1] * len(axes)))
    return Block(axes, values, weight)


def _log(values: Tensor) -> Tensor:
    """The log, -inf with no gradient at zero."""
    return torch.where(values > 0, values.where(values > 0, 1.0).log(), -torch.inf)


@dataclass(eq=False)
class Table:
    """The factors of one program, the weights of its latent elements and what is missing of the data."""

    blocks: list[Block]
    weights: dict[Element, Weight]
    """Of the latents' elements, those of missing data among them."""

    missing: set[Element] = field(default_factory=set)
    """Steps of an observed chain that a mask takes out; summed out like latents."""

    absent: set[Element] = field(default_factory=set)
    """Latent elements that do not exist, since the guide has them and the model masks them."""

    @cached_property
    def read_where_absent(self) -> bool:
        """Whether something present reads an element that does not exist."""
        return any(varies(b, axis) for b in self.blocks for axis in b.axes if axis in self.absent and axis[0] != b.site)


def varies(block: Block, axis: Element) -> bool:
    """Whether the values differ along an axis."""
    values = block.values.detach().movedim(block.axes.index(axis), 0)
    return not torch.allclose(values, values[:1], rtol=1e-12, atol=0.0)


class Tables:
    """Builds tables from a specification."""

    def __init__(self, spec: ProgramSpec) -> None:
        self.spec = spec
        self.sites = {site.name: site for site in spec.model}

    def of_model(self, given: Iterable[str] = ()) -> Table:
        """The model's table.

        Args:
            given: The latents that the guide has.
        """
        found, given = Table([], {}), set(given)
        running = running_mask(self.spec)
        for site in self.spec.model:
            mask = torch.ones(self.spec.batch_shape(site.plates)).bool()
            if site.mask in ("fixed", "of_fn", "obs_mask"):
                mask = fixed_mask(self.spec, site)
            elif site.mask == "running":
                mask = mask & running
                change_mask(self.spec, site, running)
            for index in self._indices(site):
                self._add(found, site, "theta", index, bool(self._at(mask, site, index)), site.name in given)
        return found

    def of_guide(self) -> Table:
        """The guide's table; an element that the model masks does not exist."""
        found = Table([], {})
        for site in self.spec.guide:
            own = self.sites[site.name]
            mask = fixed_mask(self.spec, own) if own.mask else torch.ones(self.spec.batch_shape(site.plates)).bool()
            for index in self._indices(site):
                self._add(found, site, "phi", index, bool(self._at(mask, site, index)), True)
        return found

    def _add(self, found: Table, site: SiteSpec, prefix: str, index: Index, there: bool, given: bool) -> None:
        own, weight = (site.name, index), self._weight(site, index)
        if not site.observed:
            found.weights[own] = weight
            if there or not given:
                block = self._latent(site, prefix, index)
            else:
                found.absent.add(own)
                block = Block((own,), _first(SIZES[site.kind]))
            found.blocks.append(Block(block.axes, block.values, weight, site.name, index))
            return
        if site.kind == "chain_2":
            block = self._latent(site, prefix, index)
            block = self._at_data(block, site)
            if not there:
                found.weights[own] = weight
                found.missing.add(own)
        elif there:
            block = self._where_present(self._likelihood(site, index), site, None)
        else:
            return
        found.blocks.append(Block(block.axes, block.values, weight, site.name, index))

    def _latent(self, site: SiteSpec, prefix: str, index: Index) -> Block:
        """Probabilities of the values of one element, given the parents' and those of the step before."""
        own = (site.name, index)
        parents = [self._element(parent, index) for parent in site.parents]
        if site.kind == "chain_2" and dict(index)["time"] == 0:
            probs = beginning(self.spec, site, prefix)
            return self._where_present(Block((own,), probs / probs.sum()), site, own)
        axes = [*parents, own]
        if site.kind == "chain_2":
            axes = [*parents, (site.name, _shifted(index)), own]
        return self._where_present(Block(tuple(axes), self._probs(site, prefix, index)), site, own)

    def _probs(self, site: SiteSpec, prefix: str, index: Index) -> Tensor:
        read = table(self.spec, site, prefix)
        if site.logits:
            read = read.softmax(-1)
        by_element = self._at(tilt(self.spec, site, prefix), site, index) if site.tilted else torch.ones(())
        if site.kind in ("bernoulli", "binomial_2"):
            yes = (read[..., 1] if site.logits else read) * by_element
            powers = [1 - yes, yes] if site.kind == "bernoulli" else [(1 - yes) ** 2, 2 * yes * (1 - yes), yes**2]
            return torch.stack(powers, -1)
        read = read * by_element
        return read / read.sum(-1, keepdim=True)

    def _likelihood(self, site: SiteSpec, index: Index) -> Block:
        parents = tuple(self._element(parent, index) for parent in site.parents)
        u = self._at(datum(self.spec, site), site, index)
        if site.kind == "normal":
            values = (-0.5 * ((u - means(self.spec, site)) / 0.8) ** 2).exp() / (0.8 * (2 * torch.pi) ** 0.5)
        elif site.kind == "poisson":
            rate = rates(self.spec, site)
            values = (-rate).exp() * rate ** int(u) / prod(range(1, int(u) + 1))
        else:
            values = self._probs(site, "theta", index)[..., int(u)]
        if site.mask == "latent":
            seen = torch.arange(values.shape[0]) != 0
            values = values.where(seen.reshape(-1, *[1] * (values.dim() - 1)), 1.0)
        return Block(parents, values)

    def _where_present(self, block: Block, site: SiteSpec, own: Element | None) -> Block:
        """One where a branch lacks the site; a latent is then at its first value."""
        for name, value in site.when:
            switch = (name, ())
            axes = tuple(dict.fromkeys((*block.axes, switch)))
            there = Block((switch,), torch.arange(SIZES[self.sites[name].kind]) == value).over(axes)
            gone = torch.ones(()) if own is None else Block((own,), _first(SIZES[site.kind])).over(axes)
            block = Block(axes, torch.where(there, block.over(axes), gone))
        return block

    def _at_data(self, block: Block, site: SiteSpec) -> Block:
        """The block of an observed chain at the states that were seen."""
        states, mask = datum(self.spec, site), fixed_mask(self.spec, site)
        for axis in block.axes:
            if axis[0] == site.name and (not site.mask or bool(self._at(mask, site, axis[1]))):
                state = int(self._at(states, site, axis[1]))
                rest = tuple(other for other in block.axes if other != axis)
                block = Block(rest, block.values.select(block.axes.index(axis), state))
        return block

    def _weight(self, site: SiteSpec, index: Index) -> Weight:
        place = dict(index)
        parts: list[tuple[str, float | Tensor]] = [
            (f"subsample of {plate.name}", plate.weight) for plate in self.spec.plates_of(site) if plate.weight != 1
        ]
        scaled = [(name, kind, (name,)) for name, kind in self.spec.scaled if name in site.plates]
        scaled += [(site.name, self.sites[site.name].scale, site.plates)] if self.sites[site.name].scale else []
        for name, kind, plates in scaled:
            scale, word = scale_of(self.spec, name, kind, plates), name
            if kind == "elements":
                own = tuple((plate, place[plate]) for plate in plates)
                word, scale = f"{name} {sorted(own)}", self._at(scale, site, index)
            parts.append((word, scale))
        return Weight(tuple(parts))

    def _indices(self, site: SiteSpec) -> list[Index]:
        plates = self.spec.plates_of(site)
        return [
            tuple((plate.name, i) for plate, i in zip(plates, place, strict=True))
            for place in product(*(range(plate.length) for plate in plates))
        ]

    def _element(self, parent: str, index: Index) -> Element:
        inside = self.sites[parent].plates
        return parent, tuple((plate, i) for plate, i in index if plate in inside)

    def _at(self, values: float | Tensor, site: SiteSpec, index: Index) -> Tensor:
        """What a tensor over (some of) a site's batch dims holds for one element."""
        values, place = torch.as_tensor(values), dict(index)
        batch = self.spec.batch_shape(site.plates)
        extra = values.shape[len(batch) :] if values.dim() > len(batch) else ()
        for plate in self.spec.plates_of(site):
            dim = values.dim() - len(extra) + plate.dim
            if dim >= 0:
                values = values.narrow(dim, place[plate.name] if values.shape[dim] > 1 else 0, 1)
        return values.reshape(extra)


def _first(size: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(0), size).to(torch.get_default_dtype())


def _shifted(index: Index) -> Index:
    return tuple((plate, i - 1 if plate == "time" else i) for plate, i in index)


# Sums


def summed(blocks: Sequence[Block], order: Iterable[Element], weights: dict[Element, Weight]) -> list[Block]:
    """The blocks that are left when elements have been summed out, one after the other."""
    left = list(blocks)
    for element in order:
        own = [block for block in left if element in block.axes]
        joint = multiplied(own, weights[element])
        axis = joint.axes.index(element)
        rest = tuple(other for other in joint.axes if other != element)
        left = [block for block in left if element not in block.axes]
        left.append(Block(rest, joint.values.sum(axis), joint.weight))
    return left


def log_total(blocks: Iterable[Block]) -> Tensor:
    """The log of what is left when everything has been summed out."""
    return sum((block.weight.value * _log(block.values) for block in blocks), torch.zeros(()))


def orders(spec: ProgramSpec, table: Table, elements: Iterable[Element]) -> list[list[Element]]:
    """The orders of summation that come into question: inside plates first, and one order where all weights agree."""
    plates = {site.name: frozenset(site.plates) for site in spec.model}
    groups: dict[tuple[frozenset[str], frozenset[str]], list[Element]] = {}
    for element in elements:
        words = frozenset(word.split()[0] if "[" in word else word for word in table.weights[element].key)
        groups.setdefault((plates[element[0]], words), []).append(element)
    inner_first = sorted(groups, key=lambda key: -len(key[0]))
    keys = {table.weights[element].key for own in groups.values() for element in own}
    if len(keys | {block.weight.key for block in table.blocks}) <= 1:
        return [[element for key in inner_first for element in groups[key]]]
    if len(groups) > 5:
        candidates = [tuple(random.Random(n).sample(inner_first, len(groups))) for n in range(120)]
        candidates = [tuple(sorted(c, key=lambda key: -len(key[0]))) for c in candidates]
    else:
        candidates = list(permutations(inner_first))
    good = [c for c in dict.fromkeys(candidates) if _is_inside_out([plates for plates, _ in c])]
    found = []
    for candidate in islice(good, MAX_ORDERS):
        for direction in (1, -1):
            found.append([element for key in candidate for element in groups[key][::direction]])
    return found


def _is_inside_out(plates: Sequence[frozenset[str]]) -> bool:
    return not any(one < other for n, one in enumerate(plates) for other in plates[n + 1 :])


def posterior_of(blocks: Sequence[Block], order: Sequence[Element], weights: dict[Element, Weight]) -> Block:
    """The probabilities of all elements together: the best Q, built from what each sum was over."""
    left, result = list(blocks), Block((), torch.ones(()))
    for element in order:
        joint = multiplied([block for block in left if element in block.axes], weights[element])
        total = joint.values.sum(joint.axes.index(element), keepdim=True)
        result = multiplied([result, Block(joint.axes, torch.where(total > 0, joint.values / total, 0.0))], Weight())
        left = summed(left, [element], weights)
    return result


def marginal(block: Block, elements: Sequence[Element]) -> Tensor:
    """The sum over all other axes."""
    axes = tuple(elements) + tuple(axis for axis in block.axes if axis not in elements)
    values = block.over(axes)
    return values.sum(tuple(range(len(elements), len(axes)))) if len(axes) > len(elements) else values
