"""One ``plinth benchmark``: what was wished for, the runs, and the report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from plinth.engine.benchmark import Outcome
from plinth.engine.errors import ConfigError, nearest
from plinth.pipelines.bench import environment, report
from plinth.pipelines.bench.in_process import SCENARIOS, Prepared, prepare
from plinth.pipelines.bench.over_http import HttpSubject, documented_body, read_bodies, read_headers
from plinth.pipelines.bench.search import Answer, Goal, Search, Step, Trial
from plinth.pipelines.config.settings import load
from plinth.pipelines.console import FAILED, OK, say, show_json

LONGEST = 60.0  # seconds of one run, unless more was asked for; bounds the lowest rate tried
QUANTILE = 0.99


@dataclass(frozen=True)
class Wishes:
    """The arguments of the command, in the units of its options."""

    target: str
    scenarios: tuple[str, ...] = ()
    sla_ms: float | None = None
    quantile: float | None = None
    rate: float | None = None
    start_rate: float = 50.0
    max_rate: float | None = None
    seconds: float = 10.0
    repeats: int = 3
    confirm: int = 2
    confidence: float = 0.95
    seed: int = 0
    bodies: tuple[Path, ...] = ()
    headers: tuple[str, ...] = ()
    content_type: str = "application/json"
    method: str = "POST"
    connections: int | None = None
    processes: int = 1
    timeout: float = 10.0
    warm_up: float = 1.0
    plot: Path | None = None
    logs: Path | None = None
    config_file: Path | None = None
    device: str | None = None
    precision: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; of headers only the names, since their values may be keys."""
        said = dataclasses.asdict(self)
        said["headers"] = [line.partition(":")[0].strip() for line in self.headers]
        said["bodies"] = [str(path) for path in self.bodies]
        paths = {name: str(value) for name, value in said.items() if isinstance(value, Path)}
        return said | paths


@dataclass(frozen=True)
class Findings:
    """What came out: LoadGen's outcomes, steps, and the search's answer if there was one."""

    goal: Goal | None
    outcomes: tuple[Outcome, ...] = ()
    steps: tuple[Step, ...] = ()
    answer: Answer | None = None

    @property
    def good(self) -> bool:
        """Every scenario is valid and the promise holds, at some rate or at the one asked for."""
        if self.answer is not None:
            held = self.answer.rate is not None
        else:
            held = all(step.verdict == "held" for step in self.steps)
        return held and all(outcome.valid for outcome in self.outcomes)


def run(wishes: Wishes, as_json: bool) -> int:
    """``plinth benchmark``: returns the exit code.

    Raises:
        ConfigError: a wish makes no sense, or the target is not there.
    """
    if wishes.plot is not None:
        report.need_matplotlib()
    machine = environment.describe()
    over_http = wishes.target.startswith(("http://", "https://"))
    findings = _over_http(wishes) if over_http else _in_process(wishes)
    warnings = report.warnings(machine, findings.steps)
    if wishes.plot is not None:
        _draw(wishes.plot, wishes.target, findings)
    if as_json:
        show_json(_as_dict(wishes, machine, findings, warnings))
    else:
        _show(wishes, findings)
    for warning in warnings:
        say(f"warning: {warning}")
    return OK if findings.good else FAILED


def _draw(path: Path, title: str, findings: Findings) -> None:
    if findings.goal is None or not findings.steps:
        say("no picture: there are no rates to draw, only scenarios")
        return
    found = findings.answer.rate if findings.answer else None
    report.draw(path, findings.steps, findings.goal, found, title)


def _as_dict(
    wishes: Wishes, machine: dict[str, Any], findings: Findings, warnings: list[str]
) -> dict[str, Any]:
    answer = findings.answer
    return {
        "target": wishes.target,
        "held": findings.good,
        "goal": dataclasses.asdict(findings.goal) if findings.goal else None,
        "warnings": warnings,
        "scenarios": [outcome.as_dict() for outcome in findings.outcomes],
        "search": report.answer_as_dict(answer) if answer else None,
        "steps": [] if answer else [report.step_as_dict(step) for step in findings.steps],
        "settings": wishes.as_dict(),
        "environment": machine,
    }


def _show(wishes: Wishes, findings: Findings) -> None:
    if findings.outcomes:
        report.show_outcomes(findings.outcomes)
    if findings.steps:
        report.show_steps(findings.steps)
    if findings.answer is not None and findings.goal is not None:
        say(f"{wishes.target}: {report.sentence(findings.answer, findings.goal)}")


def _over_http(wishes: Wishes) -> Findings:
    if wishes.sla_ms is None:
        raise ConfigError("a URL brings no promise", hint="give one with --sla-ms")
    if wishes.scenarios:
        raise ConfigError(
            "scenarios are LoadGen's, in process", hint="leave out --scenario for a URL"
        )
    headers = read_headers(wishes.headers)
    bodies = read_bodies(wishes.bodies)
    if not bodies:
        posts = wishes.method.upper() == "POST"
        bodies = [documented_body(wishes.target, headers) if posts else b""]
    subject = HttpSubject(
        url=wishes.target,
        bodies=bodies,
        headers={"content-type": wishes.content_type, **headers},
        method=wishes.method,
        timeout=wishes.timeout,
        warm_up=wishes.warm_up,
        connections=wishes.connections,
        processes=wishes.processes,
    )
    subject.try_once()
    goal = Goal(wishes.sla_ms / 1e3, wishes.quantile or QUANTILE, wishes.confidence)
    return _rates(wishes, goal, partial(subject.trial, goal))


def _in_process(wishes: Wishes) -> Findings:
    for name in wishes.scenarios:
        if name not in SCENARIOS:
            raise ConfigError(f"there is no scenario {name!r}", hint=nearest(name, SCENARIOS))
    changes = {"deadline_ms": wishes.sla_ms, "quantile": wishes.quantile}
    overrides = {"engine.device": wishes.device, "engine.precision": wishes.precision}
    prepared = prepare(
        load(wishes.config_file, overrides=overrides),
        wishes.target,
        wishes.bodies,
        {name: value for name, value in changes.items() if value is not None},
    )
    chosen = wishes.scenarios or SCENARIOS
    deadline = prepared.sla.deadline_ms
    if deadline is None and "server" in wishes.scenarios:
        raise ConfigError(
            f"{wishes.target} promises no deadline", hint="give one with --sla-ms for server"
        )
    with prepared.engine:
        outcomes = tuple(
            _scenario(wishes, prepared, name)
            for name in chosen
            if name != "server" or (wishes.rate is not None and deadline is not None)
        )
        if "server" not in chosen or wishes.rate is not None or deadline is None:
            return Findings(None, outcomes)
        goal = Goal(deadline / 1e3, prepared.sla.quantile, wishes.confidence)
        found = _rates(wishes, goal, prepared.trial)
    return dataclasses.replace(found, outcomes=outcomes)


def _scenario(wishes: Wishes, prepared: Prepared, name: str) -> Outcome:
    say(f"{name}: at least {wishes.seconds:g} s")
    return prepared.scenario(
        name,
        rate=wishes.rate or wishes.start_rate,
        seconds=wishes.seconds,
        seed=wishes.seed,
        folder=wishes.logs,
    )


def _rates(wishes: Wishes, goal: Goal, measure: Callable[[float, float, int], Trial]) -> Findings:
    """One rate, or the search; ``measure`` takes rate, seconds and seed."""

    def trial(rate: float, number: int) -> Trial:
        # Numbers count the trials, so each has arrivals of its own and a run can be made again.
        seconds = max(wishes.seconds, goal.enough() / rate)
        return measure(rate, seconds, wishes.seed + number)

    search = Search(
        trial,
        goal,
        start=wishes.rate or wishes.start_rate,
        least=wishes.rate or goal.enough() / max(LONGEST, wishes.seconds),
        most=wishes.rate or wishes.max_rate or math.inf,
        repeats=wishes.repeats,
        confirm=0 if wishes.rate else wishes.confirm,
        on_step=_tell,
    )
    answer = search.run()
    return Findings(goal, steps=answer.steps, answer=None if wishes.rate else answer)


def _tell(step: Step) -> None:
    say(f"{step.rate:.1f}/s: {step.verdict}, {step.share:.2%} in time")
