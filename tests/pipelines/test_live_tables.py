"""Tables in files of their own: read at the start, read again when they change, never half."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
from serving import running, settle, until

from plinth.engine import ConfigError
from plinth.engine.metrics import REGISTRY
from plinth.pipelines.assembly import load_vertical
from plinth.pipelines.config.settings import load
from plinth.pipelines.live.tables import LiveTables
from plinth.verticals import registry

RULE = '[[rule]]\ncode = "B1"\ntext = "A limit"\nwhen = "amount > {}"\naction = "decline"\n'


def write(path: Path, text: str) -> None:
    """Put a whole file in its place, as editors and deployments do."""
    part = path.with_suffix(".part")
    part.write_text(text)
    settle(part)
    part.replace(path)


def config_with(folder: Path, rules: str) -> Any:
    (folder / "rules.toml").write_text(rules)
    (folder / "plinth.toml").write_text('[verticals.finance]\nrules = "rules.toml"\n')
    return load(folder / "plinth.toml", env={})


def reloads(outcome: str) -> float:
    labels = {"vertical": "finance", "outcome": outcome}
    return REGISTRY.get_sample_value("plinth_settings_reloads_total", labels) or 0.0


def test_a_changed_file_takes_over_and_a_wrong_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_with(tmp_path, RULE.format(10))
    vertical: Any = load_vertical(config, "finance")
    live = LiveTables(config, {"finance": vertical})
    first, before = vertical.rules.version, (reloads("taken"), reloads("wrong"))
    live.look()
    assert vertical.rules.version == first, "nothing has changed"
    write(tmp_path / "rules.toml", RULE.format(20))
    live.look()
    second = vertical.rules.version
    assert second != first
    for wrong, said in (
        (RULE.format("amonut"), "did you mean amount"),
        ("[[rule]\n", "rules.toml"),
        ('rule = "all"\n', "rules.toml: rule"),
        ("\xff", "rules.toml"),
        ("", "rules.toml is empty"),
        ('[lists]\nbad = ["t1"]\n', "rule: Field required"),
        ("x = " + "[" * 50_000, "too many lists"),
        ("x = " + "1" * 5_000, "rules.toml"),
        (RULE.format("(" * 3_000 + "1" + ")" * 3_000), "rule 1 (B1), when"),
        (RULE.format("1 and amount > " * 30_000 + "1"), "rule 1 (B1), when"),
        (RULE.format("-" * 30_000 + "1"), "rule 1 (B1), when"),
    ):
        caplog.clear()
        with caplog.at_level(logging.ERROR):
            write(tmp_path / "rules.toml", wrong)
            live.look()
            live.look()
        assert vertical.rules.version == second
        assert len(caplog.records) == 1, "it is said once"
        assert said in caplog.text
    (tmp_path / "rules.toml").unlink()
    live.look()
    assert vertical.rules.version == second, "rules do not end with their file"
    for make in (Path.mkdir, os.mkfifo, lambda path: path.symlink_to(tmp_path)):
        caplog.clear()
        make(tmp_path / "rules.toml")
        settle(tmp_path / "rules.toml")
        live.look()
        assert vertical.rules.version == second
        assert "rules.toml" in caplog.text
        (tmp_path / "rules.toml").rename(tmp_path / str(make))
        live.look()
    write(tmp_path / "rules.toml", RULE.format(10))
    live.look()
    assert vertical.rules.version == first
    assert (reloads("taken") - before[0], reloads("wrong") - before[1]) == (2, 18)


def test_a_file_that_is_being_written_is_read_when_that_is_over(tmp_path: Path) -> None:
    config = config_with(tmp_path, RULE.format(10))
    vertical: Any = load_vertical(config, "finance")
    live = LiveTables(config, {"finance": vertical})
    first, wrong = vertical.rules.version, reloads("wrong")
    (tmp_path / "rules.toml").write_text("")  # as an editor leaves it for a moment
    live.look()
    assert vertical.rules.version == first
    (tmp_path / "rules.toml").write_text(RULE.format(20))
    settle(tmp_path / "rules.toml")
    live.look()
    assert vertical.rules.version != first
    assert reloads("wrong") == wrong


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ("rule = 5", "rules.toml: rule: "),
        (RULE.format("'x'"), "rule 1 (B1), when: at character 10: expected a number"),
        (RULE.format(1) * 2, "rule 2: the code B1 is there twice"),
        ("[[rule", "rules.toml: "),
    ],
)
def test_a_wrong_file_stops_the_start_with_its_name(tmp_path: Path, rules: str, said: str) -> None:
    config = config_with(tmp_path, rules)
    with pytest.raises(ConfigError) as caught:
        load_vertical(config, "finance")
    assert said in caught.value.message
    (tmp_path / "rules.toml").unlink()
    with pytest.raises(ConfigError, match=r"cannot read .*rules.toml: No such file"):
        load_vertical(config, "finance")


def test_a_running_server_decides_by_the_rules_of_the_file_as_it_is_now(tmp_path: Path) -> None:
    file = tmp_path / "rules.toml"
    file.write_text(RULE.format(1000))
    table = {"rules": str(file)}
    config = {"finance": {**table}}
    from plinth.pipelines.config.settings import Config

    vertical = load_vertical(Config.model_validate({"verticals": config}), "finance")
    payment = vertical.example().model_dump(mode="json")
    with running({"finance": vertical}, verticals=config) as server:

        def decided() -> str:
            answer: str = server.post("/v1/finance/score", json=payment).json()["decision"]
            return answer

        assert decided() != "decline"
        write(file, RULE.format(1))
        until(lambda: decided() == "decline")


def test_a_table_in_the_config_needs_no_file(tmp_path: Path) -> None:
    (tmp_path / "plinth.toml").write_text(
        RULE.format(5).replace("[[rule]]", "[[verticals.finance.rules.rule]]")
    )
    vertical: Any = load_vertical(load(tmp_path / "plinth.toml", env={}), "finance")
    assert [rule.code for rule in vertical.rules.rules] == ["B1"]
    assert registry.load("finance").tally().figures()["payments"] == 0
