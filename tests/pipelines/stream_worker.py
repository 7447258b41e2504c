"""A worker process for crash tests: ``stream_worker.py '<StreamConfig as JSON>' [finance [...]]``.

Behind ``finance`` may stand its settings as JSON.

Prints one JSON line of progress per commit, and the summary at the end. SIGTERM stops it.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from dataclasses import asdict
from typing import Any

from tally import TallyVertical, started_engine

import plinth.pipelines.stream.worker as stream
from plinth.verticals.finance import FraudScoring, FraudSettings


def main() -> None:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    stream.PROGRESS_S = 0.0
    vertical: Any = TallyVertical()
    if sys.argv[2:3] == ["finance"]:
        vertical = FraudScoring(FraudSettings.model_validate_json((*sys.argv[3:], "{}")[0]))
    config = stream.StreamConfig.model_validate_json(sys.argv[1])

    def tell(progress: stream.StreamProgress) -> None:
        print(json.dumps(asdict(progress)), flush=True)

    with started_engine(vertical) as engine:
        summary = stream.run(vertical, engine, config, stop, tell)
    print(json.dumps({"summary": summary.as_dict()}), flush=True)


if __name__ == "__main__":
    main()
