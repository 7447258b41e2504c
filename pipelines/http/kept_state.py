"""The state of served verticals between two runs of a server."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from plinth.engine import InputError, PlinthError
from plinth.pipelines.stream.checkpoint import claim, read_snapshot, write_snapshot
from plinth.verticals import Vertical

log = logging.getLogger("plinth.serve")


@contextlib.contextmanager
def kept_states(folder: Path | None, verticals: Mapping[str, Vertical[Any, Any]]) -> Iterator[None]:
    """Serve inside the block with the states that the last block left, and leave them to the next.

    A damaged or foreign file is named in the log and its vertical begins anew.

    Args:
        folder: holds a file for each vertical that has state; ``None`` keeps nothing.
        verticals: by name; no request is in work when the block begins and ends.

    Raises:
        ConfigError: another process holds the folder, or it cannot be written.
        PlinthError: the block ended well, but a state could not be kept.
    """
    if folder is None:
        yield
        return
    with claim(folder, "serve.state_dir"):
        files = {
            name: folder / f"{name}.snapshot"
            for name, vertical in verticals.items()
            if vertical.snapshot() is not None
        }
        for name, path in files.items():
            _restore(path, name, verticals[name])
        lost: list[str] = []
        try:
            yield
        finally:
            lost += [name for name, path in files.items() if not _save(path, name, verticals[name])]
        if lost:
            raise PlinthError(
                f"the state of {', '.join(lost)} could not be kept in {folder}",
                hint="make room there; the next run goes on with the state kept before",
            )


def _restore(path: Path, name: str, vertical: Vertical[Any, Any]) -> None:
    if not path.exists():
        return
    try:
        _, body = read_snapshot(path, _origin(name))
        vertical.restore(body)
    except (InputError, OSError) as error:
        log.error("the state in %s cannot be used, %s begins without: %s", path, name, error)
    else:
        log.info("%s goes on with the state in %s (%d bytes)", name, path, len(body))


def _save(path: Path, name: str, vertical: Vertical[Any, Any]) -> bool:
    """Whether the state is on disk; the file of the run before stays whole if it is not."""
    try:
        write_snapshot(path, _origin(name), vertical.snapshot() or b"")
    except OSError as error:
        log.error("the state of %s was not kept: %s", name, error)
        return False
    return True


def _origin(name: str) -> dict[str, str]:
    return {"vertical": name, "door": "http"}
