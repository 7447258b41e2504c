"""Tables and a plot from what run.py wrote.

    python benchmarks/serving/report.py build/serving/results.json --plot out.png

Figures are medians over the rounds; where two stand in brackets, the lowest and the highest.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

Run = dict[str, Any]
Figure = Callable[[Run], float | None]
NONE = "–"


def latency(name: str) -> Figure:
    """A percentile of the time that answers (2xx) took, ms."""

    def figure(run: Run) -> float | None:
        found: float | None = run["load"]["latency_of_ok_ms"][name]
        return found

    return figure


def per_cent(count: str) -> Figure:
    """A count as a share of the requests offered."""
    return lambda run: 100 * run[count] / max(run["load"]["offered"], 1)


def middle(runs: Iterable[Run], figure: Figure, digits: int = 0, *, span: bool = False) -> str:
    """The median of a figure over runs, with its range if asked for."""
    values = sorted(value for run in runs if (value := figure(run)) is not None)
    if not values:
        return NONE
    text = f"{median(values):.{digits}f}"
    return text + f" [{values[0]:.{digits}f}, {values[-1]:.{digits}f}]" if span else text


def at(entry: dict[str, Any], multiple: float) -> list[Run]:
    """The runs of a server at one multiple of its capacity."""
    return [run for run in entry["runs"] if run["multiple"] == multiple]


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def goodput(results: dict[str, Any], multiples: list[float]) -> str:
    """Answers in time per second, by multiple."""
    head = ["server", "version", "capacity /s", *(f"in time /s at {m:g}×" for m in multiples)]
    rows = [
        [
            *(name, entry["version"], f"{entry['capacity']:.0f}"),
            *(middle(at(entry, m), lambda run: run["goodput"], span=True) for m in multiples),
        ]
        for name, entry in measured(results)
    ]
    return table(head, rows)


def same_rates(results: dict[str, Any]) -> str:
    """Answers in time per second, and their p99, at the same offered rates."""
    rates = results["settings"]["rates"]

    def cell(entry: dict[str, Any], rate: float) -> str:
        runs = [run for run in entry["same_rates"] if run["rate"] == rate]
        if not runs:
            return NONE
        good = middle(runs, lambda run: run["goodput"])
        return f"{good} ({middle(runs, latency('p50'), 1)} / {middle(runs, latency('p99'), 1)})"

    rows = [[name, *(cell(entry, rate) for rate in rates)] for name, entry in measured(results)]
    return table(["server", *(f"{rate:g}/s" for rate in rates)], rows)


def details(results: dict[str, Any], multiple: float) -> str:
    """Latency, what was not answered, and cost at one multiple."""
    figures: list[tuple[str, Figure, int]] = [
        ("in time %", lambda run: 100 * run["share_in_time"], 1),
        ("p50 ms", latency("p50"), 1),
        ("p99 ms", latency("p99"), 1),
        ("rejected %", per_cent("rejections"), 1),
        ("errors %", per_cent("errors"), 2),
        ("given up %", per_cent("timeouts"), 1),
        ("CPU ms / request", lambda run: run["cpu_ms_per_request"], 2),
        ("PSS MB", lambda run: run["pss_mb"], 0),
        ("RSS MB", lambda run: run["rss_mb"], 0),
    ]
    rows = [
        [name, *(middle(at(entry, multiple), figure, digits) for _, figure, digits in figures)]
        for name, entry in measured(results)
    ]
    return table(["server", *(name for name, _, _ in figures)], rows)


def measured(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Servers with runs, the highest capacity first, Plinth before all."""
    found = [(name, entry) for name, entry in results["servers"].items() if entry["runs"]]
    return sorted(found, key=lambda pair: (pair[0] != "plinth", -pair[1]["capacity"]))


def remarks(results: dict[str, Any]) -> Iterable[str]:
    """What failed, and runs that say little because the client was the limit."""
    for name, entry in results["servers"].items():
        yield from (f"- {name}: {failure}" for failure in entry["failures"])
        for run in entry["runs"]:
            where = f"- {name}, round {run['round'] + 1}, {run['multiple']:g}×"
            yield from (f"{where}: {problem}" for problem in run["load"]["problems"])


def page(results: dict[str, Any]) -> str:
    """The whole report as Markdown."""
    settings = results["settings"]
    multiples = settings["multiples"]
    pinned = {
        side: " ".join(map(str, settings[f"{side}_cores"])) or "any"
        for side in ("server", "client")
    }
    machine, software = results["machine"], results["software"]
    parts = [
        f"{results['time'][:10]}, commit {software['commit']}, {machine['cpu']}, "
        f"{machine['threads']} cores, {machine['memory_bytes'] / 1e9:.0f} GB, "
        f"{software['system']}, Python {software['python']}, torch {software['torch']}; server on "
        f"core {pinned['server']}, client on core {pinned['client']}; SLA {settings['sla_ms']} ms, "
        f"{settings['rounds']} rounds of {settings['seconds']:g} s, "
        f"{results['measured_seconds'] / 60:.0f} minutes.",
        goodput(results, multiples),
        "The same rate offered to all: in time /s (p50 / p99, ms); – was not tried, since the "
        "server had broken down at the rate before:\n\n" + same_rates(results),
        *(f"At {m:g}× its own capacity:\n\n{details(results, m)}" for m in multiples),
        "Settings:\n\n"
        + "\n".join(f"- {name}: {entry['settings']}" for name, entry in results["servers"].items()),
    ]
    found = list(remarks(results))
    if found:
        parts.append("Failures and doubts:\n\n" + "\n".join(found))
    return "\n\n".join(parts) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Answers in time over offered load, both as shares of each server's own capacity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, entry in measured(results):
        multiples = sorted({run["multiple"] for run in entry["runs"]})
        shares = [median(r["goodput"] for r in at(entry, m)) / entry["capacity"] for m in multiples]
        label = f"{name} ({entry['capacity']:.0f}/s)"
        axes.plot(multiples, shares, marker="o", lw=3 if name == "plinth" else 1.5, label=label)
    axes.set_xlabel("offered load / capacity")
    axes.set_ylabel(f"answers within {results['settings']['sla_ms']} ms / capacity")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Print the report; draw the plot if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    results = json.loads(given.results.read_text())
    print(page(results))
    if given.plot is not None:
        plot(results, given.plot)


if __name__ == "__main__":
    main()
