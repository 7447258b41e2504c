"""Kafka clients that end when their owner says so, whatever their broker does.

kafka-python by itself leaves a thread behind when connecting fails, waits without bound for the
coordinator of a transaction, and closes nothing when what was sent does not arrive in time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

from kafka import KafkaProducer
from kafka.errors import KafkaTimeoutError
from kafka.net.compat import KafkaNetClient

T = TypeVar("T")

LOOK_MS = 100


def connect(kind: Callable[..., T], *args: Any, **options: Any) -> T:
    """Make a client of ``kind``; nothing of it is left if that fails."""
    made: list[Any] = []

    def network(**settings: Any) -> Any:
        made.append(KafkaNetClient(**settings))
        return made[-1]

    try:
        return kind(*args, kafka_client=network, **options)
    except BaseException:
        for client in made:
            client.close()
        raise


class Producer(KafkaProducer):  # type: ignore[misc]
    """A producer that can be given up, and with it every wait for its transactions."""

    _given_up = False

    def give_up(self) -> None:
        """End its thread, connections and waits, without what was not sent. Returns at once."""
        self._given_up = self._closed = True
        self._unregister_cleanup()
        self._sender.force_close()
        network = self._sender._client
        with contextlib.suppress(RuntimeError):  # its thread has ended already
            # so that its thread does not wait for a broker that hangs
            network._net.call_soon_threadsafe(network._manager.close)

    def send_offsets_to_transaction(self, offsets: Any, group_metadata: Any) -> None:
        """Make offsets part of the transaction."""
        self._settle(self._transaction_manager.send_offsets_to_transaction(offsets, group_metadata))

    def commit_transaction(self) -> None:
        """Commit."""
        self._settle(self._transaction_manager.begin_commit())

    def abort_transaction(self) -> None:
        """Abort."""
        self._settle(self._transaction_manager.begin_abort())

    def _settle(self, result: Any) -> None:
        self._sender.wakeup()
        while not result.wait(timeout_ms=LOOK_MS):
            if self._given_up:
                raise KafkaTimeoutError("the producer was given up")
