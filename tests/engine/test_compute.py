"""Heavy steps of flows in worker processes: what crosses, what a crash costs, what is left."""

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from plinth.engine import (
    Closed,
    Compute,
    ComputeError,
    ConfigError,
    DeadlineRefused,
    Engine,
    Flow,
    InputError,
    Sla,
)
from plinth.engine.lanes import fork_server, worker
from tests.engine import heavy_steps as steps

pytestmark = pytest.mark.cpu
ROOT = str(Path(__file__).resolve().parents[2])


@pytest.fixture(scope="module", autouse=True)
def _importable() -> Iterator[None]:
    """A worker finds modules where its parent does: the tests' too."""
    sys.path.append(ROOT)
    yield
    sys.path.remove(ROOT)


def ask(*wanted: Compute) -> Flow[list[Any]]:
    """A flow that gives for each step what it was sent, or what was raised."""
    found: list[Any] = []
    for step in wanted:
        try:
            found.append((yield step))
        except Exception as error:  # noqa: BLE001 - that is what is looked at
            found.append(error)
    return found


def run(engine: Engine, *wanted: Compute, sla: Sla | None = None) -> list[Any]:
    return engine.run(ask(*wanted), sla).value


def until(true: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Whether it becomes true in time."""
    end = time.monotonic() + seconds
    while not (now := true()) and time.monotonic() < end:
        threading.Event().wait(0.01)
    return now


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def workers() -> set[int]:
    """The worker processes of this one."""
    found = psutil.Process().children()
    return {each.pid for each in found if not gone(each.pid) and "worker.py" in str(each.cmdline())}


@pytest.fixture(scope="module")
def shared() -> Iterator[Engine]:
    """An engine with one worker process, which the tests of this file wear out in turns."""
    with Engine(compute_workers=1, compute_seconds=60) as engine:
        yield engine


# -- what crosses ------------------------------------------------------------------------------
def carried(value: Any, *, keep: bool = True) -> Any:
    """A value after its way through a socket."""
    one, other = socket.socketpair()
    with one, other:
        worker.send(one, worker.DONE, value)
        received = worker.receive(other, keep=keep)
    assert received is not None
    return received[1]()


DTYPES = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?"),
    hnp.complex_number_dtypes(endianness="?"),
    hnp.datetime64_dtypes(endianness="="),
    hnp.timedelta64_dtypes(endianness="="),
    hnp.byte_string_dtypes(),
    hnp.unicode_string_dtypes(endianness="="),
    hnp.array_dtypes(),
)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Arrays of every type, order of axes, step, sign of step and size, some read-only."""
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6))
    dtype = np.dtype(draw(DTYPES))
    count = int(np.prod(shape)) * dtype.itemsize
    bits = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 2, max(count, 1), np.uint8)
    array = np.frombuffer(bits[:count].tobytes(), dtype).reshape(shape).copy()
    if draw(st.booleans()):  # large enough to travel apart from the pickle
        array = np.broadcast_to(array, (worker._APART, *shape))
        array = array.copy() if draw(st.booleans()) else array
    array = array.transpose(draw(st.permutations(range(array.ndim))))
    for axis in range(array.ndim):
        step = draw(st.sampled_from((None, 2, -1)))
        array = array[(slice(None),) * axis + (slice(None, None, step),)]
    if draw(st.booleans()):
        array = np.asfortranarray(array)
    if draw(st.booleans()):
        array = array.view()
        array.flags.writeable = False
    return array


@settings(max_examples=100)
@given(arrays(), st.booleans())
def test_arrays_keep_their_bits_type_shape_and_order(array: np.ndarray, keep: bool) -> None:
    back = carried({"a": [array]}, keep=keep)["a"][0]
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tobytes() == array.tobytes()
    for flag in ("c_contiguous", "f_contiguous"):
        assert getattr(back.flags, flag) or not getattr(array.flags, flag)
    order = list(np.argsort([-abs(s) for s in array.strides], kind="stable"))
    strides = [abs(back.strides[axis]) for axis in order if back.shape[axis] > 1]
    if back.size and 0 not in array.strides:
        assert strides == sorted(strides, reverse=True), "sums would be added up in another order"


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
    ],
    ids=str,
)
def test_tensors_keep_their_bits(dtype: torch.dtype) -> None:
    whole = torch.randn(40, 30, 20).to(dtype)
    for tensor in (whole, whole.permute(2, 0, 1), whole[::2, :, 3], whole[0, 0, 0], whole[:0]):
        back = carried((tensor,))[0]
        assert back.dtype == dtype
        assert torch.equal(back, tensor)


def test_objects_of_arrays_travel_as_they_are() -> None:
    value = {"text": "ü", "none": None, "many": [np.arange(3), (torch.ones(2), b"bytes")]}
    back = carried(value)
    assert back["text"] == "ü"
    assert back["none"] is None
    assert back["many"][1][1] == b"bytes"
    odd = carried(np.array([1, "a", None], object))
    assert odd.tolist() == [1, "a", None]


def test_what_came_from_a_worker_is_not_copied_to_go_to_the_next(shared: Engine) -> None:
    (given_back,) = run(shared, Compute(steps.same, np.arange(1 << 20)))
    assert worker._known(memoryview(given_back[0].data).cast("B")) is not None
    part = given_back[0][1000:900_000]
    ((again,),) = run(shared, Compute(steps.same, part))
    assert np.array_equal(again, part)


def test_values_travel_while_another_thread_is_in_the_middle_of_importing(monkeypatch):
    for name in ("numpy", "torch"):
        half = ModuleType(name)
        half.__spec__ = ModuleSpec(name, None)
        half.__spec__._initializing = True
        monkeypatch.setitem(sys.modules, name, half)
    assert worker.unpack(worker.pack({"rows": bytes(100_000)})) == {"rows": bytes(100_000)}


def test_a_worker_changes_nobody_elses_array(shared: Engine) -> None:
    mine = np.zeros(1 << 18)
    ((theirs,),) = run(shared, Compute(steps.same, mine))
    for array in (mine, theirs):
        (seven,) = run(shared, Compute(steps.overwrite, array))
        assert (seven == 7).all()
        assert (array == 0).all()
    theirs[...] = 3  # here it is ours, and what is sent on is what it holds now
    assert run(shared, Compute(steps.total, theirs)) == [3 * theirs.size]


def test_nothing_is_left_open(shared: Engine) -> None:
    me, child = psutil.Process(), psutil.Process(run(shared, Compute(steps.pid))[0])
    assert until(lambda: child.num_fds() == 4)  # three of the system's, and the socket
    gc.collect()
    before = me.num_fds()
    for _ in range(20):
        run(shared, Compute(steps.same, np.zeros(1 << 16), np.ones((300, 300)).T[::2]))
    assert me.num_fds() == before
    assert until(lambda: child.num_fds() == 4)
    held = run(shared, Compute(steps.same, np.zeros(1 << 16)))
    named = [each.path for each in me.memory_maps() if "memfd:plinth" in each.path]
    assert named, "memory of which no file has a name"
    del held
    assert me.num_fds() == before


# -- steps -------------------------------------------------------------------------------------
def test_a_step_runs_in_another_process_and_imports_what_it_needs_alone() -> None:
    others = workers()
    with Engine(compute_workers=1) as engine:
        assert workers() == others  # nothing has asked yet
        assert run(engine, Compute(sorted, np.array([3, 1, 2]))) == [[1, 2, 3]]
        (child,) = workers() - others
        maps = [each.path for each in psutil.Process(child).memory_maps()]
        assert any("numpy" in path for path in maps)
        assert not any("torch" in path for path in maps)
        assert run(engine, Compute(steps.pid)) == [child]
    assert workers() == others


@pytest.mark.parametrize("workers", [0, 1])
def test_a_step_raises_what_its_function_raises(workers: int, shared: Engine) -> None:
    engine = shared if workers else Engine()
    found, value, where = run(
        engine, Compute(steps.refuse, "SliceThickness"), Compute(steps.wrong), Compute(steps.pid)
    )
    assert isinstance(found, InputError)
    assert found.as_dict() == {
        "reason": "odd",
        "message": "SliceThickness is wrong",
        "hint": "mend it",
        "field": "SliceThickness",
    }
    assert isinstance(value, ValueError)
    assert (where == os.getpid()) is (workers == 0)


def test_the_log_has_the_place_and_never_the_text(
    shared: Engine, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO):
        assert run(shared, Compute(steps.talk, "hello"))[0] == "hello"
        run(shared, Compute(steps.wrong, "secret"))
    assert ("a.library", logging.WARNING, "it said hello") in caplog.record_tuples
    assert "heavy_steps.py" in caplog.text
    assert "secret" not in caplog.text
    assert "hello" not in capfd.readouterr().out  # stdout is the command's


@pytest.mark.parametrize(
    "function",
    [lambda: 1, partial(steps.total, 1), np.zeros(3).sum, steps.not_a_step().__enter__, 3],
    ids=["lambda", "partial", "method", "bound", "number"],
)
def test_only_functions_of_modules_are_steps(function: Any) -> None:
    with pytest.raises(ConfigError, match="expected a function of a module"):
        Compute(function)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), 1e9])
def test_a_step_has_a_possible_limit(seconds: float) -> None:
    with pytest.raises(ConfigError, match="seconds"):
        Compute(steps.pid, seconds=seconds)
    with pytest.raises(ConfigError, match="compute_seconds"):
        Engine(compute_workers=1, compute_seconds=seconds)


def test_a_function_of_the_program_itself_is_refused(shared: Engine, monkeypatch: Any) -> None:
    monkeypatch.setattr(steps.pid, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "pid", steps.pid, raising=False)
    (error,) = run(shared, Compute(steps.pid))
    assert isinstance(error, ConfigError)
    assert "module of its own" in str(error)


# -- what goes wrong ---------------------------------------------------------------------------
@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="nothing forks workers elsewhere")
def test_workers_are_forked_by_a_process_that_imported_what_steps_need() -> None:
    with Engine(compute_workers=1) as engine:
        engine.prepare_steps(steps.__name__)
        (first,) = engine.run(ask(Compute(steps.pid))).value
        server = psutil.Process(first).ppid()
        assert server != os.getpid(), "it is forked, not started anew"
        wanted = (Compute(steps.segfault), Compute(steps.same, 7), Compute(steps.pid))
        error, value, second = engine.run(ask(*wanted)).value
        assert isinstance(error, ComputeError)
        assert (value, psutil.Process(second).ppid()) == ((7,), server)
        assert second != first
    assert not psutil.pid_exists(server)


@pytest.mark.parametrize(
    ("function", "reason", "words"),
    [
        (steps.segfault, "worker_died", "SIGSEGV"),
        (steps.kill_itself, "worker_died", "SIGKILL"),
        (steps.leave, "worker_died", "exit code 3"),
        (steps.hang, "time_limit", "within 0.5 s"),
        (steps.hang_with_the_lock, "time_limit", "within 0.5 s"),
        (steps.stop, "time_limit", "within 0.5 s"),
    ],
)
def test_a_lost_worker_costs_its_own_step(
    shared: Engine, function: Callable[[], None], reason: str, words: str
) -> None:
    limit = 0.5 if reason == "time_limit" else None
    before, error, after = run(
        shared, Compute(steps.pid), Compute(function, seconds=limit), Compute(steps.pid)
    )
    assert isinstance(error, ComputeError)
    assert (error.reason, words in error.message) == (reason, True)
    assert function.__name__ in error.message
    assert before != after
    assert gone(before)


@pytest.mark.parametrize(
    ("function", "kind", "words"),
    [
        (steps.unpicklable, TypeError, "its result cannot be sent"),
        (steps.peculiar, RuntimeError, "Peculiar"),
    ],
)
def test_what_cannot_be_sent_back_is_told(
    shared: Engine, function: Callable[[], Any], kind: type, words: str
) -> None:
    before, error, after = run(shared, *map(Compute, (steps.pid, function, steps.pid)))
    assert isinstance(error, kind)
    assert words in str(error)
    assert before == after


def test_what_cannot_be_sent_is_told(shared: Engine) -> None:
    error, after = run(shared, Compute(steps.same, lambda: 1), Compute(steps.pid))
    assert isinstance(error, ComputeError)
    assert "picklable" in str(error)
    assert isinstance(after, int)


def test_system_exit_of_a_step_is_its_flows_own(shared: Engine) -> None:
    with pytest.raises(SystemExit):
        run(shared, Compute(steps.system_exit))
    assert run(shared, Compute(steps.total, np.ones(3))) == [3.0]


def test_a_worker_killed_while_idle_costs_nothing(shared: Engine) -> None:
    (first,) = run(shared, Compute(steps.pid))
    os.kill(first, signal.SIGKILL)
    assert until(lambda: gone(first))
    (second,) = run(shared, Compute(steps.pid))
    assert second != first


def test_many_flows_at_once_and_each_has_its_own() -> None:
    def one(number: int) -> list[Any]:
        array = np.full(50_000, number)
        bad = (steps.segfault, steps.wrong, steps.kill_itself)[number % 3]
        wanted = [Compute(steps.total, array), Compute(steps.same, array)]
        return run(engine, *([Compute(bad), *wanted] if number % 4 == 0 else wanted))

    others = workers()
    with Engine(compute_workers=2) as engine, ThreadPoolExecutor(12) as callers:
        for number, found in enumerate(callers.map(one, range(40))):
            added, (array,) = found[-2:]
            assert added == 50_000 * number
            assert (array == number).all()
            assert (len(found) == 3) is (number % 4 == 0)
        assert len(workers() - others) <= 2
        counted = engine.metrics.steps.labels("tests.engine.heavy_steps.total", "done")
        assert counted._value.get() == 40
    assert workers() == others


def test_a_deadline_ends_what_runs_and_what_waits(tmp_path: Path) -> None:
    said = tmp_path / "pid"
    with Engine(compute_workers=1) as engine:
        first = engine.compute(Compute(steps.hang, said))
        assert until(said.exists)
        (waits,) = run(engine, Compute(steps.pid), sla=Sla(deadline_ms=50))
        assert isinstance(waits, DeadlineRefused)
        assert not gone(int(said.read_text()))
        assert first.cancel()
        (runs,) = run(engine, Compute(steps.hang), sla=Sla(deadline_ms=500))
        assert isinstance(runs, DeadlineRefused)
        assert isinstance(run(engine, Compute(steps.pid), sla=Sla(deadline_ms=60_000))[0], int)


def test_cancelling_ends_what_runs_and_what_waits(tmp_path: Path) -> None:
    said = tmp_path / "pid"

    async def some() -> None:
        runs = asyncio.create_task(engine.run_async(ask(Compute(steps.hang, said))))
        waits = asyncio.create_task(engine.run_async(ask(Compute(steps.hang))))
        while not said.exists():
            await asyncio.to_thread(until, said.exists)
        for task in (waits, runs):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        answer = await engine.run_async(ask(Compute(steps.total, np.ones(5))))
        assert answer.value == [5.0]

    with Engine(compute_workers=1) as engine:
        asyncio.run(some())
        assert until(lambda: gone(int(said.read_text())))


def test_an_engine_that_closes_at_once_ends_its_steps(tmp_path: Path) -> None:
    said, others = tmp_path / "pid", workers()
    engine = Engine(compute_workers=1).start()
    with ThreadPoolExecutor(2) as callers:
        runs = callers.submit(run, engine, Compute(steps.hang, said))
        assert until(said.exists)
        waits = callers.submit(run, engine, Compute(steps.pid))
        assert until(lambda: engine._steps is not None and len(engine._steps._waiting) == 1)
        engine.close(drain=False)
        assert [type(each.result(60)[0]) for each in (runs, waits)] == [Closed, Closed]
    assert workers() == others
    assert isinstance(run(engine, Compute(steps.pid))[0], Closed)
    with engine:
        assert isinstance(run(engine, Compute(steps.pid))[0], int)


def test_steps_can_be_ended_and_new_ones_are_taken(tmp_path: Path) -> None:
    said = tmp_path / "pid"
    with Engine(compute_workers=1) as engine:
        runs, waits = (engine.compute(Compute(steps.hang, said)) for _ in range(2))
        assert until(said.exists)
        engine.end_steps(Closed("no time is left"))
        assert isinstance(runs.exception(60), Closed)
        assert isinstance(waits.exception(60), Closed)
        assert gone(int(said.read_text()))
        assert run(engine, Compute(steps.total, np.ones(2))) == [2.0]


def test_a_worker_yields_to_its_parent(shared: Engine) -> None:
    (pid,) = run(shared, Compute(steps.pid))
    assert psutil.Process(pid).nice() == min(psutil.Process().nice() + 10, 19)
    adjusted = Path(f"/proc/{pid}/oom_score_adj")
    assert not adjusted.exists() or int(adjusted.read_text()) == 500
    assert resource.prlimit(pid, resource.RLIMIT_CORE) == (0, 0)


def test_an_engine_that_closes_finishes_what_it_took() -> None:
    with Engine(compute_workers=1) as engine:
        futures = [engine.compute(Compute(steps.total, np.ones(n))) for n in range(5)]
    assert [future.result(0) for future in futures] == [0, 1, 2, 3, 4]


PARENT = """
import sys
from pathlib import Path
from plinth.engine import Compute, Engine
from tests.engine.heavy_steps import hang, hang_with_the_lock

with Engine(compute_workers=2) as engine:
    stuck = [engine.compute(Compute(hang, Path(sys.argv[1])))]
    stuck.append(engine.compute(Compute(hang_with_the_lock)))
    stuck[0].result()
"""


def test_workers_end_with_their_parent_whatever_ends_it(tmp_path: Path) -> None:
    said = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(said)], cwd=ROOT)
    try:
        assert until(said.exists)
        assert until(lambda: len(psutil.Process(parent.pid).children()) == 2)
        workers = psutil.Process(parent.pid).children()
    finally:
        parent.kill()
        parent.wait(60)
    assert until(lambda: all(gone(each.pid) for each in workers))


def test_a_fork_server_that_began_early_is_taken_over_by_the_next_one_or_ends():
    early = fork_server.start_process()
    server = fork_server.ForkServer("colorsys")
    with fork_server.offered(early):
        server.lease()
    early.process.kill()  # it imports by now
    server.give_back()
    assert early.process.returncode == -signal.SIGKILL
    assert early.socket.fileno() == -1, "the server's own"

    left = fork_server.start_process()
    with fork_server.offered(left):
        pass
    assert left.process.returncode == 0


def test_a_command_begins_to_import_in_a_fork_server_without_the_engine():
    code = (
        "import sys; from plinth.pipelines.folders.early import begin; early = begin(None);"
        "print('torch' in sys.modules, early is not None); early.process.kill()"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert told.stdout.split() == ["False", str(fork_server.is_possible())]
