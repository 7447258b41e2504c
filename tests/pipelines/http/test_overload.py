"""Twice the load a server can carry: what it answers is still in time, and it recovers at once."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import pytest
from serving import running
from tiny_verticals import Tiny

from plinth.engine import Sla
from plinth.pipelines.bench.load import Load
from plinth.pipelines.http.wire.admission import PER_BEGUN, TURN, Limit, ReadyQueue

ROUTE = "/v1/tiny/double"
PROMISE = 0.15


class Socket:
    """A connection as the queue sees it."""

    def __init__(self) -> None:
        self.arrived = 0.0
        self.queued = False
        self.wants_read = True

    def read(self) -> None:
        raise AssertionError("the queue reads nobody")

    read_stale = read


def waiting(queue: ReadyQueue, *times: float) -> list[Socket]:
    """Connections that became ready at these times."""
    sockets = [Socket() for _ in times]
    for one, at in zip(sockets, times, strict=True):
        queue.add(one, at)
    return sockets


# -- the order -------------------------------------------------------------------------------------
def test_who_waits_a_short_time_is_served_in_order() -> None:
    queue = ReadyQueue(PROMISE)
    first, second = waiting(queue, 1.0, 1.01)
    assert [queue.next(1.07), queue.next(1.07)] == [first, second]


def test_the_newest_is_served_first_when_the_oldest_has_waited_long() -> None:
    queue = ReadyQueue(PROMISE)
    old, middle, new = waiting(queue, 1.0, 1.01, 1.02)
    assert [queue.next(1.08), queue.next(1.08)] == [new, middle]
    assert queue.next(1.08) is old


def test_without_a_promise_the_order_is_that_of_arrival() -> None:
    queue = ReadyQueue(None)
    first, second = waiting(queue, 1.0, 90.0)
    assert [queue.next(100.0), queue.next(100.0)] == [first, second]


def test_closed_connections_are_passed_over() -> None:
    queue = ReadyQueue(PROMISE)
    gone, there = waiting(queue, 1.0, 1.0)
    gone.wants_read = False
    assert queue.next(1.0) is there
    assert queue.next(1.0) is None


def test_the_stale_have_their_share_of_the_turns() -> None:
    """Three for every four that are begun, the oldest first, however many there are."""
    queue = ReadyQueue(PROMISE)
    sockets = deque(waiting(queue, *(1.0 + number / 1e5 for number in range(1000))))
    read = 0
    for _ in range(10):
        queue.begun(8)
        while (found := queue.next_stale(2.0, blocked=False)) is not None:
            assert found is sockets.popleft()
            read += 1
    assert read == 10 * 8 * PER_BEGUN


def test_nobody_is_refused_before_half_of_the_promise_has_passed() -> None:
    queue = ReadyQueue(PROMISE)
    waiting(queue, 1.0)
    queue.begun(TURN)
    assert queue.next_stale(1.07, blocked=False) is None
    assert queue.next_stale(1.08, blocked=False) is not None


# -- the bound -------------------------------------------------------------------------------------
def rounds(limit: Limit, first: int, count: int, congested: bool) -> None:
    """Rounds in which the bound is reached and all answers are alike."""
    for at in range(first, first + count):
        taken = max(limit.room, 0)
        for _ in range(taken):
            limit.begin()
        for _ in range(taken):
            limit.end(0.1 * at + limit.in_work / 1e9, congested)


def test_the_bound_grows_while_answers_are_in_time_and_falls_to_its_floor_when_not() -> None:
    limit = Limit(1024)
    begin = limit.room
    rounds(limit, 1, 40, congested=False)
    assert begin < limit.room <= 1024
    rounds(limit, 41, 80, congested=True)
    assert limit.room == limit.floor
    limit.floor = 300
    rounds(limit, 121, 1, congested=True)
    assert limit.room == 300


def test_a_bound_of_one_stays_one() -> None:
    limit = Limit(1)
    assert limit.room == 1
    rounds(limit, 1, 5, congested=True)
    assert limit.room == 1


# -- a server --------------------------------------------------------------------------------------
class Urgent(Tiny):
    sla = Sla(deadline_ms=PROMISE * 1e3)


def offered(url: str, rate: float, tail: tuple[float, float] | None = None) -> Any:
    return Load(
        url + ROUTE,
        [b'{"id":"a","value":1}'],
        headers={"content-type": "application/json"},
        rate=rate,
        seconds=1.5,
        connections=600,
        timeout=1.0,
        id_field="x-request-id",
        pool_seconds=0.02,
        tail=tail,
    ).run()


@pytest.mark.clock
def test_at_four_times_its_capacity_a_server_does_most_of_what_it_can() -> None:
    """Client and server share this process, so both multiples are of what they do together."""
    with running({"tiny": Urgent()}) as server:
        url = server.server.url
        offered(url, 200)
        best = max(offered(url, rate).in_time(PROMISE) / 1.5 for rate in (1500, 3000, 6000))
        crowd = offered(url, 4 * best, tail=(best / 4, 2.0))
    assert crowd.in_time(PROMISE) / 1.5 > 0.5 * best
    recovered = crowd.due > 1.5 + 1.0
    assert recovered.sum() > 10
    assert (crowd.latencies[recovered] <= PROMISE).mean() > 0.9
    assert math.isfinite(crowd.percentile(0.5, answered=True))
