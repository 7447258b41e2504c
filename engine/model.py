"""Models and the store they live in: safetensors and a manifest, never a pickle.

On disk: ``<root>/<name>/<version>/manifest.json`` with the spec and the sha256 of each file,
and ``weights.safetensors``. A model's code is found by the name it was registered under with
:func:`architecture`, so that loading executes nothing that lies in the store.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.errors import InputError, ModelError

FORMAT = 1
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_MANIFEST_LIMIT = 1 << 20  # bytes
_FACTORIES: dict[str, Callable[..., nn.Module]] = {}


class TensorSpec(BaseModel):
    """One input or output of a model.

    Args:
        name: its name.
        shape: sizes of one row, without the dimension of rows; ``None`` is any size.
        dtype: name of a torch dtype, such as ``"float32"``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    shape: tuple[int | None, ...]
    dtype: str = "float32"


class ModelSpec(BaseModel):
    """What a model is: its contract, origin and measured quality.

    Args:
        name: lower case, ``[a-z0-9._-]``.
        version: compared naturally, so that 1.10 follows 1.9.
        architecture: name under which its code is registered.
        config: keyword arguments of that code.
        inputs: what it takes; ``outputs``: what it gives.
        description: what it is for; ``licence``: of the weights; ``source``: where from.
        metrics: measured quality by name.
        cheaper: name of the variant that degraded work goes to.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    version: str = Field(default="1", pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    architecture: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    inputs: tuple[TensorSpec, ...] = Field(min_length=1)
    outputs: tuple[TensorSpec, ...] = Field(min_length=1)
    description: str = ""
    licence: str = ""
    source: str = ""
    metrics: dict[str, float] = Field(default_factory=dict)
    cheaper: str | None = None

    def check(self, rows: Mapping[str, Tensor]) -> None:
        """Hold rows (n, ...) by input name against the contract.

        Raises:
            InputError: names the input, what was expected and what came.
        """
        expected = {spec.name for spec in self.inputs}
        if set(rows) != expected:
            raise InputError(
                f"model {self.name} takes inputs {sorted(expected)}, got {sorted(rows)}"
            )
        for spec in self.inputs:
            got = rows[spec.name]
            shape = tuple(got.shape[1:])
            fits = len(shape) == len(spec.shape) and all(
                want is None or want == size for want, size in zip(spec.shape, shape, strict=True)
            )
            dtype = str(got.dtype).removeprefix("torch.")
            if not fits or dtype != spec.dtype:
                raise InputError(
                    f"model {self.name}: input {spec.name} has rows {shape} {dtype}, "
                    f"expected {spec.shape} {spec.dtype}",
                    field=spec.name,
                )


@dataclass(frozen=True)
class Model:
    """A loaded model: its spec and its module in eval mode, on the host."""

    spec: ModelSpec
    module: nn.Module


def architecture(name: str) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Register the code of a model, a callable of keyword arguments that gives a module."""

    def register(factory: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        known = _FACTORIES.setdefault(name, factory)
        if known is not factory and known.__qualname__ != factory.__qualname__:
            raise ModelError(f"architecture {name} is registered twice", hint="choose another name")
        return factory

    return register


class ModelStore:
    """A folder of models by name and version.

    Args:
        root: the folder; made when the first model is saved.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def save(self, spec: ModelSpec, module: nn.Module) -> Path:
        """Write a new version; whole or not at all. Returns its folder.

        Raises:
            ModelError: the version exists already.
        """
        target = self.root / spec.name / spec.version
        if target.exists():
            raise ModelError(
                f"{spec.name} {spec.version} exists already in {self.root}",
                hint="versions never change; save a new one",
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=target.parent))
        try:
            weights = part / "weights.safetensors"
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}, weights
            )
            manifest = {
                "format": FORMAT,
                "spec": spec.model_dump(mode="json"),
                "files": {
                    weights.name: {"sha256": _sha256(weights), "bytes": weights.stat().st_size}
                },
                "torch": torch.__version__,
            }
            (part / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
            part.chmod(0o755)
            part.rename(target)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        return target

    def versions(self, name: str) -> list[str]:
        """Versions of a model, oldest first."""
        _safe(name)
        found = (self.root / name).glob("*/manifest.json")
        return sorted(
            (path.parent.name for path in found if _NAME.fullmatch(path.parent.name)), key=_natural
        )

    def list(self) -> list[ModelSpec]:
        """The specs of all models and versions."""
        names = sorted(path.name for path in self.root.glob("*") if path.is_dir())
        return [self._manifest(n, v)[0] for n in names for v in self.versions(n)]

    def load(self, name: str, version: str | None = None) -> Model:
        """Load a model, the newest version unless one is named.

        Raises:
            ModelError: unknown, damaged, or not fitting its architecture.
        """
        versions = self.versions(name)
        if not versions:
            known = sorted({spec.name for spec in self.list()})
            raise ModelError(
                f"no model {name} in {self.root}", hint=f"it holds {known or 'nothing'}"
            )
        chosen = version if version is not None else versions[-1]
        if chosen not in versions:
            raise ModelError(f"{name} has no version {chosen}", hint=f"there are {versions}")
        spec = self.verify(name, chosen)
        factory = _FACTORIES.get(spec.architecture or "")
        if factory is None:
            raise ModelError(
                f"{name} {chosen} is of architecture {spec.architecture}, which is not registered",
                hint=f"import the package that defines it; registered are {sorted(_FACTORIES)}",
            )
        module = factory(**spec.config)
        _fill(module, self.root / name / chosen / "weights.safetensors", name)
        return Model(spec, module.eval())

    def verify(self, name: str, version: str) -> ModelSpec:
        """Check every file of a version against its sha256.

        Raises:
            ModelError: names the file that is missing or was changed.
        """
        spec, files = self._manifest(name, version)
        folder = self.root / name / version
        for file, facts in files.items():
            path = folder / Path(file).name
            if not path.exists() or _sha256(path) != facts.get("sha256"):
                raise ModelError(
                    f"{path} is missing or not what was saved", hint="copy the version again"
                )
        return spec

    def _manifest(self, name: str, version: str) -> tuple[ModelSpec, dict[str, dict[str, Any]]]:
        _safe(name)
        _safe(version)
        path = self.root / name / version / "manifest.json"
        try:
            if path.stat().st_size > _MANIFEST_LIMIT:
                raise ModelError(f"{path} is larger than {_MANIFEST_LIMIT} bytes")
            data = json.loads(path.read_text())
            if data["format"] != FORMAT:
                raise ModelError(f"{path} has format {data['format']}, expected {FORMAT}")
            return ModelSpec.model_validate(data["spec"]), dict(data["files"])
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error


def from_pretrained(name: str, *, version: str | None = None, store: Path | None = None) -> Model:
    """Load a model from a store: ``store``, else ``PLINTH_MODEL_STORE``, else the user's own."""
    default = Path.home() / ".local" / "share" / "plinth" / "models"
    root = store or Path(os.environ.get("PLINTH_MODEL_STORE") or default)
    return ModelStore(root).load(name, version)


def _fill(module: nn.Module, path: Path, name: str) -> None:
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ModelError(f"{path} is not a safetensors file: {error}") from error
    wanted = module.state_dict()
    for key in sorted(wanted.keys() | weights.keys()):
        ours = tuple(wanted[key].shape) if key in wanted else "absent"
        theirs = tuple(weights[key].shape) if key in weights else "absent"
        if ours != theirs:
            raise ModelError(
                f"{name}: tensor {key} is {theirs} in the file, {ours} in the code",
                hint="the architecture or its config changed since the model was saved",
            )
    module.load_state_dict(weights)


def _safe(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ModelError(
            f"{name!r} is not a model name or version", hint="use a-z, 0-9, dot, _ and -"
        )


def _natural(version: str) -> list[tuple[int, int | str]]:
    parts = re.findall(r"\d+|[a-z]+", version)
    return [(1, int(part)) if part.isdigit() else (0, part) for part in parts]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
