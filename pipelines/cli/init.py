"""``plinth init``: a config file with every table and key, each with its meaning and default."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from plinth.pipelines.console import say, written_anew

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

EPILOG = "Example: plinth init · plinth init --out deploy/plinth.toml"
HEAD = """\
# The config file of Plinth, with every key at its default: take away the # before a key to change
# it, and before the [name] of its table where there is one. `plinth check` says what would run.
"""
_LINK = re.compile(r" \(\[[^]]*\]\([^)]*\)\)")  # to a page of the documentation


def init(
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")] = Path("plinth.toml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a commented plinth.toml that starts as it is."""
    with written_anew(out, if_there="--force replaces it"):
        text = commented_config()
        with out.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    say(f"wrote {out}; next: plinth check --config {out}")


def commented_config() -> str:
    """The text of the file: the doors' own tables, then those of every installed vertical."""
    from plinth.pipelines.config.settings import Config, SlaConfig, VerticalConfig
    from plinth.verticals import registry

    lines = [HEAD]
    for name, field in Config.model_fields.items():
        if name != "verticals":
            lines += _table(name, _model(field.annotation), optional=field.default is None)
    for listing in registry.describe():
        if listing.error is None:
            where = f"verticals.{listing.name}"
            settings = registry.find(listing.name).settings_type
            lines += _table(where, settings, optional=True, about=listing.summary)
            lines.pop()  # one more key belongs to the table
            lines += _key("batch_range", VerticalConfig.model_fields["batch_range"])
            lines += ["", *_table(f"{where}.sla", SlaConfig, optional=True)]
    return "\n".join(lines).rstrip() + "\n"


def _table(
    name: str, kind: type[BaseModel] | None, *, optional: bool, about: str | None = None
) -> Iterator[str]:
    """The lines of a table and of those in it."""
    assert kind is not None
    inner: list[tuple[str, type[BaseModel]]] = []
    said = about or (kind.__doc__ or "").strip().partition("\n")[0]
    said = said.rpartition("``: ")[2] if said.startswith("``[") else said
    yield f"# {said[:1].upper()}{said[1:]}"
    yield f"# [{name}]" if optional else f"[{name}]"
    for key, field in kind.model_fields.items():
        if (below := _model(field.annotation)) is not None and not optional:
            inner.append((key, below))
        else:
            yield from _key(field.alias or key, field)
    yield ""
    for key, below in inner:
        yield from _table(f"{name}.{key}", below, optional=optional)


def _key(name: str, field: FieldInfo) -> Iterator[str]:
    meaning = _LINK.sub("", " ".join((field.description or "").split()))
    if field.is_required():
        yield f"# {name} =  # needed{': ' + meaning if meaning else ''}"
        return
    default = field.get_default(call_default_factory=True)
    value = _toml(default)
    text = f"# {name} = {value}" if value is not None else f"# {name} =  # not set"
    if meaning:
        text += f"  # {meaning}" if value is not None else f"; {meaning}"
    yield text


def _toml(value: Any) -> str | None:
    """A default as TOML, or ``None`` where TOML has no such value."""
    if isinstance(value, bool | int | float | str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, tuple | list) and all(isinstance(one, str) for one in value):
        return json.dumps(list(value), ensure_ascii=False)
    return None


def _model(annotation: Any) -> type[BaseModel] | None:
    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for one in get_args(annotation) if (found := _model(one))), None)
