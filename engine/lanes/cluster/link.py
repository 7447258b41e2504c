"""The process between a lane and its actor: messages from its socket go to Ray, answers back.

Run by its path, so that it has Ray and the standard library alone. It is a process of its own
because a driver of Ray ends when the head of its cluster does not answer for a minute, and the
engine has to go on. What crosses it stays packed: it reads none of it but what it says itself.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

APART_BYTES = 100_000
"""From which what crosses is an object of the store, and not part of the call."""
PROBE_SECONDS = 2.0
"""In which a machine has to take a connection to be asked at all."""
_LOOK_SECONDS = 0.5
_KILL_SECONDS = 2.0


def main(descriptor: int, parent: int, level: int, niceness: int) -> None:
    """Carry messages until either end ends.

    Args:
        descriptor: of our end of the socket pair.
        parent: process that started this one.
        level: of log records that it wants to have.
        niceness: how far others go first where the machine is short of CPU.
    """
    worker = _worker()
    worker.begin(parent, niceness)
    sock = socket.socket(fileno=descriptor)
    message = worker.receive(sock, keep=False)
    if message is None:
        return
    told = message[1]()
    os.environ.update(told["environment"])
    os.chdir("/")  # Ray lets actors import from the folder of their driver
    link = _Link(worker, sock, told, level)
    try:
        link.run()
    except _EndedError as error:
        link.end(str(error), error.silent)
    except BaseException as error:  # noqa: BLE001 - the lane hears why
        link.end(f"{type(error).__name__}: {_first_line(error)}")


class _EndedError(Exception):
    """Why there is nothing more to carry.

    Args:
        why: in words.
        silent: machines that said nothing, where nothing should be placed for a while.
    """

    def __init__(self, why: str, silent: Sequence[str] = ()) -> None:
        super().__init__(why)
        self.silent = silent


class _Link:
    """One lane's connection to its actor.

    Args:
        worker: the module that packs.
        sock: the lane's.
        told: the cluster's settings; CPU threads; nodes that nothing should be placed on.
        level: of log records.
    """

    def __init__(
        self, worker: ModuleType, sock: socket.socket, told: dict[str, Any], level: int
    ) -> None:
        self._worker = worker
        self._socket = sock
        self._told = told
        self._level = level
        self._sending = threading.Lock()
        self._ending = threading.Lock()
        self._ray: Any = None
        self._actor: Any = None
        self._node = self._host = ""

    def run(self) -> None:
        """Connect, place the actor, and carry until the lane ends.

        Raises:
            _EndedError: it cannot.
        """
        self._connect()
        about = self._place()
        self._node, self._host = about["node"], f"{about['host']} ({about['node'][:12]})"
        with self._sending:
            self._worker.send(self._socket, self._worker.READY, about)
        threading.Thread(target=self._watch, daemon=True).start()
        calls = {
            self._worker.UNIT: self._actor.unit,
            self._worker.LOAD: self._actor.load,
            self._worker.NEED: self._actor.need,
            self._worker.PIECE: self._actor.piece,
            self._worker.FORGET: self._actor.forget,
        }
        while (message := self._worker.receive_packed(self._socket, keep=False)) is not None:
            kind, mapped = message
            (memory,) = mapped()
            future = calls[kind].remote(self._given(memory)).future()
            if kind != self._worker.FORGET:
                future.add_done_callback(self._answer)
            del message, mapped, memory, future
        self._kill()
        os._exit(0)

    def end(self, why: str, silent: Sequence[str] = ()) -> None:
        """Tell the lane why, and end this process and the actor."""
        with self._ending:
            with contextlib.suppress(OSError), self._sending:
                self._worker.send(self._socket, self._worker.ENDED, (why, list(silent)))
            self._kill()
            os._exit(1)

    def _kill(self) -> None:
        """End the actor, without waiting for a cluster that does not answer."""
        if self._actor is not None:
            thread = threading.Thread(target=self._ray.kill, args=(self._actor,), daemon=True)
            thread.start()
            thread.join(_KILL_SECONDS)

    # -- the cluster -------------------------------------------------------------------------
    def _connect(self) -> None:
        host, port, address = (self._told[name] for name in ("host", "port", "address"))
        if not _answers(host, port):
            raise _EndedError(
                f"nothing answers at {address}: start the cluster (plinth cluster start), or name "
                "its address: cluster.address"
            )
        if self._told["ask_unguarded"]:
            _refuse_unguarded(address)
        import ray

        self._ray = ray
        try:
            import_module("ray._raylet").GcsClient(
                address=address
            )  # says at once what init retries
            ray.init(
                address=address,
                log_to_driver=False,
                configure_logging=False,
                namespace="plinth",
                _skip_env_hook=True,
            )
        except ray.exceptions.AuthenticationError:
            path = self._told["environment"]["RAY_AUTH_TOKEN_PATH"]
            raise _EndedError(
                f"the cluster at {address} refuses the token in {path}: copy the one of its head"
            ) from None
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise _EndedError(
                f"no way into the cluster at {address}: {_first_line(error)} (does a node of it "
                "run on this machine? plinth cluster join)"
            ) from None

    def _place(self) -> dict[str, Any]:
        """Let Ray start the actor on a machine that answers; what it says of itself."""
        told, ray = self._told, self._ray
        until = time.monotonic() + told["start_seconds"]
        while not (nodes := self._candidates()):
            if not told["patient"] or time.monotonic() > until:
                raise _EndedError(f"no machine has room for the lane: {self._wanted()}")
            time.sleep(_LOOK_SECONDS)
        self._actor = (
            _actor_of(ray)
            .options(
                num_cpus=told["cpus"],
                num_gpus=told["gpus"],
                resources=dict(told["resources"]),
                label_selector={"ray.io/node-id": f"in({','.join(nodes)})"},
                scheduling_strategy="SPREAD",
                max_restarts=0,
                max_task_retries=0,
            )
            .remote(told["threads"], self._level)
        )
        hello = self._actor.hello.remote()
        ready, _ = ray.wait([hello], timeout=max(until - time.monotonic(), 1.0))
        if not ready:
            silent = [node for node in nodes if self._has_room(node)]
            raise _EndedError(
                f"the actor was not placed within {told['start_seconds']:g} s: {self._wanted()}; "
                f"free: {ray.available_resources()}",
                silent,
            )
        try:
            about: dict[str, Any] = ray.get(hello)
        except ray.exceptions.RayError as error:
            raise _EndedError(f"the actor did not start: {_cause(error)}") from None
        stores = [
            node["Resources"].get("object_store_memory", 0.0)
            for node in ray.nodes()
            if node["NodeID"] in (about["node"], ray.get_runtime_context().get_node_id())
        ]
        return {**about, "store": min(stores)}

    def _candidates(self) -> list[str]:
        """Machines that answer and that could have the actor; those to be avoided come last."""
        told = self._told
        alive = [
            node
            for node in self._ray.nodes()
            if node["Alive"]
            and all(
                node["Resources"].get(name, 0.0) >= many for name, many in self._needed().items()
            )
            and all(node["Labels"].get(name) == label for name, label in told["labels"].items())
        ]
        with ThreadPoolExecutor(16) as asking:
            answers = asking.map(
                lambda node: _answers(node["NodeManagerAddress"], node["NodeManagerPort"]), alive
            )
            found = [node["NodeID"] for node, well in zip(alive, answers, strict=True) if well]
        return [node for node in found if node not in told["avoid"]] or found

    def _needed(self) -> dict[str, float]:
        told = self._told
        needed = {"CPU": told["cpus"], "GPU": told["gpus"], **told["resources"]}
        return {name: many for name, many in needed.items() if many > 0}

    def _has_room(self, node: str) -> bool:
        free = self._ray._private.state.available_resources_per_node().get(node, {})
        return all(free.get(name, 0.0) >= many for name, many in self._needed().items())

    def _wanted(self) -> str:
        labels = ", ".join(f"{name} = {label}" for name, label in self._told["labels"].items())
        there = [
            f"{node['NodeManagerAddress']} has "
            + ", ".join(
                f"{name} {many:g}"
                for name, many in node["Resources"].items()
                if name in self._needed()
            )
            for node in self._ray.nodes()
            if node["Alive"]
        ]
        needed = ", ".join(f"{name} {many:g}" for name, many in self._needed().items())
        return f"it needs {needed}{labels and f', labels {labels}'}; {'; '.join(there)}"

    # -- what crosses ------------------------------------------------------------------------
    def _given(self, memory: Any) -> Any:
        if len(memory) < APART_BYTES:
            return bytes(memory)
        import numpy

        return self._ray.put(numpy.frombuffer(memory, "u1"))

    def _answer(self, done: Any) -> None:
        try:
            packed = done.result()
        except BaseException as error:  # noqa: BLE001 - the lane hears why
            self.end(f"on {self._host}: {_cause(error)}")
            return
        self._send(self._worker.REPLY, packed)

    def _send(self, kind: bytes, packed: Any) -> None:
        try:
            with self._sending:
                self._worker.pass_on(self._socket, kind, packed)
        except OSError as error:  # the lane is gone, or there is no memory
            self.end(f"an answer could not be handed on: {error.strerror}")

    def _watch(self) -> None:
        """Ask the actor for a sign of life, and hand on what it logged."""
        limit = self._told["silent_seconds"]
        try:
            for _ in _beats(limit / 4):
                ref = self._actor.sign.remote()
                ready, _ = self._ray.wait([ref], timeout=limit)
                if not ready:
                    raise _EndedError(
                        f"{self._host} gave no sign of life for {limit:g} s", [self._node]
                    )
                for record in self._worker.unpack(self._ray.get(ref)):
                    with self._sending:
                        self._worker.send(self._socket, self._worker.LOGGED, record)
        except _EndedError as error:
            self.end(str(error), error.silent)
        except BaseException as error:  # noqa: BLE001 - the lane hears why
            self.end(f"on {self._host}: {_cause(error)}")


def _actor_of(ray: Any) -> Any:
    """What Ray starts on a machine: it is sent by value, and finds Plinth there.

    Units, models and signs of life have a thread each, so that none waits for another.
    """

    class LaneActor:
        def __init__(self, threads: int, level: int) -> None:
            runtime = import_module("plinth.engine.runtime.lane_actor")
            self.inner = runtime.Actor(threads, level)

        def hello(self) -> dict[str, Any]:
            import ray

            node = ray.get_runtime_context().get_node_id()
            return {**self.inner.about(), "node": node, "host": ray.util.get_node_ip_address()}

        @ray.method(concurrency_group="units")  # type: ignore[untyped-decorator]
        def unit(self, packed: Any) -> Any:
            return self.inner.unit(packed)

        @ray.method(concurrency_group="models")  # type: ignore[untyped-decorator]
        def load(self, packed: Any) -> Any:
            return self.inner.load(packed)

        @ray.method(concurrency_group="models")  # type: ignore[untyped-decorator]
        def need(self, packed: Any) -> Any:
            return self.inner.need(packed)

        @ray.method(concurrency_group="models")  # type: ignore[untyped-decorator]
        def piece(self, packed: Any) -> Any:
            return self.inner.piece(packed)

        @ray.method(concurrency_group="models")  # type: ignore[untyped-decorator]
        def forget(self, packed: Any) -> None:
            self.inner.forget(packed)

        @ray.method(concurrency_group="signs")  # type: ignore[untyped-decorator]
        def sign(self) -> Any:
            return self.inner.records()

    return ray.remote(concurrency_groups={"units": 1, "models": 1, "signs": 1})(LaneActor)


def _beats(seconds: float) -> Iterator[None]:
    while True:
        yield
        time.sleep(seconds)


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), PROBE_SECONDS).close()
    except OSError:
        return False
    return True


def _refuse_unguarded(address: str) -> None:
    """Refuse a cluster that lets in who has no token; asked in a process without one."""
    child = os.fork()
    if child == 0:
        code = 2
        try:
            os.environ["RAY_AUTH_MODE"] = "disabled"
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            client = import_module("ray._raylet").GcsClient
            from ray.exceptions import AuthenticationError

            try:
                client(address=address)
                code = 1
            except AuthenticationError:
                code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == 1:
        raise _EndedError(
            f"the cluster at {address} lets in whoever asks: it has no token. Start it with plinth "
            "cluster start, or with RAY_AUTH_MODE=token"
        )
    if code != 0:
        raise _EndedError(f"the cluster at {address} could not be asked whether it has a token")


def _cause(error: BaseException) -> str:
    """What Ray says, without the trace of a process elsewhere."""
    inner = getattr(error, "cause", None)
    if isinstance(inner, BaseException):
        return f"{type(inner).__name__}: {_first_line(inner)}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next((line for line in lines if "Error:" in line and "Traceback" not in line), None)
    return f"{type(error).__name__}: {said or ' '.join(lines[:1])}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _worker() -> ModuleType:
    path = Path(__file__).parents[1] / "worker.py"
    spec = importlib.util.spec_from_file_location("plinth_lane_worker", path)
    if spec is None or spec.loader is None:
        raise ImportError(str(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main(*map(int, sys.argv[1:5]))
