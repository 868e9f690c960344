r"""States that are never used, a Q with one value for everything, a Q that does not look at the data.

    used[k]          =  sum_n weight_n Q(v_n = k)                       of N = sum_n weight_n elements
    information(Q)   =  mean_n KL( Q(v_n) || mean_m Q(v_m) )            what Q's elements differ in, nats
    told             =  mean_n KL( P(v_n | u) || P(v_n) )               what the data tell of an element, nats

References:
    Wang, Blei and Cunningham (2021), Posterior collapse and latent variable non-identifiability.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_vfe.learning.alike import WORTH, Alike, verdict, worth_saying
from pyro_vfe.program.enumeration import Enumeration
from pyro_vfe.reporting.diagnose_notebook import Notebook, nats, percent
from pyro_vfe.reporting.diagnose_views import View

_ELEMENTS_PER_STATE = 5
"""With fewer elements than this for each state, a state may be unused by chance."""
_CERTAIN = 0.1
"""An element that is so sure of its value, in nats of entropy, is sure."""
_FEW = 4
"""With fewer elements than this, that all agree says nothing."""
_TELLING = 0.05
"""What the elements of the posterior must at least differ in, mean nats, for a Q to be said to ignore it."""
_IGNORED = 0.02
"""Q ignores its input if its elements differ by less than this share of what the posterior's do."""
_ALIKE = 1e-6
"""The data tell nothing if they tell less than this, mean nats per element."""
_SPREAD = 5.0
"""How many times as many elements as Q the posterior must have elsewhere, for Q to be said to have collapsed."""
_EXPECTED = 5.0
"""A state that the model expects so often, and that never comes, is no rare one."""
_MOST_NAMED = 8


def look_at_latent(view: View, share: float | None, notebook: Notebook) -> None:
    """Writes down what is wrong with Q of one latent, or with the latent itself.

    Args:
        view: The latent.
        share: Its share of the gap, nats; None where it is not known.
        notebook: Where to write.
    """
    if not view.is_many or len(view.weights) < _FEW or not view.count > 0:
        return
    if view.q is not None and (_collapsed(view, view.q, share, notebook) or _ignores(view, view.q, share, notebook)):
        return
    if _unused(view, share, notebook):
        return
    _alike(view, notebook)


def _collapsed(view: View, q: Tensor, share: float | None, notebook: Notebook) -> bool:
    """Whether Q has one value for all elements and the posterior has not."""
    used, exact = view.used(q) / view.count, view.used(view.posterior) / view.count
    top = int(used.argmax())
    elsewhere = 1 - notebook.thresholds.collapsed
    if not (used[top] >= 1 - elsewhere and exact[top] < 1 - _SPREAD * elsewhere):
        return False
    notebook.find(
        "guide-collapsed",
        view.site,
        float(used[top]),
        f"Q has {percent(float(used[top]))} of the {_elements(view)} at value {view.values[top]} of {_named(view)}; "
        f"under the exact posterior it is {percent(float(exact[top]))}.{_cost(share)}",
        "Start the guide elsewhere (vfe.AutoMeanField(model, init='posterior'), or other seeds of a network), lower "
        f"the learning rate, or leave {_named(view)} out of the guide: it is then summed out exactly.",
        share or 0.0,
        (top,),
    )
    return True


def _ignores(view: View, q: Tensor, share: float | None, notebook: Notebook) -> bool:
    """Whether Q is the same for all elements and the posterior is not."""
    own, exact = _information(view, q), _information(view, view.posterior)
    if not (exact >= _TELLING and own <= _IGNORED * exact):
        return False
    notebook.find(
        "guide-ignores-data",
        view.site,
        own,
        f"Q of {_named(view)} is the same for all {_elements(view)}: they differ by {nats(own)} on average, where the "
        f"elements of the exact posterior differ by {nats(exact)}.{_cost(share)}",
        "Let the guide read the data: probabilities for each element, or a network of the data whose output reaches "
        "the site. A guide that has not been trained yet looks like this too.",
        share or 0.0,
    )
    return True


def _unused(view: View, share: float | None, notebook: Notebook) -> bool:
    """Whether some state has next to no element."""
    states = len(view.values)
    fair = view.count / states
    if not view.has_labels or states < 2 or fair < _ELEMENTS_PER_STATE:
        return False
    limit = notebook.thresholds.unused * fair
    exact = view.used(view.posterior)
    used = exact if view.q is None else view.used(view.q)
    is_unused = used < limit
    if view.prior is not None:
        # In between are states that are rare by design: outliers, say, of which these data have none.
        before = view.used(view.prior)
        is_unused &= (before < limit) | (before >= _EXPECTED) | (exact >= limit)
    unused = [int(k) for k in is_unused.nonzero()]
    if not unused:
        return False
    missed, expected = float(exact[unused].sum()), float(used[unused].sum())
    of_q = missed >= len(unused) * limit
    names = [view.values[k] for k in unused]
    what = ("State " if len(names) == 1 else "States ") + _listed(names) + f" of {_named(view)}"
    notebook.find(
        "unused-state",
        view.site,
        expected,
        f"{what}: {_about(expected)} of the {_elements(view)} expected there under Q"
        + (f", {_about(missed)} under the exact posterior.{_cost(share)}" if of_q else "."),
        "Q gives up states that the posterior uses: start the guide elsewhere, or give it more freedom."
        if of_q
        else f"{states - len(names)} of {states} states do the work. Take fewer, or start the others where data are "
        "(vfe.EM(...).run(n_init=10), other seeds), or put a prior on the weights.",
        (share or 0.0) if of_q else 0.0,
        tuple(unused),
    )
    return True


def _alike(view: View, notebook: Notebook) -> None:
    """Whether the data say nothing of a latent that is undecided."""
    if not notebook.alike.isdisjoint(view.members):
        return
    if view.prior is None or view.count < _ELEMENTS_PER_STATE * len(view.values):
        return
    told = float(view.weights @ _divergence(view.posterior, view.prior)) / view.count
    open_nats = float(view.weights @ torch.special.entr(view.posterior).sum(-1)) / view.count
    if not (told <= _ALIKE and open_nats >= _CERTAIN):
        return
    notebook.may_be_a_saddle = True
    notebook.alike |= set(view.members)
    notebook.find(
        "states-alike",
        view.site,
        told,
        f"The posterior of {_named(view)} is its prior for all {_elements(view)}: the data are as probable under "
        "every one of its values.",
        "If its states have parameters that start equal, they stay equal, and F may be at a saddle point: start them "
        "apart, at random (vfe.EM(...).run(n_init=10) does, and tells what it gains). If nothing observed depends on "
        f"{_named(view)}, the model does not need it.",
    )


def look_at_alike(alike: Alike, gain: float | None, run: Enumeration, notebook: Notebook) -> None:
    """Writes down which values of latents were alike at the end of a run of EM, and what that costs.

    Args:
        alike: Which are.
        gain: By how much a random start ended lower, in nats; None where that is not known.
        run: The factors at the end.
        notebook: Where to write.
    """
    cost = gain if gain is not None and gain > WORTH else 0.0
    fact, way_out = verdict(gain)
    for names, of_names in worth_saying(alike, gain, run).items():
        notebook.may_be_a_saddle |= gain is None or cost > 0
        notebook.alike |= set(names)
        notebook.find("states-alike", names[0], 0.0, f"{of_names} {fact}", way_out, cost, alike[names[0]][0])


def _information(view: View, probabilities: Tensor) -> float:
    mean = view.used(probabilities) / view.count
    return float(view.weights @ _divergence(probabilities, mean)) / view.count


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of each row, nats."""
    terms: Tensor = torch.special.xlogy(p, p) - torch.special.xlogy(p, q)
    return terms.sum(-1).clamp(min=0)


def shares_of(view: View, by_site: Mapping[str, float] | None) -> float | None:
    """Returns the share of the gap that the sites of a latent have, nats; None where it is not known.

    Args:
        view: The latent.
        by_site: The shares of all sites of the guide.
    """
    if by_site is None:
        return None
    return sum(by_site.get(name, 0.0) for name in view.members)


def _named(view: View) -> str:
    return f"'{view.site}'"


def _elements(view: View) -> str:
    return f"{view.count:,.6g} elements"


def _about(count: float) -> str:
    return f"{count:.2g}" if count >= 0.01 or count == 0 else "less than 0.01"


def _cost(share: float | None) -> str:
    return "" if share is None else f" It has {nats(share)} of the gap."


def _listed(names: list[str]) -> str:
    if len(names) > _MOST_NAMED:
        return f"{', '.join(names[:_MOST_NAMED])} and {len(names) - _MOST_NAMED} more"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
