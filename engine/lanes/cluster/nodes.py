"""Nodes of a cluster that run on this machine: started, found again, and ended."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

from plinth.engine.errors import ConfigError, DeviceError
from plinth.engine.lanes.cluster import node as script
from plinth.engine.lanes.cluster.link import PROBE_SECONDS
from plinth.engine.lanes.cluster.settings import (
    Cluster,
    environment,
    is_loopback,
    need_ray,
    split_address,
)

_STARTED: list[subprocess.Popen[bytes]] = []
"""They go on when this process ends."""
START_SECONDS = 90.0
ANSWER_SECONDS = 20.0
"""In which a head has to answer who asks for the first time; Ray alone would try for minutes."""
END_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a node is to have.

    Args:
        address: of the head; the node's own where it is the head.
        head: whether others join it.
        host: the address by which others reach this machine; ``None``: the head's host on the
            head's own machine, and on others the one that leads to the head.
        token_file: as for :class:`Cluster`.
        cpus: cores for lanes; ``None``: all.
        gpus: accelerators for lanes; ``None``: as Ray finds them.
        store_mb: megabytes of its object store, through which batches go.
        labels: by which lanes are placed.
        resources: the same, in numbers.
    """

    address: str
    head: bool = False
    host: str | None = None
    token_file: Path | None = None
    cpus: int | None = None
    gpus: int | None = None
    store_mb: int = 512
    labels: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Running:
    """A node of this machine.

    Args:
        pid: of the process that keeps it.
        created: when that was started, so that another of the same number is not taken for it.
        address: of its head.
        host: its own.
        head: whether it is the head.
        node: its name in the cluster.
        token_file: the token that it asks for.
    """

    pid: int
    created: float
    address: str
    host: str
    head: bool
    node: str
    token_file: str


def start(wanted: Wanted, folder: Path | None = None) -> Running:
    """Start a node, which runs until it is stopped.

    A head makes the token where there is none.

    Args:
        wanted: what it is to have.
        folder: where it is written down, and Ray's files lie.

    Raises:
        ConfigError: no Ray, no token, an impossible address.
        DeviceError: it does not start; says why.
    """
    need_ray()
    folder = home() if folder is None else folder
    cluster = Cluster(address=wanted.address, token_file=wanted.token_file)
    if wanted.head:
        _make_token(wanted.token_file)
    token = cluster.token()
    head_host, port = split_address(wanted.address)
    if not 1 <= wanted.store_mb <= 1 << 20:
        raise ConfigError(f"store_mb is {wanted.store_mb}, expected 1 to {1 << 20}")
    host = wanted.host or (head_host if wanted.head or cluster.loopback else _towards(head_host))
    if is_loopback(host) != cluster.loopback:
        raise ConfigError(
            f"a node on {host} and a head on {head_host} do not reach each other",
            hint="name an address of the same network: --host",
        )
    if not wanted.head:
        _reach(head_host, port)  # Ray would try for minutes
    address = f"{head_host}:{port}"
    told = {
        "head": wanted.head,
        "address": address,
        "host": host,
        "cpus": wanted.cpus,
        "gpus": wanted.gpus,
        "resources": dict(wanted.resources),
        "labels": dict(wanted.labels),
        "store_bytes": wanted.store_mb << 20,
        "folder": str(folder / "ray"),  # which Ray lets everybody write to, but not reach
        "environment": environment(token, cluster.loopback),
    }
    (folder / "ray").mkdir(mode=0o700, exist_ok=True)
    log = (folder / f"node-{host}-{port if wanted.head else 'joined'}.log").open("ab")
    with log:
        process = subprocess.Popen(
            [sys.executable, "-P", str(Path(script.__file__)), json.dumps(told)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
    try:
        said = _await(process, address, log.name)
        created = psutil.Process(process.pid).create_time()
        running = Running(
            process.pid, created, address, host, wanted.head, said["node"], str(token)
        )
        _write_down(running, folder)
    except BaseException:  # an interrupt, too: who is not written down is found by nobody
        _discard(process)
        raise
    _STARTED.append(process)
    return running


def _await(process: subprocess.Popen[bytes], address: str, log: str) -> dict[str, Any]:
    """Wait until a node runs; what it said of itself.

    Raises:
        DeviceError: it does not, or takes too long.
    """
    assert process.stdout is not None
    with process.stdout as pipe:
        lines = _Lines(pipe)
        said = lines.next(ANSWER_SECONDS, f"{address} does not answer as the head of a cluster")
        if "error" not in said:
            said = lines.next(START_SECONDS, "it did not run")
    if "error" in said:
        raise DeviceError(f"the node did not start: {said['error']}", hint=f"see {log}")
    return said


def _write_down(running: Running, folder: Path) -> None:
    """Let others find a node, at once or not at all."""
    path = folder / f"{running.pid}.json"
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(asdict(running)))
    beside.replace(path)


def _discard(process: subprocess.Popen[bytes]) -> None:
    """End a node that is not to run, with all that it has started."""
    with contextlib.suppress(psutil.Error):
        node = psutil.Process(process.pid)
        node.suspend()  # so that it starts nothing more
        for each in node.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                each.kill()
    process.kill()
    process.wait(END_SECONDS)


def running(folder: Path | None = None) -> list[Running]:
    """The nodes that this user started on this machine, and that still run."""
    found = []
    for path in sorted((home() if folder is None else folder).glob("*.json")):
        try:
            each = Running(**json.loads(path.read_text()))
            alive = psutil.Process(each.pid).create_time() == each.created
        except (psutil.Error, ValueError, TypeError, OSError):
            alive = False
        if alive:
            found.append(each)
        else:
            path.unlink(missing_ok=True)
    return found


def _reach(host: str, port: int) -> None:
    """Raise DeviceError where nothing answers at an address."""
    try:
        socket.create_connection((host, port), PROBE_SECONDS).close()
    except OSError as error:
        raise DeviceError(
            f"nothing answers at {host}:{port}: {error.strerror or error}",
            hint="plinth cluster start, or name its address: --address",
        ) from None


def members(cluster: Cluster) -> list[dict[str, Any]]:
    """The machines of a cluster, as its head sees them; it takes a minute to miss a silent one.

    Raises:
        ConfigError: no Ray, or no token.
        DeviceError: nobody answers, or the token is another.
    """
    need_ray()
    host, port = split_address(cluster.address)
    _reach(host, port)
    told = {
        "members_of": f"{host}:{port}",
        "environment": environment(cluster.token(), cluster.loopback),
    }
    command = [sys.executable, "-P", str(Path(script.__file__)), json.dumps(told)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=ANSWER_SECONDS, check=False)
        said = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        said = {"error": f"nothing was heard from {host}:{port} within {ANSWER_SECONDS:g} s"}
    except ValueError:  # Ray ends a process whose head goes away while it answers
        said = {"error": f"{host}:{port} went away while it was asked"}
    if "error" in said:
        raise DeviceError(
            f"the cluster at {host}:{port} does not say who is in it: {said['error']}",
            hint="plinth cluster status, once more; else stop it and start it again",
        )
    found: list[dict[str, Any]] = said["members"]
    return found


def stop(node: Running) -> None:
    """End a node and all that Ray started for it.

    Raises:
        DeviceError: some of it does not end.
    """
    try:
        process = psutil.Process(node.pid)
        if process.create_time() != node.created:
            return
        below = process.children(recursive=True)
        process.send_signal(signal.SIGTERM)
    except psutil.NoSuchProcess:
        return
    _, left = psutil.wait_procs([process, *below], END_SECONDS)
    for each in left:
        with contextlib.suppress(psutil.Error):
            each.kill()
    _, left = psutil.wait_procs(left, END_SECONDS)
    for ours in _STARTED:
        ours.poll()
    if left:
        raise DeviceError(f"processes that do not end: {[each.pid for each in left]}")


def home() -> Path:
    """The folder of this user's nodes on this machine.

    Its path is short, for the sockets in it may have 107 bytes at most.

    Raises:
        ConfigError: it belongs to somebody else.
    """
    folder = Path(tempfile.gettempdir()) / f"plinth-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or folder.is_symlink():
        raise ConfigError(
            f"{folder} is not this user's alone", hint="remove it, or set TMPDIR to another folder"
        )
    return folder


def _make_token(named: Path | None) -> None:
    path = Cluster(token_file=named).token_path()
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as opened:
            opened.write(secrets.token_hex(32))


def _towards(host: str) -> str:
    """The address of this machine on the way to another."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((host, 9))  # sends nothing
        except OSError as error:
            raise ConfigError(f"no way to {host}: {error.strerror}") from None
        return str(sock.getsockname()[0])


class _Lines:
    """What a node says on its standard output, line by line.

    Args:
        pipe: that output.
    """

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._rest = b""
        os.set_blocking(pipe.fileno(), False)

    def next(self, seconds: float, late: str) -> dict[str, Any]:
        """The next line, or an ``error``.

        Args:
            seconds: in which it has to come.
            late: why it did not, in words.
        """
        until = time.monotonic() + seconds
        while b"\n" not in self._rest:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._pipe], [], [], left)[0]:
                return {"error": f"{late} within {seconds:g} s"}
            part = os.read(self._pipe.fileno(), 65_536)
            if not part:
                return {"error": "it ended before it ran"}
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        return said
