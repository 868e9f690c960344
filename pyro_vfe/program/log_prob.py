"""Log-probabilities that are exact at zero, and no larger than what varies.

    log_prob(fn, value)[impossible]  =  -inf        torch clamps probs=[1, 0] to [1 - eps, eps] instead

Where a distribution was given probabilities they are read as they are. Axes along which a plate has merely repeated the
parameters are dropped before anything is computed: Categorical(table[z]) in a plate of a million is a small table.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, constraints

from pyro_vfe.program.finite import Finite
from pyro_vfe.program.zeros import log_at_zero


def log_prob(fn: Any, value: Tensor, *, own_dims: int = 0) -> Tensor:
    """The log-probability of `value` in nats, exact at zero, with repeated axes dropped.

    Args:
        fn: A distribution of torch or Pyro.
        value: What to score; broadcasts with the batch shape.
        own_dims: How many of the rightmost batch dims are part of the event (used for `to_event`): these stay whole.

    Returns:
        A tensor that broadcasts to the full log-probability.
    """
    value = widened(value)
    kind = type(fn).__name__
    if kind == "ExpandedDistribution":
        return log_prob(fn.base_dist, value, own_dims=own_dims)
    if kind == "MaskedDistribution":
        return _masked(log_prob(fn.base_dist, value, own_dims=own_dims), fn._mask)
    if isinstance(fn, Independent):
        inner = log_prob(fn.base_dist, value, own_dims=own_dims + fn.reinterpreted_batch_ndims)
        return _sum_event(inner, fn, own_dims)
    exact = _EXACT.get(kind)
    if exact is not None and fn._validate_args:
        fn._validate_sample(value)
    if exact is not None:
        return exact(fn, value, own_dims)
    slim_fn = _slim_distribution(fn, own_dims)
    result: Tensor = slim_fn.log_prob(value)
    return result


def is_listed(fn: Any) -> bool:
    """Whether the log-probabilities of all values of `fn` can be had at once, without scoring each of them."""
    fn = _unexpanded(fn)
    return type(fn).__name__ in _LISTED or isinstance(fn, Finite)


def listed(fn: Any) -> Tensor:
    """The log-probabilities of all values of `fn`, shape `(*batch, K)`, with repeated axes dropped.

    Args:
        fn: A distribution for which `is_listed` holds.
    """
    fn = _unexpanded(fn)
    if type(fn).__name__ == "Bernoulli":
        success, failure = _bernoulli_logs(fn, 0)
        return torch.stack([failure, success], -1)
    return _category_table(getattr(fn, "_categorical", fn), 0)


_LISTED = frozenset(["Categorical", "OneHotCategorical", "OneHotCategoricalStraightThrough", "Bernoulli"])


def _unexpanded(fn: Any) -> Any:
    while type(fn).__name__ == "ExpandedDistribution":
        fn = fn.base_dist
    return fn


def exact_log(probs: Tensor) -> Tensor:
    """The log of probabilities; zero gives -inf, with gradient zero (see `zeros` for the other one)."""
    if probs.device.type == "cpu" and bool((probs != 0).all()):
        return probs.log()  # the usual case; elsewhere the question would wait for the device
    return log_at_zero(probs)


_HALF = frozenset([torch.float16, torch.bfloat16])

_NARROW = _HALF | {torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32}


def is_narrow(tensor: Tensor) -> bool:
    """Whether the numbers are of a type that is not computed with: half precision, or integers that overflow."""
    return tensor.dtype in _NARROW


def widened(tensor: Tensor) -> Tensor:
    """The numbers in the default precision, or as 64 bits of an integer; itself where they are no narrow ones."""
    if tensor.dtype not in _NARROW:
        return tensor
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32) if tensor.dtype in _HALF else torch.int64
    return slim(tensor, 0).to(dtype).expand(tensor.shape)


def slim(tensor: Tensor, protected: int) -> Tensor:
    """`tensor` without the repetitions that `expand` made, keeping the rightmost `protected` dims whole."""
    strides, shape = tensor.stride(), tensor.shape
    repeated = [dim for dim in range(tensor.dim() - protected) if strides[dim] == 0 and shape[dim] > 1]
    if not repeated:
        return tensor
    slim_shape = [1 if dim in repeated else size for dim, size in enumerate(shape)]
    # What was expanded is often at hand; the gradient of narrowing would fill all the repetitions with zeros.
    base = tensor._base
    if (
        base is not None
        and base.numel() == math.prod(slim_shape)
        and base.is_contiguous()
        and base.data_ptr() == tensor.data_ptr()
        and _keeps_order(strides, slim_shape)
    ):
        return base.reshape(slim_shape)
    for dim in repeated:
        tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _keeps_order(strides: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether dims of these strides lie in memory as a contiguous tensor's would."""
    expected = 1
    for stride, size in zip(reversed(strides), reversed(shape), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _masked(values: Tensor, mask: Tensor | bool) -> Tensor:
    if mask is True:
        return values
    return torch.where(torch.as_tensor(mask, device=values.device), values, values.new_zeros(()))


def _sum_event(values: Tensor, fn: Independent, own_dims: int) -> Tensor:
    """Sums the reinterpreted dims, which lie left of the `own_dims` dims that outer events keep."""
    count = fn.reinterpreted_batch_ndims
    if count == 0:
        return values
    batch_shape = fn.base_dist.batch_shape
    stop = len(batch_shape) - own_dims
    shape = batch_shape[stop - count : stop]
    dims = tuple(range(-own_dims - count, -own_dims))
    padded = values.reshape((1,) * (own_dims + count - values.dim()) + tuple(values.shape))
    repeats = [size if padded.shape[dim] == 1 else 1 for size, dim in zip(shape, dims, strict=True)]
    total = padded.sum(dims)
    for repeat in repeats:
        if repeat != 1:
            total = total * repeat
    return total


def _category_table(fn: Any, own_dims: int) -> Tensor:
    """Log-probabilities of a Categorical, shape `(*batch, K)`, with exact zeros."""
    if given_as(fn) == "probs":
        return exact_log(slim(fn.probs, own_dims + 1))
    return slim(fn.logits, own_dims + 1)


def given_as(fn: Any) -> str:
    """Whether a distribution was given "probs" or "logits": torch derives the one from the other after clamping.

    Args:
        fn: A Categorical, or a distribution with one probability of success.
    """
    known = fn.__dict__
    if "logits" not in known or "probs" not in known:
        return "probs" if "probs" in known else "logits"
    if getattr(fn, "_param", None) is known["probs"]:
        return "probs"
    # Where both are cached `expand` says logits, whichever was given; probabilities that were clamped show it.
    probs, logits = slim(known["probs"].detach(), 0), slim(known["logits"].detach(), 0)
    epsilon = torch.finfo(probs.dtype).eps
    end = math.log(epsilon) - 1e-3
    clamped = (probs < epsilon) & (logits > end)
    if type(fn).__name__ != "Categorical":
        clamped = clamped | ((probs > 1 - epsilon) & (logits < -end))
    return "probs" if bool(clamped.any()) else "logits"


def _bernoulli_logs(fn: Any, own_dims: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of 1 and of 0, each of the batch shape."""
    if given_as(fn) == "probs":
        probs = slim(fn.probs, own_dims)
        return exact_log(probs), exact_log(1 - probs)
    logits = slim(fn.logits, own_dims)
    return torch.nn.functional.logsigmoid(logits), torch.nn.functional.logsigmoid(-logits)


def _exact_categorical(fn: Any, value: Tensor, own_dims: int) -> Tensor:
    return looked_up(_category_table(fn, own_dims), value.long())


def looked_up(table: Tensor, index: Tensor) -> Tensor:
    """The entries `table[..., index]`, where the batch dims of table `(*batch, K)` and of index broadcast.

    Where no batch dim is in both (data along plates, tables along latents) rows are selected from the table as it is:
    a gather would first repeat it for every datum, and its gradient would fill all repetitions.
    """
    depth = max(table.dim() - 1, index.dim())
    rows = table.reshape((1,) * (depth + 1 - table.dim()) + tuple(table.shape))
    index = index.reshape((1,) * (depth - index.dim()) + tuple(index.shape))
    sizes = rows.shape[:-1]
    if any(a > 1 and b > 1 for a, b in zip(sizes, index.shape, strict=True)):
        index, rows = torch.broadcast_tensors(index.unsqueeze(-1), rows)
        return rows.gather(-1, index[..., :1]).squeeze(-1)
    by_value = rows.movedim(-1, 0)
    if index.numel() > len(by_value):
        by_value = by_value.contiguous()  # rows that lie together are selected ten times faster
    selected = by_value.index_select(0, index.flatten())
    paired = selected.reshape((*index.shape, *sizes)).permute([d + k * depth for d in range(depth) for k in (0, 1)])
    return paired.reshape([a * b for a, b in zip(index.shape, sizes, strict=True)])


def _exact_one_hot(fn: Any, value: Tensor, own_dims: int) -> Tensor:
    return _exact_categorical(fn._categorical, value.argmax(-1), own_dims)


def _exact_bernoulli(fn: Any, value: Tensor, own_dims: int) -> Tensor:
    if given_as(fn) == "logits":
        logits = slim(fn.logits, own_dims)
        # A product with 1 or -1 is exact, at infinite logits too, and has a cheaper gradient than a selection.
        return torch.nn.functional.logsigmoid(logits * (2 * (value == 1).to(logits.dtype) - 1))
    success, failure = _bernoulli_logs(fn, own_dims)
    return torch.where(value == 1, success, failure)


def _exact_binomial(fn: Any, value: Tensor, own_dims: int) -> Tensor:
    if given_as(fn) == "logits":
        result: Tensor = fn.log_prob(value)
        return result
    probs, count = slim(fn.probs, own_dims), slim(fn.total_count, own_dims)
    choose = torch.lgamma(count + 1) - torch.lgamma(value + 1) - torch.lgamma(count - value + 1)
    return choose + _times_log(value, exact_log(probs)) + _times_log(count - value, exact_log(1 - probs))


def _exact_normal(fn: Any, value: Tensor, own_dims: int) -> Tensor:
    # Of a scale of 1e-25 the square is zero in single precision, and (x - loc)^2 / scale^2 no number at x = loc.
    scale = slim(fn.scale, own_dims)
    z = (value - slim(fn.loc, own_dims)) / (scale * math.sqrt(2))
    return torch.addcmul(-scale.log() - _LOG_2PI / 2, z, z, value=-1)  # three passes over the data


def _exact_log_normal(fn: Any, value: Tensor, own_dims: int) -> Tensor:
    log = value.log()
    return _exact_normal(fn, log, own_dims) - log


def _exact_half_normal(fn: Any, value: Tensor, own_dims: int) -> Tensor:
    log_density = _exact_normal(fn.base_dist, value, own_dims) + math.log(2)
    return log_density.where(value >= 0, -torch.inf)


def _exact_cauchy(fn: Any, value: Tensor, own_dims: int) -> Tensor:
    scale = slim(fn.scale, own_dims)
    return -_log1p_square((value - slim(fn.loc, own_dims)) / scale) - scale.log() - math.log(math.pi)


def _exact_half_cauchy(fn: Any, value: Tensor, own_dims: int) -> Tensor:
    log_density = _exact_cauchy(fn.base_dist, value, own_dims) + math.log(2)
    return log_density.where(value >= 0, -torch.inf)


def _exact_student_t(fn: Any, value: Tensor, own_dims: int) -> Tensor:
    df, scale = slim(fn.df, own_dims), slim(fn.scale, own_dims)
    t = (value - slim(fn.loc, own_dims)) / (scale * df.sqrt())
    log_constant = torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2) - (math.pi * df).log() / 2
    return log_constant - scale.log() - (df + 1) / 2 * _log1p_square(t)


def _exact_von_mises(fn: Any, value: Tensor, own_dims: int) -> Tensor:
    # kappa cos(x) - log I_0(kappa) without the kappa in both terms.
    kappa, half = slim(fn.concentration, own_dims), (value - slim(fn.loc, own_dims)) / 2
    return -2 * kappa * half.sin() ** 2 - torch.special.i0e(kappa).log() - _LOG_2PI


def _exact_inverse_gamma(fn: Any, value: Tensor, own_dims: int) -> Tensor:
    a, rate = slim(fn.concentration, own_dims), slim(fn.rate, own_dims)
    return a * rate.log() - torch.lgamma(a) - (a + 1) * value.log() - rate / value


def _log1p_square(t: Tensor) -> Tensor:
    """log(1 + t^2), of a t too whose square is too large a number."""
    far = t.abs() > _FAR
    near = t.where(~far, 0.0)
    return torch.where(far, 2 * t.abs().where(far, 1.0).log(), (near * near).log1p())


_LOG_2PI = math.log(2 * math.pi)

_FAR = 1e9
"""To t^2 so large 1 adds nothing in any precision."""


def _times_log(count: Tensor, log: Tensor) -> Tensor:
    """count * log with 0 * -inf = 0, in value and gradient."""
    absent = count == 0
    return torch.where(absent, 0.0, count * torch.where(absent, 0.0, log))


_EXACT = {
    "Categorical": _exact_categorical,
    "OneHotCategorical": _exact_one_hot,
    "OneHotCategoricalStraightThrough": _exact_one_hot,
    "Bernoulli": _exact_bernoulli,
    "Binomial": _exact_binomial,
    "Normal": _exact_normal,
    "LogNormal": _exact_log_normal,
    "HalfNormal": _exact_half_normal,
    "Cauchy": _exact_cauchy,
    "HalfCauchy": _exact_half_cauchy,
    "StudentT": _exact_student_t,
    "VonMises": _exact_von_mises,
    "InverseGamma": _exact_inverse_gamma,
}


def _common_shape(shapes: Sequence[torch.Size]) -> torch.Size:
    """What shapes that are known to broadcast become together; torch's own takes as long as the log-probability."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    return torch.Size([next((size for size in sizes if size != 1), 1) for sizes in zip(*padded, strict=True)])


def _slim_distribution(fn: Any, own_dims: int) -> Any:
    """A copy of `fn` whose parameters lack the repetitions of plates; `fn` itself where that may not be safe."""
    family: Any = type(fn)
    event_dims = event_dims_of(family)
    if event_dims is None:
        return fn
    slimmed, shapes, changed = {}, [], False
    for name, part in fn.__dict__.items():
        if isinstance(part, Tensor):
            event_dim = event_dims.get(name)
            if event_dim is None:
                return fn
            slimmed[name] = thin = slim(part, own_dims + event_dim)
            shapes.append(thin.shape[: thin.dim() - event_dim])
            changed = changed or thin is not part
        elif isinstance(part, Distribution):
            return fn
    if not changed:
        return fn
    result = object.__new__(type(fn))
    result.__dict__.update(fn.__dict__)
    result.__dict__.update(slimmed)
    result._batch_shape = _common_shape(shapes)
    return result


@lru_cache(maxsize=1024)
def event_dims_of(family: Any) -> dict[str, int | None] | None:
    """How many dims of each parameter are the event's; None for one, or for a family, where that is not known."""
    arguments = getattr(family, "arg_constraints", None)
    if not isinstance(arguments, dict):
        return None
    return {
        name: None if constraints.is_dependent(constraint) else constraint.event_dim
        for name, constraint in arguments.items()
    }
