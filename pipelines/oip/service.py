"""What the protocol asks of models: metadata, inference, repository, statistics.

REST and gRPC are two ways to say the same; both turn their messages into calls of this service,
and the errors it raises into answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from plinth.distribution import version
from plinth.engine import (
    Answer,
    Call,
    ConfigError,
    DeviceError,
    Engine,
    Flow,
    InputError,
    ModelError,
    ModelSpec,
    ModelStore,
    QueueFull,
    Sla,
)
from plinth.pipelines.config.settings import OipConfig
from plinth.pipelines.oip.tensors import metadata_of

log = logging.getLogger("plinth.oip")
EXTENSIONS = ("binary_tensor_data", "model_repository", "statistics", "parameters")
MAX_PRIORITY = 1000
_DAY_MS = 86_400_000
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_ANSWERED = ("answered", "late")

UNSUPPORTED = {
    "sequence_id": "models here keep no state between requests",
    "shared_memory_region": "tensors in shared memory are not read",
    "classification": "outputs come as they are, without classes",
}
"""Parameters that change what is asked for, and why they are refused; others are ignored."""


class ByteBudget:
    """The bytes of requests and what is made of them that may be in work together.

    Args:
        most: bytes.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._used = 0

    @contextlib.contextmanager
    def reserve(self, count: int) -> Iterator[None]:
        """Hold bytes while a request is in work.

        Raises:
            QueueFull: too many are in work already.
        """
        if self._used and self._used + count > self._most:
            raise QueueFull(
                f"{self._used:,} bytes of tensors are in work, at most {self._most:,} may be",
                retry_after=1.0,
            )
        self._used += count
        try:
            yield
        finally:
            self._used -= count


class ModelService:
    """The models of one engine, by the words of the protocol.

    Args:
        engine: has the models of its verticals, which clients cannot change.
        store: whose models can be loaded.
        config: what clients may do and take.

    Attributes:
        budget: of the bytes in work.
        config: as given.
    """

    def __init__(self, engine: Engine, store: ModelStore, config: OipConfig) -> None:
        self.config = config
        self.budget = ByteBudget(config.max_work_bytes)
        self._engine = engine
        self._store = store
        self._owned = frozenset(engine.contracts())
        self._changing = asyncio.Lock()

    # -- what there is ---------------------------------------------------------------------------
    def server_metadata(self) -> dict[str, Any]:
        """Name, version and extensions of the server."""
        return {"name": "plinth", "version": version(), "extensions": list(EXTENSIONS)}

    def spec(self, name: str, version: str = "") -> ModelSpec:
        """The contract of a model that is loaded.

        Raises:
            InputError: ``model_not_found``; says whether it could be loaded.
        """
        found = self._engine.contracts().get(name)
        if found is None:
            raise self._missing(name)
        spec, _ = found
        if version not in ("", spec.version):
            raise InputError(
                f"model {spec.name} is loaded in version {spec.version}, not in the one asked for",
                field="model_version",
                hint="leave the version out, or load that one",
                reason="model_not_found",
            )
        return spec

    def _missing(self, name: str) -> InputError:
        stored = name in stored_models(self._store)
        loaded = sorted(self._engine.contracts())
        return InputError(
            "this model is in the store but not loaded" if stored else "there is no such model",
            field="model_name",
            hint="load it first (RepositoryModelLoad, /v2/repository/models/.../load)"
            if stored
            else f"loaded are {', '.join(loaded) or 'none'}",
            reason="model_not_found",
        )

    def is_ready(self, name: str, version: str = "") -> bool:
        """Whether the model answers now.

        Raises:
            InputError: as :meth:`spec`.
        """
        self.spec(name, version)
        return bool(self._engine.state == "running")

    def metadata(self, name: str, version: str = "") -> dict[str, Any]:
        """Inputs and outputs of a model; raises InputError as :meth:`spec`."""
        spec = self.spec(name, version)
        return {
            "name": spec.name,
            "versions": [spec.version],
            "platform": f"plinth_{self._runs(spec).get('backend', 'eager')}",
            "inputs": [metadata_of(tensor) for tensor in spec.inputs],
            "outputs": [metadata_of(tensor) for tensor in spec.outputs],
        }

    def _runs(self, spec: ModelSpec) -> dict[str, Any]:
        return dict(self._engine.status()["models"].get(spec.name, {}))

    def model_config(self, name: str, version: str = "") -> dict[str, Any]:
        """The model's configuration as Triton's tools read it; raises as :meth:`spec`."""
        spec = self.spec(name, version)
        told = self.metadata(name, version)

        def sides(tensors: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [
                {
                    "name": tensor["name"],
                    "data_type": f"TYPE_{tensor['datatype']}",
                    "dims": tensor["shape"][1:],
                }
                for tensor in tensors
            ]

        return {
            "name": told["name"],
            "platform": told["platform"],
            "max_batch_size": self._runs(spec).get("largest_batch", 1),
            "input": sides(told["inputs"]),
            "output": sides(told["outputs"]),
        }

    # -- inference -------------------------------------------------------------------------------
    def promise(self, name: str, parameters: Mapping[str, object]) -> Sla:
        """The promise of a request for a model that is loaded.

        Args:
            name: of the model, whose own promise counts where the request says nothing.
            parameters: of the request. ``timeout``: microseconds from arrival to answer.
                ``priority``: 1 is the most urgent: n may take n times the model's promise, and
                gets a share of 1/n among models without one. 0 of either: not said.

        Raises:
            InputError: no such number, or a parameter that cannot be heeded.
        """
        check_parameters(parameters)
        contract = self._engine.contracts().get(name)
        if contract is None:
            raise self._missing(name)
        own = contract[1]
        timeout = _whole("timeout", parameters.get("timeout"), _DAY_MS * 1000 - 1)
        rank = _whole("priority", parameters.get("priority"), MAX_PRIORITY)
        if rank and own.deadline_ms is not None:
            own = dataclasses.replace(own, deadline_ms=min(rank * own.deadline_ms, _DAY_MS - 1.0))
        elif rank:
            own = dataclasses.replace(own, weight=own.weight / rank)
        return dataclasses.replace(own, deadline_ms=timeout / 1e3) if timeout else own

    def check_counts(self, spec: ModelSpec, inputs: int, outputs: int) -> None:
        """Refuse a request that names more than the model has, before it is looked through.

        Raises:
            InputError: says what there is.
        """
        for field, given, there in (
            ("inputs", inputs, spec.inputs),
            ("outputs", outputs, spec.outputs),
        ):
            if given > len(there):
                raise InputError(
                    f"the request names {given:,} {field}, model {spec.name} has {len(there)}",
                    field=field,
                    hint=f"they are {', '.join(tensor.name for tensor in there)}",
                    reason="too_many_tensors",
                )

    def wanted(self, spec: ModelSpec, outputs: Sequence[str]) -> list[str]:
        """Names of the outputs to send, each once; all where none are named.

        Raises:
            InputError: the model has no such output.
        """
        known = [tensor.name for tensor in spec.outputs]
        for name in outputs:
            if name not in known:
                raise InputError(
                    f"model {spec.name} has no such output",
                    field="outputs",
                    hint=f"it gives {', '.join(known)}",
                    reason="unknown_output",
                )
        return list(dict.fromkeys(outputs)) or known

    async def infer(
        self, spec: ModelSpec, rows: Mapping[str, Tensor], sla: Sla
    ) -> Answer[dict[str, Tensor]]:
        """Outputs by name; cancelling the task takes the rows out of the queue.

        Args:
            spec: of the model.
            rows: (n, ...) by input name.
            sla: from :meth:`promise`, less what the request has waited.

        Raises:
            InputError: the rows are not what the model takes.
            Refused: the engine does not do the work.
        """
        spec.check(rows)
        return await self._engine.run_async(_one_call(spec, rows), sla)

    # -- repository ------------------------------------------------------------------------------
    def index(self, *, ready_only: bool = False) -> list[dict[str, str]]:
        """Every model that is loaded or in the store, with its state."""
        loaded = {name: spec for name, (spec, _) in self._engine.contracts().items()}
        stored = {(n, v) for n, versions in stored_models(self._store).items() for v in versions}
        ready = {(spec.name, spec.version) for spec in loaded.values()}
        shown = ready if ready_only else ready | stored
        return [
            {
                "name": name,
                "version": number,
                "state": "READY" if (name, number) in ready else "UNAVAILABLE",
                "reason": "" if (name, number) in ready else "not loaded",
            }
            for name, number in sorted(shown)
        ]

    async def load(self, name: str) -> None:
        """Load a model of the store, its newest version.

        A model of that name is replaced between two batches.

        Raises:
            InputError: clients may not, there is no such model,
                it is damaged, or does not fit into memory.
        """
        self._check_rights(name)
        if name not in stored_models(self._store):
            raise self._missing(name)
        async with self._changing:
            await asyncio.to_thread(self._load, name)
        log.info("loaded model %s", name)

    def _load(self, name: str) -> None:
        try:
            self._engine.add(self._store.load(name))
        except (ModelError, DeviceError) as error:  # told whole: it is about the model alone
            raise InputError(
                error.message, field="model_name", hint=error.hint, reason="cannot_load"
            ) from None

    async def unload(self, name: str) -> None:
        """Let a model answer no more; what it has accepted is still answered.

        Raises:
            InputError: clients may not, it belongs to a vertical, or is not loaded.
        """
        self._check_rights(name)
        async with self._changing:
            self.spec(name)
            await asyncio.to_thread(self._engine.remove, name)
        log.info("unloaded model %s", name)

    def _check_rights(self, name: str) -> None:
        if not self.config.load_models:
            raise InputError(
                "models of this server are not for clients to load and unload",
                hint="set serve.oip.load_models = true in the server's config file",
                reason="forbidden",
            )
        if name in self._owned:
            raise InputError(
                f"model {name} belongs to a vertical and stays as it is",
                field="model_name",
                reason="model_in_use",
            )

    # -- statistics ------------------------------------------------------------------------------
    def statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        """Counts and times of one model, or of all; raises InputError as :meth:`spec`."""
        contracts = self._engine.contracts()
        specs = [self.spec(name, version)] if name else [spec for spec, _ in contracts.values()]
        return {"model_stats": [self._statistics(spec) for spec in specs]}

    def _statistics(self, spec: ModelSpec) -> dict[str, Any]:
        def value(sample: str, **labels: str) -> float:
            found = self._engine.metrics.registry.get_sample_value(
                f"plinth_{sample}", {"model": spec.name, **labels}
            )
            return found or 0.0

        def phase(count: float, seconds: float) -> dict[str, int]:
            return {"count": int(count), "ns": int(seconds * 1e9)}

        calls = value("call_seconds_count")
        whole, queue = value("call_seconds_sum"), value("queue_seconds_sum")
        failed = sum(
            sample.value
            for family in self._engine.metrics.calls.collect()
            for sample in family.samples
            if sample.name.endswith("_total") and sample.labels["model"] == spec.name
            if sample.labels["outcome"] not in _ANSWERED
        )
        batches = value("batch_rows_count")
        return {
            "name": spec.name,
            "version": spec.version,
            "inference_count": int(value("batch_rows_sum")),
            "execution_count": int(batches),
            "inference_stats": {
                "success": phase(calls, whole),
                "fail": phase(failed, 0.0),
                "queue": phase(calls, queue),
                "compute_input": phase(calls, 0.0),
                "compute_infer": phase(batches, value("batch_seconds_sum")),
                "compute_output": phase(calls, 0.0),
            },
            "batch_stats": [],
        }


def check_parameters(parameters: Mapping[str, object]) -> None:
    """Refuse parameters that would make another answer right.

    Raises:
        InputError: says which, and why.
    """
    for name, why in UNSUPPORTED.items():
        if parameters.get(name):
            raise InputError(
                f"parameters.{name} cannot be heeded: {why}",
                field=f"parameters.{name}",
                hint="leave it out",
                reason="bad_parameter",
            )


def less(sla: Sla, seconds: float) -> Sla:
    """The promise, less what a request has waited; the engine refuses what is late already."""
    if sla.deadline_ms is None:
        return sla
    return dataclasses.replace(sla, deadline_ms=max(sla.deadline_ms - seconds * 1e3, 0.001))


def within(sla: Sla, seconds: float | None) -> Sla:
    """The promise, or what its client waits for at most, if that is less."""
    if seconds is None or not 0 < seconds < _DAY_MS / 1e3:
        return sla
    return dataclasses.replace(sla, deadline_ms=min(sla.deadline_ms or math.inf, seconds * 1e3))


def _one_call(spec: ModelSpec, rows: Mapping[str, Tensor]) -> Flow[dict[str, Tensor]]:
    found = yield Call(spec.name, dict(rows))
    return {spec.outputs[0].name: found} if isinstance(found, Tensor) else dict(found)


def _whole(field: str, given: object, most: int) -> int:
    """A whole number from 0 on; text is read, since some clients send it."""
    if given is None or given == "":
        return 0
    if isinstance(given, str) and given.isascii() and given.isdecimal() and len(given) < 16:
        given = int(given)
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given <= most:
        raise InputError(
            f"parameters.{field} is no whole number from 0 to {most:,}",
            field=f"parameters.{field}",
            reason="bad_parameter",
        )
    return given


def stored_models(store: ModelStore) -> dict[str, list[str]]:
    """Versions by model name, oldest first, of whatever lies in a store, whole or damaged."""
    names = sorted(path.name for path in store.root.glob("*/") if _NAME.fullmatch(path.name))
    found = {name: store.versions(name) for name in names}
    return {name: versions for name, versions in found.items() if versions}


def load_at_start(engine: Engine, store: ModelStore, names: Sequence[str]) -> None:
    """Load models of the store before the server takes requests; ``*`` stands for all.

    Raises:
        ConfigError: there is no such model.
        ModelError: one is damaged.
    """
    stored = stored_models(store)
    for name in stored if "*" in names else names:
        if name not in stored:
            raise ConfigError(
                f"serve.oip.models names {name}, which is not in {store.root}",
                hint=f"it holds {', '.join(stored) or 'nothing'}",
            )
        if name not in engine.contracts():
            engine.add(store.load(name))
