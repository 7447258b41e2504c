"""What a source is, by its name and content, and its way into the store."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plinth.engine.errors import ModelError
from plinth.engine.models.convert import boosters, code, exported, huggingface, onnx_graph
from plinth.engine.models.convert.source import Options, Request, Source
from plinth.engine.models.fidelity import versions
from plinth.engine.models.onnx import refuse_other_formats
from plinth.engine.models.signature import Rows
from plinth.engine.models.spec import ModelSpec
from plinth.engine.models.store import ModelStore

MAX_EXAMPLE_BYTES = 4 << 30

_WAYS: dict[str, Callable[[Path, Request], Source]] = {
    ".pt2": exported.read,
    ".onnx": onnx_graph.read,
    ".safetensors": code.read,
    **dict.fromkeys((".txt", ".json", ".ubj"), boosters.read),
}


@dataclass(frozen=True)
class Converted:
    """A model that is now in a store.

    Attributes:
        spec: its contract.
        folder: where it lies.
        report: how far it is from its source, on which rows, with which versions.
    """

    spec: ModelSpec
    folder: Path
    report: dict[str, Any]


def convert(
    source: Path,
    store: ModelStore,
    *,
    name: str,
    version: str = "1",
    options: Options | None = None,
) -> Converted:
    """Bring a model of another library into the store.

    Sources: an exported program of torch (``.pt2``), an ONNX file, weights (``.safetensors``)
    with the code that builds their module, a folder of Hugging Face (``config.json`` and
    ``model.safetensors``), boosted trees as LightGBM (``.txt``) and XGBoost (``.json``, ``.ubj``)
    write them. The stored model is read again and must answer example rows as the
    source does, run by its own library. Files that are pickles are refused.

    Args:
        source: the file or folder.
        store: where to.
        name: of the model there.
        version: of the model there.
        options: what the source does not say.

    Raises:
        ModelError: it cannot be converted, or answers otherwise once it is; nothing is stored.
    """
    wanted = options or Options()
    source = Path(source)
    read = _way(source)
    if wanted.code and read is not code.read:
        raise ModelError(f"{source} needs no code", hint="only files of weights do")
    example = read_example(wanted.example) if wanted.example else None
    with tempfile.TemporaryDirectory(prefix="plinth-convert-") as folder:
        found = read(source, Request(name, version, example, wanted, Path(folder)))
        facts = {
            "source": source.resolve().name,
            "example": "made up" if example is None else "given",
            "libraries": versions(*found.libraries),
            **found.facts,
        }
        path = store.add(found.model, source=found.run, facts=facts)
    spec = found.model.spec
    return Converted(spec, path, store.report(spec.name, spec.version))


def _way(source: Path) -> Callable[[Path, Request], Source]:
    if source.is_dir():
        return huggingface.read
    if not source.is_file():
        raise ModelError(f"{source} is not a file or a folder")
    if source.stat().st_size == 0:
        raise ModelError(f"{source} is empty", hint="copy it again")
    way = _WAYS.get(source.suffix.lower())
    if way is None:
        refuse_other_formats(source)
        raise ModelError(
            f"{source} is of no kind that is known by its suffix",
            hint=f"known are {', '.join(_WAYS)} and folders of Hugging Face",
        )
    return way


def read_example(path: Path) -> Rows:
    """Rows by input name from a ``.npz``; a ``.npy`` is the row of the only input, named ``""``.

    Raises:
        ModelError: not such a file, damaged, too large, or it holds objects.
    """
    try:
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                total = sum(entry.file_size for entry in archive.infolist())
            if total > MAX_EXAMPLE_BYTES:
                raise ModelError(f"{path} unpacks to {total} bytes, at most {MAX_EXAMPLE_BYTES}")
            with np.load(path, allow_pickle=False) as arrays:
                found = {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files}
        else:
            found = {"": torch.from_numpy(np.array(np.load(path, allow_pickle=False)))}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise ModelError(
            f"{path} is not a file of example rows: {error}",
            hint="write it with numpy.savez(path, input=array), or numpy.save for one input",
        ) from error
    if not found:
        raise ModelError(f"{path} has no arrays", hint="numpy.savez(path, input=array)")
    return found
