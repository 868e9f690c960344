"""The two programs that a user gives: both can be called, and None stands for a guide without sites."""

from pyro_vfe.errors import VFEError
from pyro_vfe.program.layout import Program, no_guide


def given_guide(model: object, guide: Program | None) -> Program:
    """Returns the guide; one without sites for None.

    Args:
        model: The generative model.
        guide: What a user gave as the guide.

    Raises:
        VFEError: One of them cannot be called: data in its place, say.
    """
    for name, program in (("model", model), ("guide", guide)):
        if not callable(program) and (name == "model" or program is not None):
            raise VFEError(
                f"The {name} is a {type(program).__name__}, which cannot be called.",
                hint="The programs come first, the model and then the guide, and the data after them. "
                "vfe.AutoMeanField(model) makes a guide; None stands for one without sites, which leaves all discrete "
                "latents to be summed out.",
            )
    return no_guide if guide is None else guide
