r"""Which entries of which parameter a tensor consists of, read off the graph that autograd keeps.

    p  =  J theta,    J a 0/1 matrix with one 1 in each row    =>    p_i  =  theta[index_i],    J a  =  a[index]

J a is pushed forward along the graph for one vector `a` of distinct irregular numbers: p is a selection where each
result is one of those numbers, at whose place in theta the value of p stands. So it does not matter by which operations
a program selects: indexing by a latent or by data, expanding, reshaping, stacking.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from pyro_vfe.program.parameters import unconstrained
from pyro_vfe.program.statistics import Selection, Slot

_RESHAPING = ("Expand", "View", "UnsafeView", "ReshapeAlias", "Alias", "Slice", "Squeeze", "Unsqueeze")
"""Operations that keep the order of a tensor's entries, by the beginning of their nodes' names in the graph."""

_SELECTING = ("Index", "Gather", "Take")
"""Operations that pick entries of a tensor, likewise."""

_GOLDEN = 0.6180339887498949


class Origins:
    """Where the tensors of a run come from: the parameters that it read."""

    def __init__(self, values: Mapping[str, Tensor], known: dict[object, Tensor] | None = None) -> None:
        """Args:
        values: The constrained parameters as the run read them.
        known: For slots that were selections in earlier runs, the index of their entries; new ones are added.
        """
        self._known = {} if known is None else known
        self._values = {name: value for name, value in values.items() if value.requires_grad}
        self._names: dict[Any, str] = {}
        for name, value in self._values.items():
            self._names[get_gradient_edge(unconstrained(name)).node] = name
            self._names[get_gradient_edge(value).node] = name
        self._reached: dict[Any, frozenset[str]] = {}
        self._distinct: dict[tuple[str, int], bool] = {}

    def of(self, *tensors: object) -> frozenset[str]:
        """The parameters that tensors were computed from, by any operations.

        Args:
            *tensors: Tensors; anything else counts as a constant.
        """
        found = frozenset[str]()
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                found |= self._reach(get_gradient_edge(tensor).node)
        return found

    def _reach(self, root: Any) -> frozenset[str]:
        known = self._reached.get(root)
        if known is not None:
            return known
        found: set[str] = set()
        seen, left = {root}, [root]
        while left:
            node = left.pop()
            if node in self._names:
                found.add(self._names[node])
                continue
            for follower, _ in node.next_functions:
                if follower is not None and follower not in seen:
                    seen.add(follower)
                    left.append(follower)
        self._reached[root] = frozenset(found)
        return self._reached[root]

    def slot(self, values: Tensor, key: object, *, normalised: bool = False) -> Slot:
        """What a distribution's parameter is.

        Args:
            values: The parameter as the distribution has it.
            key: What stands for the slot from run to run.
            normalised: Whether the distribution has divided it by its sum over the last axis (or, for logits, taken
                from it the log of that sum): what was given is looked at then.
        """
        depends_on = self.of(values)
        if len(depends_on) != 1:
            return Slot(values.detach(), None, depends_on)
        name = next(iter(depends_on))
        selection = self._known_before(values, name, (key, name), normalised)
        if selection is None:
            selection = self._normalised(values, name) if normalised else None
            selection = selection or self._selection(values, name)
            if selection is not None and selection.through == "itself":
                self._known[key, name] = selection.index
        return Slot(values.detach(), selection, depends_on)

    def _known_before(self, values: Tensor, name: str, key: object, normalised: bool) -> Selection | None:
        """What the slot was in an earlier run, if its numbers say that it still is."""
        index = self._known.get(key)
        if index is None or index.shape != values.shape:
            return None
        parameter = self._values[name].detach().flatten()
        selected = parameter[index]
        same = torch.equal(selected, values)
        if normalised and (same or torch.equal(_normalised_like(selected, values), values)):
            return Selection(name, index) if self._tells_apart(name, values) else None
        return Selection(name, index) if same and self._tells_apart(name) else None

    def _tells_apart(self, name: str, rows_like: Tensor | None = None) -> bool:
        """Whether a number says which entry of a parameter it is, normalised or not: equal entries do not."""
        size = 1 if rows_like is None else rows_like.shape[-1]
        if (name, size) not in self._distinct:
            numbers = self._values[name].detach().flatten()
            distinct = _all_differ(numbers) and len(numbers) % size == 0
            if distinct and rows_like is not None:
                distinct = _all_differ(_normalised_like(numbers.reshape(-1, size), rows_like))
            self._distinct[name, size] = distinct
        return self._distinct[name, size]

    def _normalised(self, values: Tensor, name: str) -> Selection | None:
        given = _before_normalisation(values)
        selection = None if given is None else self._selection(given, name)
        if selection is None or selection.through != "itself":
            return None
        index = selection.index
        if index.numel() == values.numel():
            return Selection(name, index.reshape(values.shape))
        try:
            return Selection(name, index.expand(values.shape))
        except RuntimeError:
            return None

    def _selection(self, values: Tensor, name: str) -> Selection | None:
        parameter = self._values[name]
        tangent = _irregular(parameter)
        try:
            pushed = _pushed_forward(values, parameter, tangent)
        except RuntimeError:  # an operation without a second derivative, or a parameter reached around its constraint
            return None
        flat, numbers = parameter.detach().flatten(), tangent.flatten()
        index = _places(pushed, numbers)
        if index is not None and torch.equal(flat[index], values.detach()):
            return Selection(name, index)
        if not _is_root(values):
            return None
        index = _places(2 * values.detach() * pushed, numbers)
        if index is not None and torch.equal(flat[index].sqrt(), values.detach()):
            return Selection(name, index, "sqrt")
        return None


def _all_differ(numbers: Tensor) -> bool:
    """Whether no two numbers are equal."""
    ordered = numbers.flatten().sort().values
    return not bool((ordered[1:] == ordered[:-1]).any())


def _normalised_like(given: Tensor, values: Tensor) -> Tensor:
    """Probabilities, or logits where the values are negative, as distributions normalise them."""
    if bool((values.detach() < 0).any()):
        return given - given.logsumexp(-1, keepdim=True)
    return given / given.sum(-1, keepdim=True)


def _irregular(parameter: Tensor) -> Tensor:
    """Numbers between 1 and 2, 2 and 3, ... of which no average and no sum of a few is another."""
    count = torch.arange(1, parameter.numel() + 1, dtype=torch.float64, device=parameter.device)
    return (count + 0.4 * (count * _GOLDEN).frac()).to(parameter.dtype).reshape(parameter.shape)


def _places(pushed: Tensor, numbers: Tensor) -> Tensor | None:
    """For each entry, which of the numbers it is; None where one is none of them."""
    index = pushed.detach().floor() - 1
    if not bool(((index >= 0) & (index < len(numbers))).all()):
        return None
    places = index.long()
    tolerance = 64 * torch.finfo(numbers.dtype).eps * (1 + index)
    return places if bool(((numbers[places] - pushed).abs() <= tolerance).all()) else None


def _pushed_forward(values: Tensor, parameter: Tensor, tangent: Tensor) -> Tensor:
    """The directional derivative of `values`: what is pulled back is linear in what is pulled, and so has a transpose.

    Raises:
        RuntimeError: An operation has no derivative of its derivative, or the graph does not pass the parameter.
    """
    cotangent = torch.zeros_like(values, requires_grad=True)
    with torch.enable_grad():
        (pulled,) = torch.autograd.grad(values, parameter, cotangent, create_graph=True)
        (pushed,) = torch.autograd.grad(pulled, cotangent, tangent, retain_graph=True)
    return pushed.detach()


def _maker(values: Tensor) -> Any:
    """The node of the graph that made the numbers of a tensor, before they were put into shape."""
    node: Any = values.grad_fn
    while node is not None and node.name().startswith(_RESHAPING):
        node = node.next_functions[0][0]
    return node


def _is_root(values: Tensor) -> bool:
    """Whether numbers are roots, perhaps selected from a tensor of them."""
    node = _maker(values)
    while node is not None and node.name().startswith((*_RESHAPING, *_SELECTING)):
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith(("Sqrt", "Pow"))


def _before_normalisation(values: Tensor) -> Tensor | None:
    """What was divided by its sum, or had the log of its summed exponentials taken away; None where nothing was."""
    node = _maker(values)
    if node is None or len(node.next_functions) != 2:
        return None
    (given, _), (total, _) = node.next_functions
    inner = total.next_functions[0][0] if total is not None and total.next_functions else None
    if given is None or inner is not given:
        return None
    saved: Tensor | None = None
    if node.name().startswith("Div") and total.name().startswith("Sum"):
        saved = node._saved_self
    if node.name().startswith("Sub") and total.name().startswith("Logsumexp"):
        saved = total._saved_self
    return saved
