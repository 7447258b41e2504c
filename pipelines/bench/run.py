"""One ``plinth benchmark``: its options, the runs, and the report."""

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
from plinth.pipelines.bench.over_http import HttpSut, documented_body, read_bodies, read_headers
from plinth.pipelines.bench.search import Answer, Goal, Search, Step, Trial
from plinth.pipelines.config.settings import load
from plinth.pipelines.console import FAILED, OK, need_matplotlib, say, show_json

LONGEST = 60.0  # seconds of one run, unless more was asked for; bounds the lowest rate tried
QUANTILE = 0.99


@dataclass(frozen=True)
class Options:
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
class Result:
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


def run(options: Options, as_json: bool) -> int:
    """``plinth benchmark``: returns the exit code.

    Raises:
        ConfigError: an option makes no sense, or the target is not there.
    """
    if options.plot is not None:
        need_matplotlib()
    machine = environment.describe()
    over_http = options.target.startswith(("http://", "https://"))
    result = _over_http(options) if over_http else _in_process(options)
    warnings = report.warnings(machine, result.steps)
    if options.plot is not None:
        _draw(options.plot, options.target, result)
    if as_json:
        show_json(_as_dict(options, machine, result, warnings))
    else:
        _show(options, result)
    for warning in warnings:
        say(f"warning: {warning}")
    return OK if result.good else FAILED


def _draw(path: Path, title: str, result: Result) -> None:
    if result.goal is None or not result.steps:
        say("no picture: there are no rates to draw, only scenarios")
        return
    found = result.answer.rate if result.answer else None
    report.draw(path, result.steps, result.goal, found, title)


def _as_dict(
    options: Options, machine: dict[str, Any], result: Result, warnings: list[str]
) -> dict[str, Any]:
    answer = result.answer
    return {
        "target": options.target,
        "held": result.good,
        "goal": dataclasses.asdict(result.goal) if result.goal else None,
        "warnings": warnings,
        "scenarios": [outcome.as_dict() for outcome in result.outcomes],
        "search": report.answer_as_dict(answer) if answer else None,
        "steps": [] if answer else [report.step_as_dict(step) for step in result.steps],
        "settings": options.as_dict(),
        "environment": machine,
    }


def _show(options: Options, result: Result) -> None:
    if result.outcomes:
        report.show_outcomes(result.outcomes)
    if result.steps:
        report.show_steps(result.steps)
    if result.answer is not None and result.goal is not None:
        say(f"{options.target}: {report.sentence(result.answer, result.goal)}")


def _over_http(options: Options) -> Result:
    if options.sla_ms is None:
        raise ConfigError("a URL brings no promise", hint="give one with --sla-ms")
    if options.scenarios:
        raise ConfigError(
            "scenarios are LoadGen's, in process", hint="leave out --scenario for a URL"
        )
    headers = read_headers(options.headers)
    bodies = read_bodies(options.bodies)
    if not bodies:
        posts = options.method.upper() == "POST"
        bodies = [documented_body(options.target, headers) if posts else b""]
    sut = HttpSut(
        url=options.target,
        bodies=bodies,
        headers={"content-type": options.content_type, **headers},
        method=options.method,
        timeout=options.timeout,
        warm_up=options.warm_up,
        connections=options.connections,
        processes=options.processes,
    )
    sut.try_once()
    goal = Goal(options.sla_ms / 1e3, options.quantile or QUANTILE, options.confidence)
    return _rates(options, goal, partial(sut.trial, goal))


def _in_process(options: Options) -> Result:
    for name in options.scenarios:
        if name not in SCENARIOS:
            raise ConfigError(f"there is no scenario {name!r}", hint=nearest(name, SCENARIOS))
    changes = {"deadline_ms": options.sla_ms, "quantile": options.quantile}
    overrides = {"engine.device": options.device, "engine.precision": options.precision}
    prepared = prepare(
        load(options.config_file, overrides=overrides),
        options.target,
        options.bodies,
        {name: value for name, value in changes.items() if value is not None},
    )
    chosen = options.scenarios or SCENARIOS
    deadline = prepared.sla.deadline_ms
    if deadline is None and "server" in options.scenarios:
        raise ConfigError(
            f"{options.target} promises no deadline", hint="give one with --sla-ms for server"
        )
    with prepared.engine:
        outcomes = tuple(
            _scenario(options, prepared, name)
            for name in chosen
            if name != "server" or (options.rate is not None and deadline is not None)
        )
        if "server" not in chosen or options.rate is not None or deadline is None:
            return Result(None, outcomes)
        goal = Goal(deadline / 1e3, prepared.sla.quantile, options.confidence)
        found = _rates(options, goal, prepared.trial)
    return dataclasses.replace(found, outcomes=outcomes)


def _scenario(options: Options, prepared: Prepared, name: str) -> Outcome:
    say(f"{name}: at least {options.seconds:g} s")
    return prepared.scenario(
        name,
        rate=options.rate or options.start_rate,
        seconds=options.seconds,
        seed=options.seed,
        folder=options.logs,
    )


def _rates(options: Options, goal: Goal, measure: Callable[[float, float, int], Trial]) -> Result:
    """One rate, or the search; ``measure`` takes rate, seconds and seed."""

    def trial(rate: float, number: int) -> Trial:
        # Numbers count the trials, so each has arrivals of its own and a run can be made again.
        seconds = max(options.seconds, goal.enough() / rate)
        return measure(rate, seconds, options.seed + number)

    search = Search(
        trial,
        goal,
        start=options.rate or options.start_rate,
        least=options.rate or goal.enough() / max(LONGEST, options.seconds),
        most=options.rate or options.max_rate or math.inf,
        repeats=options.repeats,
        confirm=0 if options.rate else options.confirm,
        on_step=_tell,
    )
    answer = search.run()
    return Result(goal, steps=answer.steps, answer=None if options.rate else answer)


def _tell(step: Step) -> None:
    say(f"{step.rate:.1f}/s: {step.verdict}, {step.share:.2%} in time")
