"""LoadGen itself: its settings, its start, and the results in its log."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from plinth.engine.errors import ConfigError

Issue = Callable[[Sequence[Any]], None]
"""Takes LoadGen's queries, each with an ``id`` and the ``index`` of a sample."""

_MARK = ":::MLLOG "
_WANTED = ("result_", "early_stopping_", "error_", "loadgen_version")


def module() -> Any:
    """The Python module of LoadGen.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import mlperf_loadgen
    except ModuleNotFoundError:
        raise ConfigError(
            "LoadGen is not installed", hint="pip install 'plinth-engine[benchmark]'"
        ) from None
    return mlperf_loadgen


def settings(scenario: str, seconds: float, queries: int, seed: int) -> Any:
    """LoadGen's settings of a performance test.

    Args:
        scenario: as LoadGen spells it.
        seconds: at least so long.
        queries: at least so many.
        seed: of its three random generators.
    """
    lg = module()
    made = lg.TestSettings()
    made.scenario = getattr(lg.TestScenario, scenario)
    made.mode = lg.TestMode.PerformanceOnly
    made.min_duration_ms = max(1, int(1e3 * seconds))
    made.min_query_count = queries
    made.qsl_rng_seed = seed
    made.sample_index_rng_seed = seed + 1
    made.schedule_rng_seed = seed + 2
    return made


def start(settings: Any, issue: Issue, samples: int, folder: Path | None) -> dict[str, Any]:
    """Run a test to its end.

    Args:
        settings: from :func:`settings`.
        issue: called from LoadGen's threads.
        samples: how many there are to draw from.
        folder: where the logs are kept; ``None`` keeps none.

    Returns:
        LoadGen's results by the names in its log.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="plinth-loadgen-") as made:
            return start(settings, issue, samples, Path(made))
    folder.mkdir(parents=True, exist_ok=True)
    lg = module()
    logs = lg.LogSettings()
    logs.log_output.outdir = str(folder)
    logs.enable_trace = False
    sut = lg.ConstructSUT(issue, lambda: None)
    library = lg.ConstructQSL(samples, samples, lambda numbers: None, lambda numbers: None)
    try:
        lg.StartTestWithLogSettings(sut, library, settings, logs, "")
    finally:
        lg.DestroyQSL(library)
        lg.DestroySUT(sut)
    return read(folder / "mlperf_log_detail.txt")


def complete(ids: Iterable[int]) -> None:
    """Tell LoadGen that queries are answered."""
    lg = module()
    lg.QuerySamplesComplete([lg.QuerySampleResponse(one, 0, 0) for one in ids])


def read(log: Path) -> dict[str, Any]:
    """Results by name from LoadGen's detailed log, which has one JSON object a line."""
    found: dict[str, Any] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        if line.startswith(_MARK):
            entry = json.loads(line.removeprefix(_MARK))
            if entry["key"].startswith(_WANTED):
                found[entry["key"]] = entry["value"]
    return found
