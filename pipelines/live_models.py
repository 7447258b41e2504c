"""Served models follow the store: another default variant takes over while work goes on."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

from plinth.engine import Closed, Engine

LOOK = 1.0
"""Seconds between two looks at the defaults in the store."""
END_SECONDS = 60.0
"""How long the end waits for a model that is being loaded."""

log = logging.getLogger("plinth.models")


@contextlib.contextmanager
def following(engine: Engine) -> Iterator[None]:
    """Let an engine take up defaults that change in the store, until the block ends.

    Args:
        engine: loads and checks a variant in a thread of its own, and switches between batches.
    """
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(LOOK):
            try:
                for name in engine.renew():
                    log.info("model %s took over its default in the store", name)
            except Closed:
                return
            except Exception:
                log.exception("the defaults in the store were not read; the next look tries again")

    thread = threading.Thread(target=follow, name="plinth-models", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(END_SECONDS)
