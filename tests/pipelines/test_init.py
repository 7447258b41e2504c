"""``plinth init``: the file starts as it is and leaves no table or key out."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from plinth.pipelines.cli.init import commented_config
from plinth.pipelines.cli.main import main
from plinth.pipelines.config.settings import Config, SlaConfig, load
from plinth.pipelines.stream.settings import StreamConfig
from plinth.verticals import registry


def uncommented(text: str) -> str:
    """Every key that has a default, and the tables that stand without a comment."""
    kept = []
    for line in text.splitlines():
        if re.match(r"# \[", line):
            break
        if re.match(r"# \w+ = (?! # )", line):
            line = line.removeprefix("# ")
        kept.append(line)
    return "\n".join(kept)


def test_the_file_starts_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words, code in ((["init"], 0), (["check"], 0), (["init"], 2), (["init", "--force"], 0)):
        with pytest.raises(SystemExit) as ended:
            main(words)
        said = capsys.readouterr().err
        assert ended.value.code == code, said
    assert load(tmp_path / "plinth.toml", env={}).model_dump() == Config().model_dump()


def test_what_it_gives_as_a_default_is_the_default(tmp_path: Path) -> None:
    text = uncommented(commented_config())
    file = tmp_path / "plinth.toml"
    file.write_text(text)
    assert load(file, env={}).model_dump() == Config().model_dump()
    assert tomllib.loads(text)["serve"]["port"] == 8000


def test_no_table_and_no_key_is_left_out() -> None:
    text = commented_config()
    tables = set(re.findall(r"(?m)^(?:# )?\[([\w.]+)\]$", text))
    inner = {f"serve.{name}" for name in ("upload", "oip", "grpc", "tls", "oidc", "admin")}
    wanted = {"engine", "cluster", "serve", "stream", "batch", "models"} | inner
    assert wanted == set(Config.model_fields) - {"verticals"} | inner
    for listing in registry.describe():
        if listing.error is None:
            wanted |= {f"verticals.{listing.name}", f"verticals.{listing.name}.sla"}
    assert tables == wanted
    keys = set(re.findall(r"(?m)^# (\w+) =", text))
    for name, field in Config.model_fields.items():
        kind = StreamConfig if name == "stream" else field.annotation
        if name != "verticals":
            own = set(getattr(kind, "model_fields", {}))
            assert own - {table.removeprefix("serve.") for table in inner} <= keys
    assert set(SlaConfig.model_fields) | {"batch_range"} <= keys
