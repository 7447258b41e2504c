"""Mode ``sync``: one global round in flight, of which every lane gets a share."""

from __future__ import annotations

from plinth.engine.scheduler.lane_table import LaneTable
from plinth.engine.scheduler.work import Batch, BatchKey


class Rounds:
    """The batches of the round in flight that lanes have not fetched yet.

    A round begins when all lanes are idle, and is formed at once: the first batch says the key,
    the rows of that key which wait are shared out evenly, and each lane gets one batch of them at
    most. The next round waits until all of it is done, so an answer of one version of a model
    never overtakes, or waits beside, one of another.

    Attributes:
        key: of the round that is being formed; ``None``: its first batch is free to choose.
        urgent: whether its batches are.
        share: rows that a lane gets of it at most.
        ready: batches by the number of the lane that is to fetch them.
    """

    def __init__(self) -> None:
        self.key: BatchKey | None = None
        self.urgent = False
        self.share = 0
        self.ready: dict[int, Batch] = {}

    def in_flight(self, lanes: LaneTable) -> bool:
        """Whether a lane has a batch, or is to fetch one."""
        return any(each.running for each in lanes)

    def may_slice(self, key: BatchKey | None) -> bool:
        """Whether a slice of background work of a key may be part of what is being formed."""
        return self.key is None or (not self.urgent and self.key == key)

    def lane(self, lanes: LaneTable) -> int | None:
        """A lane that may take a batch now."""
        if self.ready:
            return next(iter(self.ready))
        first = lanes.get(None)
        return None if first is None or self.in_flight(lanes) else first.number

    def formed(self, batch: Batch, waiting: int, lanes: LaneTable) -> None:
        """Take in a batch of the round.

        Args:
            batch: for one lane.
            waiting: rows like its own that waited before.
            lanes: all there are.
        """
        if self.key is None:
            self.key, self.urgent = batch.key, batch.urgent
            self.share = -(-waiting // len(lanes))
        self.ready[batch.lane] = batch
