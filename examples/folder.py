"""Analyse a folder of CT studies from Python; run it again to go on where it was stopped.

python examples/folder.py studies results
"""

import sys
from pathlib import Path

from plinth import Engine
from plinth.medical import CtAnalysis
from plinth.pipelines.console import start_logging
from plinth.pipelines.folders.batch import Batch


def main() -> None:
    """Analyse every study below the first folder; reports go below the second."""
    start_logging(debug=False)  # as the commands do: libraries quote headers when they warn
    studies, results = Path(sys.argv[1]), Path(sys.argv[2])
    vertical = CtAnalysis()
    with Engine() as engine:
        for model in vertical.models():
            engine.add(model, batch_range=(1, 4))
        summary = Batch(vertical, engine, studies, results).run()
    for name, state in summary.states.items():
        print(name, state, results / name / "report.html")
    sys.exit(summary.exit_code)


if __name__ == "__main__":
    main()
