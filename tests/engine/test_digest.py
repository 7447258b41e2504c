"""What stands for a model in caches that outlive a process."""

from __future__ import annotations

import importlib
import sys
import threading

import pytest
import torch
from torch import nn

from plinth.engine.models.digest import digest, lasting_digest, structure_digest
from plinth.engine.models.families.registry import families

pytestmark = pytest.mark.cpu

NET = """
from torch import nn
import helpers
from helpers import Scale, add_one

class Net(nn.Module):
    offsets = [0.0]

    def __init__(self):
        super().__init__()
        self.scale = Scale()

    def forward(self, x):
        return self.scale(add_one(x)) + self.offsets[0] + helpers.TABLE["y"] + helpers.last(x)
"""
HELPERS = """
import torch

TABLE = {"x": 1.0, "y": 2.0}

def add_one(x):
    return x + one()

def one():
    return 1

def last(x):
    return x[..., -1:]

class Scale(torch.nn.Module):
    factor = 2.0

    def forward(self, x):
        return self.factor * x
"""


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The network after changes to the sources of its two modules."""

    def build(*changes: tuple[str, str]) -> nn.Module:
        for name, text in (("net", NET), ("helpers", HELPERS)):
            for old, new in changes:
                text = text.replace(old, new)
            (tmp_path / f"{name}.py").write_text(text)
            monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        return importlib.import_module("net").Net()

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield build
    for name in ("net", "helpers"):
        sys.modules.pop(name, None)


def test_a_lasting_digest_is_the_same_for_the_same_sources(made):
    assert lasting_digest(made()) == lasting_digest(made()) is not None


@pytest.mark.parametrize(
    "change",
    [
        ("return 1", "return 3"),  # a function that a function of another file calls
        ('"y": 2.0', '"y": 2.5'),  # a table of another file
        ("factor = 2.0", "factor = 4.0"),  # a class of another file
        ("offsets = [0.0]", "offsets = [0.5]"),
        ("x[..., -1:]", "x[..., :1]"),  # by the name of its module
        ("2.0}", "float('2')}"),  # the same value: the same answer
    ],
)
def test_a_lasting_digest_follows_code_into_other_files(made, change):
    same = lasting_digest(made())
    assert (lasting_digest(made(change)) == same) is (change[0] == "2.0}")


@pytest.mark.parametrize(
    "change",
    [
        ("return 1", "from math import floor\n    return floor(1.5)"),
        ("TABLE =", "import threading\nTABLE = {'lock': threading.Lock()} |"),
    ],
)
def test_what_cannot_be_read_has_no_lasting_digest(made, change):
    assert lasting_digest(made(change)) is None


def test_a_lock_counts_as_itself_alone():
    net = nn.Linear(2, 2)
    net.guard = threading.Lock()
    assert digest(net) == digest(net)
    assert lasting_digest(net) is None


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_every_family_has_a_lasting_digest(family):
    one, same, other = (family.model(family.small, seed=seed).module for seed in (0, 0, 1))
    assert lasting_digest(one) == lasting_digest(same) is not None
    assert digest(one) == digest(same)
    assert lasting_digest(one) != lasting_digest(other)


def test_models_of_one_structure_differ_in_the_values_of_tensors_alone():
    one, same, wide = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 3)
    assert digest(one) != digest(same)
    assert structure_digest(one) == structure_digest(same) is not None
    assert structure_digest(one.double()) != structure_digest(same) != structure_digest(wide)
    assert structure_digest(nn.Dropout(0.1)) != structure_digest(nn.Dropout(0.2))
    same.guard = threading.Lock()
    assert structure_digest(same) is None


def test_weights_behind_a_weak_reference_are_read():
    torch.manual_seed(0)
    one = nn.GRU(3, 4)
    other = nn.GRU(3, 4)
    other.load_state_dict(one.state_dict())
    assert digest(one) == digest(other)
