"""What is remembered of one card, terminal, customer or device: its events in order of time.

All times are event times, integer milliseconds since 1970-01-01T00:00Z. Entries stay sorted
whatever the order of arrival, so a window is two binary searches and a late event costs one
insertion. Sums are kept as integers, so they do not depend on the order of arrival either.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from time import monotonic
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from plinth.verticals.contract import StateStore

MINUTE = 60_000
HOUR = 60 * MINUTE
DAY = 24 * HOUR
NEVER = -(1 << 62)
"""A time before every event."""
ALWAYS = 1 << 62
"""A time after every event."""
LABEL_DELAY = 7 * DAY
"""How far behind the event the fraud shares of a terminal are read."""
TRIM_MASK = 7
"""Entries are dropped at every eighth arrival: rarely enough to be cheap."""
SUM_LIMIT = 1 << 60
MARK_LIMIT = 4096
"""Fraud labels remembered per terminal; the ones entered first are forgotten first."""
MANY_MARKS = 24
"""From here on counting labels with numpy is faster than with a loop."""
LEAVE_AT_ONCE = 64
"""Entities that leave memory for the disk at a time."""
UNITS = 10_000
"""Amounts are counted in 1/10000 of the base currency, the finest subdivision of ISO 4217."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def milliseconds(time: datetime) -> int:
    """Whole milliseconds since 1970-01-01T00:00Z; finer digits are cut off."""
    since = time - _EPOCH
    return since.days * DAY + since.seconds * 1_000 + since.microseconds // 1_000


class Sums:
    """Running sums of whole numbers, one before each entry and one behind the last."""

    __slots__ = ("values",)

    def __init__(self) -> None:
        self.values = array("q", (0,))

    def __getitem__(self, at: Any) -> Any:
        return self.values[at]

    def insert(self, at: int, value: int) -> None:
        """Place a number before entry ``at``."""
        values = self.values
        if values[-1] > SUM_LIMIT:
            first = values[0]
            values = self.values = array("q", (one - first for one in values))
        values.insert(at + 1, values[at])
        for later in range(at + 1, len(values)):
            values[later] += value

    def __delitem__(self, part: slice) -> None:
        del self.values[part]


class Timeline:
    """Event times of one entity, ascending.

    Attributes:
        times: event times, milliseconds.
        columns: what declared features need of each entry beside the rest, a list or sums each.
        floor: what lies at or before it is forgotten, though it may not have been removed yet;
            windows that reach below it are incomplete. It follows the newest event, so that it
            depends on which events came and not on their order.
    """

    __slots__ = ("columns", "floor", "times")

    def __init__(self, floor: int = NEVER, columns: tuple[Any, ...] = ()) -> None:
        self.times = array("q")
        self.floor = floor
        self.columns = columns

    def newest(self) -> int:
        """The latest event time seen, milliseconds."""
        return self.times[-1] if self.times else self.floor

    def sink(self) -> None:
        """Remove what lies at or before the floor."""
        if drop := bisect_right(self.times, self.floor):
            self.forget(drop)

    def add(self, time: int) -> int:
        """Place an event behind all of the same or an earlier time; returns entries up to it."""
        times = self.times
        if not times or time >= times[-1]:
            times.append(time)
            return len(times)
        place = bisect_right(times, time)
        times.insert(place, time)
        return place + 1

    def entries(self) -> int:
        """How much is remembered: what the bound over all entities counts."""
        return len(self.times)

    def surplus(self, keep: int, limit: int) -> int:
        """How many of the oldest entries exceed ``keep`` milliseconds or ``limit`` entries."""
        old = bisect_right(self.times, self.times[-1] - keep)
        return max(old, len(self.times) - limit)

    def trim(self, keep: int, limit: int) -> None:
        """Forget what is older than ``keep`` milliseconds, then what exceeds ``limit`` entries."""
        drop = self.surplus(keep, limit)
        if drop > 0:
            self.floor = max(self.floor, self.times[drop - 1])
            self.forget(drop)

    def forget(self, drop: int) -> None:
        """Remove the ``drop`` oldest entries."""
        del self.times[:drop]
        for column in self.columns:
            del column[:drop]


class Card(Timeline):
    """Events of one card, with amounts, terminals and the feature rows given out.

    Attributes:
        sums: n + 1 running sums of the amounts before each entry, in 1/10000 currency unit.
        ids: transaction id of each entry; ``known`` is the same as a set.
        terminals: terminal id of each entry.
        rows: float32 columns of each entry, as computed when the event first came.
        flags: what was special about the event when it first came, one byte per entry.
    """

    __slots__ = ("flags", "ids", "known", "rows", "sums", "terminals")

    def __init__(self, floor: int = NEVER, columns: tuple[Any, ...] = ()) -> None:
        super().__init__(floor, columns)
        self.sums = array("q", (0,))
        self.ids: list[str] = []
        self.known: set[str] = set()
        self.terminals: list[str] = []
        self.rows = array("f")
        self.flags = bytearray()

    def place(self, time: int, units: int, transaction: str, terminal: str) -> int:
        """Enter an event; returns the number of entries up to and including it."""
        end = self.add(time)
        sums = self.sums
        if end == len(self.times):
            if sums[-1] > SUM_LIMIT:
                self._rebase()
            sums.append(sums[-1] + units)
            self.ids.append(transaction)
            self.terminals.append(terminal)
        else:
            sums.insert(end - 1, sums[end - 1])
            for later in range(end, len(sums)):
                sums[later] += units
            self.ids.insert(end - 1, transaction)
            self.terminals.insert(end - 1, terminal)
        self.known.add(transaction)
        return end

    def keep_row(self, end: int, row: bytes, flags: int) -> None:
        """Remember the feature row and flags of entry ``end - 1``."""
        if end == len(self.times):
            self.rows.frombytes(row)
            self.flags.append(flags)
        else:
            start = (end - 1) * (len(row) // 4)
            self.rows[start:start] = array("f", row)
            self.flags.insert(end - 1, flags)

    def index(self, transaction: str) -> int:
        """The place of a known transaction among the entries."""
        return self.ids.index(transaction)

    def row(self, at: int) -> tuple[bytes, int]:
        """The row and flags first given for entry ``at``."""
        width = len(self.rows) // len(self.times)
        row = self.rows[at * width : (at + 1) * width]
        return row.tobytes(), self.flags[at]

    def units(self, at: int) -> int:
        """The amount of entry ``at``, in 1/10000 currency unit."""
        return self.sums[at + 1] - self.sums[at]

    def forget(self, drop: int) -> None:
        del self.rows[: drop * (len(self.rows) // len(self.times))]
        super().forget(drop)
        del self.sums[:drop]
        self.known.difference_update(self.ids[:drop])
        del self.ids[:drop]
        del self.terminals[:drop]
        del self.flags[:drop]

    def _rebase(self) -> None:
        first = self.sums[0]
        self.sums = array("q", (value - first for value in self.sums))


class CardTimeline(Timeline):
    """Events of one terminal or device, and the card of each."""

    __slots__ = ("cards",)

    def __init__(self, floor: int = NEVER, columns: tuple[Any, ...] = ()) -> None:
        super().__init__(floor, columns)
        self.cards: list[str] = []

    def place(self, time: int, card: str) -> int:
        """Enter an event; returns the number of entries up to and including it."""
        times, cards = self.times, self.cards
        if not times or time >= times[-1]:
            times.append(time)
            cards.append(card)
            return len(times)
        end = self.add(time)
        cards.insert(end - 1, card)
        return end

    def forget(self, drop: int) -> None:
        super().forget(drop)
        del self.cards[:drop]


class Terminal(CardTimeline):
    """Events of one terminal and the fraud labels on them.

    Attributes:
        marks: by card and transaction id (``"card id"``): time of the transaction, time since
            when it is known to be fraud, time since when that is withdrawn again.
        blind: the latest time of a transaction whose label may be forgotten.
    """

    __slots__ = ("_table", "blind", "marks")

    def __init__(self, floor: int = NEVER, columns: tuple[Any, ...] = ()) -> None:
        super().__init__(floor, columns)
        self.blind = floor
        self.marks: dict[str, tuple[int, int, int]] = {}
        self._table: npt.NDArray[np.int64] | None = None

    def cards_at(self, time: int) -> list[str]:
        """Cards of the events at exactly this time."""
        end = bisect_right(self.times, time)
        return self.cards[bisect_right(self.times, time - 1, 0, end) : end]

    def mark(self, payment: str, time: int, known: int, fraud: bool) -> None:
        """Enter a label that became known at ``known`` milliseconds.

        Labels take effect in order of arrival: a second fraud label keeps the earlier time,
        a genuine label withdraws an earlier fraud label from ``known`` on.
        """
        self._table = None
        before = self.marks.get(payment)
        if fraud:
            since = known if before is None else min(before[1], known)
            self.marks[payment] = (time, since, ALWAYS)
            if len(self.marks) > MARK_LIMIT:
                first = next(iter(self.marks))
                self.blind = max(self.blind, self.marks.pop(first)[0])
        elif before is not None:
            self.marks[payment] = (before[0], before[1], known)

    def entries(self) -> int:
        return len(self.times) + len(self.marks)

    def newest(self) -> int:
        return max(super().newest(), *(mark[0] for mark in self.marks.values()), self.blind)

    def shares(self, time: int, after: int, widths: tuple[int, ...]) -> tuple[float, ...]:
        """Fraud shares in windows that end ``after`` milliseconds before ``time``, as known then.

        A share is 0 where the window holds no transaction.

        Args:
            time: of the event, milliseconds.
            after: milliseconds.
            widths: of the windows, ascending.
        """
        edge = time - after
        few = len(self.marks) < MANY_MARKS
        frauds = (self._few if few else self._many)(time, edge, widths)
        if not frauds[-1]:
            return (0.0,) * len(widths)
        times = self.times
        end = bisect_right(times, edge)
        counts = [end - bisect_right(times, edge - width, 0, end) for width in widths]
        return tuple(
            min(bad, all_) / all_ if all_ else 0.0 for bad, all_ in zip(frauds, counts, strict=True)
        )

    def _few(self, time: int, edge: int, widths: tuple[int, ...]) -> list[int]:
        """Frauds known at ``time`` in each window up to ``edge``."""
        frauds = [0] * len(widths)
        oldest = edge - widths[-1]
        for happened, since, until in self.marks.values():
            if since <= time < until and oldest < happened <= edge:
                for place, width in enumerate(widths):
                    frauds[place] += happened > edge - width
        return frauds

    def _many(self, time: int, edge: int, widths: tuple[int, ...]) -> list[int]:
        """The same as :meth:`_few`, faster for many labels."""
        if self._table is None:
            self._table = np.array(list(self.marks.values()), np.int64).T.copy()
        happened, since, until = self._table
        known = happened[(since <= time) & (time < until) & (happened <= edge)]
        return [int(np.count_nonzero(known > edge - width)) for width in widths]

    def sink(self) -> None:
        super().sink()
        self._forget_marks(self.floor)

    def trim(self, keep: int, limit: int) -> None:
        self._forget_marks(self.times[-1] - keep)
        super().trim(keep, limit)

    def _forget_marks(self, oldest: int) -> None:
        gone = [name for name, mark in self.marks.items() if mark[0] <= oldest]
        for name in gone:
            self.blind = max(self.blind, self.marks.pop(name)[0])
        if gone:
            self._table = None


class Device(CardTimeline):
    """Events of one device and the card of each."""

    __slots__ = ()


E = TypeVar("E", bound=Timeline)


class Shelf(Generic[E]):
    """The entities of one table on disk, and which of them the next checkpoints must write.

    An entity leaves memory only once a durable checkpoint holds it as it is. So what the disk has
    is always one checkpoint, whole, and an entity that is not in memory is read from it.

    Args:
        store: holds parts by key.
        prefix: begins the keys of this table.
        pack: an entity as bytes.
        unpack: and back.
    """

    def __init__(
        self,
        store: StateStore,
        prefix: bytes,
        pack: Callable[[E], bytes],
        unpack: Callable[[bytes], E],
    ) -> None:
        self._store = store
        self._prefix = prefix
        self._pack = pack
        self._unpack = unpack
        self._changed: set[str] = set()
        self._due: set[str] = set()
        self._written: set[str] = set()
        self._ahead: dict[str, bytes | None] = {}

    def __len__(self) -> int:
        """Entities that no durable checkpoint holds as they are."""
        return len(self._changed) + len(self._due) + len(self._written)

    def load(self, key: str) -> E | None:
        """The entity as of the last durable checkpoint.

        Raises:
            StateError: it is damaged.
        """
        # what was read ahead holds until it is asked for: before, the entity is not in memory
        raw = self._ahead.pop(key) if key in self._ahead else self._store.get(self.part(key))
        return None if raw is None else self._unpack(raw)

    def part(self, key: str) -> bytes:
        """The key of an entity's part."""
        return self._prefix + key.encode()

    def foresee(self, keys: Iterable[str], parts: Mapping[bytes, bytes]) -> None:
        """Take parts, of those that there are, for entities which are not in memory and soon are.

        Args:
            keys: of the entities.
            parts: by their keys.
        """
        self._ahead = {key: parts.get(self.part(key)) for key in keys}

    def changing(self, key: str, entity: E) -> None:
        """Told before an entity changes: a checkpoint in progress gets it as it was."""
        if key in self._due:
            self._due.discard(key)
            self._put(key, entity)
        self._changed.add(key)

    def holds(self, key: str) -> bool:
        """Whether the disk has an entity as it is in memory."""
        return not (key in self._changed or key in self._due or key in self._written)

    def begin(self) -> None:
        """What has changed up to now belongs to the checkpoint that begins."""
        self._due, self._changed = self._changed, set()

    def write(self, entities: Mapping[str, E], until: float) -> bool:
        """Put entities into the checkpoint until that time (``monotonic``); true when all are."""
        while self._due:
            key = self._due.pop()
            self._put(key, entities[key])
            if monotonic() >= until:
                break
        return not self._due

    def end(self, *, durable: bool) -> None:
        """The checkpoint is durable, or was given up."""
        if not durable:
            self._changed |= self._written | self._due
            self._due = set()
        self._written = set()

    def _put(self, key: str, entity: E) -> None:
        self._written.add(key)
        self._store.put(self.part(key), self._pack(entity))


class Entities(Generic[E]):
    """Entities by id, within bounds; the one longest without an event leaves memory first.

    Args:
        make: makes an entity that knows nothing up to a time.
        limit: entities in memory at most.
        max_entries: entries of all entities in memory together at most.

    Attributes:
        shelf: where an entity goes that leaves memory; ``None``: it is forgotten. With a shelf,
            what has changed since the last checkpoint stays in memory beyond the bounds.
        floor: the latest event time of any entity that was forgotten; new entities start with
            it, because they may be old ones.
        entries: entries of all entities in memory together.
        evicted: entities forgotten because of the bounds, ever.
    """

    def __init__(self, make: Callable[[int], E], limit: int, max_entries: int) -> None:
        self.make = make
        self.limit = limit
        self.max_entries = max_entries
        self.shelf: Shelf[E] | None = None
        self.floor = NEVER
        self.entries = 0
        self.evicted = 0
        self.items: OrderedDict[str, E] = OrderedDict()

    def touch(self, key: str) -> E:
        """The entity of this id, made if absent, now the most recently used."""
        found = self.items.get(key)
        if found is not None:
            self.items.move_to_end(key)
            if self.shelf is not None:
                self.shelf.changing(key, found)
            return found
        found = None if self.shelf is None else self._fetch(key, self.shelf)
        if found is None:
            found = self.items[key] = self.make(self.floor)
            if self.shelf is not None:
                self.shelf.changing(key, found)
        self.hold()
        return found

    def peek(self, key: str) -> E | None:
        """The entity of this id, if there is one, to be read alone; memory stays as it is."""
        found = self.items.get(key)
        return found if found is not None or self.shelf is None else self.shelf.load(key)

    @property
    def unsaved(self) -> float:
        """What no durable checkpoint has, as a share of what may be in memory."""
        if self.shelf is None or not self.items:
            return 0.0
        share = len(self.shelf) / self.limit
        if self.shelf.holds(next(iter(self.items))):
            return share
        return max(share, self.entries / self.max_entries)

    def clear(self) -> None:
        """Forget all, as if nothing had come."""
        self.items.clear()
        self.floor, self.entries, self.shelf = NEVER, 0, None

    def find(self, key: str) -> E | None:
        """The entity of this id, if there is one; it may be changed."""
        found = self.items.get(key)
        if self.shelf is None:
            return found
        if found is None:
            found = self._fetch(key, self.shelf)
            self.hold()
        else:
            self.items.move_to_end(key)
            self.shelf.changing(key, found)
        return found

    def _fetch(self, key: str, shelf: Shelf[E]) -> E | None:
        found = shelf.load(key)
        if found is not None:
            self.items[key] = found
            self.entries += found.entries()
            shelf.changing(key, found)
        return found

    def reach(self, entity: E, time: int, keep: int, width: int) -> bool:
        """Make an entity ready for an event whose longest window has ``width`` milliseconds.

        Moves its floor to ``keep`` milliseconds before its newest event, this one included.

        Returns:
            True where the window reaches below the floor; then nothing lies there any more.
        """
        times, floor = entity.times, entity.floor
        oldest = time - keep
        if times and (newest := times[-1]) > time:
            oldest = newest - keep
        if oldest > floor:
            entity.floor = floor = oldest
        if floor <= time - width:
            return False
        self.sink(entity)
        return True

    def sink(self, entity: E) -> None:
        """Remove what an entity has at or below its floor."""
        before = entity.entries()
        entity.sink()
        self.entries += entity.entries() - before

    def grown(self, entity: E, keep: int, limit: int) -> None:
        """Account for one more entry of the entity touched last; forget what exceeds the bounds.

        Args:
            entity: has one more entry.
            keep, limit: as in :meth:`Timeline.trim`.
        """
        self.entries += 1
        if not len(entity.times) & TRIM_MASK:
            before = entity.entries()
            entity.trim(keep, limit)
            self.entries += entity.entries() - before
        if self.entries > self.max_entries:
            self.hold()

    def hold(self) -> None:
        """Let entities go until the bounds hold; the one touched last stays.

        With a shelf a few at once, so that nothing waits for it.
        """
        most = LEAVE_AT_ONCE
        while len(self.items) > self.limit or (
            self.entries > self.max_entries and len(self.items) > 1
        ):
            if self.shelf is not None and not (most and self.shelf.holds(next(iter(self.items)))):
                return  # nor does it hold the others, which were touched later
            most -= 1
            _, gone = self.items.popitem(last=False)
            self.entries -= gone.entries()
            if self.shelf is None:
                self.evicted += 1
                self.floor = max(self.floor, gone.newest())
