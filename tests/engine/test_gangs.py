"""Gangs: a model on several processes gives what it gives whole, and none of them ends alone."""

import os
import signal
import tempfile
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from plinth.engine import Call, ConfigError, Engine, ModelError, ModelStore, Sla
from plinth.engine.errors import OutOfMemory
from plinth.engine.gang.exchange import Exchange, GroupLost
from plinth.engine.gang.pipeline import Pipeline
from plinth.engine.gang.plan import MAX_RANKS, ParallelPlan, Place, parse
from plinth.engine.gang.steps import shared_out, steps_of
from plinth.engine.gang.tensor import check
from plinth.engine.lanes.gang import GangLane
from plinth.engine.models.families import find
from tests.engine.lane_models import RAISE, STOP, doubles, net, rows

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("importable")]
WAIT = 120
PATIENT = Sla(deadline_ms=100_000)
NIGHTLY = Sla(deadline_ms=600_000)


# -- plans ------------------------------------------------------------------------------------
def test_a_plan_gives_every_rank_a_place_of_its_own():
    plan = ParallelPlan(replicas=2, pipeline=3, tensor=2)
    places = [plan.place(rank) for rank in range(plan.ranks)]
    assert len(set(places)) == plan.ranks == 12
    assert places[:4] == [Place(0, 0, 0), Place(0, 0, 1), Place(0, 1, 0), Place(0, 1, 1)]
    assert [rank for rank in range(12) if plan.answers(rank)] == [4, 10]


@pytest.mark.parametrize(
    ("factors", "match"),
    [
        ({"tensor": 0}, "replicas=1 x pipeline=1 x tensor=0: every factor"),
        ({"pipeline": 2.0}, "replicas=1 x pipeline=2.0 x tensor=1: every factor"),
        ({"replicas": True}, "replicas=True x pipeline=1 x tensor=1: every factor"),
        (
            {"replicas": 5, "tensor": 13},
            f"replicas=5 x pipeline=1 x tensor=13 makes 65 ranks, at most {MAX_RANKS}",
        ),
    ],
)
def test_a_wrong_plan_is_refused_with_every_factor(factors, match):
    with pytest.raises(ConfigError, match=match):
        ParallelPlan(**factors)


def test_a_plan_for_more_devices_than_there_are_is_refused_with_every_factor():
    with pytest.raises(ConfigError, match=r"pipeline=2 x tensor=4 needs 8 devices .* there are 4"):
        ParallelPlan(pipeline=2, tensor=4).fit_devices("cuda", 4)


def test_the_name_of_a_lane_says_the_plan():
    assert parse("gang:cpu:tensor=2") == ("cpu", ParallelPlan(tensor=2))
    assert parse("gang:cuda:pipeline=2,tensor=4")[1] == ParallelPlan(pipeline=2, tensor=4)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("gang:cpu", "is no gang, expected gang:DEVICE:FACTOR=NUMBER"),
        ("gang:cpu:tensor=2,", "is no gang"),
        ("gang:cpu:tenser=2", "tenser is no factor.*tensor"),
        ("gang:cpu:tensor=2,tensor=2", "tensor comes twice"),
        ("gang:cpu:tensor=99999999999999", "makes 999999 ranks"),
        ("gang:tpu:tensor=2", "tpu"),
    ],
)
def test_a_lane_of_another_name_is_refused(name, match):
    with pytest.raises(ConfigError, match=match):
        Engine(devices=[name])


def test_a_backend_that_torch_has_not_for_the_device_is_refused_at_the_start():
    with pytest.raises(ConfigError, match=r"communication_backend is 'nccl'.* for cpu"):
        Engine(devices=["gang:cpu:tensor=2"], modes={"communication_backend": "nccl"})


# -- what a model can be cut into -------------------------------------------------------------
def test_heads_that_do_not_divide_and_models_without_heads_are_refused():
    check(find("bert").model(find("bert").small).module, 2, "bert")
    llama = find("llama").model(find("llama").small).module
    with pytest.raises(ModelError, match="has 1 heads of keys, which tensor=2 does not divide"):
        check(llama, 2, "llama")
    with pytest.raises(ModelError, match="has 32 inner width, which tensor=3 does not divide"):
        check(llama, 3, "llama")
    with pytest.raises(ModelError, match="no layers that tensor=2 could share out"):
        check(nn.Linear(2, 2), 2, "net")


def test_fewer_steps_than_stages_and_models_that_are_no_sequence_are_refused():
    with pytest.raises(ModelError, match="has 2 steps, fewer than pipeline=3"):
        steps_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), 3, "net")
    with pytest.raises(ModelError, match="no sequence of steps"):
        steps_of(net().module, 2, "net")


def test_stages_are_neighbours_and_the_largest_is_as_small_as_can_be():
    steps = [nn.Linear(1, n, bias=False) for n in (50, 10, 10, 10, 30, 30, 5)]
    cut = shared_out(steps, 3)
    assert [each for stage in cut for each in stage] == steps
    assert [sum(each.out_features for each in stage) for stage in cut] == [60, 50, 35]
    assert [len(each) for each in shared_out(steps[:3], 3)] == [1, 1, 1]


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama"])
def test_the_steps_of_a_text_model_give_what_it_gives_bit_for_bit(name):
    model = find(name).model(find(name).small)
    given = model.rows(3)
    state = (given["input_ids"], given["attention_mask"])
    with torch.inference_mode():
        for step in steps_of(model.module, 2, name):
            state = step(*state)
        want = model.run(given)
    assert state.keys() == want.keys()
    assert all(torch.equal(state[key], want[key]) for key in want)


# -- one rank in this process -----------------------------------------------------------------
@pytest.fixture
def alone():
    """A group of one rank."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", f"file://{folder}/meet", rank=0, world_size=1)
        yield dist.group.WORLD
        dist.destroy_process_group()


def test_rows_of_any_number_are_padded_to_a_compiled_shape_and_cut_off_again(alone):
    steps = [nn.Linear(4, 4), nn.ReLU()]
    made = Pipeline(steps, 0, 1, alone, torch.device("cpu"), lambda x: (x,))
    with torch.inference_mode():
        for count in (8, 3, 1, 7, 8, 13, 2):
            given = rows(count, count)
            (found,) = made.run((given,), 4)
            torch.testing.assert_close(found, steps[1](steps[0](given)))
    schedule = made._schedules[(((8, 4), torch.float32),), 4]
    with pytest.raises(ModelError, match="a schedule for 8x4 float32 was given 4x4 float32"):
        schedule.run((rows(1, 4),))  # torch gives wrong rows here: what it received before


def test_a_step_that_raises_or_changes_the_number_of_rows_is_its_batchs_alone(alone, tmp_path):
    bad = doubles(tmp_path).module
    made = Pipeline([bad], 0, 1, alone, torch.device("cpu"), lambda x: (x,))
    for _ in range(2):  # of a new shape, and of a known one
        with pytest.raises(ValueError, match="4111"):
            made.run((torch.full((2, 4), RAISE),), 2)
        assert torch.equal(made.run((rows(1, 2),), 2)[0], 2 * rows(1, 2))
    fewer = Pipeline([nn.Identity()], 0, 1, alone, torch.device("cpu"), lambda x: (x[:1],))
    with pytest.raises(ModelError, match=r"4 rows went into the pipeline, .* came out"):
        fewer.run((rows(1, 4),), 2)


def test_micro_batches_take_turns_in_one_order_and_all_end_when_one_fails(alone):
    exchange = Exchange(alone, torch.device("cpu"), 3)
    seen: list[int] = []

    def work(number: int) -> int:
        for _ in range(1 + number):
            seen.append(number)
            exchange.sum(torch.ones(1))
        return number

    assert exchange.in_turns([lambda n=n: work(n) for n in range(3)]) == [0, 1, 2]
    assert seen == [0, 1, 2, 1, 2, 2]
    seen.clear()

    def fails() -> int:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        exchange.in_turns([fails, lambda: work(1), lambda: work(2)])
    assert seen == [1, 2, 1, 2, 2]
    exchange.agree(False)
    exchange.agree(True)
    exchange.ranks = 2
    with pytest.raises(GroupLost, match="raised on 1 ranks alone"):
        exchange.agree(True)
    exchange.close()


# -- under an engine --------------------------------------------------------------------------
def stored(folder: Path, family: str, **changed):
    model = find(family).model({**find(family).small, **changed})
    store = ModelStore(folder)
    store.save(model.spec, model.module)
    return store.load(family)


def gang(engine: Engine) -> GangLane:
    (lane,) = (thread.lane for thread in engine._lanes.threads)
    assert isinstance(lane, GangLane)
    return lane


def right(engine: Engine, model, count: int) -> None:
    given = model.rows(count)
    found = engine.submit(Call(model.spec.name, given), PATIENT).result(WAIT).value
    want = model.run(given)
    found = found if isinstance(found, dict) else {model.spec.outputs[0].name: found}
    for key, value in want.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A text model on two processes, each of which has half of its heads."""
    model = stored(tmp_path_factory.mktemp("store"), "bert")
    with Engine(devices=["gang:cpu:tensor=2"], threads=1, hung_seconds=3.0) as engine:
        engine.add(model, batch_range=(1, 8))
        yield engine, model


def test_half_of_the_heads_in_each_process_give_what_the_whole_gives(bert):
    engine, model = bert
    for count in (1, 2, 7, 20):
        right(engine, model, count)
    (lane,) = engine.status()["lanes"]
    assert (lane["kind"], lane["state"]) == ("gang", "running")
    whole = sum(each.nbytes for each in model.module.state_dict().values())
    assert all(whole / 2 < held < 0.65 * whole for held in lane["weights_by_rank"])
    assert len(set(gang(engine).pids)) == 2


def test_a_model_that_does_not_fit_the_plan_is_refused_and_nothing_else_is_harmed(bert, tmp_path):
    engine, model = bert
    with pytest.raises(ModelError, match="1 heads of keys, which tensor=2 does not divide"):
        engine.add(stored(tmp_path, "llama"))
    with pytest.raises(ModelError, match="no layers that tensor=2 could share out"):
        engine.add(doubles(tmp_path))
    right(engine, model, 3)
    assert engine.status()["lanes"][0]["deaths"] == 0


@pytest.mark.parametrize(
    "by", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.soak)]
)
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.soak)])
def test_the_end_of_one_rank_ends_all_and_loses_nothing(bert, by, rank):
    engine, model = bert
    right(engine, model, 3)  # a batch of unknown cost would have 120 s to hang in
    before, pids = engine.status()["lanes"][0]["deaths"], gang(engine).pids
    given = model.rows(3)
    asked = [engine.submit(Call("bert", given), PATIENT) for _ in range(20)]
    os.kill(pids[rank], by)
    asked += [engine.submit(Call("bert", given), PATIENT) for _ in range(20)]
    want = model.run(given)
    for one in asked:
        torch.testing.assert_close(one.result(WAIT).value["tokens"], want["tokens"])
    assert engine.status()["lanes"][0]["deaths"] == before + 1
    assert not set(gang(engine).pids) & set(pids)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("plan", "family", "changed"),
    [
        ("pipeline=2", "gpt2", {"depth": 3}),
        ("pipeline=2,tensor=2", "llama", {"key_heads": 2}),
        ("replicas=2", "ft-transformer", {}),
        ("replicas=2,tensor=2", "vit", {}),
        ("tensor=3", "gpt2", {"heads": 3, "width": 18, "vocabulary": 61}),
    ],
)
def test_every_plan_gives_what_the_whole_gives(tmp_path, plan, family, changed):
    model = stored(tmp_path, family, **changed)
    with Engine(devices=[f"gang:cpu:{plan}"], threads=1) as engine:
        engine.add(model, batch_range=(1, 8))
        for count in (1, 3, 8, 21):
            right(engine, model, count)
        assert engine.status()["lanes"][0]["deaths"] == 0


@pytest.mark.soak
def test_a_model_larger_than_the_budget_of_a_process_runs_on_two(tmp_path):
    model = stored(tmp_path, "bert", width=64, inner=512, vocabulary=8000)
    whole = sum(each.nbytes for each in model.module.state_dict().values())
    with Engine(devices=["gang:cpu:tensor=2"], threads=1, memory_budget=int(0.7 * whole)) as engine:
        engine.add(model, batch_range=(1, 4))
        right(engine, model, 4)
        assert max(engine.status()["lanes"][0]["weights_by_rank"]) < 0.7 * whole
    with (
        Engine(devices=["gang:cpu:tensor=2"], threads=1, memory_budget=int(0.4 * whole)) as engine,
        pytest.raises(OutOfMemory, match="rank 0 of gang:cpu:tensor=2 would hold"),
    ):
        engine.add(model, batch_range=(1, 4))


@pytest.mark.soak
@pytest.mark.timeout(480)
def test_a_row_that_stops_a_rank_is_found_and_fails_alone(tmp_path):
    with Engine(devices=["gang:cpu:pipeline=2"], threads=1, hung_seconds=2.0) as engine:
        engine.add(doubles(tmp_path, architecture="doubles-in-steps"), batch_range=(1, 4))
        bad = engine.submit(Call("net", torch.full((1, 4), STOP)), NIGHTLY)
        others = [engine.submit(Call("net", rows(n, 2)), NIGHTLY) for n in range(8)]
        assert isinstance(bad.exception(3 * WAIT), ModelError)
        for n, one in enumerate(others):
            assert torch.equal(one.result(WAIT).value, 2 * rows(n, 2))


@pytest.mark.soak
def test_models_come_and_go_on_a_gang_while_calls_run(tmp_path):
    model = stored(tmp_path, "bert")
    stop = threading.Event()
    failed: list[Exception] = []

    def caller() -> None:
        while not stop.is_set():
            try:
                right(engine, model, 3)
            except Exception as error:  # noqa: BLE001
                failed.append(error)
                return

    with Engine(devices=["gang:cpu:tensor=2"], threads=1) as engine:
        engine.add(model, batch_range=(1, 4))
        thread = threading.Thread(target=caller)
        thread.start()
        try:
            other = stored(tmp_path, "gpt2")
            engine.add(other, batch_range=(1, 4))
            right(engine, other, 5)
            engine.remove("gpt2")
            engine.add(ModelStore(tmp_path).load("bert"), batch_range=(1, 4))
        finally:
            stop.set()
            thread.join()
        assert not failed
        assert engine.status()["lanes"][0]["deaths"] == 0
