"""What ``plinth benchmark`` shows: tables, and the picture of latency over rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from plinth.engine.benchmark import Outcome
from plinth.pipelines.bench.search import Answer, Goal, Step
from plinth.pipelines.console import show_table

BUSY = 0.5  # load average per core from which others disturb the measurement
NEVER = "-"


def step_as_dict(step: Step) -> dict[str, Any]:
    """A step of the search, ready for JSON."""
    return {
        "rate": step.rate,
        "purpose": step.purpose,
        "verdict": step.verdict,
        "share_in_time": step.share,
        "problems": sorted({problem for trial in step.trials for problem in trial.problems}),
        "trials": [trial.detail for trial in step.trials],
    }


def answer_as_dict(answer: Answer) -> dict[str, Any]:
    """What the search found, ready for JSON."""
    return {
        "rate": answer.rate,
        "ceiling": answer.ceiling,
        "limit": answer.limit,
        "steps": [step_as_dict(step) for step in answer.steps],
    }


def sentence(answer: Answer, goal: Goal) -> str:
    """The answer in one sentence, with what it does not say."""
    promise = f"p{goal.quantile * 100:g} <= {goal.sla * 1e3:g} ms"
    if answer.rate is None:
        blame = ": the client was the limit" if answer.limit == "client" else ""
        return f"{promise} does not hold at any rate tried, down to {answer.ceiling:.1f}/s{blame}"
    limits = {
        "server": "",
        "client": "; above it the CLIENT was the limit, so the server may do more",
        "max_rate": "; no higher rate was tried, so the server may do more",
    }
    return f"{promise} holds up to {answer.rate:.1f} requests/s{limits[answer.limit]}"


def show_steps(steps: Iterable[Step]) -> None:
    """The steps as a table, in order of rate."""
    columns = (
        "rate/s",
        "",
        "verdict",
        "runs",
        "requests",
        "in time",
        "p50 ms",
        "p99 ms",
        "refused",
        "lost",
    )
    rows = [
        (
            f"{step.rate:.1f}",
            step.purpose if step.purpose == "confirm" else "",
            step.verdict,
            len(step.trials),
            sum(trial.offered for trial in step.trials),
            f"{step.share:.2%}",
            *(_worst(step, name) for name in ("p50", "p99")),
            sum(_total(trial.detail, "refused") for trial in step.trials),
            sum(_total(trial.detail, *_LOST) for trial in step.trials),
        )
        for step in sorted(steps, key=lambda step: step.rate)
    ]
    show_table("Rates", columns, rows)


_LOST = ("errors", "timeouts", "unsent", "failed")


def _total(detail: Mapping[str, Any], *names: str) -> int:
    found = [detail.get(name, 0) for name in names]
    return sum(sum(one.values()) if isinstance(one, dict) else one for one in found)


def latencies(detail: Mapping[str, Any]) -> Mapping[str, float | None]:
    """Latencies in milliseconds of the requests that were answered, by percentile."""
    found: Mapping[str, float | None] = detail.get("latency_of_ok_ms") or detail["latency_ms"]
    return found


def _worst(step: Step, name: str) -> str:
    found = [latencies(trial.detail)[name] for trial in step.trials]
    known = [value for value in found if value is not None]
    return f"{max(known):.2f}" if known else NEVER


def show_outcomes(outcomes: Sequence[Outcome]) -> None:
    """LoadGen's findings as a table."""
    columns = (
        "scenario",
        "valid",
        "samples",
        "rate/s",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "late",
        "refused",
    )
    rows = [
        (
            found.scenario,
            "yes" if found.valid else "no: " + "; ".join(found.reasons),
            found.samples,
            f"{found.rate:.1f}",
            *(
                NEVER if found.scenario == "Offline" else f"{found.latency_ms[name]:.3f}"
                for name in ("p50", "p90", "p99")
            ),
            found.late,
            sum(found.refused.values()),
        )
        for found in outcomes
    ]
    show_table("LoadGen-based figures (no MLPerf scores)", columns, rows)


def warnings(environment: Mapping[str, Any], steps: Iterable[Step] = ()) -> list[str]:
    """What a reader of the figures must know."""
    machine = environment["machine"]
    found = []
    load, threads = machine["load_average"][0], machine["usable_threads"] or 1
    if load > BUSY * threads:
        found.append(f"the machine was busy before the start: load {load} on {threads} threads")
    if (environment["software"]["commit"] or "").endswith("+changes"):
        found.append("the code differs from its commit")
    told = {problem for step in steps for trial in step.trials for problem in trial.problems}
    return found + [f"client: {problem}" for problem in sorted(told)]


def draw(path: Path, steps: Sequence[Step], goal: Goal, rate: float | None, title: str) -> None:
    """A picture: latency percentiles and the share in time over the offered rate.

    Args:
        path: of the file; its ending says the format.
        steps: whose trials are drawn, a point each.
        goal: drawn as lines.
        rate: the answer, if there is one.
        title: above it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    points = [(step.rate, trial) for step in steps for trial in step.trials]
    for name in ("p50", "p90", "p99", "p99.9"):
        known = [
            (at, value)
            for at, trial in points
            if (value := latencies(trial.detail)[name]) is not None
        ]
        _points_and_line(above, known, max, label=name)
    above.axhline(goal.sla * 1e3, color="black", linestyle="--", linewidth=1, label="SLA")
    shares = [(at, 100 * trial.in_time / max(trial.offered, 1)) for at, trial in points]
    _points_and_line(below, shares, min, color="black")
    below.axhline(100 * goal.quantile, color="black", linestyle="--", linewidth=1)
    for axes in (above, below):
        axes.grid(visible=True, which="both", alpha=0.3)
        if rate is not None:
            axes.axvline(rate, color="green", linewidth=1, label=f"holds up to {rate:.0f}/s")
    above.set_yscale("log")
    below.set_xscale("log")
    above.set_ylabel("latency of answers, ms")
    below.set_ylabel("in time, %")
    below.set_xlabel("offered requests per second")
    above.set_title(title)
    above.legend(loc="upper left")
    figure.savefig(path, dpi=120)


def _points_and_line(
    axes: Any,
    points: Sequence[tuple[float, float]],
    worst: Callable[[Iterable[float]], float],
    **style: Any,
) -> None:
    """A point for each run, and a line through the worst at each rate."""
    rates = sorted({at for at, _ in points})
    values = [worst(value for at, value in points if at == rate) for rate in rates]
    (line,) = axes.plot(rates, values, linewidth=1, **style)
    alone = [at for at, _ in points], [value for _, value in points]
    axes.plot(*alone, ".", color=line.get_color())
