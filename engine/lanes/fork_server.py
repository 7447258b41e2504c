"""A process that has imported what worker processes need, and forks them: in 30 ms, not seconds.

It runs nothing of its own: it imports, and then has one thread and no state that a fork would tear
apart (threads of OpenMP start with the first batch, in the forked process). Where it finds itself
with more than one thread it says so instead of forking, and the worker is started anew.

What it forks ends with it, and it ends with the process that started it, SIGKILL included. Linux
alone has what this takes: a descriptor of a process (pidfd_open(2)), by which a worker is killed
without any doubt about whose number it is.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIRST_SECONDS, FORK_SECONDS = 120.0, 10.0
"""In which a server that has just been started has imported all, and forked; in which it forks."""
NAME = "plinth-lane"
"""What a forked process is called in lists of processes."""
_MAX_MESSAGE = 1 << 20
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
"""The environment of a worker process."""


def is_possible() -> bool:
    """Whether this system has what a fork server takes."""
    return sys.platform == "linux" and hasattr(os, "pidfd_open")


class ForkServer:
    """The server of one kind of worker; it runs while somebody holds a lease of it.

    Args:
        modules: what is imported before the first fork.
    """

    def __init__(self, *modules: str) -> None:
        self._modules = modules
        self._lock = threading.Lock()
        self._leases = 0
        self._socket: socket.socket | None = None
        self._has_imported = False
        self._keeper: threading.Thread | None = None

    def lease(self) -> None:
        """Let it run until :meth:`give_back`; it imports beside the caller."""
        with self._lock, contextlib.suppress(OSError):  # :meth:`fork` tells of it
            self._leases += 1
            if self._socket is None:
                self._begin()

    def give_back(self) -> None:
        """One lease less; the server ends with the last, and with it whatever it forked."""
        keeper = None
        with self._lock:
            self._leases -= 1
            if not self._leases and self._socket is not None:
                self._socket.close()
                self._socket, keeper = None, self._keeper
        if keeper is not None:
            keeper.join(FORK_SECONDS)

    def fork(self, given: Mapping[str, int], descriptor: int) -> Forked:
        """A new worker process.

        Args:
            given: ``level`` of log records and ``niceness``, as ``worker.main`` takes them.
            descriptor: of the worker's end of its socket.

        Raises:
            OSError: there is none: the server has ended, or does not fork here.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        message = json.dumps(dict(given) | {"environment": dict(os.environ)}).encode()
        try:
            self._send(message, [descriptor, theirs.fileno()])
            theirs.close()
            ours.settimeout(FORK_SECONDS if self._has_imported else FIRST_SECONDS)
            forked = Forked(ours)
            self._has_imported = True
            return forked
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()

    def _send(self, message: bytes, descriptors: list[int]) -> None:
        with self._lock:
            if self._socket is None:
                self._begin()
            assert self._socket is not None
            try:
                socket.send_fds(self._socket, [message], descriptors)
            except (BrokenPipeError, ConnectionResetError):  # it was killed: another one
                self._socket.close()
                self._begin()
                socket.send_fds(self._socket, [message], descriptors)

    def _begin(self) -> None:
        """Start the process, in a thread of its own: the kernel ends it with that thread."""
        early = _early.pop() if _early else None
        begun, failed = threading.Event(), list[OSError]()
        self._has_imported = False
        made: list[Early] = [] if early is None else [early]

        def keep() -> None:
            try:
                if not made:
                    made.append(start_process())
            except OSError as error:
                failed.append(error)
                return
            finally:
                begun.set()
            made[0].process.wait()

        self._keeper = threading.Thread(target=keep, name="plinth-fork-server", daemon=True)
        self._keeper.start()
        begun.wait()
        if failed:
            raise failed[0]
        ours = made[0].socket
        ours.settimeout(FIRST_SECONDS)
        _let_import(ours, self._modules)
        self._socket = ours


@dataclass(frozen=True, slots=True)
class Early:
    """A process that imports and waits for whoever takes it over.

    Args:
        socket: our end of its socket.
        process: itself.
    """

    socket: socket.socket
    process: subprocess.Popen[bytes]


_early: list[Early] = []
"""One that the next server takes over."""


def start_process(*modules: str) -> Early:
    """Start a server's process, which ends with the thread that calls this, or with its socket.

    Args:
        modules: which it imports at once, as far as there are any.

    Raises:
        OSError: it cannot be started.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-P", "-X", "faulthandler", str(Path(__file__))]
    command += [str(theirs.fileno()), str(os.getpid())]
    try:
        process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, **ONE_THREAD},
        )
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
    if modules:
        _let_import(ours, modules)
    return Early(ours, process)


@contextlib.contextmanager
def offered(early: Early | None) -> Iterator[None]:
    """Let the next server that begins meanwhile be one that has begun before; else it ends."""
    if early is not None:
        _early.append(early)
    try:
        yield
    finally:
        if early is not None and early in _early:
            _early.remove(early)
            early.socket.close()
            early.process.wait()


def _let_import(sock: socket.socket, modules: Sequence[str]) -> None:
    sock.send(json.dumps({"path": sys.path, "modules": modules}).encode())


class Forked:
    """A process that a server has forked.

    Args:
        status: where the server tells of it: that it runs, and later how it ended.

    Attributes:
        pid: its number.
        descriptor: of its end of its socket, there.

    Raises:
        OSError: the server did not fork it.
    """

    def __init__(self, status: socket.socket) -> None:
        self._status = status
        message, descriptors, _, _ = socket.recv_fds(status, _MAX_MESSAGE, 1)
        told: dict[str, Any] = json.loads(message) if message else {"why": "the fork server ended"}
        if "why" in told or len(descriptors) != 1:
            for each in descriptors:
                os.close(each)
            raise OSError(str(told.get("why", "no descriptor of the process came")))
        self.pid, self.descriptor = int(told["pid"]), int(told["descriptor"])
        self._handle = descriptors[0]
        self._lock = threading.Lock()
        self._waiting = threading.Lock()
        self._code: int | None = None

    def kill(self) -> None:
        """End it at once."""
        with self._lock, contextlib.suppress(ProcessLookupError):
            if self._handle >= 0:
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that ended it; ``None``: it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0.0)
        return None

    def wait(self, seconds: float) -> int:
        """Wait for what :meth:`poll` returns; -SIGKILL if its server ended, and it with that.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        with self._waiting:
            if self._code is None:
                self._status.settimeout(seconds)
                try:
                    told = self._status.recv(_MAX_MESSAGE)
                except (TimeoutError, BlockingIOError):
                    raise subprocess.TimeoutExpired(NAME, seconds) from None
                self._code = int(told or -signal.SIGKILL)
            return self._code

    def close(self) -> None:
        """Forget it."""
        with self._lock:
            handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)
        self._status.close()


_servers: dict[tuple[str, ...], ForkServer] = {}
_servers_lock = threading.Lock()


def shared(*modules: str) -> ForkServer:
    """The server of this process for one kind of worker."""
    with _servers_lock:
        return _servers.setdefault(modules, ForkServer(*modules))


# -- the process -------------------------------------------------------------------------------
def main(descriptor: int, parent: int) -> None:
    """Import, and then fork whenever somebody asks, until the other end of the socket ends.

    Args:
        descriptor: of our end.
        parent: process that started this one.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent says when work is over
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.dup2(2, 1)  # what a model prints is no answer of the command
    sock = socket.socket(fileno=descriptor)
    first = sock.recv(_MAX_MESSAGE)
    if first:
        _import(json.loads(first), parent)
        _Forks(sock, importlib.import_module("plinth.engine.lanes.worker"), parent).run()
    os._exit(0)  # at once: there is nothing to put away


def _import(told: Mapping[str, Any], parent: int) -> None:
    """Import what is asked for, in a process that ends with its parent."""
    sys.path[:] = told["path"]
    importlib.import_module("plinth.engine.lanes.worker").end_with(parent)
    for module in told["modules"]:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # what is never looked at again is never copied for a fork


class _Forks:
    """What was forked and has not ended, by the descriptor of its process."""

    def __init__(self, sock: socket.socket, worker: Any, parent: int) -> None:
        self._socket = sock
        self._worker = worker
        self._parent = parent
        self._forked: dict[int, tuple[int, socket.socket]] = {}

    def run(self) -> None:
        """Fork and reap until the other end ends."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor == self._socket.fileno():
                    message, given, _, _ = socket.recv_fds(self._socket, _MAX_MESSAGE, 2)
                    if not message:
                        return
                    told = json.loads(message)
                    if "modules" in told:
                        _import(told, self._parent)
                        continue
                    handle = self._fork(told, given)
                    if handle is not None:
                        poll.register(handle, select.POLLIN)
                else:
                    poll.unregister(descriptor)
                    self._reap(descriptor)

    def _fork(self, given: dict[str, Any], descriptors: list[int]) -> int | None:
        """Fork once; a descriptor of the process, if there is one."""
        own, status = descriptors[0], socket.socket(fileno=descriptors[1])
        threads = sum(1 for _ in Path("/proc/self/task").iterdir())
        if threads > 1:
            self._refuse(status, own, f"the fork server has {threads} threads")
            return None
        here = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            self._refuse(status, own, f"it cannot fork: {error.strerror}")
            return None
        if not pid:
            self._become(given, own, status, here)
        try:
            handle = os.pidfd_open(pid)
        except OSError as error:
            os.kill(pid, signal.SIGKILL)  # not reaped yet: the number is still its own
            os.waitpid(pid, 0)
            self._refuse(status, own, f"there is no descriptor of a process: {error.strerror}")
            return None
        self._forked[handle] = (pid, status)
        with contextlib.suppress(OSError):  # whoever asked is gone; its socket ends the process
            told = json.dumps({"pid": pid, "descriptor": own}).encode()
            socket.send_fds(status, [told], [handle])
        os.close(own)
        return handle

    @staticmethod
    def _refuse(status: socket.socket, own: int, why: str) -> None:
        with contextlib.suppress(OSError):
            status.send(json.dumps({"why": why}).encode())
        status.close()
        os.close(own)

    def _become(self, given: dict[str, Any], own: int, status: socket.socket, server: int) -> None:
        """Be the worker, in the forked process; never comes back."""
        code = 1
        try:
            for handle, (_, other) in self._forked.items():
                os.close(handle)
                other.close()
            self._socket.close()
            status.close()
            os.environ.clear()
            os.environ.update(given["environment"] | ONE_THREAD)
            self._worker.call_itself(NAME)
            self._worker.main(own, server, given["level"], given["niceness"])
            code = 0
        except BaseException:  # noqa: BLE001 - the server's code must never run here
            traceback.print_exc()
        finally:
            os._exit(code)

    def _reap(self, handle: int) -> None:
        pid, status = self._forked.pop(handle)
        os.close(handle)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(OSError):
            status.send(str(code).encode())
        status.close()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
