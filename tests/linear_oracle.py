"""Every answer that the linear-domain table has for a seeded program, and where there is none."""

from functools import cached_property

import torch
from linear_tables import (
    Block,
    Element,
    Table,
    Tables,
    Weight,
    log_total,
    marginal,
    multiplied,
    orders,
    posterior_of,
    summed,
    varies,
)
from seeded_programs import SIZES, ProgramSpec, SiteSpec
from torch import Tensor

RELATIVE = 1e-8
"""To which an answer has to be right."""

ROUNDING = 1e-11
"""To which sums in different orders agree where there is one answer."""


class Expected:
    """What the table says of a program: numbers, or that there is none."""

    def __init__(self, spec: ProgramSpec) -> None:
        self.spec = spec
        tables = Tables(spec)
        self.guide = tables.of_guide()
        self.model = tables.of_model(site.name for site in spec.guide)
        self.alone = tables.of_model()
        self.guided = [element for element in self.model.weights if element in self.guide.weights]
        self.hidden = [element for element in self.model.weights if element not in self.guide.weights]

    @cached_property
    def q(self) -> Block:
        """Q(v), over all elements of the guide."""
        return multiplied([Block(block.axes, block.values) for block in self.guide.blocks], Weight())

    @cached_property
    def log_joint(self) -> list[Block]:
        """The factors of P(v, u), with what only the model has summed out."""
        return summed(self.model.blocks, orders(self.spec, self.model, self.hidden)[0], self.model.weights)

    @cached_property
    def log_prior(self) -> list[Block]:
        """The factors of P(v)."""
        observed = {site.name for site in self.spec.model if site.observed}
        blocks = [block for block in self.model.blocks if block.site not in observed]
        hidden = [element for element in self.hidden if element not in self.model.missing]
        return summed(blocks, orders(self.spec, self.model, hidden)[0], self.model.weights)

    def expectation(self, blocks: list[Block]) -> Tensor:
        """The expectation of a log-probability under Q."""
        total = torch.zeros(())
        for block in blocks:
            q, values = self.q.over(self.q.axes), block.over(self.q.axes)
            q, values = torch.broadcast_tensors(q, values)
            if bool(((q > 0) & (values <= 0)).any()):
                return torch.tensor(-torch.inf)
            logs = values.where(q > 0, 1.0).log()
            total = total + block.weight.value * (q * logs).sum()
        return total

    @cached_property
    def terms(self) -> dict[str, Tensor]:
        """The seven terms."""
        joint, prior, q = (self.expectation(b) for b in (self.log_joint, self.log_prior, self.guide.blocks))
        free_energy, surprise, complexity = q - joint, -self.evidences(self.model)[0], q - prior
        return {
            "energy": -joint,
            "entropy": -q,
            "free_energy": free_energy,
            "surprise": surprise,
            "gap": free_energy - surprise,
            "complexity": complexity,
            "accuracy": complexity - free_energy,
        }

    def evidences(self, table: Table) -> list[Tensor]:
        """log P(u), by each order of summation."""
        found = orders(self.spec, table, table.weights)
        return [log_total(summed(table.blocks, order, table.weights)) for order in found]

    @cached_property
    def no_free_energy(self) -> str:
        """Why F must be refused; empty where it may not be."""
        if self.model.read_where_absent:
            return "a latent is read where it is masked out"
        if self._above_a_subsample(self.model, self.hidden):
            return "a latent is summed out of the model above a subsample"
        ways = orders(self.spec, self.model, self.hidden)
        given = orders(self.spec, self.model, self.guided)
        if len(ways) > 1 and not _agree([self._spread(way) for way in ways]):
            return "the sums over the model's own latents depend on their order"
        first = [log_total(summed(self.model.blocks, [*ways[0], *after], self.model.weights)) for after in given]
        every = self.evidences(self.model)
        if not any(_agree([one, other]) for one in first for other in every):
            return "F bounds no surprise"
        return ""

    @cached_property
    def no_surprise(self) -> str:
        """Why surprise and gap must be refused or marked beside an F that is defined."""
        return self._no_evidence(self.model)

    @cached_property
    def no_posterior(self) -> str:
        """Why the posterior must be refused."""
        return self._no_evidence(self.alone)

    def _no_evidence(self, table: Table) -> str:
        if table.read_where_absent:
            return "a latent is read where it is masked out"
        if self._above_a_subsample(table, list(table.weights)):
            return "a latent is summed above a subsample"
        return "" if _agree(self.evidences(table)) else "the sums depend on their order"

    def _spread(self, way: list[Element]) -> Tensor:
        """A number that tells apart tables of log P(v, u)."""
        left = multiplied(summed(self.model.blocks, way, self.model.weights), Weight())
        return _finite_log(left.values.detach()).sum()

    def _above_a_subsample(self, table: Table, elements: list[Element]) -> bool:
        """Whether what lies in a subsample depends on an element outside of it, when what is inside has been summed."""
        inside = {site.name: site.plates for site in self.spec.model}
        for plate in (plate.name for plate in self.spec.plates if plate.weight != 1):
            blocks = [block for block in table.blocks if plate in inside[block.site]]
            own = [element for element in elements if plate in inside[element[0]]]
            (order, *_) = orders(self.spec, table, own)
            for block in summed(blocks, order, table.weights):
                if any(axis in elements and varies(block, axis) for axis in block.axes):
                    return True
        return False

    @cached_property
    def posterior(self) -> Block:
        """P(v | u) of all elements."""
        order = orders(self.spec, self.alone, self.alone.weights)[0]
        return posterior_of(self.alone.blocks, order, self.alone.weights)

    def marginal(self, joint: Block, site: SiteSpec) -> Tensor:
        """A latent's probabilities, `(*plates by name, K)`; they sum to the probability that a branch has it."""
        elements = [element for element in self.model.weights if element[0] == site.name]
        switches = [(name, ()) for name, _ in site.when]
        rows = []
        for element in elements:
            values = marginal(joint, [*switches, element])
            for _, value in site.when:
                values = values[value]
            rows.append(values)
        plates = self.spec.plates_of(site)
        shape = [plate.length for plate in plates]
        by_name = sorted(range(len(plates)), key=lambda n: plates[n].name)
        return torch.stack(rows).reshape(*shape, SIZES[site.kind]).permute([*by_name, len(plates)]).detach()

    def element_terms(self, plate: str, index: int) -> dict[str, Tensor]:
        """The terms of what lies at one index of a plate that is around every site."""
        part = Expected(self.spec)
        for table in (part.guide, part.model):
            table.blocks = [block for block in table.blocks if (plate, index) in block.index]
            table.weights = {e: weight for e, weight in table.weights.items() if (plate, index) in e[1]}
        part.guided = [element for element in part.guided if (plate, index) in element[1]]
        part.hidden = [element for element in part.hidden if (plate, index) in element[1]]
        return part.terms


def _finite_log(values: Tensor) -> Tensor:
    return torch.where(values > 0, values.clamp(min=1e-300).log(), -7.0)


def _agree(numbers: list[Tensor]) -> bool:
    return all(close(number, numbers[0], ROUNDING) for number in numbers[1:])


def close(found: Tensor, expected: Tensor, relative: float = RELATIVE) -> bool:
    """Whether numbers are equal to rounding, infinite ones included."""
    found = torch.as_tensor(found).detach().to(expected.dtype)
    if found.shape != expected.shape:
        return False
    same = found == expected
    near = (found - expected).abs() <= relative * expected.abs().where(expected.isfinite(), 0.0).clamp(min=1.0)
    return bool((same | near).all())
