"""Which verticals are there: plug-ins on the path are found, checked and described."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from plinth.engine import ConfigError
from plinth.verticals import registry

ROOT = Path(__file__).resolve().parents[2]
GOOD = """
from pydantic import BaseModel, Field
from plinth.verticals import Settings, Vertical

class Limits(Settings):
    upper: float = 1.0

class WordSettings(Settings):
    language: str = "en"
    limits: Limits = Limits()

class Word(BaseModel):
    text: str

class Words(Vertical[Word, Word]):
    name = "words"
    summary = "Counts words."
    request = Word
    response = Word
    settings_type = WordSettings
    def models(self): return []
    def example(self): return Word(text="a")
    def infer(self, requests): return list(requests)
    def encode(self, result): return b"{}"
"""
Plant = Callable[..., None]


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Puts a distribution on the path: module text and an entry point."""

    def put(
        source: str, *, name: str = "words", distribution: str = "plinth-words", attr: str = "Words"
    ) -> None:
        module = f"planted_{distribution.replace('-', '_')}"
        info = tmp_path / f"{distribution.replace('-', '_')}-2.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 2.1\nProvides-Extra: words\n"
        )
        (info / "entry_points.txt").write_text(f"[plinth.verticals]\n{name} = {module}:{attr}\n")
        (tmp_path / f"{module}.py").write_text(source)
        monkeypatch.delitem(sys.modules, module, raising=False)

    monkeypatch.syspath_prepend(tmp_path)
    return put


def listed(name: str) -> registry.Listing:
    (found,) = [listing for listing in registry.describe() if listing.name == name]
    return found


def refusal(name: str, settings: dict[str, object] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        registry.load(name, settings)
    return str(caught.value)


def test_a_plug_in_stands_beside_the_built_in_ones(plant: Plant) -> None:
    plant(GOOD)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    built_in = project.get("entry-points", {}).get("plinth.verticals", {})
    assert {*built_in, "words"} <= set(registry.names())
    assert listed("words") == registry.Listing("words", "Counts words.", "plinth-words", "2.1")
    assert all(listed(name).distribution == "plinth-engine" for name in built_in)


def test_names_imports_nothing(plant: Plant) -> None:
    plant("raise RuntimeError('imported too early')")
    assert "words" in registry.names()


def test_load_gives_an_instance_with_its_settings(plant: Plant) -> None:
    plant(GOOD)
    assert registry.load("words").settings.model_dump()["language"] == "en"
    vertical = registry.load("words", {"language": "de", "limits": {"upper": 2}})
    assert vertical.settings.model_dump() == {"language": "de", "limits": {"upper": 2.0}}
    assert registry.load("words", vertical.settings).settings is vertical.settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"languge": "de"}, "languge: unknown key, did you mean 'language'?"),
        ({"limits": {"uper": 2}}, "limits.uper: unknown key, did you mean 'upper'?"),
        ({"limits": {"upper": "much"}}, "limits.upper: Input should be a valid number"),
        ({"zzz": 1}, "zzz: unknown key (known keys: language, limits)"),
    ],
)
def test_wrong_settings_are_refused_by_name(
    plant: Plant, settings: dict[str, object], said: str
) -> None:
    plant(GOOD)
    message = refusal("words", settings)
    assert message.startswith("[verticals.words] ")
    assert said in message
    assert "much" not in message


def test_settings_of_another_vertical_are_refused(plant: Plant) -> None:
    from plinth.verticals import Settings

    class Other(Settings):
        pass

    plant(GOOD)
    with pytest.raises(ConfigError, match="takes WordSettings, not Other"):
        registry.load("words", Other())


def test_an_unknown_name_is_answered_with_what_is_installed(plant: Plant) -> None:
    plant(GOOD)
    message = refusal("wrods")
    assert "no vertical named 'wrods', did you mean 'words'?" in message
    assert f"installed: {', '.join(registry.names())}" in message
    assert "pip install" in message


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import no_such_module", "needs the module 'no_such_module', which is not installed"),
        ("1 / 0", "ZeroDivisionError"),
        ("def broken(:", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("", "AttributeError"),
        ("Words = 7", "is not a subclass of verticals.Vertical"),
        (GOOD.replace('name = "words"', 'name = "woods"'), "calls itself 'woods'"),
        (GOOD.replace('summary = "Counts words."', ""), "no class attribute 'summary'"),
        (GOOD.replace("def example(self)", "def sample(self)"), "does not define example"),
    ],
)
def test_a_broken_plug_in_is_listed_with_its_reason_and_stops_nobody(
    plant: Plant, source: str, why: str
) -> None:
    plant(source)
    plant(GOOD.replace('name = "words"', 'name = "fine"'), name="fine", distribution="plinth-fine")
    error = listed("words").error
    assert error is not None
    assert why in error
    assert "plinth-words 2.1" in error
    assert listed("words").distribution == "plinth-words"
    assert listed("fine").error is None
    assert registry.load("fine").name == "fine"


def test_a_missing_dependency_names_the_extra_that_brings_it(plant: Plant) -> None:
    plant("import no_such_module")
    assert "pip install 'plinth-words[words]'" in refusal("words")


def test_two_distributions_may_not_bring_one_name(plant: Plant) -> None:
    plant(GOOD)
    plant(GOOD, distribution="plinth-vocabulary")
    message = refusal("words")
    assert "plinth-vocabulary 2.1 and plinth-words 2.1" in message
    errors = [listing.error for listing in registry.describe() if listing.name == "words"]
    assert len(errors) == 2
    assert all(error and "two distributions" in error for error in errors)


def test_a_plug_in_that_fails_to_start_says_whose_fault_it_is(plant: Plant) -> None:
    plant(GOOD + "\n    def __init__(self, settings=None): raise KeyError('weights')")
    message = refusal("words")
    assert "'words' could not start: KeyError: 'weights'" in message
    assert "tell its author" in message
