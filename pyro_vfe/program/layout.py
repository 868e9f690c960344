"""One ordinary run of guide and model, and what it tells: who reads whom, and hence which dim each latent takes."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from pyro_vfe.errors import EscapeError, StructureError
from pyro_vfe.program.branches import MAX_RUNS, Paths
from pyro_vfe.program.broadcasting import cannot_broadcast
from pyro_vfe.program.chain_sites import check_observed, time_plate
from pyro_vfe.program.colouring import enumeration_dims
from pyro_vfe.program.equal_sites import reads_itself
from pyro_vfe.program.escapes import Escaped, Sites
from pyro_vfe.program.guide_sites import check_guide, check_masks
from pyro_vfe.program.lasting import ran_twice
from pyro_vfe.program.left_over import first_look
from pyro_vfe.program.log_prob import is_listed
from pyro_vfe.program.masking import hand_over_masks, unmasked
from pyro_vfe.program.missing_data import check_data
from pyro_vfe.program.missing_plates import check_batch_dims
from pyro_vfe.program.operations import Observer
from pyro_vfe.program.plate_violations import different_plates, not_written_out, plate_violation
from pyro_vfe.program.provenance import Provenance
from pyro_vfe.program.randomness import random_state, set_random_state
from pyro_vfe.program.recorder import Plate, Role, Site, missing_guide_site, record_both
from pyro_vfe.program.returned import check_returned
from pyro_vfe.program.row_sizes import Rows, TooLarge
from pyro_vfe.program.single_values import Deeper, Ones, runs_somehow
from pyro_vfe.program.site_structure import SiteStructure
from pyro_vfe.program.sizeless import SizeFound, SizelessPlates
from pyro_vfe.program.supports import check_same_support, finite_support, is_enumerable, support_size, unwrapped
from pyro_vfe.program.written_out import MOST_JOINT_VALUES, names_parts, structure_parts

Program = Callable[..., Any]


def no_guide(*args: Any, **kwargs: Any) -> None:
    """A guide without sites: every latent is summed out inside the model."""


@dataclass(frozen=True)
class Portioning:
    """That the elements of a plate are summed a portion at a time, as the tables of all together would not fit."""

    plate: str
    """The plate."""
    length: int
    """How many of its elements make a portion."""


@dataclass(frozen=True)
class Layout:
    """Where each latent goes in the enumerated run of a pair of programs."""

    nesting: int
    """The number of batch dims that plates take, at the right."""
    dims: Mapping[str, int]
    """The batch dim of each latent that is enumerated in parallel, negative."""
    sequential: frozenset[str]
    """Latents on which the program branches: one run per value."""
    unread: frozenset[str]
    """Latents of the model without finite support that the guide lacks and nothing depends on."""
    sites: Mapping[tuple[Role, str], SiteStructure]
    """All sites that some ordinary run met."""
    portioning: Portioning | None = None
    """Which plate is summed in portions; None where all tables fit whole."""
    room: float = math.inf
    """How many times more elements the plates may have before the tables have to be looked at again."""
    overwrites_saved: bool = False
    """Whether the programs change in place what the gradients of their own operations need."""
    groups: Mapping[str, int] = field(default_factory=dict)
    """The group of each latent whose values are taken one by one, as the programs do not broadcast over them."""
    wholes: Mapping[str, tuple[Plate, ...]] = field(default_factory=dict)
    """The plates along which a latent is written out, one latent per element, as a site reads all of them."""
    stars: Mapping[tuple[Role, str], str] = field(default_factory=dict)
    """The latent of another plate that a site reads by index."""
    unseen: Mapping[tuple[Role, str], Sites] = field(default_factory=dict)
    """The latents that a site reads out of sight of torch's functions, in a scripted function say."""
    unvalidated: bool = False
    """Whether the programs make invalid distributions at values that are impossible."""
    row_bytes: float = 0.0
    """The most that an ordinary run makes for each element of a latent."""
    only_enumerated: bool = False
    """Whether the programs run with values alone that have the dims of enumerated ones."""

    @cached_property
    def sizes_around(self) -> dict[tuple[str, str], dict[str, int]]:
        """The size of each plate around each site in the ordinary run."""
        return {key: {plate.name: plate.size for plate in site.plates} for key, site in self.sites.items()}

    @cached_property
    def plate_sizes(self) -> dict[str, int]:
        """The size of each plate in the ordinary run."""
        plates = sorted((plate.size, plate.name) for site in self.sites.values() for plate in site.plates)
        return {name: size for size, name in plates}  # The largest: it may have another size in each branch.

    @cached_property
    def reads(self) -> dict[tuple[Role, str], Sites]:
        """The latents, and the draws of the guide, that each site read."""
        return {key: site.scope for key, site in self.sites.items()}

    @cached_property
    def group_sizes(self) -> list[int]:
        """How many values each group of latents takes."""
        count = max(self.groups.values(), default=-1) + 1
        return [max(self.sizes[name] for name, own in self.groups.items() if own == group) for group in range(count)]

    @cached_property
    def num_runs(self) -> int:
        """How many runs the latents take whose values are taken one by one."""
        return math.prod(self.group_sizes)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The number of values of each enumerated latent."""
        return {site.name: site.size for site in self.sites.values() if site.kind == "enumerated"}


@dataclass
class _Findings:
    """What the ordinary runs have shown so far."""

    sites: dict[tuple[Role, str], SiteStructure] = field(default_factory=dict)
    meetings: dict[Sites, str] = field(default_factory=dict)
    plates: dict[str, tuple[Plate, ...]] = field(default_factory=dict)
    sizes: dict[str, set[int]] = field(default_factory=dict)
    sites_before: frozenset[tuple[Role, str]] = frozenset()
    """The sites of the paths before the present one."""
    overwrites_saved: bool = False
    marked: set[str] = field(default_factory=set)
    """Latents whose statements ask for a run per value."""
    rows: Rows = field(default_factory=Rows)
    known: dict[str, int] = field(default_factory=dict)
    """The size of plates that have none of their own, where a latent stands before the data."""
    ones: Ones = field(default_factory=Ones)

    def provenance(self) -> Provenance:
        """What follows the values of a run."""
        observer = Observer() if self.ones.dims else self.rows
        return Provenance(on_union=self.met, follows=True, observer=observer)

    def met(self, sites: Sites, operation: str) -> None:
        """Notes that an operation joined these sites in one tensor."""
        self.meetings.setdefault(sites, operation)

    def add(self, sites: Mapping[tuple[Role, str], Site], provenance: Provenance) -> None:
        """Notes the sites of a run; a plate that differs in size from path to path counts where it is largest."""
        for key, site in sites.items():
            for plate in site.plates:
                self.sizes.setdefault(plate.name, set()).add(plate.size)
            known = self.sites.get(key)
            if known is None or any(one.size < own.size for one, own in zip(known.plates, site.plates, strict=False)):
                self.sites[key] = _structure(site, provenance)


def lay_out(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    extra_nesting: int = 0,
    min_nesting: int = 0,
    by_index: bool = True,
) -> Layout:
    """Returns the layout of a pair of programs, from ordinary runs.

    Args:
        model: The generative model.
        guide: The guide.
        args: Arguments of both.
        kwargs: Keyword arguments of both.
        extra_nesting: Batch dims to leave free left of the programs' own plates.
        min_nesting: Batch dims to take for plates at least.
        by_index: Whether what reads a latent from another plate may read it by index.

    Raises:
        EscapeError: The program takes a latent of a plate out of torch.
        CostError: Too many latents meet in one tensor.
        PlateError: A latent is read from outside one of its plates.
    """
    with runs_somehow(), first_look((guide, model), args, kwargs):
        findings, sequential = _explored(model, guide, args, kwargs)
    return _arranged(findings, sequential, min_nesting, extra_nesting, by_index)


def latents_and_branches(
    program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[dict[str, SiteStructure], frozenset[str]]:
    """Returns the latents of a program whose values can be listed, in all its branches, and on which it branches.

    Args:
        program: A model.
        args: Its arguments.
        kwargs: Its keyword arguments.

    Raises:
        StructureError: A latent is in a plate whose size another latent decides.
    """
    with runs_somehow(), first_look((program,), args, kwargs):
        findings, branches = _explored(no_guide, program, args, kwargs)
    latents = {site.name: site for site in findings.sites.values() if site.kind == "enumerated"}
    for name, site in latents.items():
        for plate in site.plates:
            if len(sizes := findings.sizes[plate.name]) > 1:
                raise StructureError(
                    f"Latent site '{name}' lies in plate '{plate.name}', whose size is {min(sizes)} in one branch of "
                    f"the model and {max(sizes)} in another: an automatic guide has tables of one size.",
                    hint="Leave it to the model, which sums it out (no guide), or write a guide with these branches.",
                )
    return latents, branches


def _explored(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[_Findings, frozenset[str]]:
    """Runs along all paths until it is known which latents the programs branch on."""
    looks = Rows(), Ones()
    findings, sequential = _explored_from(frozenset(), looks, model, guide, args, kwargs)
    by_mark = sequential | findings.marked
    sizes = {site.name: site.size for site in findings.sites.values()}
    if by_mark == sequential or math.prod(sizes[name] for name in by_mark) > MAX_RUNS:
        return findings, sequential  # Enumerated in parallel, what is marked has the same sums.
    return _explored_from(by_mark, looks, model, guide, args, kwargs)


def _explored_from(
    sequential: frozenset[str],
    looks: tuple[Rows, Ones],
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[_Findings, frozenset[str]]:
    """Runs along all paths, of latents of which it is known that they take one value in each run."""
    while True:
        findings = _Findings(rows=looks[0], ones=looks[1])
        for _ in (paths := Paths(warns=True)):
            more = _explored_path(model, guide, args, kwargs, sequential, paths, findings)
            sequential |= more
            if not more.isdisjoint(name for _, name in findings.sites_before):
                break  # A path before had it as one that is no choice.
        else:
            return findings, sequential


def _explored_path(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    sequential: frozenset[str],
    paths: Paths,
    findings: _Findings,
) -> frozenset[str]:
    """Runs along one path, and returns the latents that were found to be choices on it."""
    found: frozenset[str] = frozenset()
    findings.sites_before = frozenset(findings.sites)
    known, depth = dict(findings.meetings), len(paths.path)
    while True:
        try:
            _ordinary_run(model, guide, args, kwargs, sequential | found, paths, findings)
            return found
        except Escaped as escape:
            found |= _can_be_sequential(escape, findings)
            findings.meetings = dict(known)
            del paths.path[depth:]
            if not found.isdisjoint(name for _, name in findings.sites):
                return found
        except SizeFound as plate:
            findings.known[plate.plate] = plate.size
        except TooLarge:
            findings.rows.together = True
        except (Deeper, IndexError, RuntimeError, ValueError) as error:
            if findings.rows.together and isinstance(error, RuntimeError):
                raise cannot_broadcast(error) from error  # One value for all has the dims that enumerated ones have.
            findings.ones.instead(error)
            findings.meetings = dict(known)
            del paths.path[depth:]


def _ordinary_run(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    sequential: frozenset[str],
    paths: Paths,
    findings: _Findings,
) -> None:
    """Runs the guide and the model against it once, with sampled values."""
    families: dict[str, Any] = {}
    chosen: dict[str, Tensor] = {}
    returned: list[tuple[Sized, object]] = []
    state = random_state()

    def draw(name: str, role: Role, fn: Any, plates: tuple[Plate, ...]) -> Tensor:
        findings.plates[name] = plates
        families[name] = fn
        if name not in sequential:
            value = findings.ones.drawn(fn, fn.sample(), plates)
            return value if findings.ones.dims else findings.rows.drawn(name, fn, value, plates)
        if name not in chosen:
            chosen[name] = finite_support(fn, name)[paths.choose(name, support_size(fn))]
        return chosen[name].clone()

    def run(provenance: Provenance) -> dict[tuple[Role, str], Site]:
        set_random_state(state)
        both = record_both(
            model,
            guide,
            args,
            kwargs,
            draw,
            sequential=sequential,
            check_given=lambda name, fn: check_same_support(name, fn, families[name]),
            provenance=provenance,
            sizeless=SizelessPlates(known=findings.known),
        )
        findings.marked |= both[0].marked | both[1].marked
        returned[:] = [(record.sites, record.returned) for record in both]
        sites = {(site.role, site.name): site for record in both for site in record.sites.values()}
        findings.ones.ran(plate for site in sites.values() for plate in site.plates)
        hand_over_masks(sites)
        return sites

    sites, provenance, overwrites_saved = ran_twice(run, findings.provenance, (args, kwargs))
    findings.overwrites_saved |= overwrites_saved
    findings.add(sites, provenance)
    # A look at the latents alone calls the model a guide.
    _check_run(sites.values(), returned, provenance, of_both=model is not no_guide)


def _check_run(
    sites: Iterable[Site], returned: Sequence[tuple[Sized, object]], provenance: Provenance, *, of_both: bool
) -> None:
    """Checks what an ordinary run of guide and model met, and what each of them returned."""
    for met, result in returned:
        check_returned(met, result, is_guide=of_both and met is returned[0][0])
    for site in sites if of_both else ():
        if site.kind != "unread":
            check_batch_dims(site)
            check_observed(site)
            if not provenance.of(site.value):
                check_data(site)


def _structure(site: Site, provenance: Provenance) -> SiteStructure:
    enumerated = site.kind == "enumerated"
    finite = enumerated or (site.kind == "unread" and is_enumerable(site.fn))
    support = finite_support(site.fn, site.name) if finite else None
    scope = site.reads(provenance)
    alone = enumerated and is_listed(unmasked(site)[0]) and not reads_itself(site, provenance)
    return SiteStructure(
        name=site.name,
        role=site.role,
        kind=site.kind,
        family=type(unwrapped(site.fn)).__name__,
        size=1 if support is None or not enumerated else len(support),
        scope=scope,
        plates=site.plates,
        auxiliary=site.auxiliary,
        support=support,
        chain=time_plate(site),
        elements=1 if alone else math.prod(site.fn.event_shape),
        needs_score=site.needs_score,
        meets=scope - {site.name} if alone else scope,
    )


def _can_be_sequential(escape: Escaped, findings: _Findings) -> frozenset[str]:
    for name in sorted(escape.sites):
        plates = findings.plates.get(name, ())
        if plates:
            raise EscapeError(
                f"Latent site '{name}' in plate '{plates[0].name}' leaves torch by `{escape.operation}` at "
                f"{escape.line}: its elements would take different branches.",
                hint="Use torch operations on it (torch.where, indexing a table), or a sequential plate "
                f"(for i in pyro.plate('{plates[0].name}', ...)).",
            )
    return escape.sites


def _arranged(
    findings: _Findings, sequential: frozenset[str], min_nesting: int, extra_nesting: int, by_index: bool
) -> Layout:
    _check_homes(findings.sites)
    stars = _star_latents(findings.sites) if by_index else {}
    wholes = _read_as_wholes(findings.sites, stars)
    if not wholes.keys().isdisjoint(stars.values()):  # What is written out is no plate to read from by index.
        stars = {key: latent for key, latent in stars.items() if latent not in wholes}
        wholes = _read_as_wholes(findings.sites, stars)
    sites = structure_parts(findings.sites, wholes) if wholes else findings.sites
    meetings = {names_parts(names, wholes): operation for names, operation in findings.meetings.items()}
    check_masks(sites)
    check_guide(sites)
    unread = _unread(sites)
    nesting = max((-plate.dim for site in findings.sites.values() for plate in site.plates), default=0)
    nesting = max(nesting, min_nesting) + extra_nesting
    latents = [
        name
        for name in dict.fromkeys(site.name for site in sites.values() if site.kind == "enumerated")
        if name not in sequential
    ]
    return Layout(
        nesting=nesting,
        dims=enumeration_dims(latents, meetings, [site.meets for site in sites.values()], nesting),
        sequential=sequential,
        unread=unread,
        sites=sites,
        overwrites_saved=findings.overwrites_saved,
        stars=stars,
        wholes=wholes,
        row_bytes=findings.rows.row_bytes,
        only_enumerated=findings.ones.dims > 0,
    )


def _unread(sites: Mapping[tuple[Role, str], SiteStructure]) -> frozenset[str]:
    """Model-only latents that integrate to one; one that something reads would have to be in the guide."""
    unread = {site.name: site for site in sites.values() if site.kind == "unread"}
    for site in sites.values():
        for name in sorted(site.scope & unread.keys() - {site.name}):
            raise missing_guide_site(name, unread[name].family, unread[name].support is not None)
    return frozenset(unread)


def _star_latents(sites: Mapping[tuple[Role, str], SiteStructure]) -> dict[tuple[Role, str], str]:
    """The latent of other plates that each site may read by index: an observed one, of one such latent."""
    latents = {site.name: site for site in sites.values() if site.kind == "enumerated"}
    homes = {name: frozenset(plate.name for plate in site.plates) for name, site in latents.items()}
    found = {}
    for key, site in sites.items():
        around = {plate.name for plate in site.plates}
        outside = [name for name in site.scope if not homes.get(name, frozenset()) <= around]
        if len(outside) == 1 and site.kind == "observed" and around:
            latent = latents[outside[0]]
            is_simple = latent.chain is None and latent.support is not None and latent.support.dim() == 1
            if is_simple and all(homes.get(name, frozenset()) <= homes[latent.name] for name in site.scope):
                found[key] = latent.name
    return found


def _read_as_wholes(
    sites: Mapping[tuple[Role, str], SiteStructure], stars: Mapping[tuple[Role, str], str]
) -> dict[str, tuple[Plate, ...]]:
    """The latents that some site reads from outside of their plates, all elements together; a star's is no such one.

    Raises:
        PlateError: One has too many elements for that, or is a chain, or shows a part of its plate.
        CostError: Several have too many together.
    """
    latents = {site.name: site for site in sites.values() if site.kind == "enumerated"}
    found: dict[str, tuple[Plate, ...]] = {}
    before = -1
    while before != (before := sum(map(len, found.values()))):  # What is written out leaves its plate, and reads on.
        for key, site in sites.items():
            gone = found.get(site.name, ()) if site.kind == "enumerated" else ()
            around = {plate.name for plate in site.plates if plate not in gone}
            for name in sorted(site.scope & latents.keys() - {stars.get(key), site.name}):
                for plate in latents[name].plates:
                    if plate.name not in around and plate not in found.get(name, ()):
                        if latents[name].chain or plate.size != plate.full_size:
                            raise plate_violation(key[1], key[0], name, plate.name)
                        found[name] = (*found.get(name, ()), plate)
    for key, site in sites.items():
        own = {site.name} if site.kind == "enumerated" else set()
        read = sorted(site.scope & found.keys() - own)
        bits = [math.log2(latents[name].size) * math.prod(plate.size for plate in found[name]) for name in read]
        if sum(bits) > math.log2(MOST_JOINT_VALUES):
            raise not_written_out(key[1], key[0], {name: found[name][0].name for name in read}, sum(bits))
    return found


def _check_homes(sites: Mapping[tuple[Role, str], SiteStructure]) -> None:
    """A latent lies in the same plates in both programs."""
    homes: dict[str, tuple[Plate, ...]] = {}
    for site in sites.values():
        if site.kind == "enumerated":
            home = homes.setdefault(site.name, site.plates)
            one, other = ({plate.name for plate in plates} for plates in (home, site.plates))
            if one != other:
                raise different_plates(site.name, one, other)
