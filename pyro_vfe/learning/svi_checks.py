"""What SVI cannot be given, said before anything changes: the fact, and the way out."""

from collections.abc import Iterator, Mapping
from operator import index
from typing import Any, SupportsIndex

import torch
from pyro.infer import ELBO
from pyro.infer.elbo import ELBOModule
from pyro.optim import PyroOptim

from pyro_vfe.errors import VFEError, described
from pyro_vfe.learning.batches import Arguments, check_batches, numbered


def check_optim(optim: object, name: str = "optim") -> None:
    """Checks that Pyro can use an optimiser.

    Args:
        optim: What a user gave.
        name: The argument that it was given as.

    Raises:
        VFEError: It is none of Pyro's.
    """
    if isinstance(optim, PyroOptim):
        return
    if getattr(optim, "__module__", "").startswith("pyro.optim") and callable(optim):
        made = getattr(optim, "__name__", "Adam")
        raise VFEError(
            f"{name}= is {described(optim)}, which makes an optimiser and is none.",
            hint=f'Call it: pyro.optim.{made}({{"lr": 0.01}}).',
        )
    own = optim if isinstance(optim, type) else type(optim)
    if issubclass(own, torch.optim.Optimizer):
        rate = "0.01" if isinstance(optim, type) else f"{getattr(optim, 'defaults', {}).get('lr', 0.01)}"
        raise VFEError(
            f"{name}= is torch's own {own.__name__}; the parameters come into being as the programs run, and Pyro "
            "makes an optimiser for each.",
            hint=f'Pass pyro.optim.{own.__name__}({{"lr": {rate}}}); or keep a loop of your own over '
            "vfe.FreeEnergy()(model, guide), with a vfe.Monitor.",
        )
    raise VFEError(
        f"{name}= is {described(optim)}, which is no optimiser of Pyro's.",
        hint='Pass one such as pyro.optim.Adam({"lr": 0.01}).',
    )


def check_maker(optim: object) -> None:
    """Checks that something is one of Pyro's optimisers, or makes a torch optimiser of a list of tensors.

    Args:
        optim: What a user gave.

    Raises:
        VFEError: It is neither.
    """
    if isinstance(optim, PyroOptim):
        return
    try:
        made = optim([torch.zeros(1, requires_grad=True)]) if callable(optim) else None
    except Exception as error:
        raise VFEError(f"optim= is {described(optim)}, which makes no optimiser: {error}.", hint=_MAKERS) from error
    if not isinstance(made, torch.optim.Optimizer):
        raise VFEError(f"optim= is {described(optim)}, which makes no optimiser.", hint=_MAKERS)


_MAKERS = (
    "Pass one of Pyro's, pyro.optim.Adam({\"lr\": 0.01}), or what makes one of torch's from a list of tensors, "
    "functools.partial(torch.optim.Adam, lr=0.01)."
)


def check_elbo(elbo: object) -> None:
    """Checks that there is a loss to descend.

    Args:
        elbo: What a user gave.

    Raises:
        VFEError: It is no ELBO.
    """
    if not isinstance(elbo, ELBO):
        of_modules = " An ELBOModule has its programs inside; pass them and the ELBO it was made by." * isinstance(
            elbo, ELBOModule
        )
        raise VFEError(
            f"elbo= is {described(elbo)}, which is no ELBO.{of_modules}",
            hint="Leave it out for vfe.FreeEnergy(), or pass an instance, such as pyro.infer.TraceEnum_ELBO().",
        )


def check_num_steps(num_steps: object, who: str = "fit") -> None:
    """Checks that a number of steps is one.

    Args:
        num_steps: What a user gave.
        who: Was given it.

    Raises:
        VFEError: It is not.
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, SupportsIndex) or index(num_steps) < 1:
        raise VFEError(f"{who} was given num_steps={num_steps!r}.", hint="Pass a whole number of steps of at least 1.")


def arguments_of_steps(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], batches: Any, who: str = "fit"
) -> Iterator[Arguments]:
    """Returns an iterator over the arguments of the programs at every step.

    Args:
        args: Positional arguments of all steps.
        kwargs: Keyword arguments of all steps.
        batches: What is iterated over, again and again if it can be; None where all steps have the same arguments.
        who: Was given them.

    Raises:
        VFEError: It is no iterable of batches, or there are arguments beside them.
    """
    if batches is None:
        return _the_same(args, kwargs)
    again = check_batches(batches, 1)
    if args:
        raise VFEError(
            f"{who} was given batches= and {len(args)} positional arguments of the programs.",
            hint="Let the batches hold the arguments: a list, such as u.split(100), or a torch DataLoader. What"
            " all batches share may be passed by keyword.",
        )
    return _cycled(kwargs, batches, again, who)


def _the_same(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Arguments]:
    while True:
        yield args, kwargs


def _cycled(kwargs: Mapping[str, Any], batches: Any, again: bool, who: str) -> Iterator[Arguments]:
    epoch = 0
    while again or not epoch:
        epoch += 1
        for number, (args, own) in numbered(batches, epoch):
            twice = sorted(kwargs.keys() & own.keys())
            if twice:
                raise VFEError(
                    f"Batch {number} has the keyword argument '{twice[0]}', and {who} was given another.",
                    hint="Pass it in one place only.",
                )
            yield args, {**kwargs, **own}
