"""Plates without a size, `pyro.plate("data")`: each is as long as the sites in it are along its dim.

A latent whose distribution has one batch element stands before the data that say how many there are: the first run ends
where they are met, and begins again with that size. So each element has a latent of its own, as Pyro's enumeration has
it.
"""

from collections.abc import Mapping
from typing import Any

from pyro_vfe.errors import StructureError


class SizeFound(StructureError):
    """A plate without a size has several elements, and a latent before had one value along it."""

    def __init__(self, plate: str, size: int, latent: str) -> None:
        super().__init__(
            f"Plate '{plate}' has no size of its own, and {size} elements, of which latent '{latent}' did not know.",
            hint=f"Give the plate its size: pyro.plate('{plate}', {size}).",
        )
        self.plate = plate
        self.size = size


class SizelessPlates:
    """What is known of such plates in one run of guide and model."""

    def __init__(
        self,
        ordinary: Mapping[tuple[str, str], Mapping[str, int]] | None = None,
        *,
        known: Mapping[str, int] | None = None,
    ) -> None:
        """Args:
        ordinary: The size of each plate around each site in an ordinary run, by role and name.
        known: The size of plates as it was found.
        """
        self.ordinary = ordinary or {}
        self.known = known or {}
        self._found: dict[str, tuple[int, str]] = {}
        self._guide: dict[str, dict[str, int]] = {}
        self._single: dict[str, str] = {}
        """A latent of each plate that has one value along it."""

    def measure(self, msg: Any, role: str) -> None:
        """Gives the plates around a site the size that the site has along them.

        One along which an observation has a single value is no plate of it: it counts once.

        Args:
            msg: Pyro's message of the site, before it runs; its plates and distribution are replaced.
            role: The program.

        Raises:
            StructureError: Two sites in one plate are of different sizes.
            SizeFound: A latent before had one value along a plate that turns out to have several elements.
        """
        frames, shape = [], list(msg["fn"].batch_shape)
        for frame in msg["cond_indep_stack"]:
            if frame.dim is None or frame.size != -1:
                frames.append(frame)
                continue
            size = self._size(msg, frame, role)
            if size > 1:
                known, first = self._found.setdefault(frame.name, (size, msg["name"]))
                if known != size:
                    raise StructureError(
                        f"Plate '{frame.name}' has no size of its own, and site '{first}' has {known} elements along "
                        f"its dim {frame.dim}, site '{msg['name']}' {size}.",
                        hint="Give both sites one size, or put them into two plates of different names.",
                    )
                self._check_single(frame.name)
                frames.append(frame._replace(size=size, full_size=size))
                shape = [1] * (-frame.dim - len(shape)) + shape
                shape[frame.dim] = size
            elif not msg["is_observed"]:
                self._single.setdefault(frame.name, msg["name"])
                self._check_single(frame.name)
        if shape != list(msg["fn"].batch_shape):
            msg["fn"] = msg["fn"].expand(shape)
        if role == "guide":
            self._guide[msg["name"]] = {frame.name: frame.size for frame in frames}
        msg["cond_indep_stack"] = tuple(frames)

    def _check_single(self, plate: str) -> None:
        """Begins again where a latent had one value along a plate of several elements."""
        if plate in self._found and plate in self._single:
            raise SizeFound(plate, self._found[plate][0], self._single[plate])

    def _size(self, msg: Any, frame: Any, role: str) -> int:
        """How many elements a site has along a plate."""
        sizes = [_along(msg["fn"].batch_shape, frame.dim)]
        if msg["value"] is not None and hasattr(msg["value"], "shape"):
            sizes.append(_along(msg["value"].shape, frame.dim - msg["fn"].event_dim))
        sizes.append(self._guide.get(msg["name"], {}).get(frame.name, 1))
        if not msg["is_observed"]:
            sizes.append(self.known.get(frame.name, 1))
        if max(sizes) > 1:
            return max(sizes)
        # A latent that it reads may be enumerated now, and have one value for all elements.
        ordinary = self.ordinary.get((role, msg["name"]), {}).get(frame.name, 1)
        return self._found.get(frame.name, (ordinary, ""))[0] if ordinary > 1 else 1


def _along(shape: Any, dim: int) -> int:
    return int(shape[dim]) if len(shape) >= -dim else 1
