"""``plinth optimize`` ends in a variant that an engine serves."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from plinth.engine import Model, ModelStore
from plinth.pipelines.cli.main import app

pytestmark = pytest.mark.slow


def test_a_torch_module_of_ones_own_becomes_a_faster_variant(tmp_path, monkeypatch):
    monkeypatch.setenv("PLINTH_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 4)).eval()
    rows = torch.randn(32, 256)
    store = ModelStore(tmp_path / "store")
    store.add(Model.from_torch(module, example=rows, name="own"))
    np.savez(tmp_path / "rows.npz", **{store.list()[0].inputs[0].name: rows.numpy()})
    options = ["--data", str(tmp_path / "rows.npz"), "--store", str(store.root)]
    limits = ["--max-loss", "0.01", "--backend", "onnxruntime"]
    drawn = ["--picture", str(tmp_path / "curve.png"), "--json"]
    done = CliRunner().invoke(app, ["optimize", "own", *options, *limits, *drawn])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["default"] == store.variants("own").default
    assert {p["backend"] for p in told["points"]} == {"onnxruntime"}
    assert all(v["evidence"]["held_out"] == 16 for v in told["variants"])
    assert (tmp_path / "curve.png").stat().st_size > 1000
    shown = CliRunner().invoke(app, ["models", "show", "own", "--store", str(store.root)])
    assert shown.exit_code == 0, shown.output
    assert "onnxruntime" in shown.output
