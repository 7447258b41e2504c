"""One machine's node of a Ray cluster, for as long as this process lives.

Run by its path with its settings as JSON. It says on standard output that it may start, starts
Ray's own processes, says that they run, and ends them when it is told to, when one of them ends, or
when nobody hears what it says: a node that nobody knows of could not be ended. ``ray start`` is not
used because it puts an outside address in the place of 127.0.0.1, on which it listens then.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil

_LOOK_SECONDS = 1.0
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - Ray's own place for its store


def main(told: dict[str, Any]) -> int:
    """Start a node and keep it.

    Args:
        told: ``head``; ``address`` of the head; ``host`` of this machine; ``cpus``, ``gpus``,
            ``resources``, ``labels``; ``store_bytes``; ``folder`` for Ray's files;
            ``environment``. Or ``members_of``, an address: who is in that cluster is said. What
            cannot be is said as ``error``.

    Returns:
        The exit code: 0 when it was told to end.
    """
    os.environ.update(told["environment"])
    try:
        if "members_of" in told:
            _meet(told["members_of"])
            _say({"members": _members(told["members_of"])})
            return 0
        signals = {signal.SIGTERM, signal.SIGINT}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        _look(told)
        if not _say({"starts": True}):
            return 1
        node = _start(told)
    except _RefusedError as error:
        _say({"error": str(error)})
        return 1
    except Exception as error:  # noqa: BLE001 - it is told to who started this
        _say({"error": f"{type(error).__name__}: {_told(error)}"})
        return 1
    heard = _say({"pid": os.getpid(), "address": node.address, "node": node.node_id})
    os.dup2(2, 1)
    code, below = 0, _below({})
    while heard and signal.sigtimedwait(signals, _LOOK_SECONDS) is None:
        below = _below(below)
        dead = node.dead_processes()
        if dead:
            names = ", ".join(str(name) for name, _ in dead)
            logging.getLogger("plinth").error("this node ends, because these did: %s", names)
            code = 1
            break
    for process in _below(below).values():
        with contextlib.suppress(psutil.Error):
            process.kill()
    return code


def _below(known: dict[int, psutil.Process]) -> dict[int, psutil.Process]:
    """All that was started here and runs, also what has outlived its parent."""
    children = {each.pid: each for each in psutil.Process().children(recursive=True)}
    return {**{pid: each for pid, each in known.items() if each.is_running()}, **children}


class _RefusedError(Exception):
    """Why nothing is started, in words."""


def _look(told: dict[str, Any]) -> None:
    """Find out what Ray would find out after minutes.

    Raises:
        _RefusedError: the head's port is taken, there is no way into the cluster, or shared memory
            is too small.
    """
    if told["head"]:
        host, _, port = told["address"].rpartition(":")
        _refuse_taken(host, int(port))
    else:
        _meet(told["address"])
    _refuse_little_memory(told["store_bytes"])


def _meet(address: str) -> None:
    """Speak with the head of a cluster.

    Raises:
        _RefusedError: it is none, or has another token.
    """
    from ray.exceptions import AuthenticationError, RayError

    try:
        import_module("ray._raylet").GcsClient(address=address)
    except AuthenticationError:
        path = os.environ["RAY_AUTH_TOKEN_PATH"]
        raise _RefusedError(
            f"the cluster at {address} refuses the token in {path}: copy the one of its head"
        ) from None
    except RayError as error:
        raise _RefusedError(f"{address} is no head of a cluster: {_told(error)}") from None


def _start(told: dict[str, Any]) -> Any:
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    folder = Path(told["folder"])
    params = RayParams(
        node_ip_address=told["host"],
        num_cpus=told["cpus"],
        num_gpus=told["gpus"],
        resources=told["resources"] or None,
        labels=told["labels"] or None,
        object_store_memory=told["store_bytes"],
        include_dashboard=False,
        include_log_monitor=False,
        no_monitor=True,
        temp_dir=str(folder),
        min_worker_port=0,
        max_worker_port=0,
        dashboard_agent_listen_port=0,
    )
    if told["head"]:
        params.gcs_server_port = int(told["address"].rpartition(":")[2])
        # A study that does not fit is refused; it is never written to a disk.
        params._system_config = {"automatic_object_spilling_enabled": False}
    else:
        params.gcs_address = told["address"]
    return Node(params, head=told["head"], shutdown_at_exit=False, spawn_reaper=True)


def _members(address: str) -> list[dict[str, Any]]:
    import ray
    from ray._private.state import GlobalState

    state = GlobalState()
    options = ray._raylet.GcsClientOptions.create(
        address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False
    )
    state._initialize_global_state(options)
    free = state.available_resources_per_node()
    return [
        {
            "node": node["NodeID"],
            "host": node["NodeManagerAddress"],
            "alive": node["Alive"],
            "cpus": node["Resources"].get("CPU", 0.0),
            "cpus_free": free.get(node["NodeID"], {}).get("CPU", 0.0),
            "gpus": node["Resources"].get("GPU", 0.0),
            "store_mb": int(node["Resources"].get("object_store_memory", 0.0)) >> 20,
            "labels": {
                name: label
                for name, label in node["Labels"].items()
                if not name.startswith("ray.io/")
            },
        }
        for node in state.node_table()
    ]


def _refuse_taken(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError as error:
            why = f"{host}:{port} cannot be listened on: {error.strerror}"
            raise _RefusedError(why) from None


def _refuse_little_memory(needed: int) -> None:
    """Refuse a store that Ray would put on a disk instead, with a warning in its log."""
    if not _SHARED_MEMORY.is_dir():
        return
    found = os.statvfs(_SHARED_MEMORY)
    free = found.f_bsize * found.f_bavail
    if free < needed:
        raise _RefusedError(
            f"{_SHARED_MEMORY} has {free >> 20} MB free, and the store is to have {needed >> 20}: "
            "name less (--store-mb), or give the container more (docker run --shm-size)"
        )


def _say(said: dict[str, Any]) -> bool:
    """Write a line; whether anybody can hear it."""
    try:
        os.write(1, json.dumps(said).encode() + b"\n")
    except OSError:
        return False
    return True


def _told(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
