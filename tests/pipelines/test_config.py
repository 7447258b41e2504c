"""One TOML file: what is taken, what is refused and how the refusal reads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic.fields import FieldInfo
from tiny_verticals import Tiny, install

from plinth.engine import ConfigError, Sla
from plinth.pipelines.assembly import sla_of
from plinth.pipelines.config.settings import (
    AdminConfig,
    BatchConfig,
    ClusterConfig,
    EngineConfig,
    GrpcConfig,
    ModelsConfig,
    OidcConfig,
    OipConfig,
    ServeConfig,
    SlaConfig,
    TlsConfig,
    UploadConfig,
    VerticalConfig,
    load,
    parse_bytes,
)
from plinth.pipelines.config.source import validated

Write = Callable[[str], Path]


@pytest.fixture(autouse=True)
def tiny_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config may only name verticals that are installed."""
    install(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "plinth.toml"
        path.write_text(text)
        return path

    return write


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, **{"env": {}, **options})
    return str(caught.value)


def test_without_a_file_everything_has_a_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load(env={})
    assert (config.serve.host, config.serve.port) == ("127.0.0.1", 8000)
    assert config.engine.device == "auto"
    assert config.stream is None


def test_a_whole_file(write: Write) -> None:
    config = load(
        write(
            """
            [engine]
            device = "cpu"
            memory_budget = "2GiB"
            [engine.precision]
            conv = "bf16"
            [serve]
            port = 9000
            max_body_bytes = "64 KiB"
            [serve.upload]
            max_files = 12
            [stream]
            input_topic = "in"
            output_topic = "out"
            [batch]
            workers = 2
            [models]
            store = "/models"
            [verticals.tiny]
            offset = 1.5
            batch_range = [1, 64]
            sla = { deadline_ms = 25, on_overload = "late" }
            """
        ),
        env={},
    )
    assert config.engine.memory_budget == 2 << 30
    assert config.engine.precision == {"conv": "bf16"}
    assert config.serve.max_body_bytes == 65536
    assert config.serve.upload.max_files == 12
    assert config.stream is not None
    assert config.stream.dead_letters == "in.dead-letter"
    assert config.vertical("tiny").settings == {"offset": 1.5}
    assert config.vertical("tiny").batch_range == (1, 64)
    assert sla_of(Tiny(), config) == Sla(deadline_ms=25, on_overload="late")
    assert config.vertical("absent").settings == {}


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("[serve]\nprot = 1", 2, "unknown key serve.prot; did you mean 'port'?"),
        ("\n\n[sevre]\nport = 1", 3, "unknown key sevre; did you mean 'serve'?"),
        ("[serve.upload]\nmax_file = 1", 2, "unknown key serve.upload.max_file; did you mean"),
        ("[stream]\ninput_topic='a'\noutput_topic='b'\ngruop='c'", 4, "did you mean 'group'?"),
        ("[verticals.tiny.sla]\ndeadline = 5", 2, "did you mean 'deadline_ms'?"),
        ("[engine]\nzzz = 1", 2, "use one of backend, compute_seconds"),
        ("[serve]\nhost = 'x'\nport = 99999", 3, "serve.port: Input should be less than"),
        ("[serve]\nmax_body_bytes = '3 apples'", 2, "expected bytes, such as"),
        ("[batch]\nworkers = 0", 2, "batch.workers: Input should be greater than"),
        ("[engine]\npipeline_depth = 17", 2, "engine.pipeline_depth: Input should be less than"),
        ("[engine]\ngraphs = 'always'", 2, "engine.graphs: Input should be a valid boolean"),
    ],
)
def test_a_mistake_is_named_with_its_line(write: Write, text: str, line: int, said: str) -> None:
    path = write(text)
    message = refusal(path)
    assert message.startswith(f"{path}:{line}: ")
    assert said in message


def test_every_mistake_is_told_at_once(write: Write) -> None:
    message = refusal(write("[serve]\nprot = 1\nhsot = 'a'\n[batch]\nworkers = 0"))
    assert len(message.splitlines()) == 3


def test_settings_of_a_vertical_are_named_with_their_line(write: Write) -> None:
    path = write("[verticals.tiny]\nofset = 2")
    config = load(path, env={})
    with pytest.raises(ConfigError, match=r":2: unknown key verticals\.tiny\.ofset.*mean 'offset'"):
        validated(
            Tiny.settings_type,
            config.vertical("tiny").settings,
            ("verticals", "tiny"),
            config.origin,
        )


def test_a_promise_without_sense_is_named_with_its_line(write: Write) -> None:
    config = load(write("[verticals.tiny.sla]\ndeadline_ms = -1"), env={})
    with pytest.raises(ConfigError, match=r"plinth.toml:1: Sla.deadline_ms is -1"):
        sla_of(Tiny(), config)


def test_broken_toml_names_the_place(write: Write) -> None:
    assert re.search(r"plinth\.toml: .*line 2", refusal(write("[serve]\nport = = 1")))


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    assert "there is no config file" in refusal(tmp_path / "absent.toml")


def test_environment_beats_the_file_and_the_command_line_beats_both(write: Write) -> None:
    path = write("[serve]\nport = 1\nhost = '0.0.0.0'\nmax_items = 7")
    env = {"PLINTH_SERVE__PORT": "2", "PLINTH_SERVE__HOST": "::1", "HOME": "/"}
    config = load(path, env=env, overrides={"serve.port": 3, "serve.host": None})
    assert (config.serve.port, config.serve.host, config.serve.max_items) == (3, "::1", 7)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[verticals.fiance]", r":1: no vertical named 'fiance', did you mean 'finance'\?"),
        ("[verticals.finance]\n[verticals.mediacl.sla]\nweight = 1", r":2: .*mean 'medical'"),
        ("[batch]\nvertical = 'shelv'", r":2: no vertical named 'shelv', did you mean 'shelf'"),
    ],
)
def test_a_vertical_nobody_installed_stops_every_command(
    write: Write, text: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        load(write(text), env={})


def test_an_unknown_vertical_in_the_environment_is_named_with_its_variable() -> None:
    with pytest.raises(ConfigError, match=r"PLINTH_VERTICALS__FIANCE__SLA__WEIGHT: no vertical"):
        load(env={"PLINTH_VERTICALS__FIANCE__SLA__WEIGHT": "2"})


def test_environment_reaches_nested_tables_and_verticals() -> None:
    env = {
        "PLINTH_SERVE__UPLOAD__MAX_FILES": "5",
        "PLINTH_VERTICALS__TINY__OFFSET": "2.5",
        "PLINTH_ENGINE__MEMORY_BUDGET": "1GiB",
    }
    config = load(env=env)
    assert config.serve.upload.max_files == 5
    assert config.vertical("tiny").settings == {"offset": 2.5}
    assert config.engine.memory_budget == 1 << 30


def test_a_wrong_variable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^PLINTH_SERVE__PROT: unknown key .*mean 'port'"):
        load(env={"PLINTH_SERVE__PROT": "1"})
    with pytest.raises(ConfigError, match=r"^PLINTH_SERVE__PORT: serve.port: "):
        load(env={"PLINTH_SERVE__PORT": "many"})


def test_the_file_may_be_named_by_the_environment(write: Write) -> None:
    path = write("[serve]\nport = 4242")
    assert load(env={"PLINTH_CONFIG": str(path)}).serve.port == 4242


def test_the_api_key_stays_in_the_environment(write: Write) -> None:
    config = load(write("[serve]\napi_key_env = 'MY_KEY'"), env={})
    assert config.api_key({"MY_KEY": " secret "}) == "secret"
    with pytest.raises(ConfigError, match=r":2: .*MY_KEY, which is not set"):
        config.api_key({})


def test_a_config_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(env={}).serve.port = 1  # type: ignore[misc]


TABLES = {
    "engine": EngineConfig,
    "cluster": ClusterConfig,
    "serve": ServeConfig,
    "serve.upload": UploadConfig,
    "serve.oip": OipConfig,
    "serve.grpc": GrpcConfig,
    "serve.tls": TlsConfig,
    "serve.oidc": OidcConfig,
    "serve.admin": AdminConfig,
    "batch": BatchConfig,
    "models": ModelsConfig,
    "verticals.<name>": VerticalConfig,
    "verticals.<name>.sla": SlaConfig,
}


@pytest.mark.parametrize("name", TABLES)
def test_the_handbook_has_every_key_with_its_default(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    section = page.partition(f"`[{name}]`\n")[2].partition("\n#")[0]
    rows = [_row(key, field) for key, field in TABLES[name].model_fields.items()]
    expected = "\n".join(row for row in rows if row)
    assert expected in section, f"docs/configuration.md should have:\n{expected}"


def _row(key: str, field: FieldInfo) -> str:
    if field.description is None:  # a table of its own, or a vertical's settings
        return ""
    value = field.default
    if isinstance(value, bool):
        shown = f"`{str(value).lower()}`"
    elif value is None:
        shown = "none"
    elif any(getattr(part, "func", None) is parse_bytes for part in field.metadata):
        shown = f"`{json.dumps(_size(value))}`"
    else:
        shown = f"`{json.dumps(value)}`"
    return f"| `{key}` | {shown} | {field.description} |"


def _size(count: int) -> str:
    power = (count.bit_length() - 1) // 10
    return f"{count >> 10 * power}{('', 'KiB', 'MiB', 'GiB')[power]}"
