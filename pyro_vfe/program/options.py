"""Options are of the kind that their annotations say: numbers, names, functions, mappings."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, SupportsFloat, SupportsIndex, Union, get_args, get_origin

from pyro_vfe.errors import VFEError, described

Kind = tuple[Callable[[object], bool], str]
"""Whether a value is of a kind, and what that is in words."""


def kind_of(annotation: object) -> Kind | None:
    """Returns the kind that an annotation asks for; None for one whose values are left to whoever takes them.

    Args:
        annotation: Of an option: a type or a union of types.
    """
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    kinds = [_kind_of_part(part) for part in parts]
    if any(kind is None for kind in kinds):
        return None
    known = [kind for kind in kinds if kind is not None]
    return lambda value: any(fits(value) for fits, _ in known), " or ".join(words for _, words in known)


def check_kind(who: str, name: str, value: object, kind: Kind) -> None:
    """Checks that an option is of its kind.

    Args:
        who: Was given it.
        name: The option.
        value: Its value.
        kind: What it is to be.

    Raises:
        VFEError: It is not.
    """
    fits, words = kind
    if not fits(value):
        raise VFEError(f"{who} was given {name}={_shown(value)}.", hint=f"Pass {words}.")


def check_fields(owner: Any) -> None:
    """Checks that the fields of a dataclass are of the kinds that their annotations say.

    Args:
        owner: The instance.

    Raises:
        VFEError: One is not.
    """
    for field in fields(owner):
        kind = kind_of(field.type)
        if kind is not None:
            check_kind(type(owner).__name__, field.name, getattr(owner, field.name), kind)


def _kind_of_part(part: object) -> Kind | None:
    if part is NoneType:
        return (lambda value: value is None), "None"
    if part is int:
        return _is_whole, "a whole number"
    if part is float:
        return (lambda value: isinstance(value, SupportsFloat)), "a number"
    if part == Iterable[str]:
        return (lambda value: isinstance(value, Iterable)), "names"
    if get_origin(part) is Literal:
        names = get_args(part)
        # What can be turned off by False is often turned on by True.
        return (lambda value: value in names or (value is True and False in names)), " or ".join(map(repr, names))
    if get_origin(part) is Callable:
        return callable, "a function"
    if get_origin(part) is Sequence:
        return (lambda value: isinstance(value, Iterable)), "a list"
    if get_origin(part) is Mapping:
        return (lambda value: isinstance(value, Mapping)), "a mapping"
    return None


def _is_whole(value: object) -> bool:
    return isinstance(value, SupportsIndex) or (isinstance(value, float) and value.is_integer())


def _shown(value: object) -> str:
    return described(value) if isinstance(value, type) or callable(value) else repr(value)
