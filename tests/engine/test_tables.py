"""Tables that people write: what is no number stands for none."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, Field, ValidationError

from plinth.engine import ConfigError
from plinth.engine.tables import Table
from plinth.pipelines.config.settings import Config, load
from plinth.pipelines.formats.mapping import MappingFile
from plinth.pipelines.live.tables import settings_of
from plinth.verticals.finance.decisions.rules import RuleBook
from plinth.verticals.finance.features.language import Declaration
from plinth.verticals.finance.settings import FraudSettings
from plinth.verticals.medical.networks.recipe import Recipe


class Inner(Table):
    share: float = 0.5


class Outer(Table):
    number: int | None = None
    several: tuple[float, ...] = ()
    named: dict[str, float] = Field(default_factory=dict)
    either: bool | float = False
    inner: Inner = Inner()
    free: dict[str, Any] = Field(default_factory=dict)


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"number": True}, "number"),
        ({"several": [0.5, False]}, "several.1"),
        ({"named": {"a": True}}, "named.a"),
        ({"inner": {"share": True}}, "inner.share"),
        ({"inner": {"share": float("nan")}}, "inner.share"),
        ({"several": [float("inf")]}, "several.0"),
        ({"numbr": 1}, "numbr"),
    ],
)
def test_true_is_no_number_nor_is_nan(given: dict[str, Any], where: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Outer.model_validate(given)
    (problem,) = refused.value.errors()
    assert ".".join(map(str, problem["loc"])) == where


def test_true_is_true_where_it_may_be() -> None:
    made = Outer.model_validate({"either": True, "free": {"yes": True}, "number": 3})
    assert (made.either, made.free, made.number) == (True, {"yes": True}, 3)


def tables(kind: type[BaseModel], known: set[type[BaseModel]]) -> set[type[BaseModel]]:
    """All models that the schema of one is made of."""
    for found in _models([field.annotation for field in kind.model_fields.values()]):
        if found not in known:
            known.add(found)
            tables(found, known)
    return known


def _models(annotations: list[Any]) -> list[type[BaseModel]]:
    found = []
    for one in annotations:
        if isinstance(one, type) and issubclass(one, BaseModel):
            found.append(one)
        found += _models(list(get_args(one)))
    return found


@pytest.mark.parametrize(
    "kind", [Config, FraudSettings, RuleBook, Declaration, MappingFile, Recipe], ids=str
)
def test_whatever_people_write_is_such_a_table(kind: type[BaseModel]) -> None:
    every = tables(kind, {kind})
    assert [one.__name__ for one in every if not issubclass(one, Table)] == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("verticals.finance.review_threshold", "true"),
        ("verticals.finance.promotion.min_frauds", "true"),
        ("verticals.finance.rates.EUR", "true"),
        ("verticals.finance.max_ahead_seconds", "nan"),
        ("verticals.finance.sla.deadline_ms", "true"),
        ("stream.max_records", "true"),
        ("serve.port", "false"),
        ("serve.upload.max_ratio", "inf"),
        ("engine.memory_budget", "true"),
    ],
)
def test_a_config_with_a_word_for_a_number_is_refused_by_its_key(
    key: str, value: str, tmp_path: Path
) -> None:
    file, (table, _, name) = tmp_path / "plinth.toml", key.rpartition(".")
    topics = 'input_topic = "a"\noutput_topic = "b"\n' if table == "stream" else ""
    file.write_text(f"[{table}]\n{name} = {value}\n{topics}")
    with pytest.raises(ConfigError, match=rf"plinth.toml:2: {key}: .*(number|finite)"):
        settings_of(load(file), "finance", FraudSettings)
