"""Settings of the stream: refused when wrong, all of them in the documentation, no secrets."""

from __future__ import annotations

import base64
import re
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from plinth.engine import ConfigError
from plinth.pipelines.stream.worker import StreamConfig, chosen_client

PAGE = Path(__file__).parents[2] / "docs" / "streaming.md"
TOPICS: dict[str, Any] = {"input_topic": "a", "output_topic": "b"}
SASL: dict[str, Any] = {
    "security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": "PLAIN", "sasl_username": "me",
}  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"bootstrap_servers": "no-port"}, "host:port"),
        ({"output_topic": "a"}, "must differ"),
        ({"dead_letter_topic": "b"}, "must differ"),
        ({"input_topic": "not a topic"}, "input_topic"),
        ({"security_protocol": "SASL_SSL"}, "sasl_mechanism"),
        ({"security_protocol": "SASL_SSL", "sasl_mechanism": "OAUTHBEARER"}, "sasl_token_file"),
        ({"max_recrods": 1}, "max_recrods"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(wrong: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        StreamConfig(**{**TOPICS, **wrong})


def test_dead_letters_have_a_topic_of_their_own() -> None:
    assert StreamConfig(**TOPICS).dead_letters == "a.dead-letter"


def test_passwords_come_from_the_environment_and_are_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = StreamConfig(**TOPICS, **SASL)
    with pytest.raises(ConfigError, match="PLINTH_KAFKA_PASSWORD"):
        config.client_options()
    monkeypatch.setenv("PLINTH_KAFKA_PASSWORD", "hunter2")
    assert "hunter2" in config.client_options().values()
    assert "hunter2" not in repr(config) + config.model_dump_json()


def test_a_token_is_read_anew_and_what_is_none_is_said_by_its_file(tmp_path: Path) -> None:
    path = tmp_path / "token"
    config = StreamConfig(
        **TOPICS, security_protocol="SASL_SSL", sasl_mechanism="OAUTHBEARER", sasl_token_file=path
    )
    for wrong in (None, "", "one two", "\u00e9", "x" * 70_000):
        if wrong is not None:
            path.write_text(wrong)
        with pytest.raises(ConfigError, match=r"token.*sasl_token_file"):
            config.client_options()
    payload = base64.urlsafe_b64encode(b'{"exp":1234.5}').decode().rstrip("=")
    path.write_text(f"a.{payload}.b\n")
    tokens = config.client_options()["sasl_oauth_token_provider"]
    assert tokens.with_end() == (f"a.{payload}.b", 1234.5)
    path.write_text("opaque")
    assert tokens.token() == "opaque"
    assert 0 < tokens.with_end()[1] - time.time() <= 300


@pytest.mark.skipif(find_spec("gssapi") is not None, reason="it is installed here")
def test_kerberos_says_what_it_needs() -> None:
    config = StreamConfig(**TOPICS, security_protocol="SASL_SSL", sasl_mechanism="GSSAPI")
    with pytest.raises(ConfigError, match="package gssapi"):
        config.client_options()


@pytest.mark.needs("confluent_kafka")
def test_kerberos_with_a_client_that_was_built_without_is_an_error() -> None:
    confluent = pytest.importorskip("plinth.pipelines.stream.confluent")
    if confluent.has_kerberos():
        pytest.skip("this build has it")
    config = StreamConfig(
        **TOPICS, security_protocol="SASL_SSL", sasl_mechanism="GSSAPI", client="confluent"
    )
    with pytest.raises(ConfigError, match="no GSSAPI"):
        chosen_client(config)


def test_every_setting_is_in_the_documentation_with_its_default() -> None:
    rows = re.findall(r"(?m)^\| (`[^|]+) \| ([^|]*) \|", PAGE.read_text())
    told = {name: default for names, default in rows for name in re.findall(r"`(\w+)`", names)}
    for name, field in StreamConfig.model_fields.items():
        assert name in told, f"docs/streaming.md does not explain {name}"
        default = field.default
        if isinstance(default, int | float) and not isinstance(default, bool) and default > 0:
            assert str(int(default)) in told[name].replace(",", ""), name
