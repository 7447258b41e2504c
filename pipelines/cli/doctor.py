"""``plinth doctor``: whether this machine can do what the config asks for, and what is missing."""

from __future__ import annotations

import errno
import os
import resource
import select
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from plinth.pipelines.console import FAILED, say, show_json, show_table

if TYPE_CHECKING:
    from plinth.pipelines.config.settings import Config

EPILOG = "Example: plinth doctor · plinth doctor --json | jq '.[] | select(.state != \"fine\")'"
State = Literal["fine", "warning", "wrong"]
_ROOM = 1 << 30  # bytes of disk below which a folder is too full to be trusted
_SPARE = 64  # file descriptors a server needs beside its connections


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        what: it is.
        state: ``"wrong"`` keeps something from starting; a ``"warning"`` does not.
        found: here.
        advice: what to do.
    """

    what: str
    state: State
    found: str
    advice: str = ""


def doctor(
    config_file: Annotated[
        Path | None, typer.Option("--config", "-c", help="TOML file; default ./plinth.toml.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON on stdout, for scripts.")
    ] = False,
) -> None:
    """Look at this machine: packages, devices, memory, limits, folders, ports; say what to do."""
    from plinth.engine import PlinthError
    from plinth.pipelines.config.settings import Config, load

    findings: list[Finding] = []
    try:
        config = load(config_file)
    except PlinthError as error:
        findings.append(Finding("config", "wrong", error.message, error.hint or ""))
        config = Config()
    findings += [one for look in LOOKS for one in look(config)]
    if as_json:
        show_json([asdict(finding) for finding in findings])
    else:
        rows = [(one.what, one.state, one.found, one.advice) for one in findings]
        show_table("This machine", ("what", "state", "found", "what to do"), rows)
        worst = {one.state for one in findings}
        say(
            "something is wrong"
            if "wrong" in worst
            else "all can run" + (", with warnings" if "warning" in worst else "")
        )
    if any(one.state == "wrong" for one in findings):
        raise typer.Exit(FAILED)


def _python(config: Config) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("Python", "fine", version)
    epoll = hasattr(select, "epoll")
    yield Finding(
        "serving over HTTP",
        "fine" if epoll else "wrong",
        f"{sys.platform}, {'with' if epoll else 'without'} epoll",
        "" if epoll else "serve on Linux, or in a container",
    )


def _packages(config: Config) -> Iterator[Finding]:
    """What each extra would bring that is not here."""
    from plinth.distribution import DISTRIBUTION, extras, missing
    from plinth.pipelines.observability.tracing import is_asked_for

    asked = {
        "grpc": config.serve.grpc.port is not None,
        "kafka": config.stream is not None,
        "oidc": config.serve.oidc.issuer is not None,
        "otel": is_asked_for(os.environ),
        "web": config.serve.web,
    }
    for extra in extras():
        absent = missing(extra)
        advice = f"pip install '{DISTRIBUTION}[{extra}]'" if absent else ""
        needed = asked.get(extra, False)
        state: State = "fine" if not absent else "wrong" if needed else "warning"
        found = f"without {', '.join(absent)}" if absent else "whole"
        yield Finding(f"extra {extra}", state, found, advice)


def _hot_code(config: Config) -> Iterator[Finding]:
    from plinth.compiled import hot_code_is_compiled, how_hot_code_runs

    advice = "" if hot_code_is_compiled() else "for a faster stream: python -m plinth.compiled"
    yield Finding("hot code", "fine", how_hot_code_runs(), advice)


def _devices(config: Config) -> Iterator[Finding]:
    from plinth.engine import PlinthError
    from plinth.engine.devices.device import Absent, devices

    for device in devices():
        if not isinstance(device, Absent):
            memory = device.memory()
            told = f"{device.name or device.vendor}, {', '.join(device.dtypes)}, "
            told += f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
            state: State = "fine" if memory.available >= _ROOM else "warning"
            advice = "" if state == "fine" else "free memory, or set engine.memory_budget"
            yield Finding(f"device {device}", state, told, advice)
    key = "engine.device" if config.engine.devices is None else "engine.devices"
    for name in config.engine.devices or (config.engine.device,):
        try:
            yield Finding(key, "fine", f"{name}: {_lane(name)}")
        except PlinthError as error:
            yield Finding(key, "wrong", error.message, error.hint or "")


def _lane(name: str) -> str:
    """Where the batches of a lane run.

    Raises:
        ConfigError, DeviceError: nowhere.
    """
    from plinth.engine.devices.device import pick
    from plinth.engine.gang.plan import GANG, parse
    from plinth.engine.runtime.lane_set import device_of

    if name.startswith(GANG):
        kind, plan = parse(name)
        return f"{plan.ranks} processes on {kind}, {plan}"
    return str(pick(device_of(name)))


def _limits(config: Config) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = config.serve.max_connections + _SPARE
    enough = soft == resource.RLIM_INFINITY or soft >= needed
    yield Finding(
        "open files",
        "fine" if enough else "warning",
        f"{soft} (at most {hard}), serve.max_connections needs {needed}",
        "" if enough else f"ulimit -n {needed}, or lower serve.max_connections",
    )


def _folders(config: Config) -> Iterator[Finding]:
    from plinth.pipelines.assembly import store_path

    named = {
        "models.store": store_path(config),
        "serve.state_dir": config.serve.state_dir,
        "serve.upload.folder": config.serve.upload.folder,
        "batch.output": config.batch.output,
    }
    for what, folder in named.items():
        if folder is not None:
            yield _folder(what, folder)


def _folder(what: str, folder: Path) -> Finding:
    """Whether a folder, or the nearest that is there above it, can be written to and has room."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        return Finding(what, "wrong", f"{there} is no folder", "name another")
    if not os.access(there, os.W_OK | os.X_OK):
        only_read = what == "models.store" and folder.exists()
        state: State = "warning" if only_read else "wrong"
        return Finding(what, state, f"{there} cannot be written to", "change its owner or mode")
    free = shutil.disk_usage(there).free
    if free < _ROOM:
        return Finding(what, "warning", f"{free >> 20} MiB are free for {folder}", "make room")
    return Finding(what, "fine", f"{folder}, {free / 2**30:.0f} GiB free")


def _ports(config: Config) -> Iterator[Finding]:
    wanted = {"serve.port": config.serve.port, "serve.grpc.port": config.serve.grpc.port}
    for what, port in wanted.items():
        if port:
            yield _port(what, config.serve.host, port)


def _port(what: str, host: str, port: int) -> Finding:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        busy = error.errno == errno.EADDRINUSE
        advice = "choose another port" if busy else "use an address and port of this machine"
        return Finding(
            what, "warning" if busy else "wrong", f"{host}:{port}: {error.strerror}", advice
        )
    return Finding(what, "fine", f"{host}:{port} is free")


def _access(config: Config) -> Iterator[Finding]:
    from plinth.engine import PlinthError

    try:
        key = config.api_key()
    except PlinthError as error:
        yield Finding("API key", "wrong", error.message, error.hint or "")
        return
    local = config.serve.host in ("127.0.0.1", "::1", "localhost")
    state: State = "fine" if local or key else "warning"
    found = "asked for" if key else "not asked for"
    advice = "" if state == "fine" else "set serve.api_key_env: others can reach this address"
    yield Finding("API key", state, f"{found} at {config.serve.host}", advice)


LOOKS: tuple[Callable[[Config], Iterator[Finding]], ...] = (
    _python,
    _packages,
    _hot_code,
    _devices,
    _limits,
    _folders,
    _ports,
    _access,
)
"""What is looked at, in order."""
