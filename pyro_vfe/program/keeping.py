"""What statements were given, as it was then.

    mask |= captured[:, t]        the sites before it are handed a copy of the mask, made before the write

A site's numbers are read when the run is over, and a program may have changed a mask, data or a parameter in place by
then. Nothing is copied, or even looked at, as long as it writes into nothing.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Size, Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributions import Distribution, Transform

from pyro_vfe.program.sharing import memories_of

if TYPE_CHECKING:
    from pyro_vfe.program.recorder import Site

_Result = TypeVar("_Result")


class AsGiven:
    """Runs programs out of sight: where they change what a statement was given, they run again, and it gets copies."""

    def __init__(self) -> None:
        self._copies = False

    def run(self, programs: "Callable[[Callable[[Site], None]], _Result]") -> "_Result":
        """Returns what the programs give where each statement has what it was given.

        Args:
            programs: Runs them, and calls what it is called with at each statement.
        """
        if self._copies:
            return programs(own_tensors)
        noted: list[tuple[Tensor, int]] = []

        def note(site: "Site") -> None:
            noted.extend([(held, held._version) for held in tensors_of(site) if not held.is_inference()])

        result = programs(note)
        if all(held._version == version for held, version in noted):
            return result
        self._copies = True
        return programs(own_tensors)


def own_tensors(site: "Site") -> None:
    """Gives a site copies of what it holds."""
    vars(site).update(replaced(vars(site), Tensor.clone))


def own_value(site: "Site") -> None:
    """Gives a site a copy of its value, unless it is data."""
    if site.kind != "observed":
        site.value = site.value.clone()


@dataclass(eq=False)
class _Saved:
    """A tensor that autograd needs for a gradient."""

    tensor: Tensor


class Kept:
    """Objects whose tensors, at any depth, stay what they are when a program writes into them."""

    def __init__(self, copied: Callable[[Tensor], Tensor]) -> None:
        """Args:
        copied: Makes a copy of a tensor with memory of its own.
        """
        self.has_writes = False
        """Whether a program has written into anything."""
        self.has_overwritten_saved = False
        """Whether it has written into what `saving` keeps."""
        self._copied = copied
        self._new: list[object] = []
        self._holders: dict[int, list[object]] = {}

    def add(self, holder: object) -> None:
        """Keeps what an object's attributes hold at present."""
        self._new.append(holder)

    def forget(self) -> None:
        """Lets go of all holders: autograd, which no collector looks into, may keep what `saving` gave it."""
        self._new, self._holders = [], {}

    def saving(self) -> saved_tensors_hooks:
        """A context in which what autograd saves is kept too, where torch would refuse the gradient."""
        return saved_tensors_hooks(self._saved, lambda saved: saved.tensor)

    def _saved(self, tensor: Tensor) -> "_Saved":
        saved = _Saved(tensor.detach())
        self.add(saved)
        return saved

    def written(self, memories: set[int]) -> None:
        """Hands out copies of what lies in memories that are about to change."""
        self.has_writes |= bool(memories)
        for holder in self._new:
            for memory in memories_of(tensors_of(holder)):
                self._holders.setdefault(memory, []).append(holder)
        self._new = []
        if not any(memory in self._holders for memory in memories):
            return
        copies: dict[int, Tensor] = {}  # A mask of many sites stays one mask.

        def changed(tensor: Tensor) -> Tensor:
            if memories.isdisjoint(memories_of(tensor)):
                return tensor
            if id(tensor) not in copies:
                copies[id(tensor)] = self._copied(tensor)
            return copies[id(tensor)]

        for memory in memories:
            for holder in self._holders.pop(memory, ()):
                vars(holder).update(replaced(vars(holder), changed))
                self._new.append(holder)  # The model is handed the copies of the guide's values.
                self.has_overwritten_saved |= isinstance(holder, _Saved)


def tensors_of(holder: object) -> list[Tensor]:
    """The tensors that an object's attributes hold, at any depth."""
    found: list[Tensor] = []
    _collect(vars(holder).values(), found)
    return found


def _collect(parts: Iterable[Any], found: list[Tensor]) -> None:
    for part in parts:
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, (Distribution, Transform)):
            _collect(_attributes(part).values(), found)
        elif isinstance(part, (list, tuple, dict)) and part and type(part) is not Size:
            _collect(part.values() if isinstance(part, dict) else part, found)


def replaced(holder: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An object with other tensors in the place of its own, at any depth; itself where none of them changes.

    Args:
        holder: A tensor, distribution or transform, or a container of such; anything else stays as it is.
        change: Says what stands in the place of a tensor: itself, or another.
    """
    if isinstance(holder, Tensor):
        return change(holder)
    if isinstance(holder, (list, tuple)):
        items = [replaced(item, change) for item in holder]
        return holder if all(map(_is, items, holder)) else getattr(holder, "_make", type(holder))(items)
    if isinstance(holder, dict):
        found = {key: replaced(item, change) for key, item in holder.items()}
        return holder if all(map(_is, found.values(), holder.values())) else found
    if not isinstance(holder, (Distribution, Transform)):
        return holder
    own = _attributes(holder)
    changed = replaced(own, change)
    if changed is own:
        return holder
    result = object.__new__(type(holder))
    result.__dict__.update(changed)
    return result


def _attributes(holder: Any) -> dict[str, Any]:
    """A transform and its inverse hold each other: the one that was made first has the tensors, and finds the other."""
    if not isinstance(holder, Transform) or type(holder).__name__ == "_InverseTransform":
        return vars(holder)
    return {**vars(holder), "_inv": None}


def _is(one: object, other: object) -> bool:
    return one is other
