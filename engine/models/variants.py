"""Variants of a stored model: the same model computed otherwise, with the evidence for it.

On disk beside the reference, which never changes::

    <root>/<name>/<version>/variants/<variant>/variant.json     and its files
    <root>/<name>/<version>/variants/default.json               which one is taken

A variant is written whole or not at all and never changes either. What is the default may
change, and going back to the one before is the same step.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from plinth.engine.errors import ModelError, nearest
from plinth.engine.files import replace_file

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_LIMIT = 4 << 20  # bytes of variant.json


class VariantExists(ModelError):
    """A variant of that name is there already."""


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileFacts(_Facts):
    """What a file must be: its SHA-256 and its size."""

    sha256: str
    bytes: int


class Evidence(_Facts):
    """What was measured of a variant, on what, and where.

    Args:
        speed: times as fast as the reference, eager fp32, by CPU time of interleaved runs.
        seconds: CPU seconds of one such run of ``rows`` rows; ``reference_seconds``: of the
            reference.
        rows: rows of a timed run.
        threads: of a timed run.
        memory: bytes of its weights as they run; ``reference_memory``: of the reference.
        metric: the measure of fidelity; ``loss``: how much is lost by it, 0 is nothing, on rows
            that the search did not see; ``max_loss``: what was allowed.
        data: where the rows are from; ``data_digest``: SHA-256 over them; ``held_out``: rows
            that the loss was measured on.
        machine: name of the device; ``versions``: of what ran.
        kernels: how often each kernel ran; ``flops``: share of the arithmetic by dtype; both by
            the backend's own profile.
        reference_bytes: of the reference's file, where the variant was made to be smaller on
            disk; ``bits_per_weight``: of its file, over all its weights; ``sparsity``: share of
            these that are 0; ``difference``: largest from the reference's outputs on the
            held-out rows, as a share of the largest output.
    """

    speed: float
    seconds: float
    reference_seconds: float
    rows: int
    threads: int
    memory: int
    reference_memory: int
    metric: str
    loss: float
    max_loss: float
    data: str
    data_digest: str
    held_out: int
    machine: str
    versions: dict[str, str] = Field(default_factory=dict)
    kernels: dict[str, int] = Field(default_factory=dict)
    flops: dict[str, float] = Field(default_factory=dict)
    reference_bytes: int | None = None
    bits_per_weight: float | None = None
    sparsity: float | None = None
    difference: float | None = None


class Variant(_Facts):
    """One way to compute a model.

    Args:
        name: lower case, ``[a-z0-9._-]``.
        backend: what runs it.
        precision: the table of its policy.
        compression: how its weights were made smaller, if they were.
        device: kind of device it is for.
        needs: what the device must have: ``"int8-exact"``, int8 products that do not overflow.
        files: what it consists of, by name; none if the backend makes it from the reference.
        reference: SHA-256 of the reference's file.
        evidence: what was measured.
        created: when, UTC.
    """

    name: str = Field(pattern=NAME.pattern)
    backend: str
    precision: dict[str, Any]
    compression: str | None = None
    device: str = "cpu"
    needs: tuple[str, ...] = ()
    files: dict[str, FileFacts] = Field(default_factory=dict)
    reference: str
    evidence: Evidence
    created: str = ""

    @property
    def bytes(self) -> int:
        """Bytes of its files; 0 where the backend makes it from the reference."""
        return sum(facts.bytes for facts in self.files.values())

    @model_validator(mode="after")
    def _plain_names(self) -> Variant:
        for file in self.files:
            if not NAME.fullmatch(file) or file == "variant.json":
                raise ValueError(f"{file!r} is not the name of a file in the variant's folder")
        return self


class Variants:
    """The variants of one version of a model.

    Args:
        folder: the version's folder.
        reference: SHA-256 of its file; a variant of another one is refused.
    """

    def __init__(self, folder: Path, reference: str) -> None:
        self.folder = folder / "variants"
        self.reference = reference

    def add(self, variant: Variant, files: Mapping[str, Path]) -> Variant:
        """Write a variant with copies of its files; whole or not at all.

        Raises:
            VariantExists: one of that name exists.
            ModelError: it is of another reference, or cannot be written.
        """
        target = self.folder / variant.name
        if variant.reference != self.reference:
            raise ModelError(f"variant {variant.name} is of another reference")
        if target.exists():
            raise _exists(target)
        try:
            self.folder.mkdir(exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix=".part-", dir=self.folder))
        except OSError as error:
            raise _unwritten(target, error) from error
        try:
            for name, path in files.items():
                shutil.copyfile(path, part / name)
            facts = {
                name: FileFacts(sha256=_sha256(part / name), bytes=(part / name).stat().st_size)
                for name in files
            }
            now = datetime.now(UTC).isoformat(timespec="seconds")
            whole = Variant.model_validate(
                variant.model_dump() | {"files": facts, "created": variant.created or now}
            )
            (part / "variant.json").write_text(whole.model_dump_json(indent=1) + "\n")
            part.chmod(0o755)
            part.rename(target)
        except OSError as error:
            if target.exists():
                raise _exists(target) from error
            raise _unwritten(target, error) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return whole

    def list(self) -> list[Variant]:
        """All of them, by name.

        Raises:
            ModelError: the description of one cannot be read, or it is of another reference.
        """
        return [self._read(path) for path in sorted(self.folder.glob("[!.]*/variant.json"))]

    def get(self, name: str) -> Variant:
        """One by name, its files checked.

        Raises:
            ModelError: there is none of that name, or a file is missing or was changed.
        """
        known = [variant.name for variant in self.list()]
        if name not in known:
            raise ModelError(
                f"there is no variant {name} in {self.folder}",
                hint=nearest(name, known) if known else "plinth optimize and compress make some",
            )
        variant = self._read(self.folder / name / "variant.json")
        for file, facts in variant.files.items():
            path = self.folder / name / file
            there = path.is_file() and path.stat().st_size == facts.bytes
            if not there or _sha256(path) != facts.sha256:
                raise ModelError(
                    f"{path} is missing or not what was saved",
                    hint=f"remove {path.parent} and make it again: plinth optimize or compress",
                )
        return variant

    def path(self, variant: Variant, file: str) -> Path:
        """Where a file of a variant lies."""
        return self.folder / variant.name / file

    @property
    def default(self) -> str | None:
        """Name of the one that is taken; ``None`` is the reference.

        Raises:
            ModelError: the file that says so cannot be read.
        """
        return self._said("default")

    @property
    def before(self) -> str | None:
        """Name of the one that was taken before the default; ``None`` is the reference.

        Raises:
            ModelError: the file that says so cannot be read.
        """
        return self._said("before")

    def _said(self, key: str) -> str | None:
        path = self.folder / "default.json"
        if not path.is_file():
            return None
        try:
            name = json.loads(path.read_text())[key]
            if name is not None and not NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not a name")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error
        return None if name is None else str(name)

    def set_default(self, name: str | None) -> str | None:
        """Take this one from now on, ``None`` the reference. Returns what was taken before.

        Raises:
            ModelError: there is no such variant, or a file of it is damaged.
        """
        before = self.default
        if name is not None:
            self.get(name)
        self.folder.mkdir(exist_ok=True)
        told = json.dumps({"default": name, "before": before}).encode()
        replace_file(self.folder / "default.json", told)
        return before

    def _read(self, path: Path) -> Variant:
        try:
            if path.stat().st_size > _LIMIT:
                raise ModelError(f"{path} is larger than {_LIMIT} bytes")
            variant = Variant.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise ModelError(
                f"{path} cannot be read: {error}", hint=f"remove {path.parent}"
            ) from error
        if variant.name != path.parent.name:
            raise ModelError(f"{path} is of {variant.name}, not of its folder")
        if variant.reference != self.reference:
            raise ModelError(
                f"{path} was made from another reference than the one beside it",
                hint=f"remove {path.parent}",
            )
        return variant


def _unwritten(target: Path, error: OSError) -> ModelError:
    return ModelError(
        f"variant {target.name} cannot be written to {target.parent}: {error.strerror}",
        hint="nothing of it is there; see to the disk, and run it again",
    )


def _exists(target: Path) -> VariantExists:
    return VariantExists(
        f"variant {target.name} exists already in {target.parent}",
        hint="variants never change; give another name, or remove its folder",
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
