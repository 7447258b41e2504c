"""A real Apache Kafka on loopback, one node or three, for measurements and tests.

Found by ``KAFKA_HOME``, else beside the repository in ``../shared/kafka``; formatted and started
through its own ``bin/``.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient

from plinth.pipelines.cli.embedded_broker import Guarded, free_port
from plinth.pipelines.stream.kafka_clients import prepare
from plinth.pipelines.stream.settings import StreamConfig

SHARED = Path(__file__).resolve().parents[2] / "shared" / "kafka"
MARKS_S = 2.0
"""How long a reader waits for the marks of a transaction that may be open for ever."""
USER, PASSWORD = "plinth", "a password of tests"
SECURITY = """\
sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512,OAUTHBEARER
listener.name.secure.oauthbearer.sasl.jaas.config=\
org.apache.kafka.common.security.oauthbearer.OAuthBearerLoginModule required \
unsecuredLoginStringClaim_sub="{user}";
listener.name.secure.plain.sasl.jaas.config=\
org.apache.kafka.common.security.plain.PlainLoginModule required user_{user}="{password}";
listener.name.secure.scram-sha-256.sasl.jaas.config=\
org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.secure.scram-sha-512.sasl.jaas.config=\
org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.certified.ssl.client.auth=required
ssl.keystore.type=PEM
ssl.keystore.location={folder}/both.pem
ssl.truststore.type=PEM
ssl.truststore.location={folder}/certificate.pem
"""
PROPERTIES = """\
process.roles=broker,controller
node.id={number}
controller.quorum.voters={voters}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}{more}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}{more}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,\
SECURE:SASL_SSL,CERTIFIED:SSL
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
log.dirs={data}
offsets.topic.replication.factor={copies}
offsets.topic.num.partitions=4
transaction.state.log.replication.factor={copies}
transaction.state.log.min.isr={in_sync}
min.insync.replicas={in_sync}
default.replication.factor={copies}
transaction.state.log.num.partitions=4
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
transaction.abort.timed.out.transaction.cleanup.interval.ms=1000
auto.create.topics.enable=false
"""


def find_home() -> Path:
    """The Kafka to use.

    Raises:
        FileNotFoundError: there is none, or no Java to run it.
    """
    named = os.environ.get("KAFKA_HOME")
    home = Path(named) if named else SHARED
    if not (home / "bin" / "kafka-server-start.sh").exists():
        raise FileNotFoundError(f"no Apache Kafka at {home}: set KAFKA_HOME")
    if shutil.which("java") is None:
        raise FileNotFoundError("Apache Kafka needs java 17 or newer on the PATH")
    return home


class Kafka:
    """What is done with a Kafka, however many nodes it has."""

    servers: str
    """``host:port``, comma between them, for any client."""

    def config(self, **settings: Any) -> StreamConfig:
        """Settings for a stream over new topics that ends when it is idle.

        Its client is kafka-python, unless PLINTH_TEST_KAFKA_CLIENT or the settings say otherwise.
        """
        name = f"t-{uuid.uuid4().hex[:8]}"
        defaults: dict[str, Any] = {
            "bootstrap_servers": self.servers,
            "client": os.environ.get("PLINTH_TEST_KAFKA_CLIENT", "kafka-python"),
            "input_topic": name,
            "output_topic": f"{name}-out",
            "group": f"{name}-group",
            "create_topics": True,
            "idle_exit_s": 2.0,
            "session_timeout_ms": 6_000,
        }
        return StreamConfig(**{**defaults, **settings})

    def fill(self, config: StreamConfig, records: Iterable[tuple[bytes | None, bytes]]) -> None:
        """Create the topics and append records (key, value)."""
        prepare(config)
        producer = KafkaProducer(bootstrap_servers=self.servers, linger_ms=20, batch_size=200_000)
        with contextlib.closing(producer):
            sent = [producer.send(config.input_topic, value, key) for key, value in records]
            producer.flush(60)
        if failed := [future.exception for future in sent if not future.succeeded()]:
            raise RuntimeError(f"{len(failed)} records were not written: {failed[0]!r}")

    def create(self, topic: str, partitions: int = 4, **configs: str) -> None:
        """Create a topic with settings of its own, and wait until it can be written."""
        asked = {"num_partitions": partitions, "replication_factor": 1, "configs": configs}
        with contextlib.closing(KafkaAdminClient(bootstrap_servers=self.servers)) as admin:
            admin.create_topics({topic: asked}, wait_for_metadata=True)

    def grow(self, topic: str, partitions: int) -> None:
        """Have so many partitions in a topic, more than before."""
        with contextlib.closing(KafkaAdminClient(bootstrap_servers=self.servers)) as admin:
            admin.create_partitions({topic: partitions})

    def delete(self, topic: str, seconds: float = 60.0) -> None:
        """Delete a topic, and wait until the node no longer tells of it."""
        until = time.monotonic() + seconds
        pause = threading.Event()
        with contextlib.closing(KafkaAdminClient(bootstrap_servers=self.servers)) as admin:
            admin.delete_topics([topic])
            while not admin.describe_topics([topic])[0]["error_code"]:
                if time.monotonic() > until:
                    raise TimeoutError(f"{topic} is still there after {seconds:g} s")
                pause.wait(0.02)

    def read(self, topic: str, seconds: float = 60.0) -> list[Any]:
        """Everything committed in a topic, as a read_committed consumer sees it.

        A commit is answered before its marks are written, so those are awaited for a moment.
        """
        with contextlib.closing(self._consumer("read_uncommitted")) as consumer:
            places = [TopicPartition(topic, p) for p in consumer.partitions_for_topic(topic)]
            written = consumer.end_offsets(places, timeout_ms=30_000)
        with contextlib.closing(self._consumer("read_committed")) as consumer:
            consumer.assign(places)
            ends = consumer.end_offsets(places, timeout_ms=30_000)
            until = time.monotonic() + MARKS_S
            while any(ends[p] < written[p] for p in places) and time.monotonic() < until:
                ends = consumer.end_offsets(places, timeout_ms=30_000)
            consumer.seek_to_beginning(*places)
            found: list[Any] = []
            until = time.monotonic() + seconds
            while any(consumer.position(p, timeout_ms=30_000) < ends[p] for p in places):
                assert time.monotonic() < until, f"{topic}: read {len(found)}, then nothing came"
                for records in consumer.poll(500).values():
                    found.extend(records)
        return found

    def _consumer(self, isolation: str) -> Any:
        return KafkaConsumer(
            bootstrap_servers=self.servers,
            isolation_level=isolation,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
        )

    def answers(self, config: StreamConfig) -> list[dict[str, Any]]:
        """Committed answers, decoded, in order within each partition."""
        return [json.loads(record.value) for record in self.read(config.output_topic)]


class KafkaNode(Kafka):
    """One node, broker and controller; its data outlives :meth:`kill` and :meth:`start`.

    Args:
        home: an Apache Kafka 4 distribution.
        folder: for its data, settings and log; it goes on with data that are there.
        prefix: what to start it with, such as ``("taskset", "-c", "0")``.
        number: which node of its cluster it is.
        ports: of broker and controller of every node of the cluster; by default it is alone.
        secure: it also listens at ``secure`` (TLS, and SASL with USER and PASSWORD) and at
            ``certified`` (TLS with a certificate of the client); ``certificate.pem`` and
            ``key.pem`` in the folder are both sides'. Needs openssl.
    """

    def __init__(
        self,
        home: Path,
        folder: Path,
        prefix: Sequence[str] = (),
        number: int = 1,
        ports: Sequence[tuple[int, int]] = (),
        secure: bool = False,
    ) -> None:
        self.home, self.folder, self.prefix = home, folder, prefix
        ports = ports or [(free_port(), free_port())]
        self.port, controller = ports[number - 1]
        self.servers = f"127.0.0.1:{self.port}"
        voters = ",".join(f"{n}@127.0.0.1:{at}" for n, (_, at) in enumerate(ports, 1))
        self.secure, self.certified = (
            (f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}") if secure else ("", "")
        )
        more = f",SECURE://{self.secure},CERTIFIED://{self.certified}" if secure else ""
        self.properties = folder / "server.properties"
        self.properties.write_text(
            PROPERTIES.format(
                more=more,
                number=number,
                port=self.port,
                controller=controller,
                voters=voters,
                data=folder / "data",
                copies=len(ports),
                in_sync=(len(ports) + 1) // 2,
            )
            + (SECURITY.format(user=USER, password=PASSWORD, folder=folder) if secure else "")
        )
        scram = [f"SCRAM-SHA-{bits}=[name={USER},password={PASSWORD}]" for bits in (256, 512)]
        users = [word for one in scram for word in ("--add-scram", one)] if secure else []
        if secure:
            _certify(folder)
        self.env = {**os.environ, "KAFKA_HEAP_OPTS": "-Xmx384M", "LOG_DIR": str(folder)}
        self._held: Guarded | None = None
        subprocess.run(
            [home / "bin/kafka-storage.sh", "format", "--ignore-formatted",
             "--config", self.properties,
             "--cluster-id", "5L6g3nShT-eMCtK--X86sw", *users],
            env=self.env,
            check=True,
            capture_output=True,
            timeout=60,
        )  # fmt: skip
        if len(ports) == 1:
            self.start()

    def start(self) -> None:
        """Start the node on the data it has, and wait until it listens."""
        self._held = Guarded(
            [*self.prefix, str(self.home / "bin/kafka-server-start.sh"), str(self.properties)],
            self.port,
            log=self.folder / "log",
            env=self.env,
            wait=60,
        )

    def kill(self) -> None:
        """kill -9, frozen or not. Safe to call twice.

        Not in the middle of a commit: a lone node (seen with Kafka 4.3.1) may, after its restart,
        call the transaction complete without a marker in any partition, and then the group's
        offsets stay unstable for ever. :meth:`freeze` is safe at any moment.
        """
        if self._held is not None:
            with contextlib.suppress(ProcessLookupError):
                self.thaw()
            self._held.kill()

    def revive(self) -> None:
        """Have it run and answer, whatever was done to it."""
        if self._held is None or self._held.ended:
            self.start()
        else:
            self.thaw()

    def freeze(self) -> None:
        """Stop answering without closing a connection."""
        assert self._held is not None
        os.killpg(self._held.process_group, signal.SIGSTOP)

    def thaw(self) -> None:
        """Answer again."""
        assert self._held is not None
        os.killpg(self._held.process_group, signal.SIGCONT)


def _certify(folder: Path) -> None:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
        timeout=60,
    )  # fmt: skip
    (folder / "both.pem").write_text(key.read_text() + certificate.read_text())


class KafkaCluster(Kafka):
    """Three nodes, of which one may be lost at a time.

    Args:
        home: an Apache Kafka 4 distribution.
        folder: for their data, settings and logs.
    """

    def __init__(self, home: Path, folder: Path) -> None:
        ports = [(free_port(), free_port()) for _ in range(3)]
        self.servers = ",".join(f"127.0.0.1:{port}" for port, _ in ports)
        self.nodes: list[KafkaNode] = []
        for number in (1, 2, 3):
            own = folder / str(number)
            own.mkdir(exist_ok=True)
            self.nodes.append(KafkaNode(home, own, number=number, ports=ports))
        # none of them listens before two of them have elected a controller
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(KafkaNode.start, self.nodes))

    def kill(self) -> None:
        """kill -9 of every node."""
        for node in self.nodes:
            node.kill()
