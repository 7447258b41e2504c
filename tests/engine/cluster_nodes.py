"""Small clusters of Ray on this machine, for tests: always ended, whatever happens."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plinth.engine.lanes.cluster import nodes
from plinth.engine.lanes.cluster.settings import Cluster
from tests.engine.lane_models import ROOT


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def importing(*folders: str) -> Iterator[None]:
    """Let processes that start now import from folders, as installed packages would be."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


class Nodes:
    """A cluster on loopback: a head with one core for lanes, and nodes that join it.

    Args:
        folder: of tokens and of Ray's files; its path is short.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = f"127.0.0.1:{free_port()}"
        self.token = folder / "token"
        self.shelf = folder / "shelf"
        self.all: list[nodes.Running] = []

    def add(
        self, python_path: tuple[str, ...] = (f"{ROOT}/src", ROOT), **has: Any
    ) -> nodes.Running:
        """Start one more node; the first is the head."""
        given: dict[str, Any] = {
            "head": not self.all,
            "token_file": self.token,
            "cpus": 1,
            "gpus": 0,
        }
        wanted = nodes.Wanted(self.address, **{**given, "store_mb": 100, **has})
        os.environ["PLINTH_CLUSTER_CACHE"] = str(self.shelf)
        try:
            with importing(*python_path):
                self.all.append(nodes.start(wanted, self.folder))
        finally:
            del os.environ["PLINTH_CLUSTER_CACHE"]
        return self.all[-1]

    def settings(self, **more: Any) -> Cluster:
        """For an engine whose lanes are to run there."""
        given: dict[str, Any] = {"address": self.address, "token_file": self.token, "cpus": 0.25}
        return Cluster(**{**given, "silent_seconds": 2.0, **more})

    def stop(self) -> None:
        """End all of it."""
        for node in reversed(self.all):
            nodes.stop(node)


@contextmanager
def cluster(folder: Path, count: int = 1) -> Iterator[Nodes]:
    """A cluster of so many nodes."""
    made = Nodes(folder)
    try:
        for _ in range(count):
            made.add()
        yield made
    finally:
        made.stop()
