"""What a program returns that samples nothing: most often the program, or the distribution, that was meant."""

import inspect
import warnings
from collections.abc import Sized

import torch

from pyro_vfe.errors import VFEError, VFEWarning, callers_level, described


def check_returned(sites: Sized, returned: object, *, is_guide: bool) -> None:
    """Checks that a program without sites does not return what should have been run.

    Args:
        sites: The sites of a run, by name.
        returned: What the program returned.
        is_guide: Whether it is one; otherwise a model.

    Raises:
        VFEError: It returns a program, a distribution or a generator.
    """
    if sites or returned is None or (isinstance(returned, (dict, list, tuple)) and not returned):
        return
    role, what = "guide" if is_guide else "model", described(returned)
    if inspect.isgenerator(returned) or inspect.iscoroutine(returned):
        raise VFEError(
            f"The {role} samples nothing: calling it makes {what}, whose code does not run.",
            hint="Write it without yield and async.",
        )
    if isinstance(returned, torch.distributions.Distribution):
        raise VFEError(
            f"The {role} samples nothing, and returns {what}.",
            hint="Sample from it, under the latent's name: pyro.sample(name, distribution).",
        )
    if callable(returned):
        raise VFEError(
            f"The {role} samples nothing, and returns {what}.",
            hint=f"Make it once, before the call, and pass it as the {role} itself: `{role} = ...`, and not a function "
            "that makes it.",
        )
    warnings.warn(
        f"The {role} samples nothing, and returns {what}. "
        + ("Q is then left to the model, whose latents are summed out: the gap is 0. " if is_guide else "F is then 0. ")
        + "Let it call pyro.sample(name, distribution); one that is meant to sample nothing returns nothing.",
        VFEWarning,
        stacklevel=callers_level(),
    )
