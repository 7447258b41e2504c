"""Writing files that are never seen in part."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path


def replace_file(
    path: Path,
    data: bytes | Iterable[bytes],
    mode: int = 0o644,
    owner: tuple[int, int] | None = None,
) -> None:
    """Write a file so that readers see the old content or the new one, never a part.

    Args:
        path: the file.
        data: its content, whole or in pieces.
        mode: who may read it.
        owner: user and group whose it is; ``None``: ours.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    handle, name = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.writelines([data] if isinstance(data, bytes) else data)
            out.flush()
            os.fsync(out.fileno())
        if owner is not None:
            os.chown(name, *owner)
        Path(name).chmod(mode)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
