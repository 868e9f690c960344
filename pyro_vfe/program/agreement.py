"""What guide and model, and the branches of both, have to agree on: values, plates, weights, and who exists when."""

from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

from torch import Tensor

from pyro_vfe.engine.factors import Factor, Variable
from pyro_vfe.engine.scales import same_scale
from pyro_vfe.errors import NameClashError, ScaleError, StructureError
from pyro_vfe.program.enumeration import Enumeration, SiteKey
from pyro_vfe.program.escapes import StructureChanged
from pyro_vfe.program.layout import Layout
from pyro_vfe.program.plate_violations import different_plates
from pyro_vfe.program.recorder import Plate, Site
from pyro_vfe.program.supports import check_same_support, is_enumerable, support_size


def check_decided(
    factors: Mapping[SiteKey, Factor], sites: Mapping[SiteKey, Site], supports: Mapping[str, Tensor]
) -> None:
    """Checks that the guide samples what decides whether a latent exists before the latent.

    Args:
        factors: The factors of both programs.
        sites: Their sites.
        supports: The values of each latent.

    Raises:
        StructureError: It does so later, or leaves that to the model.
    """
    known: set[str] = set()
    for (role, name), factor in factors.items():
        if role == "guide" and sites[role, name].kind == "enumerated":
            known.add(name)
            unknown = [axis for axis in factor.table.axes if axis in supports and axis not in known]
            if unknown:
                raise StructureError(
                    f"The guide has latent site '{name}', which the model has for some values of '{unknown[0]}' only, "
                    f"and does not sample '{unknown[0]}' before it.",
                    hint=f"Sample '{unknown[0]}' in the guide before '{name}', or leave '{name}' out of the guide.",
                )


def common_order(paths: Sequence[Mapping[SiteKey, Site]]) -> list[SiteKey]:
    """Returns an order of all sites that agrees with that of every path: a branch may have sites that another lacks.

    Args:
        paths: The sites of each path of choices.

    Raises:
        StructureError: Two paths have two sites in different orders.
    """
    sorter: TopologicalSorter[SiteKey] = TopologicalSorter()
    for sites in paths:
        keys = list(sites)
        for key in keys[:1]:
            sorter.add(key)
        for before, after in pairwise(keys):
            sorter.add(after, before)
    try:
        return list(sorter.static_order())
    except CycleError as error:
        (_, one), (_, other), *_ = error.args[1]
        raise StructureError(
            f"Sites '{one}' and '{other}' come in one order in one branch of the programs and in the other "
            f"order in another.",
            hint="Sample them in the same order in all branches, or give them different names.",
        ) from error


def check_supports(sites: Mapping[SiteKey, Site], supports: Mapping[str, Tensor]) -> None:
    """Checks that guide and model mean the same values.

    Args:
        sites: The sites of both programs.
        supports: The values of each latent.

    Raises:
        SupportError: They do not.
        StructureError: The model observes what the guide samples.
    """
    for (role, name), site in sites.items():
        guide_site = sites.get(("guide", name))
        if role != "model" or guide_site is None or guide_site.kind == "observed":
            continue
        if site.kind == "observed":
            raise StructureError(
                f"Site '{name}' is observed in the model and sampled in the guide.",
                hint="Remove it from the guide, or do not observe it.",
            )
        if site.kind != "enumerated":
            continue
        if not is_enumerable(site.fn) or support_size(site.fn) != len(supports[name]):
            check_same_support(name, site.fn, guide_site.fn)


def check_plate(known: Plate, plate: Plate) -> None:
    """Checks that a plate has one size wherever it is met.

    Args:
        known: As it was met before.
        plate: As it is met now.

    Raises:
        NameClashError: It has two.
    """
    if known.size != plate.size:
        raise NameClashError(
            f"Plate '{plate.name}' has size {known.size} at one site and {plate.size} at another.",
            hint="Give the two plates different names, or the same subsample.",
        )


def check_same(known: Variable, variable: Variable) -> None:
    """Checks that guide and model have a latent in the same plates and with the same weight.

    Args:
        known: As one of them has it.
        variable: As the other has it.

    Raises:
        StructureError: Its plates differ.
        ScaleError: Its weights differ.
    """
    if known.plates != variable.plates:
        raise different_plates(variable.name, known.plates, variable.plates)
    if not same_scale(known.scale, variable.scale):
        raise ScaleError(
            f"Latent site '{variable.name}' has different scales in the guide and in the model: the free energy would "
            "not split into surprise and gap.",
            hint="Put the site under the same poutine.scale and the same subsampling in both programs.",
        )


def check_reads(layout: Layout, enumeration: Enumeration) -> None:
    """Checks that each site reads the latents that it read a moment ago, at the same arguments.

    Args:
        layout: What the sites read then.
        enumeration: What they read now.

    Raises:
        StructureChanged: It reads others, so the program draws its structure at random.
    """
    if layout.sequential or layout.groups:
        return
    latents = enumeration.supports.keys()
    read: dict[tuple[str, str], set[str]] = {}
    for role, name, latent in enumeration.lost:
        read.setdefault((role, name), set()).add(latent)
    for key, factor in enumeration.factors.items():
        known = layout.sites.get(key)
        site = enumeration.sites[key]
        if known is None or site.controls or site.reveals in enumeration.closed:
            continue
        varies, before = latents & set(factor.axes) - {key[1]}, latents & known.scope - {key[1]}
        if not varies <= before <= varies | read.get(key, set()):
            raise StructureChanged(f"site '{key[1]}' read {sorted(before)}, and then {sorted(varies)}")
