"""What a server can say of itself."""

from __future__ import annotations

import time


class Health:
    """``reasons`` a server is not ready, and whether it drains."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {"warm_up": "models are warming up"}
        self.drain_until: float | None = None

    def drain(self, seconds: float) -> None:
        """Not ready from now on; accepted work has ``seconds`` left."""
        self.reasons["draining"] = "the server is shutting down"
        self.drain_until = time.monotonic() + seconds

    @property
    def seconds_left(self) -> float:
        """Seconds left to drain; 0 when it was never told to."""
        return max(0.0, (self.drain_until or 0.0) - time.monotonic())
