"""Which versions of the model a process has: the champion that answers, a challenger beside it.

The engine knows them by two names: ``fraud`` and ``fraud-challenger``, each with its cheaper
variant. A flow keeps to the version it began with, so no decision is made by two. When another
version becomes the champion, it is (or is first made) ready under the second name; flows that begin
from then on ask it there, and once those that began before have ended it takes over the first
name. Nothing is unloaded that a flow may still ask.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, NamedTuple

import orjson
import torch

from plinth.engine import (
    ConfigError,
    Flow,
    Model,
    ModelError,
    ModelSpec,
    ModelStore,
    PlinthError,
    Timing,
)
from plinth.engine.compression.packed_layers import unpack_layers
from plinth.engine.files import replace_file
from plinth.verticals.finance.decisions.reasons import Groups
from plinth.verticals.finance.decisions.rules import Action
from plinth.verticals.finance.features.columns import Columns
from plinth.verticals.finance.features.program import Program
from plinth.verticals.finance.features.timeline import NEVER
from plinth.verticals.finance.settings import STORE, FraudSettings
from plinth.verticals.finance.succession.challenger import Promotion, Shadow, Thresholds
from plinth.verticals.finance.succession.champion import NAME, WINDOW, Champion
from plinth.verticals.finance.succession.drift import DriftWatch, Reference
from plinth.verticals.finance.succession.probation import Probation

log = logging.getLogger(__name__)

SECOND = f"{NAME}-challenger"
CONSIDER_S = 10.0
"""Seconds between two looks at what the challenger has shown."""
AGAIN_S = 60.0
"""Seconds until a model is tried again that could not be loaded."""
REPORT = "challenger.json"


class Variant(NamedTuple):
    """A model that may answer, and from which scores on its answers matter."""

    model: str
    version: str
    review: float
    decline: float
    digest: str

    @property
    def thresholds(self) -> Thresholds:
        """Both of them."""
        return Thresholds(self.review, self.decline)

    def stricter(self, action: Action, score: float) -> Action:
        """What the rules ask for, or the score, whichever is stricter."""
        if action == "decline" or score >= self.decline:
            return "decline"
        return "review" if action == "review" or score >= self.review else "approve"


@dataclass(slots=True, eq=False)
class Serving:
    """One version, ready to answer.

    Args:
        asked_as: names of the model and its cheaper variant in the engine.
        variants: the model and its cheaper variant.
        columns: what it sees of the features.
        reasons: groups of them.
        drift: what its payments are held against, if the store says.
        trained_until: event time of the newest payment it was trained on, milliseconds.
        flows: that began with it and have not ended, whatever thread they run on.
        probation: counts what it declines, once it answers.
    """

    asked_as: tuple[str, ...]
    variants: tuple[Variant, ...]
    columns: Columns
    reasons: Groups
    drift: DriftWatch | None
    trained_until: int = NEVER
    flows: set[object] = field(default_factory=set)
    probation: Probation = field(default_factory=lambda: Probation(None))

    @property
    def name(self) -> str:
        """Of its model in the engine."""
        return self.asked_as[0]

    @property
    def version(self) -> str:
        """Of the model."""
        return self.variants[0].version


class Versions:
    """The champion and the challenger of a process.

    A flow reads ``serving`` and ``shadow`` when it begins; all else is called by whoever follows
    the store, on one thread.

    Args:
        settings: of the vertical.
        clock: seconds.
        features: that are computed.
    """

    def __init__(
        self, settings: FraudSettings, clock: Callable[[], float], features: Program
    ) -> None:
        self._given, self._features = settings, features
        self._clock = clock
        self._rule = settings.promotion
        self.champion = Champion(settings.store or STORE)
        self.shadow: Shadow | None = None
        self.report: dict[str, Any] | None = None
        self._considered = -inf
        self._told: tuple[str, ...] = ()
        self.load()

    def load(self) -> list[Model]:
        """The champion and its cheaper variant, under the first name; what it was before is gone.

        Raises:
            ModelError: not in the store, damaged, or not of this kind.
            ConfigError: the thresholds contradict each other.
        """
        version = self._given.model_version or self.champion.version()
        self.serving, models = self._read(version, NAME)
        self.serving.probation = self._probation(self.serving.version)
        self._ready = {NAME: self.serving}
        self._asked: tuple[str, str] | None = None
        self._again = -inf
        self._coming: Serving | None = None
        return models

    def _read(self, version: str | None, name: str) -> tuple[Serving, list[Model]]:
        store = ModelStore(self.champion.store)
        main = store.load(NAME, version)
        unpack_layers(main.module)  # half a megabyte, and eager torch takes two thirds of the time
        main = main.pinned()
        models = [main]
        if main.spec.cheaper:
            same = main.spec.version in store.versions(main.spec.cheaper)
            other = store.load(main.spec.cheaper, main.spec.version if same else None)
            models.append(other.pinned())
        version = main.spec.version
        facts, told = store.facts(NAME, version), f"{NAME} {version}"
        columns = Columns.of(self._features, facts, told)
        width = len(columns.names)
        variants = tuple(self._variant(model, place, width) for place, model in enumerate(models))
        found = Reference.read(facts, told, columns.names)
        alarms = self._given.drift_alarm, self._given.missing_labels_alarm
        drift = None if found is None else DriftWatch(found, *alarms, columns)
        until = _trained_until(facts, told)
        named = _renamed(models, name)
        asked_as = tuple(model.spec.name for model in named)
        return Serving(asked_as, variants, columns, Groups(columns), drift, until), named

    def _variant(self, model: Model, place: int, width: int) -> Variant:
        spec, given = model.spec, self._given
        if spec.inputs[0].shape != (width,):
            raise ModelError(
                f"{spec.name} {spec.version} takes {spec.inputs[0].shape} features, not {width}",
                hint="train it again; both models of a version see the same",
            )
        with torch.inference_mode():
            answer = model.module(torch.zeros(1, width))
        if answer.shape != (1, 2) or answer[0, 1] != place:
            raise ModelError(
                f"{spec.name} {spec.version} gave {tuple(answer.shape)} for one row of "
                f"{width} features, expected probability and variant {place}",
                hint="train it with python -m plinth.verticals.finance.training.train",
            )
        review = _threshold(spec, "review_threshold", given.review_threshold)
        decline = _threshold(spec, "decline_threshold", given.decline_threshold)
        if decline < review:
            raise ConfigError(
                f"decline_threshold {decline:g} is below review_threshold {review:g} "
                f"for {spec.name}",
                hint="set both",
            )
        return Variant(spec.name, spec.version, review, decline, model.digest())

    @contextmanager
    def asked(self) -> Iterator[Serving]:
        """What a flow asks that begins now; it stays loaded until the flow has ended.

        A flow says that it is there, then looks whether another version has taken over; who
        replaces models lets the other take over first, then looks whether a flow is there.
        """
        flow = object()
        while True:
            serving = self.serving
            serving.flows.add(flow)  # one step of the interpreter, so no thread's is lost
            if serving is self.serving:
                break
            serving.flows.discard(flow)
        try:
            yield serving
        finally:
            serving.flows.discard(flow)

    # -- following the store ---------------------------------------------------------------
    def take_over(self, settings: FraudSettings) -> None:
        """The rule of promotion in new settings."""
        self._rule = settings.promotion

    def next_models(self) -> list[Model]:
        """Models that the engine is to load now; :meth:`loaded` is called once it has.

        Raises:
            PlinthError: what is asked for cannot be read; it is asked for again in a minute, or
                when something else is.
        """
        self._watch()
        self._consider()
        wanted = self._wanted()
        now = self._clock()
        if wanted is None or (wanted == self._asked and now < self._again):
            return []
        name, version = wanted
        if name in self._ready and self._ready[name].flows:
            return []
        self._asked, self._again = wanted, now + AGAIN_S
        self._ready.pop(name, None)
        if name == SECOND:
            self.shadow = None
        self._coming, models = self._read(version, name)
        return models

    def loaded(self) -> None:
        """The engine has the models of :meth:`next_models`: use them."""
        coming, self._coming, self._asked = self._coming, None, None
        if coming is None:
            return
        self._ready[coming.name] = coming
        if coming.name == NAME:
            coming.probation = self.serving.probation
            self.serving = coming
        elif coming.version != self._champion():
            now, given = self.serving.variants[0], self._given
            both = now.thresholds, coming.variants[0].thresholds
            memory = given.challenger_payments, given.challenger_share
            since = max(self.serving.trained_until, coming.trained_until)
            self.shadow = Shadow(coming.name, both, *memory, since, coming.columns)
            log.info("%s %s scores beside %s, in shadow", NAME, coming.version, now.version)

    def _champion(self) -> str:
        return self._given.model_version or self.champion.version() or self.serving.version

    def _wanted(self) -> tuple[str, str] | None:
        """Name and version of the next model to load."""
        champion, second = self._champion(), self._ready.get(SECOND)
        if self.serving.name != NAME:
            return NAME, self.serving.version
        if champion != self.serving.version:
            if second is None or second.version != champion:
                return SECOND, champion
            log.info("%s %s answers from now on, after %s", NAME, champion, self.serving.version)
            second.probation = self._probation(champion)
            self.serving, self.shadow = second, None
            return NAME, champion
        version = self._given.challenger
        if version == "newest":
            version = self.champion.newest_challenger(champion)
        elif version in self.champion.rolled_back():
            version = None
        if version in (None, champion):
            self.shadow = None
            return None
        if self.shadow is not None and second is not None and second.version == version:
            return None
        return SECOND, str(version)

    # -- the challenger --------------------------------------------------------------------
    def background(self) -> Flow[None] | None:
        """Score in shadow what waits for it."""
        return None if self.shadow is None else self.shadow.flow()

    def background_done(self, timing: Timing) -> None:
        """Note what that took."""
        if self.shadow is not None:
            self.shadow.cost(timing.device)

    def _probation(self, version: str) -> Probation:
        """Of a version that is about to answer."""
        if self._given.model_version is not None:
            return Probation(None)
        changes = (line for line in self.champion.decisions() if line["to"] != line["from"])
        to_it = [line for line in changes if line["to"] == version]
        return Probation.of(to_it[-1] if to_it else None, self._rule)

    def _watch(self) -> None:
        """Take a version back that declines far more than it did in shadow."""
        serving = self.serving
        figures = serving.probation.exceeded()
        if figures is None:
            return
        serving.probation = Probation(None)
        try:
            before = self.champion.take_back(serving.version, {"probation": figures})
        except PlinthError as error:
            log.error("%s %s cannot be taken back: %s", NAME, serving.version, error)
            before = None
        log.error(
            "%s %s declines %.3g of %d payments by its score, at most %.3g is allowed by what it "
            "showed in shadow; %s",
            NAME, serving.version, figures["decline_share"], figures["payments"],
            figures["at_most"], f"{before} answers again" if before else "it answers on",
        )  # fmt: skip

    def _consider(self) -> None:
        """Hold the challenger against the rule; promote it when all of it holds."""
        now, shadow, second = self._clock(), self.shadow, self._ready.get(SECOND)
        if shadow is None or second is None or now - self._considered < CONSIDER_S:
            return
        self._considered = now
        rule = self._rule or Promotion()
        figures = shadow.figures(rule.label_days)
        unmet = rule.unmet(figures)
        champion = self.serving.version
        self.report = report = {
            "champion": champion,
            "challenger": second.version,
            "process": os.getpid(),
            "time": now,
            "figures": figures,
            "rule": rule.model_dump() if self._rule else None,
            "unmet": unmet,
        }
        try:
            path = self.champion.store / NAME / REPORT
            replace_file(path, orjson.dumps(report, option=orjson.OPT_INDENT_2))
            if self._rule is not None and not unmet and self._champion() == champion:
                why = {"rule": report["rule"], "figures": figures}
                self.champion.promote(second.version, by="rule", champion=champion, why=why)
        except (OSError, PlinthError) as error:
            if self._told != (told := (type(error).__name__, str(error))):
                log.error("what the challenger has shown cannot be written: %s", error)
            self._told = told


def _threshold(spec: ModelSpec, name: str, given: float | None) -> float:
    """A threshold of the settings, else the model's own.

    Raises:
        ConfigError: there is none, or it is no probability, so that it would hold for no score.
    """
    found = spec.metrics.get(name) if given is None else given
    if found is None or not 0 <= found <= 1:
        told = "has no" if found is None else f"has {found:g} as its"
        raise ConfigError(
            f"{spec.name} {spec.version} {told} {name}",
            hint=f"set verticals.finance.{name}, or train it again",
        )
    return found


def _trained_until(facts: Mapping[str, Any], model: str) -> int:
    """Event time of the newest payment that a version was trained on, if the store says.

    Raises:
        ModelError: it says no time.
    """
    window = facts.get(WINDOW)
    if window is None:
        return NEVER
    until = window.get("to") if isinstance(window, dict) else None
    if not isinstance(until, int):
        raise ModelError(f"{model}: {WINDOW}.to: expected milliseconds", hint="train it again")
    return until


def _renamed(models: Sequence[Model], name: str) -> list[Model]:
    """Models as the engine is to know them: a name, and the name of its cheaper variant."""
    if name == NAME:
        return list(models)
    names = [name, f"{name}-lite"][: len(models)]
    cheaper = [*names[1:], None]
    return [
        replace(model, spec=model.spec.model_copy(update={"name": own, "cheaper": other}))
        for model, own, other in zip(models, names, cheaper, strict=True)
    ]
