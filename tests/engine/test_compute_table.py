"""The script of the table of backends and precisions runs, and keeps the lines of earlier runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "compute.py"
pytestmark = [pytest.mark.cpu, pytest.mark.slow]


@pytest.mark.soak
def test_a_quick_run_measures_the_small_model_and_keeps_other_lines(tmp_path: Path) -> None:
    kept = tmp_path / "lines.json"
    other = {"model": "ResNet-50", "rows": 1, "way": "eager/fp32", "cpu": [0.2, 0.1, 0.3]}
    kept.write_text(json.dumps([other]))
    command = [sys.executable, str(SCRIPT), "--quick", "--json", "--results", str(kept)]
    done = subprocess.run(
        [*command, "--ways", "onnxruntime/fp32"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PLINTH_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    lines = json.loads(done.stdout)["results"]
    assert lines == json.loads(kept.read_text())
    assert lines[0]["model"] == "ResNet-50", "in the order of the table"
    own = lines[1:]
    assert [(line["rows"], line["way"]) for line in own] == [
        (rows, f"{backend}/fp32") for rows in (1, 16, 128) for backend in ("eager", "onnxruntime")
    ]
    assert all(len(line["cpu"]) >= 3 and min(line["cpu"]) > 0 for line in own)
    assert all(line["off"] < 1e-3 and line["cosine"] > 0.999 for line in own)
