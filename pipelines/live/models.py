"""Served models follow the store, and work that nobody waits for is done, while work goes on.

Another default variant takes over, or another version that a vertical asks for; each is loaded and
checked in a thread of its own, and taken up between two batches. What cannot be loaded changes
nothing. The same thread runs the verticals' background flows, without a deadline.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from plinth.engine import Closed, Engine, Model, PlinthError, Sla
from plinth.pipelines.interpreter import beside_others
from plinth.verticals import Vertical

LOOK = 1.0
"""Seconds between two looks at the store."""
PAUSE = 0.1
"""Seconds between two questions for background work, where there was some lately."""
END_SECONDS = 60.0
"""How long the end waits for a model that is being loaded."""

log = logging.getLogger("plinth.models")

AnyVertical = Vertical[Any, Any]
Add = Callable[[AnyVertical, Model], None]
"""Adds a model of a vertical to the engine, with the settings that its others have."""


class Follower:
    """Takes up what changes in the store, and runs background flows; for one thread.

    Args:
        engine: loads and checks models, and switches between batches.
        verticals: whose models and background flows.
        add: adds a model of one of them.
    """

    def __init__(self, engine: Engine, verticals: Sequence[AnyVertical], add: Add) -> None:
        self._engine, self._verticals, self._add = engine, verticals, add
        self._ended = threading.Event()

    def look(self) -> None:
        """Take up other default variants and other models.

        Raises:
            Closed: the engine was closed.
        """
        for name in self._engine.renew():
            log.info("model %s took over its default in the store", name)
        for vertical in self._verticals:
            try:
                models = vertical.next_models()
                for model in models:
                    self._add(vertical, model)
                if models:
                    vertical.models_loaded()
            except Closed:
                raise
            except PlinthError as error:
                log.error("%s: what serves stays: %s", vertical.name, error)

    def work(self, until: float) -> bool:
        """Run background flows until this time, ``monotonic``; whether there were any.

        Raises:
            Closed: the engine was closed.
        """
        found = False
        for vertical in self._verticals:
            while time.monotonic() < until and not self._ended.is_set():
                flow = vertical.background()
                if flow is None:
                    break
                found = True
                try:
                    vertical.background_done(self._engine.run(flow, Sla()).timing)
                except Closed:
                    raise
                except PlinthError as error:
                    log.warning("%s: background work was left out: %s", vertical.name, error)
                    break
        return found

    def run(self) -> None:
        """Follow until :meth:`end`, or until the engine is closed."""
        looked = time.monotonic()
        pause = LOOK
        while not self._ended.wait(min(pause, max(0.0, looked + LOOK - time.monotonic()))):
            try:
                found = self.work(time.monotonic() + LOOK)
                pause = PAUSE if found else min(2 * pause, LOOK)
                if time.monotonic() - looked >= LOOK:
                    looked = time.monotonic()
                    with beside_others():
                        self.look()
            except Closed:
                return
            except Exception:
                log.exception("the store was not followed; the next look tries again")
                looked, pause = time.monotonic(), LOOK

    def end(self) -> None:
        """Let :meth:`run` return."""
        self._ended.set()


@contextlib.contextmanager
def following(engine: Engine, verticals: Sequence[AnyVertical], add: Add) -> Iterator[None]:
    """Let an engine follow the store in a thread of its own, until the block ends.

    Args:
        engine: of the models.
        verticals: whose models and background flows.
        add: adds a model of one of them.
    """
    follower = Follower(engine, verticals, add)
    thread = threading.Thread(target=follower.run, name="plinth-models", daemon=True)
    thread.start()
    try:
        yield
    finally:
        follower.end()
        thread.join(END_SECONDS)
