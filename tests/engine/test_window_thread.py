"""Windows are put together beside the lanes while promises are in use, and lose nothing by it."""

import threading

import pytest
import torch
from torch import nn

from plinth.engine import Call, Engine, Sla, Tiling
from plinth.engine.lanes import window_thread
from plinth.engine.tiling import WindowMerger
from tests.engine.lane_models import net, rows

WAIT = 60
URGENT = Sla(deadline_ms=30_000)
VOLUME = torch.arange(1 * 6 * 8 * 8, dtype=torch.float32).reshape(1, 6, 8, 8)


class Identity3d(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


@pytest.fixture
def engine():
    with Engine(device="cpu", threads=1) as made:
        made.add(net("volume", Identity3d(), shape=(1, 4, 4, 4)), batch_range=(1, 4))
        made.add(net(), batch_range=(1, 4), sla=URGENT)
        yield made


def volume() -> Call:
    tiling = Tiling(window=(4, 4, 4), overlap=0.5, activation="none", reduce="none")
    return Call("volume", VOLUME, tiling)


@pytest.fixture
def putters(monkeypatch):
    """The threads that put windows together; held up until ``go`` is set."""
    go, names, put = threading.Event(), [], WindowMerger.put

    def held(self, outputs):
        names.append(threading.current_thread().name)
        go.wait(WAIT)
        put(self, outputs)

    monkeypatch.setattr(WindowMerger, "put", held)
    return go, names


def test_an_urgent_row_never_waits_for_windows_to_be_put_together(engine, putters):
    go, names = putters
    patient = engine.submit(volume(), Sla())
    assert torch.equal(engine.submit(Call("net", rows(1, 2))).result(WAIT).value, 2 * rows(1, 2))
    assert not patient.done()
    go.set()
    assert torch.allclose(patient.result(WAIT).value, VOLUME)
    assert set(names) == {"plinth-windows"}


def test_what_was_accepted_is_put_together_before_the_engine_ends(engine, putters):
    go, names = putters
    patient = engine.submit(volume(), Sla())
    closing = threading.Thread(target=engine.close)
    closing.start()
    go.set()
    closing.join(WAIT)
    assert torch.allclose(patient.result(0).value, VOLUME)
    assert not any(each.name == "plinth-windows" for each in threading.enumerate())
    engine.start()
    assert torch.allclose(engine.submit(volume(), Sla()).result(WAIT).value, VOLUME)
    assert set(names) == {"plinth-windows"}


def test_what_is_too_much_to_hold_is_put_together_by_the_lane(engine, putters, monkeypatch):
    go, names = putters
    go.set()
    monkeypatch.setattr(window_thread, "MAX_BYTES", 0)
    assert torch.allclose(engine.submit(volume(), Sla()).result(WAIT).value, VOLUME)
    assert set(names) == {"plinth-device"}


def test_the_engine_closes_from_a_callback_of_a_volume(engine, putters):
    putters[0].set()
    patient, closed = engine.submit(volume(), Sla()), threading.Event()
    patient.add_done_callback(lambda _: (engine.close(), closed.set()))
    assert closed.wait(WAIT)
    assert torch.allclose(patient.result(0).value, VOLUME)
    engine.close()
    assert engine.state == "closed"
