"""Models and the store they live in: safetensors and a manifest, never a pickle.

On disk: ``<root>/<name>/<version>/manifest.json`` with the spec and the sha256 of each file,
and ``weights.safetensors``, ``weights.packed``, ``model.onnx`` or ``program.pt2``. The code of
weights is found by the name it was registered under with :func:`architecture`, and a graph is
read as data, so that loading executes nothing that lies in the store.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from plinth.engine.compression.training import Compressed
from plinth.engine.errors import ModelError
from plinth.engine.models import program, weights
from plinth.engine.models.binding import Binding, outputs_by_name
from plinth.engine.models.digest import digest
from plinth.engine.models.fidelity import Run, compare, versions
from plinth.engine.models.fitted import estimators
from plinth.engine.models.fitted.trees import rows_at_thresholds
from plinth.engine.models.onnx import OnnxModule, read_contract
from plinth.engine.models.signature import Example, Wishes, derive, given_rows
from plinth.engine.models.spec import ModelSpec, TensorSpec, hold_against, spec_of
from plinth.engine.models.variants import Variants

__all__ = ["Model", "ModelSpec", "ModelStore", "TensorSpec", "architecture", "from_pretrained"]

FORMAT = 1
_WEIGHTS = "weights.safetensors"
_PACKED = weights.PACKED.name
_ONNX = "model.onnx"
_PROGRAM = "program.pt2"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_MANIFEST_LIMIT = 1 << 20  # bytes
_FACTORIES: dict[str, Callable[..., nn.Module]] = {}


@dataclass(frozen=True)
class Model:
    """A loaded model.

    Args:
        spec: its contract.
        module: the network in eval mode, on the host; for an ONNX file, one that runs it.
        onnx: the ONNX file, if it is one.
        example: rows (n, ...) by input name that the model is tried and measured on; ``None``
            makes rows up from the spec.
        made_from: SHA-256 of the files it was read from, where these alone decide what it
            computes; for modules that cannot be read, such as TorchScript. Or its digest, once
            its module stays as it is, see :meth:`pinned`.
        origin: what is known of the model of another library that it was made of.
        variants: other ways to compute it that a store has, if it has any.
        exact: runs in precision ``"exact"``, whatever the engine runs others in: what these are
            held against.
        memory: bytes that a forward of one row may take beside the weights; backend ``"auto"`` does
            not try what is foreseen to take more. ``None``: as much as there is.
    """

    spec: ModelSpec
    module: nn.Module
    onnx: Path | None = None
    example: Mapping[str, Tensor] | None = None
    made_from: str | None = None
    origin: Mapping[str, Any] | None = None
    variants: Variants | None = None
    exact: bool = False
    memory: int | None = None

    @classmethod
    def from_torch(
        cls,
        module: nn.Module,
        *,
        example: Example,
        name: str | None = None,
        version: str = "1",
        other: Example = None,
        free: Mapping[str, Sequence[int]] | None = None,
        outputs: Sequence[str] | None = None,
        rows_dim: Mapping[str, int] | None = None,
        **about: str,
    ) -> Model:
        """A model from a torch module and rows it takes; the contract is read off them.

        Inputs get the names of ``forward``'s parameters, dtypes and sizes those of the example,
        integers that go into an embedding its size as bounds. The model is a copy in eval mode,
        so that training goes on without it. Each row is run alone and beside the others.

        Args:
            module: takes tensors, and gives a tensor, or several in a tuple or mapping.
            example: a batch it takes: a tensor, a tuple in the order of ``forward``, or tensors
                (n, ...) by input name. Arrays of NumPy will do.
            name: its name; by default the module's class, in lower case.
            version: its version.
            other: a second example; sizes that differ are free.
            free: dimensions of any size by input, such as ``{"input_ids": [1]}``.
            outputs: names of the outputs of a tuple, or those of a mapping that are kept.
            rows_dim: the dimension of rows where it is not the first, by input or output name.
            about: ``description``, ``licence`` and ``source`` of the spec.

        Raises:
            ModelError: the example does not fit, an output has no row for each input row, rows
                mix in a batch, or answers are random; says which and what to do.
        """
        wishes = Wishes(
            name, version, other, dict(free or {}), outputs, dict(rows_dim or {}), **about
        )
        found = derive(module, example, wishes)
        return cls(found.spec, found.module, example=found.example)

    @classmethod
    def from_sklearn(
        cls,
        estimator: Any,
        *,
        example: Any,
        name: str | None = None,
        version: str = "1",
        outputs: Sequence[str] | None = None,
    ) -> Model:
        """A model from a fitted estimator of scikit-learn, LightGBM or XGBoost, through ONNX.

        It takes ``X``, float32 rows of the features, and gives ``label`` and ``probabilities``,
        or ``variable`` for a number. Its answers are held against the estimator's own.

        Args:
            estimator: fitted; pipelines are taken too.
            example: rows (n, features) of numbers: an array, a tensor or a data frame.
            name: its name; by default the estimator's class, in lower case.
            version: its version.
            outputs: names of the outputs to keep; by default all.

        Raises:
            ModelError: it cannot be converted, gives words, or other answers in ONNX.
        """
        named = name or type(estimator).__name__.lower()
        given = estimators.as_rows(example, named)
        path = estimators.to_onnx(estimator, given, named)
        spec = spec_of(path, read_contract(path, outputs), named, version)
        spec = spec.model_copy(update={"source": type(estimator).__qualname__})
        rows = given_rows(named, spec.inputs, {estimators.INPUT: given})
        model = cls(spec, _read(path, spec), path, rows)
        shapes = {tensor.name: tensor.shape for tensor in spec.outputs}
        met = rows_at_thresholds(path, given.shape[1])
        tried = {estimators.INPUT: given if met is None else torch.cat([given, met])}
        found = compare(named, model.run, estimators.predictor(estimator, shapes), tried)
        libraries = versions(*estimators.LIBRARIES)
        origin = found.model_dump(mode="json") | {"kind": "estimator", "libraries": libraries}
        return replace(model, origin=origin)

    def digest(self) -> str:
        """SHA-256 over weights, structure and code: the key of what is derived from them."""
        if self.made_from is not None:
            return self.made_from
        return _sha256(self.onnx) if self.onnx else digest(self.module)

    def pinned(self) -> Model:
        """The same, whose digest is not computed again: nobody changes its module from now on."""
        return replace(self, made_from=self.digest())

    def rows(self, count: int) -> dict[str, Tensor]:
        """So many rows to try it with: those of ``example`` in turn, else made up."""
        if self.example is None:
            return self.spec.example(count)
        given = len(next(iter(self.example.values())))
        if count <= given:
            return {name: tensor[:count] for name, tensor in self.example.items()}
        turn = torch.arange(count) % given
        return {name: tensor[turn] for name, tensor in self.example.items()}

    def run(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Plain torch on the host: rows (n, ...) by input name to rows by output name.

        Raises:
            ModelError: names of inputs or outputs do not match; whatever the module raises.
        """
        with torch.inference_mode():
            output = Binding(self.spec, self.module).call(self.module, rows)
        return outputs_by_name(self.spec, output)


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

    def save(
        self,
        spec: ModelSpec,
        module: nn.Module | Compressed,
        *,
        facts: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write a new version; whole or not at all. Returns its folder.

        Args:
            spec: its contract.
            module: its network, of a registered architecture; a compressed one is stored packed.
            facts: JSON-ready, to keep with it; see :meth:`facts`.

        Raises:
            ModelError: the version exists already.
        """
        factory = _FACTORIES.get(spec.architecture or "")
        origin = None if factory is None else f"{factory.__module__}.{factory.__qualname__}"

        def fill(folder: Path) -> dict[str, Any]:
            shared: dict[str, str] = {}
            if isinstance(module, Compressed):
                module.write(folder / _PACKED)
            else:
                shared = weights.write(module, folder / _WEIGHTS)
            return {"shared": shared, "factory": origin, "facts": dict(facts or {})}

        return self._write(spec, _PACKED if isinstance(module, Compressed) else _WEIGHTS, fill)

    def add(
        self, model: Model, *, source: Run | None = None, facts: Mapping[str, Any] | None = None
    ) -> Path:
        """Write a model whose code is not registered as a new version. Returns its folder.

        A torch module is exported, an ONNX file is copied. What was written is read again and
        held against the model on its example rows; :meth:`report` says how far they are apart.

        Args:
            model: the model, from :meth:`Model.from_torch` say.
            source: rows by input name to rows by output name, as the model it was made of
                computes them; by default the model itself.
            facts: more to keep in the report.

        Raises:
            ModelError: it cannot be exported, what was written gives other answers, or the
                version exists.
        """
        spec, file = model.spec, _ONNX if model.onnx else _PROGRAM
        rows = model.rows(max(2, len(next(iter(model.example.values())))) if model.example else 4)

        def fill(folder: Path) -> dict[str, Any]:
            if model.onnx:
                _copy(model.onnx, folder / _ONNX)
            else:
                program.write(spec, model.module, rows, folder / _PROGRAM)
            written = Model(spec, _read(folder / file, spec))
            found = compare(spec.name, written.run, source or model.run, rows)
            return {"report": found.model_dump(mode="json") | dict(facts or model.origin or {})}

        return self._write(spec, file, fill)

    def report(self, name: str, version: str | None = None) -> dict[str, Any]:
        """How far a converted model is from its source, on which rows; empty for others."""
        return dict(self._manifest(name, self._choose(name, version))[1].get("report") or {})

    def facts(self, name: str, version: str | None = None) -> dict[str, Any]:
        """What else was kept with a version when it was saved; empty for most."""
        return dict(self._manifest(name, self._choose(name, version))[1].get("facts") or {})

    def import_onnx(
        self,
        spec: ModelSpec | None,
        path: Path,
        *,
        name: str | None = None,
        version: str | None = None,
        outputs: Sequence[str] | None = None,
    ) -> Path:
        """Check an ONNX file and copy it into a new version. Returns its folder.

        Args:
            spec: its contract; ``None`` reads inputs and outputs from its graph.
            path: one file with all weights; the first dimension of its tensors is dynamic.
            name: without a spec, the model's name; by default the file's stem.
            version: without a spec, its version; by default ``"1"``.
            outputs: without a spec, names of the outputs to keep; by default all.

        Raises:
            ModelError: the file is not valid, has a fixed number of rows, keeps weights
                elsewhere, does not fulfil the spec; or the version exists already.
        """
        path = Path(path)
        found = read_contract(path, outputs if spec is None else [o.name for o in spec.outputs])
        if spec is None:
            spec = spec_of(path, found, name or path.stem.lower(), version or "1")
        else:
            hold_against(spec, path, found)
        return self._write(spec, _ONNX, lambda folder: _copy(path, folder / _ONNX))

    def _write(self, spec: ModelSpec, file: str, fill: Callable[[Path], dict[str, Any]]) -> Path:
        target = self.root / spec.name / spec.version
        if target.exists():
            raise _exists(spec, self.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=target.parent))
        try:
            extra = fill(part)
            manifest = {
                "format": FORMAT,
                "spec": spec.model_dump(mode="json"),
                "files": {
                    file: {
                        "sha256": _sha256(part / file),
                        "bytes": (part / file).stat().st_size,
                    }
                },
                **extra,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "torch": torch.__version__,
            }
            (part / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
            part.chmod(0o755)
            part.rename(target)
        except OSError as error:
            if target.exists():
                raise _exists(spec, self.root) from error
            raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return target

    def versions(self, name: str) -> list[str]:
        """Versions of a model, oldest first."""
        _safe(name)
        found = (self.root / name).glob("[!.]*/manifest.json")
        return sorted(
            (path.parent.name for path in found if _NAME.fullmatch(path.parent.name)), key=_natural
        )

    def list(self) -> list[ModelSpec]:
        """The specs of all models and versions."""
        names = sorted(path.name for path in self.root.glob("*") if _NAME.fullmatch(path.name))
        return [self._manifest(n, v)[0] for n in names for v in self.versions(n)]

    def load(self, name: str, version: str | None = None) -> Model:
        """Load a model, the newest version unless one is named.

        Raises:
            ModelError: unknown, damaged, or not fitting its architecture.
        """
        chosen = self._choose(name, version)
        spec = self.verify(name, chosen)
        data = self._manifest(name, chosen)[1]
        folder = self.root / name / chosen
        variants = self.variants(name, chosen)
        if _ONNX in data["files"]:
            path = folder / _ONNX
            return Model(spec, _read(path, spec), path, variants=variants)
        if _PROGRAM in data["files"]:
            return Model(spec, _read(folder / _PROGRAM, spec), variants=variants)
        built = weights.uninitialised(lambda: _build(spec, data.get("factory")))
        (file,) = data["files"]
        weights.fill(built, folder / file, name, data.get("shared") or {})
        return Model(spec, built.eval(), variants=variants)

    def network(
        self, name: str, version: str | None = None, variant: str | None = None
    ) -> nn.Module | Compressed:
        """The network of a version, or of a variant of it, as :meth:`save` takes it.

        Packed weights stay the codes that they are, so that what is saved again has the same.

        Args:
            name: of the model.
            version: the newest unless one is named.
            variant: one that has packed weights of its own, as ``plinth compress`` makes them.

        Raises:
            ModelError: unknown, damaged, no network of a registered architecture, or the variant
                has no weights.
        """
        chosen = self._choose(name, version)
        spec, data = self.verify(name, chosen), self._manifest(name, chosen)[1]
        (file,) = data["files"]
        path = self.root / name / chosen / file
        if file not in (_WEIGHTS, _PACKED):
            raise ModelError(
                f"{name} {chosen} is kept as {file}, not as weights of a registered architecture",
                hint="save the module that it was made from",
            )
        if variant is not None:
            variants = self.variants(name, chosen)
            found = variants.get(variant)
            if _PACKED not in found.files:
                raise ModelError(
                    f"variant {variant} of {name} {chosen} has no weights of its own",
                    hint="plinth compress makes some that do; plinth models show lists them",
                )
            path = variants.path(found, _PACKED)
        if path.name == _WEIGHTS:
            return self.load(name, chosen).module
        built = weights.uninitialised(lambda: _build(spec, data.get("factory")))
        return weights.read_packed(built, path, name)

    def size(self, name: str, version: str | None = None) -> int:
        """Bytes of a version's file, without its variants."""
        (facts,) = self._manifest(name, self._choose(name, version))[1]["files"].values()
        return int(facts["bytes"])

    def memory(self, name: str, version: str | None = None) -> int:
        """Bytes that a version's weights take in memory while torch runs it, by its file alone.

        Raises:
            ModelError: there is no such model or version, or its file is damaged.
        """
        chosen = self._choose(name, version)
        (file,) = self._manifest(name, chosen)[1]["files"]
        return weights.held_bytes(self.root / name / chosen / file)

    def variants(self, name: str, version: str | None = None) -> Variants:
        """Other ways to compute a version, the newest unless one is named, and the default.

        Raises:
            ModelError: there is no such model or version.
        """
        chosen = self._choose(name, version)
        (facts,) = self._manifest(name, chosen)[1]["files"].values()
        return Variants(self.root / name / chosen, str(facts.get("sha256")))

    def _choose(self, name: str, version: str | None) -> str:
        versions = self.versions(name)
        if not versions:
            known = sorted({spec.name for spec in self.list()})
            raise ModelError(
                f"no model {name} in {self.root}", hint=f"it holds {known or 'nothing'}"
            )
        chosen = version if version is not None else versions[-1]
        if chosen not in versions:
            raise ModelError(f"{name} has no version {chosen}", hint=f"there are {versions}")
        return chosen

    def verify(self, name: str, version: str | None = None) -> ModelSpec:
        """Check every file of a version (the newest unless one is named) against its sha256.

        The files of its variants are checked too.

        Raises:
            ModelError: names the file that is missing or was changed.
        """
        version = self._choose(name, version)
        spec, data = self._manifest(name, version)
        for file, facts in data["files"].items():
            path = self.root / name / version / file
            there = path.is_file() and path.stat().st_size == facts.get("bytes")
            if not there or _sha256(path) != facts.get("sha256"):
                raise ModelError(
                    f"{path} is missing or not what was saved", hint="copy the version again"
                )
        variants = self.variants(name, version)
        for variant in variants.list():
            variants.get(variant.name)
        return spec

    def _manifest(self, name: str, version: str) -> tuple[ModelSpec, dict[str, Any]]:
        _safe(name)
        _safe(version)
        path = self.root / name / version / "manifest.json"
        try:
            if path.stat().st_size > _MANIFEST_LIMIT:
                raise ModelError(f"{path} is larger than {_MANIFEST_LIMIT} bytes")
            data = json.loads(path.read_text())
            if data["format"] != FORMAT:
                raise ModelError(f"{path} has format {data['format']}, expected {FORMAT}")
            spec = ModelSpec.model_validate(data["spec"])
            if (spec.name, spec.version) != (name, version):
                raise ModelError(f"{path} is of {spec.name} {spec.version}, not of its folder")
            if list(data["files"]) not in ([_WEIGHTS], [_PACKED], [_ONNX], [_PROGRAM]):
                raise ModelError(f"{path} lists {list(data['files'])}, expected one model file")
            return spec, data
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error


_CHOSEN: ContextVar[Path | None] = ContextVar("plinth_model_store", default=None)


@contextmanager
def choose_store(root: Path | None) -> Iterator[None]:
    """Let :func:`from_pretrained` read this store inside the block; None leaves it as it is."""
    token = _CHOSEN.set(_CHOSEN.get() if root is None else root)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def default_store() -> Path:
    """The store in force: the one chosen, else ``PLINTH_MODEL_STORE``, else the user's own."""
    own = Path.home() / ".local" / "share" / "plinth" / "models"
    return _CHOSEN.get() or Path(os.environ.get("PLINTH_MODEL_STORE") or own)


def from_pretrained(name: str, *, version: str | None = None, store: Path | None = None) -> Model:
    """Load a model from a store: ``store``, else the one in force (:func:`default_store`)."""
    return ModelStore(store or default_store()).load(name, version)


ARCHITECTURES = "plinth.architectures"
"""Entry-point group of modules that register the architecture of that name."""


def module_of(architecture: str | None) -> str:
    """The name of the module that registered an architecture; ``""``: none has."""
    factory = _FACTORIES.get(architecture or "")
    return "" if factory is None else factory.__module__


def read_model(path: Path, spec: ModelSpec) -> Model:
    """A model of an ONNX file, or of an exported program, as :meth:`ModelStore.add` writes them.

    Raises:
        ModelError: the file is not what its name says.
    """
    return Model(spec, _read(path, spec), path if path.name.endswith(".onnx") else None)


def _build(spec: ModelSpec, origin: str | None) -> nn.Module:
    if spec.architecture not in _FACTORIES:
        for entry in entry_points(group=ARCHITECTURES, name=spec.architecture or ""):
            entry.load()
    factory = _FACTORIES.get(spec.architecture or "")
    if factory is None:
        package = origin.rpartition(".")[0] if origin else "the package that defines it"
        raise ModelError(
            f"{spec.name} {spec.version} is of architecture {spec.architecture}, "
            "which is not registered",
            hint=f"import {package}; registered are {sorted(_FACTORIES)}",
        )
    try:
        return factory(**spec.config)
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"{spec.name} {spec.version}: architecture {spec.architecture} does not take its "
            f"config: {error}",
            hint="the architecture changed since the model was saved",
        ) from error


def _read(path: Path, spec: ModelSpec) -> nn.Module:
    """An ONNX file or an exported program as a module in eval mode."""
    if path.suffix == Path(_PROGRAM).suffix:
        return program.load(path, spec)
    names = tuple(t.name for t in spec.inputs), tuple(t.name for t in spec.outputs)
    return OnnxModule(path, *names).eval()


def _copy(path: Path, target: Path) -> dict[str, Any]:
    shutil.copyfile(path, target)
    return {}


def _exists(spec: ModelSpec, root: Path) -> ModelError:
    return ModelError(
        f"{spec.name} {spec.version} exists already in {root}",
        hint="versions never change; save a new one",
    )


def _safe(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ModelError(
            f"{name!r} is not a model name or version", hint="use a-z, 0-9, dot, _ and -"
        )


def _natural(version: str) -> list[tuple[int, int | str]]:
    """1 < 2 < 10 and 1.2 < 1.10; a word comes before the end: 2.0-rc1 < 2.0 < 2.0.1."""
    parts = re.findall(r"\d+|[a-z]+", version)
    return [*((2, int(part)) if part.isdigit() else (0, part) for part in parts), (1, 0)]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
