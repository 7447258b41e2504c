"""``[stream]``: which Kafka, which topics, which guarantee."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from plinth.engine import ConfigError
from plinth.engine.tables import Table

Topic = Annotated[str, Field(min_length=1, max_length=249, pattern=r"^[A-Za-z0-9._-]+$")]
Guarantee = Literal["exactly_once", "at_least_once"]
_SERVER = re.compile(r"(\[[0-9a-fA-F:]+\]|[^\s:,/]+):\d{1,5}")


class StreamConfig(Table):
    """Settings of the Kafka door. Secrets are named by environment variable, never written here."""

    bootstrap_servers: str = Field(
        default="127.0.0.1:9092", description="brokers to ask first, host:port, comma between them"
    )
    client: Literal["kafka-python", "confluent"] = Field(
        default="kafka-python",
        description="Kafka client: kafka-python, or confluent (the extra [kafka-fast])",
    )
    input_topic: Topic = Field(description="topic of records to score")
    output_topic: Topic = Field(description="topic of answers")
    dead_letter_topic: Topic | None = Field(
        default=None,
        description="topic of records without an answer; none: <input_topic>.dead-letter",
    )
    audit_topic: Topic | None = Field(
        default=None, description="topic of a chained record of every decision; none: not kept"
    )
    audit_key_env: str | None = Field(
        default=None,
        description="environment variable with a key, without which the chain cannot be written",
    )
    group: str = Field(
        default="plinth",
        min_length=1,
        max_length=200,
        description="consumer group: workers that share",
    )
    instance_id: str | None = Field(
        default=None,
        max_length=200,
        pattern=r"^[A-Za-z0-9._-]+$",
        description="this worker's own lasting name: it returns to its partitions after a crash",
    )
    leave_on_stop: bool = Field(
        default=False,
        description="a stop gives the partitions of a worker with an instance_id away at once",
    )
    guarantee: Guarantee = Field(
        default="exactly_once", description="exactly_once or at_least_once"
    )

    mapping: Path | None = Field(
        default=None,
        description="TOML file that says how messages become records; none: they are records",
    )
    max_records: int = Field(default=512, ge=1, le=10_000, description="records in one transaction")
    linger_ms: float = Field(default=20.0, ge=0, le=5_000, description="longest wait to fill one")
    max_record_bytes: int = Field(
        default=1_000_000, ge=64, le=100_000_000, description="larger records become dead letters"
    )
    positions: bool = Field(
        default=True,
        description="answers say from which records they were made, so that each can be rebuilt",
    )
    compression: Literal["none", "gzip", "snappy", "lz4", "zstd"] = Field(
        default="none", description="of what is written"
    )

    session_timeout_ms: int = Field(
        default=10_000, ge=1_000, description="silence after which the group gives partitions away"
    )
    commit_timeout_ms: int = Field(
        default=10_000,
        ge=500,
        description="longest commit before its producer is replaced",
    )
    transaction_timeout_ms: int = Field(
        default=10_000,
        ge=1_000,
        description="time after which Kafka aborts what a vanished worker left open",
    )
    connect_timeout_s: float = Field(
        default=10.0, gt=0, description="longest wait for a broker at start"
    )
    outage_timeout_s: float = Field(
        default=300.0,
        gt=0,
        description="time without a commit or a group before the stream gives up",
    )
    stall_timeout_s: float = Field(
        default=30.0,
        gt=0,
        description="time without a commit while records wait before the stream gives up",
    )
    metadata_max_age_ms: int = Field(
        default=30_000, ge=100, description="time after which added partitions are seen"
    )
    drain_timeout_s: float = Field(default=20.0, gt=0, description="time to finish after a stop")

    state_dir: Path | None = Field(
        default=None, description="folder of this worker's state; its alone"
    )
    standby: bool = Field(
        default=False,
        description="wait, with all loaded and the state up to date, until the worker that "
        "holds state_dir has ended, then take over",
    )
    state_store: Literal["snapshot", "disk"] = Field(
        default="snapshot",
        description="the state as one file, or by parts on disk: larger than memory, no pauses",
    )
    snapshot_interval_s: float = Field(
        default=60.0, gt=0, description="time between snapshots or checkpoints"
    )
    replay_max_records: int = Field(
        default=1_000_000,
        ge=0,
        description="per partition: records read again to rebuild lost state",
    )
    dead_letter_window: int = Field(
        default=1_000, ge=10, description="latest records over which dead letters are counted"
    )
    dead_letter_alarm_share: float = Field(
        default=0.1, gt=0, le=1, description="share of dead letters above which an alarm is raised"
    )
    dead_letter_stop_share: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of dead letters above which the stream ends with an error",
    )
    start_at: Literal["earliest", "latest"] = Field(
        default="earliest", description="where a group without committed offsets begins"
    )

    create_topics: bool = Field(default=False, description="create topics that are missing")
    partitions: int = Field(default=4, ge=1, le=10_000, description="partitions of created topics")
    replication_factor: int = Field(
        default=-1, ge=-1, description="of created topics; -1: the broker's"
    )

    idle_exit_s: float | None = Field(
        default=None, gt=0, description="end after so long without records"
    )
    max_events: int | None = Field(default=None, ge=1, description="end after so many records")

    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: (
        Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER", "GSSAPI"] | None
    ) = None
    sasl_username: str | None = None
    sasl_password_env: str = Field(
        default="PLINTH_KAFKA_PASSWORD", description="environment variable that holds the password"
    )
    sasl_token_file: Path | None = Field(
        default=None, description="file with the token of OAUTHBEARER, read for every connection"
    )
    sasl_kerberos_service: str = Field(
        default="kafka", description="name of the brokers' service for GSSAPI (Kerberos)"
    )
    ssl_cafile: Path | None = None
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    ssl_password_env: str = Field(
        default="PLINTH_KAFKA_KEY_PASSWORD",
        description="environment variable that holds the key's password",
    )
    ssl_check_hostname: bool = True

    @model_validator(mode="after")
    def _check(self) -> StreamConfig:
        for server in self.bootstrap_servers.split(","):
            if not _SERVER.fullmatch(server.strip()):
                raise ValueError(f"bootstrap_servers: {server.strip()!r} is not host:port")
        if self.transaction_timeout_ms < self.commit_timeout_ms:
            raise ValueError("transaction_timeout_ms must not be below commit_timeout_ms")
        if self.state_store == "disk" and self.state_dir is None:
            raise ValueError("state_store = 'disk' needs a state_dir")
        if self.standby and self.state_dir is None:
            raise ValueError("standby needs the state_dir of the worker it stands by for")
        if self.standby and self.leave_on_stop:
            raise ValueError("leave_on_stop gives away what standby keeps for another of the name")
        if len(set(self.topics)) < len(self.topics):
            raise ValueError(
                "input_topic, output_topic, dead_letter_topic and audit_topic must differ"
            )
        if self.audit_topic is not None and self.guarantee != "exactly_once":
            raise ValueError("audit_topic needs guarantee = 'exactly_once'")
        if self.security_protocol.startswith("SASL"):
            self._check_sasl()
        return self

    def _check_sasl(self) -> None:
        if self.sasl_mechanism == "OAUTHBEARER":
            if self.sasl_token_file is None:
                raise ValueError("sasl_mechanism = 'OAUTHBEARER' needs sasl_token_file")
        elif self.sasl_mechanism != "GSSAPI" and not (self.sasl_mechanism and self.sasl_username):
            raise ValueError(f"{self.security_protocol} needs sasl_mechanism and sasl_username")

    @property
    def dead_letters(self) -> str:
        """The dead-letter topic in force."""
        return self.dead_letter_topic or f"{self.input_topic}.dead-letter"

    @property
    def topics(self) -> tuple[str, ...]:
        """Every topic of the stream, the input first."""
        audit = () if self.audit_topic is None else (self.audit_topic,)
        return self.input_topic, self.output_topic, self.dead_letters, *audit

    @property
    def heartbeat_ms(self) -> int:
        """How often a worker tells the group that it lives, and is told that the group changes."""
        return max(250, min(1_000, self.session_timeout_ms // 5))

    @property
    def stays(self) -> bool:
        """A stop does not give partitions away: the worker comes back under its name."""
        return self.instance_id is not None and not self.leave_on_stop

    def _sasl_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"sasl_mechanism": self.sasl_mechanism}
        if self.sasl_mechanism == "OAUTHBEARER":
            assert self.sasl_token_file is not None
            return options | {"sasl_oauth_token_provider": _token_of(self.sasl_token_file)}
        if self.sasl_mechanism == "GSSAPI":
            if find_spec("gssapi") is None:
                raise ConfigError(
                    "stream.sasl_mechanism = 'GSSAPI' (Kerberos) needs the package gssapi",
                    hint="pip install gssapi (it needs libkrb5), and have a ticket or a keytab",
                )
            return options | {"sasl_kerberos_service_name": self.sasl_kerberos_service}
        return options | {
            "sasl_plain_username": self.sasl_username,
            "sasl_plain_password": _secret(self.sasl_password_env),
        }

    def client_options(self) -> dict[str, Any]:
        """Connection options of every Kafka client, secrets read from the environment.

        The words are kafka-python's.

        Raises:
            ConfigError: a password, a token or a package is needed and not there.
        """
        options: dict[str, Any] = {
            "bootstrap_servers": [s.strip() for s in self.bootstrap_servers.split(",")],
            "security_protocol": self.security_protocol,
            "bootstrap_timeout_ms": int(self.connect_timeout_s * 1e3),
            "reconnect_backoff_max_ms": 1_000,
        }
        if self.security_protocol.startswith("SASL"):
            options |= self._sasl_options()
        if self.security_protocol.endswith("SSL"):
            files = ("ssl_cafile", "ssl_certfile", "ssl_keyfile")
            options |= {name: str(path) for name in files if (path := getattr(self, name))}
            options["ssl_check_hostname"] = self.ssl_check_hostname
            options["ssl_password"] = os.environ.get(self.ssl_password_env)
        return options


def _token_of(path: Path) -> Any:
    from kafka.errors import KafkaError

    from plinth.pipelines.tokens import TokenFile

    found = TokenFile(path)
    try:
        found.token()
    except KafkaError as error:
        raise ConfigError(
            str(error), hint="stream.sasl_token_file names the file; whoever renews it writes it"
        ) from None
    return found


def _secret(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise ConfigError(
            f"the environment variable {name} is not set",
            hint="put the SASL password there, or name another with stream.sasl_password_env",
        )
    return value
