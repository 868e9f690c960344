"""A seeded program against its table in the linear domain: right, refused, or wrong."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from linear_oracle import Expected, close
from linear_tables import marginal
from oracles import gradients
from seeded_programs import ProgramSpec, SiteSpec, guide_of, model_of
from torch import Tensor

import pyro_vfe as vfe
from pyro_vfe.errors import ImpossibleDataError, NotFiniteError, ScaleError, VFEError, VFEWarning

INFINITE = "it is infinite"


@dataclass(frozen=True)
class Finding:
    """What came of one quantity of a program."""

    quantity: str
    verdict: str
    """ "right", "refused" (in words, where there is an answer) or "wrong"."""

    found: str = ""
    expected: str = ""


@dataclass(frozen=True)
class Verdict:
    """What came of a program."""

    spec: ProgramSpec
    findings: tuple[Finding, ...]

    @property
    def word(self) -> str:
        """The worst of its findings."""
        words = {finding.verdict for finding in self.findings}
        return next(word for word in ("wrong", "refused", "right") if word in words)

    def __str__(self) -> str:
        lines = [f"seed {self.spec.seed}: {self.word}, with {', '.join(self.spec.kinds)}"]
        for finding in self.findings:
            if finding.verdict == self.word:
                lines.append(f"  {finding.quantity}: found {finding.found}, expected {finding.expected}")
        return "\n".join([*lines, f"  {self.spec}"])


def verdict_on(spec: ProgramSpec) -> Verdict:
    """Asks the library for everything and compares."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide = model_of(spec), guide_of(spec)
    expected = Expected(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VFEWarning)
        findings = [
            *_of_the_loss(expected, model, guide),
            *_of_the_terms(expected, model, guide),
            *_of_the_posterior(expected, model),
        ]
    return Verdict(spec, tuple(findings))


def _asked(
    quantity: str, ask: Callable[[], Any], refusal: str, judge: Callable[[Any], Iterator[Finding]]
) -> list[Finding]:
    """Asks for something, and has the answer judged; where there must be none, the refusal has to say so.

    Args:
        quantity: Its name.
        ask: The question.
        refusal: Why there is no answer; empty where there is one.
        judge: What to make of an answer.
    """
    findings: list[Finding] = []
    try:
        for finding in judge(ask()):
            findings.append(finding)
    except VFEError as error:
        findings.append(_of_a_refusal(quantity, error, refusal if not findings else ""))
    except Exception as error:
        findings.append(Finding(quantity, "wrong", f"{type(error).__name__}: {error}", refusal or "an answer"))
    return findings


def _of_a_refusal(quantity: str, error: VFEError, reason: str) -> Finding:
    said = f"{type(error).__name__}: {error}"
    wanted = (NotFiniteError, ImpossibleDataError) if reason == INFINITE else ScaleError
    if reason and isinstance(error, wanted):
        return Finding(quantity, "right")
    if reason and type(error) is VFEError:
        return Finding(f"class of the refusal of {quantity}", "wrong", said, reason)
    return Finding(quantity, "refused", said, reason or "an answer")


def _compared(quantity: str, found: Any, expected: Tensor) -> Finding:
    found = torch.as_tensor(found).detach()
    if close(found, expected):
        return Finding(quantity, "right")
    if quantity.startswith(("surprise", "gap")) and bool(found.isnan()):  # The mark of an F that does not split
        return Finding(quantity, "refused", "marked as NaN", str(expected.tolist()))
    return Finding(quantity, "wrong", str(found.tolist()), str(expected.tolist()))


def _of_the_loss(expected: Expected, model: Any, guide: Any) -> list[Finding]:
    elbo = vfe.FreeEnergy(strict_enumeration_warning=False)
    free_energy = expected.terms["free_energy"]
    refusal = expected.no_free_energy or ("" if free_energy.isfinite() else INFINITE)

    def judge(loss: Tensor) -> Iterator[Finding]:
        if refusal:
            yield Finding("loss", "wrong", str(loss.item()), f"a refusal: {refusal}")
            return
        yield _compared("loss", loss, free_energy)
        # The oracle's first: a library that changed the leaves would change them for both.
        wanted, found = gradients(free_energy), gradients(loss)
        for name, gradient in wanted.items():
            yield _compared(f"gradient of {name}", found[name], gradient)

    return _asked("loss", lambda: elbo.differentiable_loss(model, guide), refusal, judge)


def _of_the_terms(expected: Expected, model: Any, guide: Any) -> list[Finding]:
    elbo = vfe.FreeEnergy(strict_enumeration_warning=False)
    terms = expected.terms
    without = expected.no_free_energy or expected.no_surprise
    refusal = without or (INFINITE if terms["surprise"].isinf() else "")

    def judge(found: Any) -> Iterator[Finding]:
        if expected.no_free_energy:
            yield Finding("terms", "wrong", str(found), f"a refusal: {refusal}")
            return
        for name, value in terms.items():
            number = getattr(found, name)
            if name in ("surprise", "gap") and (without or found.unsplit is not None):
                # An infinite F is all of it the guide's: that much is known without the surprise.
                is_marked = number.isnan() or (
                    name == "gap" and bool(number.isposinf() & terms["free_energy"].isposinf())
                )
                verdict = "wrong" if not is_marked else "right" if without else "refused"
                yield Finding(name, verdict, found.unsplit or str(number.item()), without or "an answer")
            elif value.isfinite() or name != "accuracy":  # complexity - F is inf - inf there
                yield _compared(name, number, value.detach())
        if not without and terms["free_energy"].isfinite():
            yield from _of_the_elements(expected, found)
            if not expected.model.absent:
                yield from _asked("Q's marginals", found.q_marginals, "", lambda tables: _of_q(expected, tables))

    return _asked("terms", lambda: elbo.decompose(model, guide), refusal, judge)


def _of_q(expected: Expected, tables: dict[str, Tensor]) -> Iterator[Finding]:
    for site in expected.spec.guide:
        yield _compared(f"Q's marginal of {site.name}", tables[site.name], expected.marginal(expected.q, site))


def _of_the_elements(expected: Expected, found: Any) -> Iterator[Finding]:
    for plate in expected.spec.plates:
        if plate.name != "time" and all(plate.name in site.plates for site in expected.spec.model):
            inside = found.by(plate.name)
            for index in range(plate.length):
                for name, value in expected.element_terms(plate.name, index).items():
                    yield _compared(f"{name} of {plate.name}[{index}]", getattr(inside, name)[index], value.detach())


def _of_the_posterior(expected: Expected, model: Any) -> list[Finding]:
    log_evidence = expected.evidences(expected.alone)[0].detach()
    refusal = expected.no_posterior or ("" if log_evidence.isfinite() else INFINITE)

    def judge(posterior: vfe.Posterior) -> Iterator[Finding]:
        number = posterior.log_evidence
        if refusal:
            verdict = "right" if number.isnan() else "wrong"
            yield Finding("posterior", verdict, str(number.item()), f"a refusal: {refusal}")
            return
        yield _compared("log evidence", number, log_evidence)
        latents = [site for site in expected.spec.model if not site.observed]
        for site in latents:
            yield _compared(
                f"marginal of {site.name}", posterior.marginal(site.name), expected.marginal(expected.posterior, site)
            )
        if latents:
            yield from _of_the_draws(expected, latents, posterior.sample(3))

    return _asked("posterior", lambda: vfe.posterior(model), refusal, judge)


def _of_the_draws(expected: Expected, latents: list[SiteSpec], draws: dict[str, Tensor]) -> Iterator[Finding]:
    joint = expected.posterior
    own = [element for element in joint.axes if element not in expected.alone.missing]
    probs = marginal(joint, own)
    for n in range(3):
        values = {}
        for site in latents:
            value = draws[site.name][n]
            values[site.name] = value.argmax(-1) if site.kind == "one_hot_3" else value.long()
        index = tuple(_at(expected.spec, values[name], name, place) for name, place in own)
        if not bool(probs[index] > 0):
            yield Finding("draw", "wrong", str({name: value.tolist() for name, value in values.items()}), "possible")


def _at(spec: ProgramSpec, value: Tensor, name: str, place: Any) -> int:
    site, inside = next(site for site in spec.model if site.name == name), dict(place)
    batch = spec.batch_shape(site.plates)
    value = value.expand(batch) if value.dim() <= len(batch) else value
    for plate in spec.plates_of(site):
        value = value.narrow(plate.dim, inside[plate.name], 1)
    return int(value.reshape(()))
