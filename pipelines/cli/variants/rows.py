"""Rows of a user's own data, from the files that commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def read_rows(path: Path, names: list[str]) -> tuple[dict[str, Any], Any]:
    """Rows by input name, and their labels or ``None``.

    Args:
        path: ``.npz`` or ``.safetensors`` of arrays (n, ...) by input name, and perhaps
            ``labels``; or ``.npy`` for the first input.
        names: of the model's inputs.

    Raises:
        InputError: it cannot be read.
    """
    import zlib
    from zipfile import BadZipFile

    import numpy as np
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from plinth.engine import InputError

    try:
        if path.suffix == ".safetensors":
            rows = load_file(path)
        else:
            with path.open("rb") as file:
                loaded = np.load(file, allow_pickle=False)
                arrays = {names[0]: loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
            rows = {name: torch.from_numpy(array) for name, array in arrays.items()}
    except (
        OSError,
        ValueError,
        TypeError,
        EOFError,
        BadZipFile,
        zlib.error,
        SafetensorError,
    ) as error:
        raise InputError(
            f"{path} cannot be read: {error}",
            hint="write it with numpy.savez, or safetensors.torch.save_file",
        ) from error
    labels = rows.pop("labels", None) if "labels" not in names else None
    return rows, labels
