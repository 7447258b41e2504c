"""A lane in an actor of Ray, on whichever machine of a cluster has room for it.

The process beside the engine that other lanes have is here one that talks to the cluster
(``link.py``); what runs the model is an actor that Ray placed. All else is as for
:class:`plinth.engine.lanes.process.RemoteLane`: whatever ends the actor, its machine or the way
there is the death of the lane, never of the engine. Ray starts nothing again and repeats nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor

from plinth.engine.devices.device import Device
from plinth.engine.errors import DeviceError, ModelError
from plinth.engine.lanes import worker
from plinth.engine.lanes.cluster import link as script
from plinth.engine.lanes.cluster.identity import identity
from plinth.engine.lanes.cluster.parcel import Parcel
from plinth.engine.lanes.cluster.settings import Cluster, need_ray
from plinth.engine.lanes.process import HUNG_SECONDS, START_SECONDS, Link, RemoteLane
from plinth.engine.lanes.worker_process import WorkerProcess
from plinth.engine.scheduler.cost_model import LatencyModel

AVOID_SECONDS = 30.0
"""For which nothing is placed on a machine that was silent, where there is another one."""
STORE_SHARE = 0.5
"""Of the smaller object store on the way that one batch may take."""
_log = logging.getLogger("plinth.engine.lanes")


class _Recipe(Protocol):
    @property
    def path(self) -> Path: ...


class RayLane(RemoteLane):
    """Runs batches in an actor of a cluster.

    Args:
        device: that of the machine; the CPU.
        cluster: where it is, and where the lane may be.
        threads: CPU threads of a forward.
        depth: batches sent to it before the first is done; ``None``: 1.
        costs: what batches cost there; ``None``: as on the engine's own lanes on the CPU.
        hung_seconds: as for worker processes.

    Attributes:
        cluster: where it is.
        about: what the actor said of itself: its machine, process and versions.

    Raises:
        ConfigError: no Ray, no token, another device, or an impossible depth or bound.
    """

    alone = True

    def __init__(
        self,
        device: Device,
        cluster: Cluster,
        threads: int,
        depth: int | None = None,
        costs: LatencyModel | None = None,
        hung_seconds: float = HUNG_SECONDS,
    ) -> None:
        need_ray()
        super().__init__(device, threads, depth, costs, hung_seconds)
        self.cluster = cluster
        self.about: dict[str, Any] = {}
        self._told = cluster.told()
        self._was_well = False
        self._parcels: dict[Path, Parcel] = {}

    @property
    def kind(self) -> str:
        """See :class:`Lane`."""
        return "ray"

    @property
    def where(self) -> str | None:
        """See :class:`Lane`."""
        return f"{self.about['host']} ({self.about['node'][:12]})" if self.about else None

    def connect(self) -> Link:
        """See :class:`RemoteLane`."""
        return Link(self, self._open_process)

    def _open_process(self) -> WorkerProcess:
        process = WorkerProcess(0, Path(script.__file__))
        told = {
            **self._told,
            "threads": self.threads,
            "avoid": SILENT.machines(),
            "patient": self._was_well,
            "ask_unguarded": not self._was_well,
        }
        worker.send(process.socket, b"s", told)
        return process

    def accept(self, about: object) -> None:
        """See :class:`RemoteLane`.

        Raises:
            DeviceError: another Plinth runs there.
        """
        found = cast(dict[str, Any], about)
        other = [
            f"{name} {found.get(name)}, here {here}"
            for name, here in identity().items()
            if found.get(name) != here
        ]
        if other:
            raise DeviceError(
                f"{found['host']} runs another Plinth than this machine: {'; '.join(other)}",
                hint="install the same on every machine of the cluster",
            )
        self.about, self._was_well = found, True

    def weigh(self, link: Link, rows: dict[str, Tensor]) -> None:
        """See :class:`RemoteLane`.

        Raises:
            ModelError: they would fill the object store of a machine.
        """
        needed, store = sum(each.nbytes for each in rows.values()), link.about["store"]
        if needed > STORE_SHARE * store:
            raise ModelError(
                f"a batch of {needed / 1e6:.0f} MB does not fit through the cluster, whose object "
                f"store has {store / 1e6:.0f} MB on a machine, of which one batch may take half",
                hint="plinth cluster start --store-mb, or a smaller batch: add(batch_range=...)",
            )

    def bring(self, link: Link, recipe: object) -> None:
        """See :class:`RemoteLane`; files that the machine lacks are sent there."""
        path = cast(_Recipe, recipe).path
        parcel = self._parcels.get(path)
        if parcel is None:
            parcel = self._parcels[path] = Parcel.of(path)
        try:
            wanted, _ = link.ask(worker.NEED, (parcel, False), START_SECONDS).result()
            for piece in parcel.pieces(wanted):
                link.ask(worker.PIECE, (parcel.digest, *piece), START_SECONDS).result()
            if wanted:
                _log.info("sent %s to %s", parcel.inner, self.where)
                link.ask(worker.NEED, (parcel, True), START_SECONDS).result()
        except ModelError:
            del self._parcels[path]
            raise

    def is_over(self, link: Link) -> None:
        """See :class:`RemoteLane`."""
        SILENT.add(link.silent)


class Silent:
    """Machines that were silent lately, for all lanes of this process."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}
        self._lock = threading.Lock()

    def add(self, machines: list[str]) -> None:
        """Avoid machines for a while."""
        with self._lock:
            now = time.monotonic()
            self._until = {name: at for name, at in self._until.items() if at > now}
            self._until.update(dict.fromkeys(machines, now + AVOID_SECONDS))

    def machines(self) -> list[str]:
        """Those to be avoided."""
        with self._lock:
            return [name for name, at in self._until.items() if at > time.monotonic()]


SILENT = Silent()
