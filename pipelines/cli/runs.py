"""The long commands: streams and batches with their live views and signals."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from plinth.compiled import how_hot_code_runs
from plinth.engine import ConfigError, Engine
from plinth.engine.lanes.fork_server import offered
from plinth.engine.models.store import choose_store
from plinth.pipelines.assembly import STREAM_ROWS, doors, load_vertical, running, sla_of
from plinth.pipelines.config.settings import Config
from plinth.pipelines.console import err, say, show_json, show_table
from plinth.pipelines.folders.batch import Batch, Carry, Summary
from plinth.pipelines.folders.batch import Progress as Step
from plinth.pipelines.folders.carrier import Carrier, own_engine, shares_of
from plinth.pipelines.folders.storage import check_folders
from plinth.pipelines.interpreter import STREAM_THRESHOLDS, frozen, set_for_serving
from plinth.pipelines.live.models import AnyVertical
from plinth.pipelines.live.tables import LiveTables
from plinth.pipelines.observability.tracing import batch_span, tracing_while
from plinth.pipelines.process import Signals, metrics_at
from plinth.verticals import registry


def run_stream(config: Config, name: str, metrics: str | None, as_json: bool) -> int:
    """``plinth stream``: returns the exit code.

    Args:
        config: has a ``[stream]`` table.
        name: of the vertical.
        metrics: ``host:port`` for Prometheus, or ``None``.
        as_json: print the summary as JSON.

    Raises:
        ConfigError: no ``[stream]`` table, or no broker.
    """
    if config.stream is None:
        raise ConfigError(
            "the stream has no topics",
            hint="add a [stream] table, or give --input-topic and --output-topic",
        )
    from plinth.pipelines.stream import worker as stream

    vertical = load_vertical(config, name)
    live = LiveTables(config, {name: vertical})
    stop = threading.Event()

    def on_progress(progress: Any) -> None:
        _stream_line(progress)
        live.look()

    with (
        Signals(stop.set).handled(),
        metrics_at(metrics) as url,
        tracing_while(os.environ) as tracing,
        running(config, {name: vertical}, follow=True, rows=STREAM_ROWS) as engine,
        set_for_serving(STREAM_THRESHOLDS),
    ):
        say(f"streaming {config.stream.input_topic} -> {config.stream.output_topic}")
        say(f"hot code: {how_hot_code_runs()}")
        if url is not None:
            say(f"metrics: {url}")
        summary = stream.run(
            vertical,
            engine,
            config.stream,
            stop,
            on_progress,
            sla=sla_of(vertical, config),
            tracing=tracing,
        )
    if as_json:
        show_json(summary.as_dict())
    else:
        show_table("Stream", ("", ""), summary.as_dict().items())
    return 0


def run_rebuild(config: Config, name: str, wanted: str) -> int:
    """``plinth stream --replay``: prints each decision made again; 1 if one is another now.

    Args:
        config: has a ``[stream]`` table.
        name: of the vertical.
        wanted: a value of one of the answer's fields, such as its id; ``*`` for all answers.

    Raises:
        ConfigError: no ``[stream]`` table, no broker, or no such answer.
        StreamError: the records are not retained any more.
    """
    if config.stream is None:
        raise ConfigError(
            "the stream has no topics",
            hint="add a [stream] table, or give --input-topic and --output-topic",
        )
    from plinth.pipelines.stream.history.rebuild import has_value, rebuild

    vertical = load_vertical(config, name)
    equal = count = 0
    why: Counter[str] = Counter()
    with (
        running(config, {name: vertical}, rows=STREAM_ROWS) as engine,
        set_for_serving(STREAM_THRESHOLDS),
    ):
        found = rebuild(
            vertical,
            engine,
            config.stream,
            has_value(wanted),
            sla=sla_of(vertical, config),
            features=wanted != "*",
        )
        for one in found:
            count += 1
            equal += one.equal
            why.update(one.why[:1])
            if wanted != "*" or not one.equal:
                show_json(one.as_dict())
    say(f"{equal:,} of {count:,} decisions are the same again, bit for bit")
    for reason, times in why.most_common(10):
        say(f"{times:,} differ: {reason}")
    return 0 if equal == count else 1


def _stream_line(progress: Any) -> None:
    say(
        f"{progress.records:,} records, {progress.dead_letters:,} dead letters, "
        f"lag {progress.lag:,}, {progress.partitions} partitions"
    )


def batch_words(words: Sequence[str]) -> tuple[str | None, Path | None]:
    """Vertical and folder of ``plinth batch [VERTICAL] [FOLDER]``; one word is the folder.

    Raises:
        ConfigError: more than two words, or a vertical where the folder is missing.
    """
    if len(words) > 2:
        raise ConfigError(
            f"batch takes a vertical and a folder, not {len(words)} words",
            hint="plinth batch VERTICAL FOLDER --out DIR; quote a name with spaces",
        )
    if not words:
        return None, None
    *vertical, folder = words
    if not vertical and folder in registry.names() and not Path(folder).is_dir():
        raise ConfigError(
            f"{folder} is a vertical; the folder is missing",
            hint=f"plinth batch {folder} FOLDER --out DIR",
        )
    return (vertical[0] if vertical else None), Path(folder)


def run_batch(config: Config, as_json: bool, early: Any = None) -> int:
    """``plinth batch``: returns the exit code.

    Args:
        config: names the folders.
        as_json: print the summary as JSON.
        early: what :func:`plinth.pipelines.folders.early.begin` gave.

    Raises:
        ConfigError: folders or vertical are not named or not there.
    """
    settings = config.batch
    if settings.input is None or settings.output is None:
        missing = "input folder" if settings.input is None else "output folder"
        raise ConfigError(
            f"the batch has no {missing}",
            hint="plinth batch VERTICAL FOLDER --out DIR, or a [batch] table",
        )
    check_folders(settings.input, settings.output)
    name = settings.vertical or only_folder_vertical()
    vertical = load_vertical(config, name)
    with contextlib.ExitStack() as stack:
        stack.enter_context(choose_store(config.models.store))
        stack.enter_context(offered(early))
        engine, carry = stack.enter_context(_batch_engine(config, vertical))
        view = stack.enter_context(BatchView())
        tracing = stack.enter_context(tracing_while(os.environ))
        job = Batch(
            vertical,
            engine,
            settings.input,
            settings.output,
            sla=replace(sla_of(vertical, config), deadline_ms=None),
            workers=settings.workers,
            processes=settings.processes,
            carry=carry,
            resume=settings.resume,
            retry_failed=settings.retry_failed,
            on_progress=view.show,
            within=stack.enter_context(batch_span(tracing, name, os.environ)),
        )
        signals = stack.enter_context(Signals(lambda: _abort(job, engine)).handled())
        summary = job.run()
    if as_json:
        show_json(summary.as_dict())
    else:
        show_summary(summary)
        say(f"results: {settings.output}")
    return signals.exit_code or summary.exit_code


@contextlib.contextmanager
def _batch_engine(config: Config, vertical: AnyVertical) -> Iterator[tuple[Engine, Carry | None]]:
    """The engine of a batch, and what carries whole items where that is for its processes."""
    processes = config.batch.processes
    own = shares_of(config, processes) if processes else None
    if own is None:
        steps = config.engine.model_copy(update={"compute_workers": processes})
        config = config.model_copy(update={"engine": steps})
        with (
            running(config, {vertical.name: vertical}, follow=True, steps_soon=True) as engine,
            frozen(),
        ):
            yield engine, None
        return
    with (
        contextlib.closing(vertical),
        Engine(device="cpu", threads=1, compute_workers=processes) as engine,
    ):
        carrier = Carrier(engine, vertical, own_engine, (own, vertical.name))
        carrier.prepare()
        yield engine, carrier.carry


def _abort(job: Batch, engine: Engine) -> None:
    """Stop now: what is in work is done again next time."""
    job.stop()
    engine.close(drain=False)


def only_folder_vertical() -> str:
    """The one vertical that reads folders.

    Raises:
        ConfigError: there is none, or several.
    """
    able = [
        one.name
        for one in registry.describe()
        if one.error is None and "folder" in doors(registry.find(one.name))
    ]
    if len(able) != 1:
        raise ConfigError(
            f"which vertical? these read folders: {', '.join(able) or 'none'}",
            hint="name it: plinth batch VERTICAL FOLDER --out DIR",
        )
    return able[0]


def show_summary(summary: Summary) -> None:
    """The failed items, and how many of what."""
    if summary.failed:
        rows = [
            (entry.id, (entry.error or {}).get("reason"), (entry.error or {}).get("message"))
            for entry in summary.failed
        ]
        show_table("Failed", ("item", "reason", "message"), rows)
    counts = summary.as_dict()
    keys = ("found", "done", "skipped", "failed", "open", "seconds")
    show_table("Batch", keys, [[counts[key] for key in keys]])


class BatchView:
    """A progress bar on a terminal, a line per finished item elsewhere; all on stderr."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[now]}"),
            console=err,
            disable=not err.is_terminal,
        )
        self._task = self._bar.add_task("batch", total=None, now="")
        self._total = self._done = 0

    def __enter__(self) -> BatchView:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def show(self, step: Step) -> None:
        """Show one step of the batch."""
        if step.kind == "found":
            self._total = step.total
            self._bar.update(self._task, total=step.total)
        elif step.kind == "stage":
            self._bar.update(self._task, now=f"{step.stage} {step.item}")
        else:
            self._done += 1
            self._bar.update(self._task, advance=1)
            if not err.is_terminal:
                say(f"{self._done}/{self._total} {step.item}: {step.state}")
