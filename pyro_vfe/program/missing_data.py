"""Missing data that are coded as NaN and that no mask hides: which mask does, in the shape that it has to have."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pyro_vfe.errors import SupportError
from pyro_vfe.program.arrays import is_from_array
from pyro_vfe.program.chain_gaps import OBSERVED
from pyro_vfe.program.log_prob import log_prob
from pyro_vfe.program.masking import unmasked, without_gaps
from pyro_vfe.program.recorder import Site


def check_data(site: Site) -> None:
    """Checks that the data of a site in an ordinary run are numbers where no mask hides them.

    Args:
        site: A site as it ran with sampled values.

    Raises:
        SupportError: Some are NaN, and its distribution does not know what to do with them.
    """
    found = shown_gaps([site])
    if found is None:
        return
    try:
        with torch.no_grad():
            is_scored = not bool(log_prob(unmasked(site)[0], site.value).isnan().any())
    except ValueError:
        is_scored = False
    if not is_scored:
        raise SupportError(found[0], hint=found[1])


def shown_gaps(sites: Iterable[Site]) -> tuple[str, str] | None:
    """Returns the fact and the way out for the first observed site whose data are NaN under no mask, if there is one.

    Args:
        sites: Sites as they ran.
    """
    for site in sites:
        value: Any = site.value
        if site.kind == "observed" and value.is_floating_point() and bool(value.isnan().any()):
            gaps = int(without_gaps(site).isnan().sum())
            if gaps:
                of = f", {gaps} of {value.numel()} numbers" if value.numel() > 1 else ""
                fact = f"Site '{site.name}' of the {site.role} observes NaN{of}."
                return fact, _way_out(site, value)
    return None


def way_out_of_nan(sites: Iterable[Site]) -> str:
    """Returns what to do where log-probabilities are NaN: hide missing data, or look at the parameters.

    Args:
        sites: Sites as they ran.
    """
    gaps = shown_gaps(sites)
    otherwise = "Look for a parameter that is NaN, or at the end of its range or outside of it."
    return otherwise if gaps is None else " ".join(gaps)


def _way_out(site: Site, value: Tensor) -> str:
    gaps = "torch.tensor(np.isnan(np.asarray(u, dtype=float)))" if is_from_array(value) else "u.isnan()"
    event_dim, has_mask = len(site.fn.event_shape), site.name.endswith(OBSERVED)
    events = f"{gaps}.flatten({-event_dim})" if event_dim > 1 else gaps
    line = f"{'mask & ' if has_mask else ''}~{events}{'.any(-1)' if event_dim else ''}"
    return (
        f"Where that is a missing datum, hide it: write `obs_mask={line}` beside its obs=, u being the data"
        + (" and mask the mask that it has" if has_mask else "")
        + ("; an event of which one number is missing is hidden as a whole." if event_dim else ".")
    )
