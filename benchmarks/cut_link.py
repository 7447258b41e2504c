"""A link between two machines is cut under load: what is lost, and when it is noticed.

    sudo python benchmarks/cut_link.py [--fault cut] [--seconds 30] [--json]

Two network namespaces of this machine stand for two hosts, with a link between them. The engine and
the head of a Ray cluster are on one, a node that joined is on the other, and each has a lane.
Callers ask under a deadline of 10 s, and the link goes down. Ray alone takes a machine for dead
after about a minute; the engine's own signs of life find it silent after
``cluster.silent_seconds``. Other faults: ``raylet``, kill -9 of the other host's; ``actor``,
kill -9 of its lane; ``stop``, SIGSTOP of that.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from head import parser_of, print_json

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plinth.engine import Call, Engine, Refused, Sla  # noqa: E402
from tests.engine.cluster_nodes import Nodes  # noqa: E402
from tests.engine.lane_models import doubles  # noqa: E402

HERE, THERE = "plinth-a", "plinth-b"
ADDRESS, OTHER = "10.77.0.1", "10.77.0.2"
SILENT_SECONDS = 3.0
FAULTS = ("cut", "raylet", "actor", "stop")
DEADLINE = Sla(deadline_ms=10_000)


def ip(*words: str) -> None:
    """Run ip(8)."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


def hosts_made() -> None:
    """Two namespaces and a link between them."""
    for name in (HERE, THERE):
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")
    ip("link", "add", "pla", "netns", HERE, "type", "veth", "peer", "name", "plb", "netns", THERE)
    for name, device, address in ((HERE, "pla", ADDRESS), (THERE, "plb", OTHER)):
        ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
        ip("-n", name, "link", "set", device, "up")


def hosts_gone() -> None:
    """Remove them."""
    for name in (HERE, THERE):
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def run(seconds: float, fault: str = "cut") -> dict[str, Any]:
    """Make the hosts, measure in one of them, and remove them."""
    hosts_gone()
    try:
        hosts_made()
        command = ["ip", "netns", "exec", HERE, sys.executable, __file__, "--inside"]
        done = subprocess.run(
            [*command, "--seconds", str(seconds), "--fault", fault],
            capture_output=True,
            text=True,
            timeout=seconds + 240,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    finally:
        hosts_gone()


class _There(Nodes):
    """The node of the other host: started in its namespace."""

    def join(self) -> subprocess.Popen[bytes]:
        """Start it; the process keeps it until its standard input ends."""
        code = (
            "import sys\nfrom pathlib import Path\n"
            "from plinth.engine.lanes.cluster import nodes as n\n"
            f"node = n.start(n.Wanted({self.address!r}, host={OTHER!r}, token_file=Path("
            f"{str(self.token)!r}), cpus=1, gpus=0, store_mb=100), Path({str(self.folder)!r}))\n"
            "print(node.node, flush=True); sys.stdin.read(); n.stop(node)"
        )
        return subprocess.Popen(
            ["ip", "netns", "exec", THERE, sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )


def strike(fault: str, far: Any) -> None:
    """Let something happen to the other host.

    Args:
        fault: one of ``FAULTS``.
        far: the lane there.
    """
    if fault == "cut":
        ip("-n", THERE, "link", "set", "plb", "down")
    elif fault == "raylet":
        own = (
            each
            for each in psutil.process_iter(["name", "cmdline"])
            if each.info["name"] == "raylet" and any(OTHER in word for word in each.info["cmdline"])
        )
        next(own).kill()
    else:
        sign = signal.SIGKILL if fault == "actor" else signal.SIGSTOP
        os.kill(far.about["pid"], sign)


def inside(seconds: float, fault: str) -> dict[str, Any]:
    """In the first host: a cluster over both, load, and the fault."""
    with tempfile.TemporaryDirectory(prefix="plc") as folder:
        nodes = _There(Path(folder))
        nodes.address = f"{ADDRESS}:6379"
        os.environ["PYTHONPATH"] = os.pathsep.join((f"{ROOT}/src", str(ROOT)))
        other = None
        try:
            nodes.add(host=ADDRESS)
            other = nodes.join()
            assert other.stdout is not None
            far = other.stdout.readline().decode().strip()
            return _measured(nodes, far, seconds, fault)
        finally:
            with suppress(subprocess.SubprocessError, OSError):
                ip("-n", THERE, "link", "set", "plb", "up")
            if other is not None:
                other.communicate(timeout=60)
            nodes.stop()


def _measured(nodes: Nodes, far: str, seconds: float, fault: str) -> dict[str, Any]:
    outcomes: Counter[str] = Counter()
    longest = [0.0]
    lock = threading.Lock()
    settings = nodes.settings(silent_seconds=SILENT_SECONDS, cpus=0.5)
    with Engine(devices=["ray:cpu", "ray:cpu"], threads=1, cluster=settings) as engine:
        model = doubles(nodes.folder / "store")
        engine.add(model, batch_range=(1, 8), sla=DEADLINE)
        lanes = [thread.lane for thread in engine._lanes.threads]
        there = next(lane for lane in lanes if lane.about["node"] == far)  # type: ignore[attr-defined]
        room = threading.Semaphore(16)

        def ask(number: int) -> None:
            room.acquire()
            begun = time.monotonic()
            rows = torch.full((2, 4), float(number))

            def told(done: Future[Any]) -> None:
                error, took = done.exception(), time.monotonic() - begun
                right = error is None and torch.equal(done.result().value, 2 * rows)
                refused = isinstance(error, Refused)
                with lock:
                    outcomes["answered" if right else "refused" if refused else "wrong"] += 1
                    outcomes["late"] += took > 10.05
                    longest[0] = max(longest[0], took)
                room.release()

            engine.submit(Call("net", rows), DEADLINE).add_done_callback(told)

        until, asked, cut, noticed, well = time.monotonic() + seconds, 0, 0.0, 0.0, 0.0
        while time.monotonic() < until:
            ask(asked)
            asked += 1
            if not cut and time.monotonic() > until - seconds + 3:
                strike(fault, there)
                cut = time.monotonic()
            states = engine.status()["lanes"]
            if cut and not noticed and sum(lane["deaths"] for lane in states):
                noticed = time.monotonic() - cut
            if noticed and not well and all(lane["state"] == "running" for lane in states):
                well = time.monotonic() - cut
        for _ in range(16):
            room.acquire(timeout=60)
    return {
        "fault": fault,
        "asked": asked,
        "outcomes": dict(outcomes),
        "lost": asked - outcomes["answered"] - outcomes["refused"] - outcomes["wrong"],
        "longest_seconds": longest[0],
        "noticed_after_seconds": noticed,
        "both_lanes_well_after_seconds": well,
    }


def main() -> None:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--fault", choices=FAULTS, default=FAULTS[0])
    parser.add_argument("--inside", action="store_true", help="used by the program itself")
    given = parser.parse_args()
    if given.inside:
        sys.stdout.write(json.dumps(inside(given.seconds, given.fault)) + "\n")
        return
    result = run(given.seconds, given.fault)
    if given.json:
        print_json(result)
    else:
        sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
