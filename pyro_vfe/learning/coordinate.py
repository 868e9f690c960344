r"""The E-phase of a mean-field guide in closed form: coordinate descent over the factors of Q.

    log q_i(k)  =  d E_Q[ log P(v, u) ] / d q_i(k)  /  scale_i  +  const

is where F is least in q_i with the other factors held, for F = E_Q log Q - E_Q log P is linear in q_i but for its
entropy. The elements of a site's plate do not meet in any table, and change together; those of a chain meet their
neighbours in time, so its even and its odd steps change in turn.

References:
    Saul, Jaakkola and Jordan (1996), Mean field theory for sigmoid belief networks.
    Ghahramani and Jordan (1997), Factorial hidden Markov models, appendix C (chains under mean field).
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from pyro_vfe.errors import ImpossibleDataError, StructureError, VFEError
from pyro_vfe.guides.mean_field import AutoMeanField
from pyro_vfe.learning.belief import Belief
from pyro_vfe.learning.factored import FactoredQ
from pyro_vfe.learning.guided import guided_belief
from pyro_vfe.learning.pair import Pair
from pyro_vfe.learning.phases import EPhase
from pyro_vfe.program.enumeration import Enumeration
from pyro_vfe.program.layout import Program
from pyro_vfe.program.options import check_fields


@dataclass(frozen=True)
class Coordinate(EPhase):
    """Each factor of an `AutoMeanField` in turn is set to the best one given the others; F never rises.

    References:
        Saul, Jaakkola and Jordan (1996), Mean field theory for sigmoid belief networks.
    """

    num_sweeps: int = 1
    """How often one E-phase goes through all sites."""

    monotone = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_sweeps < 1:
            raise VFEError(f"Coordinate was given num_sweeps={self.num_sweeps}.", hint="Take at least one sweep.")

    def update(self, pair: Pair, iteration: int) -> None:
        """Sets the guide's logits to log q of the best factors, -inf for what is impossible; present rows only.

        Args:
            pair: The programs; the guide is an `AutoMeanField`, or holds some as an `AutoGuideList` does.
            iteration: Not read.

        Raises:
            StructureError: Some latent's factor belongs to another guide, or exists in a branch of the programs only.
            ImpossibleDataError: The other factors leave a latent no possible value; the guide is as it was.
        """
        enumeration = pair.enumerate()
        owners = _owners(pair.guide, enumeration)
        with torch.no_grad():
            q = FactoredQ(enumeration, pair.max_bytes)
            held = {name for name, owner in owners.items() if owner.parameter_name(name) in pair.fixed}
            for _ in range(self.num_sweeps):
                stuck = [name for name in owners if name not in held and not q.improve(name)]
            if stuck:
                raise _impossible(stuck)
            for name in owners.keys() - held:
                owners[name].set_log_probs(name, q.table(name), q.changed(name), enumeration.subsamples)

    def belief(self, enumeration: Enumeration, iteration: int, max_bytes: float | None = None) -> Belief:
        """Q as the guide has it.

        Args:
            enumeration: The factors of both programs after `update`, in float64.
            iteration: Not read.
            max_bytes: The most memory that intermediate tables may take.
        """
        return guided_belief(enumeration, max_bytes)


def _owners(guide: Program, enumeration: Enumeration) -> dict[str, AutoMeanField]:
    """The mean-field guide of each latent that the guide has, in order of sampling."""
    owner_of = {name: owner for owner in mean_fields(inspect.unwrap(guide)) for name in owner.latents}
    is_sampled = enumeration.is_sampled
    owners: dict[str, AutoMeanField] = {}
    for factor in enumeration.guide_latents:
        if factor.name not in owner_of or is_sampled:
            raise StructureError(
                f"Coordinate sets the factors of vfe.AutoMeanField, and latent site '{factor.name}' is of another guide"
                f"{', or stands beside sites that are drawn at random' if is_sampled else ''}.",
                hint="Use e_phase=vfe.Gradient(optim, num_steps), which serves any guide.",
            )
        readers = [axis for axis in factor.axes if axis in enumeration.variables and axis != factor.name]
        if readers:
            raise StructureError(
                f"Latent site '{factor.name}' of the guide exists for some values of '{readers[0]}' only: its best "
                "factor has no closed form here.",
                hint="Use e_phase=vfe.Gradient(optim, num_steps), or sample the site in every branch of the model.",
            )
        owners[factor.name] = owner_of[factor.name]
    if not owners:
        raise StructureError(
            "Coordinate is the E-phase of a mean-field guide, and the guide has no discrete latent.",
            hint="Pass guide=vfe.AutoMeanField(model), or leave the E-phase out: Q is then the exact posterior.",
        )
    return owners


def mean_fields(guide: Program | None) -> Iterator[AutoMeanField]:
    """The mean-field guides that a guide is or holds.

    Args:
        guide: A guide, not watched.
    """
    modules = guide.modules() if isinstance(guide, torch.nn.Module) else ()
    return (module for module in modules if isinstance(module, AutoMeanField))


def _impossible(stuck: Sequence[str]) -> ImpossibleDataError:
    names = ", ".join(f"'{name}'" for name in stuck[:4])
    return ImpossibleDataError(
        f"The other factors of Q leave no possible value to latent site {names}: F is +inf.",
        hint="Leave sites that others determine out of the guide: they are then summed inside the model. Or start with "
        "logits of -inf for what the other factors forbid.",
    )
