"""A vertical of somebody else: pip-installed, found, checked and answered by the engine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

USE = """
from engine import Engine
from verticals import registry
from verticals.testing import check_vertical

assert "sensors" in registry.names()
vertical = registry.load("sensors", {"alarm_above": 0.4})
print(check_vertical(vertical))
with Engine() as engine:
    for model in vertical.models():
        engine.add(model, sla=vertical.sla)
    answer = engine.run(vertical.infer([vertical.example()] * 3))
assert [health.alarm for health in answer.value] == [True] * 3
assert answer.models == {"impulses": "1.0.0"}
try:
    registry.load("sensors", {"alarm_abov": 0.4})
except Exception as error:
    print(error)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The example, built and installed by pip into a folder of its own."""
    target = tmp_path_factory.mktemp("site")
    options = [
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--target",
        str(target),
    ]
    source = tmp_path_factory.mktemp("source")
    for path in (ROOT / "tests" / "example_vertical").glob("*.*"):
        (source / path.name).write_bytes(path.read_bytes())
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True)
    return target


def test_it_is_found_passes_the_kit_and_is_answered(site):
    done = subprocess.run(
        [sys.executable, "-c", USE],
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "alarm_above" in done.stdout  # the nearest known key is named


def test_what_is_not_installed_is_said():
    from engine import ConfigError
    from verticals import registry

    with pytest.raises(ConfigError, match="nowhere"):
        registry.load("nowhere")
