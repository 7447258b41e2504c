"""The features are what their definition says, however late, often or bounded."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress

import numpy as np
import pytest
from fraud_reference import Reference
from hypothesis import example, given
from hypothesis import strategies as st
from payments import DAY, HOUR, MINUTE, NOON, features, label, payment

from plinth.engine import ConfigError, InputError
from plinth.verticals.contract import StateError
from plinth.verticals.finance import FraudScoring
from plinth.verticals.finance.features import parts, timeline
from plinth.verticals.finance.features.language import KEYS, Declaration
from plinth.verticals.finance.features.online import (
    FEATURES,
    Event,
    FeatureState,
    Flag,
    Labelled,
    Limits,
)
from plinth.verticals.finance.features.persistence import pack, unpack
from plinth.verticals.finance.features.program import STANDARD, Program, compiled
from plinth.verticals.finance.training.simulator import Population, events, simulate

INCOMPLETE = Flag.PARTIAL | Flag.UNCOUNTED
STEPS = (0, 1, MINUTE, 5 * MINUTE, 5 * MINUTE - 1, HOUR, HOUR + 1, DAY, 7 * DAY, 8 * DAY, 30 * DAY)
"""Gaps that put events on the very edges of the windows."""
LATENESS = (0, 0, 0, 1, HOUR, 2 * DAY, 8 * DAY, 40 * DAY)
WEEK = 7 * DAY


@st.composite
def histories(draw: st.DrawFn, cards: int = 3) -> list[Event | Labelled]:
    """Events and labels in order of arrival: late, repeated, contradicting, on window edges."""
    now = NOON
    made: list[Event | Labelled] = []
    for number in range(draw(st.integers(1, 30))):
        now += draw(st.sampled_from(STEPS))
        time = now - draw(st.sampled_from(LATENESS))
        kind = draw(st.sampled_from(("event", "event", "event", "again", "label", "orphan")))
        seen = [one for one in made if isinstance(one, Event)]
        terminal = draw(st.sampled_from("tu"))
        if kind == "orphan":
            made.append(Labelled(f"o{number}", terminal, time, now, draw(st.booleans())))
        elif kind == "event" or not seen:
            card = draw(st.integers(1, cards))
            amount = draw(st.sampled_from((0.01, 1.0, 12.34, 99.9999, 1e7)))
            device = draw(st.sampled_from((None, "d", "e")))
            made.append(
                Event(f"x{number}", time, amount, f"k{card}", f"c{card % 2}", terminal, device)
            )
        elif kind == "again":
            made.append(draw(st.sampled_from(seen)))
        else:
            about = draw(st.sampled_from(seen))
            fraud = draw(st.sampled_from((True, True, False)))
            card = draw(st.sampled_from((None, about.card)))
            made.append(Labelled(about.transaction, about.terminal, about.time, time, fraud, card))
    return made


def labelled(event: Event, known: int) -> Labelled:
    """The event was fraud, as became known at a time."""
    return Labelled(event.transaction, event.terminal, event.time, known, True)


def walk(
    state: FeatureState, history: list[Event | Labelled], reference: Reference
) -> list[tuple[np.ndarray, np.ndarray, Flag]]:
    """Row of the state, row by definition, and flag, for each event."""
    found = []
    for one in history:
        if isinstance(one, Labelled):
            with suppress(InputError):
                state.label(one)
            reference.label(one)
            continue
        batch = state.update([one])
        flag = Flag(int(batch.flags[0]))
        slow = reference.update(one, count=Flag.UNCOUNTED not in flag)
        found.append((batch.rows[0], slow, flag))
    return found


@pytest.mark.parametrize("many", [1, 24])
@given(histories())
def test_rows_are_exact_or_say_that_they_are_not(
    many: int, history: list[Event | Labelled]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timeline, "MANY_MARKS", many)  # both ways of counting labels
        for row, slow, flag in walk(FeatureState(), history, Reference()):
            if not flag & INCOMPLETE:
                np.testing.assert_array_equal(row, slow, f"{FEATURES} {flag!r}")


@given(histories(cards=2))
def test_what_was_forgotten_is_said(history: list[Event | Labelled]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timeline, "TRIM_MASK", 0)  # forget at every arrival
        for row, slow, flag in walk(FeatureState(Limits(lateness_ms=0)), history, Reference()):
            if not flag & INCOMPLETE:
                np.testing.assert_array_equal(row, slow, f"{FEATURES} {flag!r}")


@given(histories(cards=12))
def test_bounds_hold_and_what_they_cost_is_said(history: list[Event | Labelled]) -> None:
    state = FeatureState(Limits(DAY, 8, 8, 8, 8, 12, 8, 8, 8, 8))
    for row, slow, flag in walk(state, history, Reference()):
        if not flag & INCOMPLETE:
            np.testing.assert_array_equal(row, slow)
    for kind in (state.cards, state.terminals, state.customers, state.devices):
        assert len(kind.items) <= 8
        assert kind.entries == sum(entity.entries() for entity in kind.items.values())
        assert kind.entries <= 12 or len(kind.items) == 1


@given(histories())
def test_events_within_the_lateness_are_complete(history: list[Event | Labelled]) -> None:
    newest, intime = NOON, []
    for one in history:
        newest = max(newest, one.time)
        if one.time > newest - WEEK:
            intime.append(one)
    for row, slow, flag in walk(FeatureState(Limits(lateness_ms=WEEK)), intime, Reference()):
        assert not flag & INCOMPLETE
        np.testing.assert_array_equal(row, slow)


@given(histories(), st.integers(0, 30))
def test_a_snapshot_goes_on_as_if_nothing_had_happened(
    history: list[Event | Labelled], cut: int
) -> None:
    state = FeatureState()
    walk(state, history[:cut], Reference())
    kept = pack(state)
    other = unpack(kept, state.limits)
    assert pack(other) == kept
    for (row, _, flag), (again, _, flag_again) in zip(
        walk(state, history[cut:], Reference()),
        walk(other, history[cut:], Reference()),
        strict=True,
    ):
        assert row.tobytes() == again.tobytes()
        assert flag == flag_again
    assert pack(other) == pack(state)


@given(histories())
def test_chunks_do_not_matter(history: list[Event | Labelled]) -> None:
    chunk = [one for one in history if isinstance(one, Event)]
    whole = FeatureState().update(chunk)
    state = FeatureState()
    alone = [state.update([one]) for one in chunk]
    assert b"".join(batch.rows.tobytes() for batch in alone) == whole.rows.tobytes()
    assert b"".join(batch.flags.tobytes() for batch in alone) == whole.flags.tobytes()


@given(histories(), st.randoms(use_true_random=False), st.sampled_from(LATENESS[:-1]))
def test_the_order_of_arrival_leaves_no_trace(
    history: list[Event | Labelled], dice: random.Random, ago: int
) -> None:
    made = {one.transaction: one for one in history if isinstance(one, Event)}
    newest = max((one.time for one in made.values()), default=NOON)
    made = {name: one for name, one in made.items() if one.time > newest - 20 * DAY}
    other = list(made.values())
    dice.shuffle(other)
    probe = Event("probe", newest - ago, 5.0, "k1", "c1", "t", "d")
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timeline, "TRIM_MASK", 1)  # remove what is forgotten now and then
        for order in (list(made.values()), other):
            state = FeatureState(Limits(lateness_ms=DAY))
            state.update(order)
            batch = state.update([probe])
            found.append((batch.rows.tobytes(), batch.flags.tobytes()))
    assert found[0] == found[1]


def test_what_is_forgotten_does_not_depend_on_the_order_of_arrival() -> None:
    def event(name: str, time: int) -> Event:
        return Event(name, time, 5.0, f"k{name}", f"c{name}", f"t{name}", "d")

    old = event("old", NOON)
    new = [event(f"new{n}", NOON + 3 * DAY + n) for n in range(8)]
    found = []
    for order in ([old, *new], [*new, old]):
        state = FeatureState(Limits(lateness_ms=DAY))
        state.update(order)
        batch = state.update([event("probe", NOON + DAY // 2)])
        found.append((batch.rows[0, FEATURES.index("device_cards_24h")], Flag(batch.flags[0])))
    assert found == [(1.0, Flag.PARTIAL)] * 2


def test_a_simulated_month_and_a_half_is_exact() -> None:
    people = Population(customers=12, terminals=8, days=50, radius=200, bad_terminals=0.2)
    table = simulate(people, seed=3)
    state, reference = FeatureState(), Reference()
    pending: list[tuple[int, Event]] = []
    risky = 0
    for event, fraud in zip(events(table), table["fraud"].tolist(), strict=True):
        while pending and pending[0][0] <= event.time:
            known, about = pending.pop(0)
            assert state.label(labelled(about, known))
            reference.label(labelled(about, known))
        row = state.update([event]).rows[0]
        np.testing.assert_array_equal(row, reference.update(event))
        risky += bool(row[FEATURES.index("terminal_risk_30d")] > 0)
        if fraud:
            pending.append((event.time + 9 * DAY, event))
    assert risky > 50


def test_windows_by_hand() -> None:
    times = [NOON, NOON + 4 * MINUTE, NOON + 5 * MINUTE, NOON + 65 * MINUTE, NOON + DAY]
    raws = [payment(n, at, amount=10.0 * n, terminal_id=f"t{n}") for n, at in enumerate(times, 1)]
    rows = features(FraudScoring(), *raws)
    assert [row["card_count_5m"] for row in rows] == [1, 2, 2, 1, 1]
    assert [row["card_count_1h"] for row in rows] == [1, 2, 3, 1, 1]
    assert [row["card_count_24h"] for row in rows] == [1, 2, 3, 4, 4]
    assert [row["card_sum_5m"] for row in rows] == [10, 30, 50, 40, 50]
    assert [row["card_sum_30d"] for row in rows] == [10, 30, 60, 100, 150]
    assert [row["card_terminals_24h"] for row in rows] == [1, 2, 3, 4, 4]
    assert [row["card_recency"] for row in rows][1:] == [240, 60, 3600, 86400 - 3900]
    assert rows[4]["card_amount_ratio_30d"] == pytest.approx(50 / 30)
    assert [row["weekend"] for row in rows] == [0] * 5


def test_a_late_event_sees_only_what_was_before_it_and_is_seen_by_what_comes_after() -> None:
    vertical = FraudScoring()
    rows = features(
        vertical,
        payment(1, NOON),
        payment(2, NOON + 4 * MINUTE),
        payment(3, NOON + 2 * MINUTE),
        payment(4, NOON + 4 * MINUTE + 1),
    )
    assert [row["card_count_5m"] for row in rows] == [1, 2, 2, 4]


def test_labels_count_after_their_delay_and_never_before_they_are_known() -> None:
    def risk(known: int, asked: int) -> float:
        vertical = FraudScoring()
        [row] = features(
            vertical, label(1, NOON, known), payment(2, asked, card="tok_2")
        )  # the fraud itself was seen before:
        return row["terminal_risk_30d"]

    assert risk(NOON + DAY, NOON + 8 * DAY) == 0.0, "a share of no transactions is 0"
    vertical = FraudScoring()
    features(vertical, payment(1, NOON), payment(9, NOON))
    vertical.parse(label())
    [first, second, third] = features(
        vertical,
        label(1, NOON, NOON + 8 * DAY),
        payment(2, NOON + WEEK - 1, card="tok_2"),
        payment(3, NOON + 8 * DAY - 1, card="tok_3"),
        payment(4, NOON + 8 * DAY, card="tok_4"),
    )
    assert [first["terminal_risk_30d"], second["terminal_risk_30d"]] == [0.0, 0.0]
    assert third["terminal_risk_30d"] == 0.5


def test_a_repeated_event_gets_its_first_row_and_is_not_counted() -> None:
    state = FeatureState()
    one = Event("x1", NOON, 10.0, "k", "c", "t")
    first = state.update([one])
    state.update([Event("x2", NOON + 1, 10.0, "k", "c", "t")])
    again = state.update([one])
    assert again.rows.tobytes() == first.rows.tobytes()
    assert Flag(int(again.flags[0])) == Flag.DUPLICATE
    after = state.update([Event("x3", NOON + 2, 10.0, "k", "c", "t")])
    assert after.rows[0, FEATURES.index("card_count_24h")] == 3


@given(st.integers(0, 10_000_000), st.sampled_from("tu"))
def test_a_repeat_with_another_amount_gets_the_row_it_would_have_had(
    cents: int, where: str
) -> None:
    """The state is as if the repeat had not come; the row as if it had come in its place."""
    state, other = FeatureState(), FeatureState()
    before = [Event(f"b{n}", NOON - n * HOUR, 10.0 * n, "k", "c", "t") for n in range(9)]
    one = Event("x1", NOON, 10.0, "k", "c", "t")
    asked = one._replace(amount=cents / 100, terminal=where)
    for target, last in ((state, one), (other, asked._replace(terminal="t"))):
        target.update([*before, last])
    kept = pack(state)
    batch = state.update([asked])
    flag = Flag(int(batch.flags[0])) & ~Flag.LATE
    same = asked == one
    assert flag == (Flag.DUPLICATE if same else Flag.DUPLICATE | Flag.CONFLICT)
    row, _ = other.cards.items["k"].row(other.cards.items["k"].index("x1"))
    np.testing.assert_allclose(batch.rows[0], np.frombuffer(row, np.float32), rtol=1e-5, atol=1e-3)
    assert pack(state) == kept


class Disk:
    """A store of parts and a log, whose checkpoints become durable when they are told to."""

    def __init__(self, *, logs: bool = False) -> None:
        self.logs = logs
        self.durable_parts: dict[bytes, bytes] = {}
        self.open: dict[bytes, bytes] = {}
        self.log: list[bytes] = []
        self.logged = self.mark = 0

    def get(self, key: bytes) -> bytes | None:
        return self.durable_parts.get(key)

    def fetch(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        return {key: self.durable_parts[key] for key in keys if key in self.durable_parts}

    def put(self, key: bytes, part: bytes) -> None:
        self.open[key] = part

    def append(self, entry: bytes) -> None:
        self.log.append(entry)

    def entries(self) -> list[bytes]:
        return self.log[self.logged :]

    def durable(self) -> Future[None]:
        raise NotImplementedError

    def commit(self) -> None:
        self.durable_parts |= self.open
        self.open, self.logged = {}, self.mark


def on_disk(disk: Disk, limits: Limits, features: Program = STANDARD) -> FeatureState:
    state = FeatureState(limits, features)
    parts.keep_in(state, disk)
    return state


def begin(state: FeatureState, disk: Disk) -> None:
    disk.mark = len(disk.log)
    parts.begin(state, disk)


def checkpoint(state: FeatureState, disk: Disk) -> None:
    """The rest of a checkpoint, entity by entity."""
    while not parts.write(state, 0.0):
        pass
    disk.commit()
    parts.end(state, durable=True)


def taken(state: FeatureState, one: Event | Labelled) -> object:
    """What the state makes of an event or a label, for comparison bit by bit."""
    if isinstance(one, Event):
        batch = state.update([one])
        return batch.rows.tobytes(), batch.flags.tobytes()
    try:
        return state.label(one)
    except InputError as error:
        return error.reason


def named(events: Sequence[Event]) -> dict[str, list[str | None]]:
    """What the events are of, by table."""
    return {f"{key}s": [getattr(one, key) for one in events] for key in KEYS}


MORE = compiled(
    Declaration.model_validate(
        {
            "feature": [
                {"name": "amount", "kind": "value", "of": "amount", "reason": "A1"},
                *(
                    {"name": f"{key}_{kind}", "kind": kind, "by": key, "over": "7d", "reason": "A1"}
                    | more
                    for key in KEYS
                    for kind, more in (
                        ("sum", {"of": "amount"}),
                        ("distinct", {"of": "customer" if key == "card" else "card"}),
                        ("speed", {}),
                    )
                ),
            ],
            "reasons": {"A1": "Some reason"},
        }
    )
)
"""Features that have every kind of column kept beside the rest."""


@given(histories(cards=24), st.booleans(), st.sampled_from((STANDARD, MORE)), st.data())
def test_a_state_on_disk_is_the_same_however_little_of_it_is_in_memory(
    history: list[Event | Labelled], logs: bool, features: Program, data: st.DataObject
) -> None:
    """Also after kills: what no checkpoint has comes from its own log, or is read again."""
    small = Limits(DAY, 8, 8, 8, 8, 12, 4096, 4096, 4096, 4096)
    places = (None, (52.5, 13.4), (-33.9, 151.2))
    whole, disk = FeatureState(Limits(lateness_ms=DAY), features), Disk(logs=logs)
    state = on_disk(disk, small, features)
    for number, one in enumerate(history):
        if isinstance(one, Event):
            # a customer, a card and a terminal of one name are three entities
            place, customer = places[number % 3], f"k{1 + number % 2}"
            history[number] = one._replace(place=place, customer=customer)
    kept, expected = 0, [taken(whole, one) for one in history]
    begun: int | None = None
    place = 0
    while place < len(history):
        do = data.draw(st.sampled_from("gggbwcaxkf"))
        if do == "g":
            assert taken(state, history[place]) == expected[place]
            place += 1
        elif do == "b" and begun is None:
            begin(state, disk)
            begun = place
        elif do == "f":  # what is read ahead may be of other payments than those that come next
            some = data.draw(st.lists(st.sampled_from(history), max_size=4))
            foreseen = [one for one in some if isinstance(one, Event)]
            parts.foresee(state, disk, named(foreseen))
        elif do == "w" and begun is not None:
            parts.write(state, 0.0)
        elif do == "c" and begun is not None:
            checkpoint(state, disk)
            kept, begun = begun, None
        elif do == "a" and begun is not None:
            disk.open = {}
            parts.end(state, durable=False)
            begun = None
        elif do == "k":
            disk.open = {}
            state, begun = on_disk(disk, small, features), None
            for one in [] if logs else history[kept:place]:
                taken(state, one)


def test_what_a_checkpoint_holds_leaves_memory_beyond_the_bounds_and_comes_back() -> None:
    disk = Disk()
    state = on_disk(disk, Limits(max_cards=8))
    first = [Event(f"x{n}", NOON + n, 1.0, f"k{n}", "c", "t") for n in range(60)]
    state.update(first)
    assert len(state.cards.items) == 60, "no checkpoint has them yet"
    assert state.unsaved == 60 / 8, "and whoever makes checkpoints is told"
    begin(state, disk)
    checkpoint(state, disk)
    assert len(state.cards.items) == 8
    assert state.unsaved == 0
    assert state.history("k0", 5)[0].transaction == "x0"
    again = state.update([one._replace(transaction="y", time=NOON + HOUR) for one in first])
    assert set(again.rows[:, FEATURES.index("card_count_24h")]) == {2.0}
    assert not (again.flags & Flag.PARTIAL).any()
    assert state.cards.evicted == 0


@given(st.data())
def test_a_damaged_part_is_refused(data: st.DataObject) -> None:
    disk = Disk()
    state = on_disk(disk, Limits())
    event = Event("x", NOON, 1.0, "k", "c", "t", "d")
    state.update([event])
    state.label(labelled(event, NOON + DAY))
    begin(state, disk)
    checkpoint(state, disk)
    key = data.draw(st.sampled_from(sorted(disk.durable_parts)))
    raw = disk.durable_parts[key]
    at = data.draw(st.integers(0, len(raw) - 1))
    disk.durable_parts[key] = raw[:at] + bytes([raw[at] ^ 0x55]) + raw[at + 1 :]
    with pytest.raises(StateError, match="damaged"):
        on_disk(disk, Limits()).update([event._replace(transaction="y")])


def test_a_state_on_disk_of_other_features_is_refused() -> None:
    disk = Disk()
    state = on_disk(disk, Limits())
    begin(state, disk)
    checkpoint(state, disk)
    with pytest.raises(InputError, match="other features"):
        on_disk(disk, Limits(), MORE)


def test_a_label_names_its_payment_exactly() -> None:
    state = FeatureState()
    one = Event("1", NOON, 10.0, "k", "c", "t")
    state.update([one, one._replace(card="l"), one._replace(card="m", time=NOON + 1)])
    known = labelled(one, NOON + DAY)
    for wrong in (
        known._replace(transaction="nope"),
        known._replace(terminal="u"),
        known._replace(time=NOON + 2),
        known._replace(card="m"),
    ):
        with pytest.raises(InputError) as caught:
            state.label(wrong)
        assert caught.value.reason == "unknown_payment"
    with pytest.raises(InputError) as caught:
        state.label(known)
    assert caught.value.reason == "ambiguous_label"
    assert state.label(known._replace(card="k"))
    assert state.label(known._replace(card="l"))
    assert state.label(known._replace(time=NOON + 1))  # one card alone has it at that time
    assert len(state.terminals.items["t"].marks) == 3


def test_a_label_of_what_was_forgotten_is_said_to_be_uncertain() -> None:
    state = FeatureState(Limits(max_cards=8))
    old = Event("old", NOON, 10.0, "k", "c", "t")
    state.update([old, *(Event(f"x{n}", NOON + n, 1.0, f"k{n}", "c", "t") for n in range(1, 12))])
    assert not state.label(labelled(old, NOON + DAY))
    later = state.update([Event("y", NOON + 8 * DAY, 1.0, "z", "c", "t")])
    assert Flag(int(later.flags[0])) & Flag.PARTIAL


@example(-0.01)
@example(-1.0)
@example(float("nan"))
@example(float("inf"))
@given(st.floats(min_value=1.1e9))
def test_an_absurd_amount_is_refused(amount: float) -> None:
    with pytest.raises(InputError, match="amount"):
        FeatureState().update([Event("x1", NOON, amount, "k", "c", "t")])


def test_sums_stay_exact_over_many_large_amounts() -> None:
    state = FeatureState(Limits(card_events=8))
    for number in range(20_000):
        batch = state.update([Event(f"x{number}", NOON + number, 1e9, "k", "c", "t")])
    total = batch.rows[0, FEATURES.index("card_sum_5m")]
    count = batch.rows[0, FEATURES.index("card_count_5m")]
    assert total == np.float32(count * 1e9)


@pytest.mark.parametrize("name", ["max_cards", "card_events", "max_events"])
def test_bounds_that_make_no_sense_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        Limits(**{name: 7})


@pytest.fixture(scope="module")
def kept() -> bytes:
    state = FeatureState()
    people = Population(customers=5, terminals=4, days=12, radius=200, bad_terminals=1)
    table = simulate(people, seed=1)
    for event, fraud in zip(events(table), table["fraud"].tolist(), strict=True):
        state.update([event._replace(device="d1")])
        if fraud:
            state.label(labelled(event, event.time))
    return pack(state)


@given(st.data())
def test_a_damaged_snapshot_is_refused_and_nothing_is_lost(
    kept: bytes, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(kept) - 1))
    cut = data.draw(st.booleans())
    damaged = kept[:at] if cut else kept[:at] + bytes([kept[at] ^ 0x55]) + kept[at + 1 :]
    state = restored(damaged)
    if state is not None:
        assert not cut
        state.update([Event("x2", NOON + 1, 10.0, "k", "c", "t")])


def restored(data: bytes) -> FeatureState | None:
    """The state, or None where the bytes are refused as no snapshot; nothing else may happen."""
    try:
        return unpack(data, Limits())
    except InputError as error:
        if error.reason != "bad_snapshot":
            raise
        return None


def test_a_snapshot_is_held_to_the_limits_of_who_restores_it(kept: bytes) -> None:
    small = unpack(kept, Limits(max_cards=8, max_events=40))
    assert len(small.cards.items) <= 8
    assert small.cards.entries <= 40 or len(small.cards.items) == 1


def test_a_snapshot_holds_no_code(kept: bytes) -> None:
    assert b"pickle" not in kept
    assert kept[8:9] == b"{", "safetensors: a JSON header, then flat arrays"
