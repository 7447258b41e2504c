"""The cost model: seeded by warm-up, kept true by what batches really take."""

import json
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plinth.engine import ConfigError, LatencyModel

pytestmark = pytest.mark.cpu


def warmed(path=None) -> LatencyModel:
    model = LatencyModel(path)
    for rows in (1, 32, 128):
        model.seed("net", rows, 0.020 + 0.001 * rows)
    return model


def test_between_and_beyond_what_was_measured():
    model = warmed()
    assert model.predict("net", 64) == pytest.approx(0.084)
    assert model.predict("net", 200) == pytest.approx(0.220)
    assert model.predict("never seen", 8) == 0.0


@given(st.floats(0.0, 0.3))
def test_rows_within_is_the_inverse_of_predict(seconds):
    model = warmed()
    rows = model.rows_within("net", seconds, 128)
    assert rows == 0 or model.predict("net", rows) <= seconds + 1e-6
    assert rows == 128 or model.predict("net", rows + 1) > seconds - 1e-6


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_a_drift_of_the_cost_is_learned_within_some_batches(factor):
    model = warmed()
    for _ in range(64):
        model.observe("net", 64, 0.084)
    for _ in range(8):
        model.observe("net", 64, 0.084 * factor)
    assert model.predict("net", 64) == pytest.approx(0.084 * factor, rel=0.05)
    assert model.predict("net", 128, 0.5) == pytest.approx(0.148 * factor, rel=0.1)


def test_sizes_in_use_do_not_drift_off_from_the_others_under_skewed_durations():
    """Durations have a long upper tail: their mean is above the median, batch after batch."""
    model, random = warmed(), Random(0)
    for _ in range(60_000):
        rows = random.choice((1, 2, 3))
        usual = 0.020 + 0.001 * rows
        model.observe("net", rows, usual * (1 + random.expovariate(4)))
    small, large = model.predict("net", 1, 0.5), model.predict("net", 128, 0.5)
    assert small == pytest.approx(0.021 * 1.17, rel=0.1)
    assert large == pytest.approx(0.148 * 1.17, rel=0.1)
    assert model.learned("net")[1] == pytest.approx(small, rel=0.1)


def test_one_outlier_widens_the_promise_but_not_the_typical_cost():
    model = warmed()
    for batch in range(40):
        model.observe("net", 64, 0.5 if batch == 20 else 0.084)
    assert model.predict("net", 64, 0.5) == pytest.approx(0.084, rel=0.05)
    assert model.predict("net", 64, 0.99) > 0.4


def test_what_was_learned_survives_a_restart(tmp_path):
    path = tmp_path / "latency.json"
    first = warmed(path)
    for _ in range(20):
        first.observe("net", 64, 0.168)
    first.save()
    second = LatencyModel(path)
    assert second.restore() == 1
    assert second.predict("net", 64) == pytest.approx(0.168, rel=0.05)
    path.write_text("[]")
    with pytest.raises(ConfigError, match=r"latency\.json is not a latency file"):
        LatencyModel(path).restore()


def test_a_stall_adds_to_a_prediction_and_does_not_multiply_it():
    model = LatencyModel()
    for rows in (1, 128):
        model.seed("net", rows, 50e-6 * rows)
    for batch in range(100):
        model.observe("net", 1, 5e-3 if batch % 30 == 10 else 50e-6)
    assert model.predict("net", 1) == pytest.approx(5e-3, rel=0.1)
    assert model.predict("net", 128) == pytest.approx(5e-3 + 128 * 50e-6, rel=0.1)


@pytest.mark.parametrize(("rows", "stall"), [(48, 1), (1, 1), (1, 4), (128, 0.5)])
def test_a_class_nobody_measured_is_learned_whatever_its_first_batch_was(rows, stall):
    model = LatencyModel()

    def cost(rows: int) -> float:
        return 0.005 + 0.010 * rows

    model.observe("net", rows, stall * cost(rows))
    taken = []
    for batch in range(60):
        rows = max(1, model.rows_within("net", 0.060, 128, 0.5))
        taken.append(rows)
        model.observe("net", rows, cost(rows) * (0.9, 1.0, 1.2)[batch % 3])
    assert max(taken) <= 11
    assert {4, 5} >= set(taken[20:])


def test_the_file_keeps_how_far_batches_were_off_also_from_before_the_cost_changed(tmp_path):
    model = LatencyModel(tmp_path / "costs.json")
    model.seed("a", 1, 0.010)
    for number in range(200):
        model.observe("a", 1, 0.010 if number % 10 else 0.060)
    for _ in range(12):  # a shift: predictions forget what was
        model.observe("a", 1, 0.004)
    assert model.predict("a", 1, 0.5) == pytest.approx(0.004, rel=0.2)
    model.save()
    told = json.loads(model.path.read_text())
    assert told["seconds"]["a"]["1"] == pytest.approx(0.010, rel=0.2)
    assert max(told["delays"]["a"]) == pytest.approx(0.050, rel=0.2)


def test_the_file_knows_of_what_is_rare_and_how_rare_it_is(tmp_path):
    model = warmed(tmp_path / "costs.json")
    for n in range(20_000):
        model.observe("net", 32, 0.052 + 0.0001 * (n % 7) + (0.070 if n % 50 == 7 else 0.0))
    for _ in range(300):  # the last seconds were calm
        model.observe("net", 32, 0.052)
    model.save()
    delays = json.loads((tmp_path / "costs.json").read_text())["delays"]["net"]
    assert len(delays) == 512
    assert 4 <= sum(delay > 0.060 for delay in delays) <= 18
    for n in range(1000):
        model.observe(f"net[{n}]", 32, 0.052)
        for _ in range(110):
            model.turned(f"net[{n}]", 0.001)
    model.turned("unknown", 0.001)
    model.save()
    told = json.loads((tmp_path / "costs.json").read_text())
    assert len(told["delays"]["net"]) == 101, "of many keys, less is kept"
    assert told["turns"].keys() == told["seconds"].keys()
    assert told["turns"]["net"] == []
    assert told["turns"]["net[7]"] == [0.001] * 101
