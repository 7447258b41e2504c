"""Backends are found through an entry point, whoever wrote them; each says why it cannot run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from plinth.engine import ConfigError
from plinth.engine.backends import Backend, registry
from plinth.engine.devices.hardware import HARDWARE, hardware

pytestmark = pytest.mark.cpu
SOURCE = Path(__file__).resolve().parent.parent / "example_backend"
OURS = {"eager", "inductor", "aotinductor", "onnxruntime", "openvino"}

USE = """
import torch
from torch import nn
from plinth.engine import Engine, Call, Model, ModelSpec, TensorSpec

spec = ModelSpec(
    name="net",
    inputs=(TensorSpec(name="input", shape=(4,)),),
    outputs=(TensorSpec(name="y", shape=(2,)),),
)
module = nn.Linear(4, 2).eval()

def infer(rows):
    return (yield Call("net", rows))

with Engine(device="cpu", backend="traced") as engine:
    engine.add(Model(spec, module))
    rows = torch.randn(5, 4)
    torch.testing.assert_close(engine.run(infer(rows)).value, module(rows).detach())
    assert engine.status()["models"]["net"]["backend"] == "traced"
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Runs Python, or a command of Plinth, where the example's distribution is installed."""
    folder = tmp_path_factory.mktemp("backend")
    source = shutil.copytree(SOURCE, folder / "source")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    target = ["--no-build-isolation", "--target", folder / "site", source]
    subprocess.run([*install, *target], check=True)
    env = os.environ | {"PYTHONPATH": str(folder / "site")}

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_every_backend_of_plinth_is_found_and_says_its_version_or_why_not():
    lines = {line.name: line for line in registry.listings()}
    assert set(lines) >= OURS
    for line in lines.values():
        assert (line.version is None) != (line.reason is None), line
    assert all(isinstance(backend, Backend) for backend in registry.backends().values())


def test_somebody_elses_backend_is_listed_beside_ours_and_a_broken_one_stops_nobody(installed):
    found = json.loads(installed("-m", "plinth", "backends", "--json"))
    lines = {line["name"]: line for line in found["backends"]}
    assert set(lines) >= OURS | {"traced", "broken"}
    assert lines["traced"]["distribution"] == "plinth-traced 2.0.0"
    assert lines["traced"]["reason"] is None
    assert "cannot be imported: AttributeError" in lines["broken"]["reason"]


def test_somebody_elses_backend_runs_a_model_of_the_engine(installed):
    installed("-c", USE)


def test_what_is_not_there_is_refused_with_the_reason(monkeypatch):
    with pytest.raises(ConfigError, match="did you mean 'openvino'"):
        registry.find("openvin")
    monkeypatch.setattr("plinth.engine.backends.base.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed: openvino .*plinth-engine\[openvino\]"):
        registry.find("openvino")
    tried, reasons = registry.automatic()
    assert [backend.name for backend in tried] == ["eager"]
    assert set(reasons) == {"onnxruntime", "openvino"}


@pytest.mark.cpu
def test_eight_kinds_of_hardware_are_listed_each_with_devices_or_a_reason():
    found = {kind.hardware.name: kind for kind in hardware()}
    assert len(found) == len(HARDWARE) == 8
    assert found["CPU"].devices == ("cpu",)
    for kind in found.values():
        assert bool(kind.devices) == (kind.reason is None), kind
    assert "not installed: torch_xla" in found["TPU / XLA"].reason
    assert "torch_npu" in found["Ascend / torch-npu"].reason
