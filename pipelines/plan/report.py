"""A plan as a table, and as a picture."""

from __future__ import annotations

from pathlib import Path

from plinth.pipelines.console import say, show_table
from plinth.pipelines.plan.planner import Plan, Question, rows_of


def show(found: Plan, question: Question) -> None:
    """Print the points and the answer."""
    asked = question.patient
    heads = ["lanes", "in time %", "gained", "p50 ms", "p99 ms", "p99.9 ms", "busy %"]
    heads += [] if asked is None else [asked.noun, "gained"]
    rows = []
    for each in rows_of(found):
        gained, more = each["in_time_gained"], each["jobs_gained"]
        row = [str(each["lanes"]), f"{100 * each['in_time']:.2f}"]
        row.append("" if gained is None else f"{100 * gained:+.2f}")
        row += [f"{each[name]:.1f}" for name in ("p50", "p99", "p999")]
        row.append(f"{100 * each['busy']:.0f}")
        if asked is not None:
            row.append(f"{each['jobs']:,.0f}")
            row.append("" if more is None else f"{more:+,.0f}")
        rows.append(row)
    show_table("Plan", heads, rows)
    say(_answer(found, question))


def _answer(found: Plan, question: Question) -> str:
    promise = f"{question.rate:,.0f}/s within {question.deadline * 1e3:g} ms"
    if question.patient is not None:
        promise += f" and {question.patient.jobs:,.0f} {question.patient.noun}"
    if found.needed is None:
        return f"none of these numbers of lanes holds {promise}"
    told = f"{found.needed} {'lane holds' if found.needed == 1 else 'lanes hold'} {promise}"
    if found.separate is not None and found.saved is not None:
        urgent, patient = found.separate
        told += f"; separate pools take {urgent} + {patient}, so sharing saves "
        told += f"{100 * found.saved:.0f} %"
    return told


def draw(path: Path, found: Plan, question: Question) -> None:
    """A picture: the share in time and the background work done, over the lanes.

    Args:
        path: of the file; its ending says the format.
        found: what is drawn.
        question: drawn as lines.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    lanes = [each.lanes for each in found.points]
    above.plot(lanes, [100 * each.in_time for each in found.points], ".-", label="in time")
    above.plot(lanes, [100 * each.busy for each in found.points], ".-", label="busy")
    above.axhline(100 * question.quantile, color="black", linestyle="--", linewidth=1)
    above.set_ylabel("%")
    above.legend()
    for name, label in (("p50", "p50"), ("p99", "p99"), ("p999", "p99.9")):
        below.plot(lanes, [getattr(each, name) for each in found.points], ".-", label=label)
    below.axhline(1e3 * question.deadline, color="black", linestyle="--", linewidth=1)
    below.set_ylabel("latency of answers, ms")
    below.set_xlabel("lanes")
    below.legend()
    for axes in (above, below):
        axes.grid(visible=True, alpha=0.3)
        if found.needed is not None:
            axes.axvline(found.needed, color="green", linewidth=1)
    figure.savefig(path, dpi=120)
