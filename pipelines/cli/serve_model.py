"""``plinth serve-model``: a model over HTTP with a deadline, without writing a vertical."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plinth.pipelines.cli.convert import ArgumentsOption, CodeOption, table
from plinth.pipelines.console import say, show_json

if TYPE_CHECKING:
    from plinth.engine import Model
    from plinth.engine.models.convert import Options
    from plinth.pipelines.served_model import ServedModel

EPILOG = (
    "Example: plinth serve-model risk.onnx --deadline 50ms · plinth serve-model trees.txt "
    "--deadline 20ms · plinth serve-model store/risk/1.2 --features amount,age,country"
)
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(us|ms|s|)\s*")
_UNITS = {"us": 1e-3, "ms": 1.0, "": 1.0, "s": 1e3}
_BYTES_OF_A_NUMBER = 32  # as JSON, with what stands between


def serve_model(
    path: Annotated[
        Path,
        typer.Argument(
            help="A .pt2, .onnx or .safetensors file, LightGBM's .txt, XGBoost's .json or .ubj, a "
            "folder of Hugging Face, or one of a model store."
        ),
    ],
    name: Annotated[
        str | None, typer.Option(help="Name of model and route; default: the file's.")
    ] = None,
    deadline: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="The promise, such as 50ms or 2s; default: none."),
    ] = None,
    on_overload: Annotated[
        str, typer.Option(help="What would be late is: reject, or answered late.")
    ] = "reject",
    features: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="Names of a row's numbers, comma between; or a CSV file's header."
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port; 0 takes a free one.", show_default="8000")
    ] = None,
    example: Annotated[
        Path | None, typer.Option(help="Rows it takes: .npz with an array per input, or .npy.")
    ] = None,
    output: Annotated[
        list[str] | None, typer.Option(help="Keep this output; repeat it for several.")
    ] = None,
    code: CodeOption = None,
    arguments: ArgumentsOption = None,
    config_file: Annotated[Path | None, typer.Option("--config", "-c", help="TOML file.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what is served as JSON on stdout.")
    ] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let others ask without a key.")
    ] = False,
) -> None:
    """Serve one model over HTTP with a deadline: records by input or feature name, API docs."""
    from plinth.engine import Sla
    from plinth.engine.models.convert import Options
    from plinth.pipelines.assembly import running
    from plinth.pipelines.config.settings import load
    from plinth.pipelines.http import server as door
    from plinth.pipelines.served_model import served

    sla = Sla(deadline_ms=milliseconds(deadline), on_overload=on_overload)  # type: ignore[arg-type]
    options = Options(example=example, outputs=output, code=code, arguments=table(arguments))
    asked = {"serve.host": host, "serve.port": port, "serve.insecure": insecure or None}
    config = load(config_file, overrides=asked)
    config.check_access()
    named = feature_names(features) if features else ()
    bound = door.bind(config.serve.host, config.serve.port)
    with model_at(path, name, options) as (model, facts):
        own, missing = facts.get("features") or (), facts.get("missing") or ()
        vertical = served(model, name=name, sla=sla, features=named or own, missing=missing)
        most = max(config.serve.max_body_bytes, body_bytes(model))
        serve = config.serve.model_copy(update={"max_body_bytes": most})
        config = config.model_copy(update={"serve": serve})
        verticals = {vertical.name: vertical}
        with running(config, verticals, follow=True) as engine:
            server = door.Server(door.create_app(verticals, engine, config), config, bound)
            server.run(lambda: _tell(vertical, server.url, as_json))
    say("drained, good bye")


def _tell(vertical: ServedModel, url: str, as_json: bool) -> None:
    spec = vertical.model.spec
    route = f"/v1/{vertical.name}/{vertical.action}"
    if as_json:
        show_json(
            {
                "url": url,
                "route": route,
                "docs": f"{url}/docs",
                "model": spec.model_dump(mode="json", exclude_defaults=True),
                "features": list(vertical.features),
                "deadline_ms": vertical.sla.deadline_ms,
                "example": json.loads(vertical.example().model_dump_json()),
            }
        )
        sys.stdout.flush()
        return
    promise = vertical.sla.deadline_ms
    due = "without a deadline" if promise is None else f"due in {promise:g} ms"
    say(f"serving {spec.name} {spec.version} on {url} (POST {route}, {due}; API docs: {url}/docs)")


def milliseconds(text: str | None) -> float | None:
    """``"50ms"``, ``"2s"`` or ``"50"`` as milliseconds.

    Raises:
        ConfigError: no such time.
    """
    from plinth.engine import ConfigError

    if text is None:
        return None
    match = _DURATION.fullmatch(text)
    value = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not 0 < value < 86_400_000:
        raise ConfigError(
            f"--deadline {text!r} is no time above 0 and below a day", hint="such as 50ms or 2s"
        )
    return value


def feature_names(text: str) -> list[str]:
    """Names from ``a,b,c``, or from the header of a CSV file.

    Raises:
        ConfigError: a name is empty.
    """
    from plinth.engine import ConfigError

    path = Path(text)
    line = text
    if "," not in text and path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            line = file.readline(1 << 20)
    names = [name.strip() for name in next(csv.reader([line]), [])]
    if not names or "" in names:
        raise ConfigError(
            f"--features {text!r} has an empty name", hint="names with commas between: amount,age"
        )
    return names


@contextlib.contextmanager
def model_at(
    path: Path, name: str | None, options: Options
) -> Iterator[tuple[Model, dict[str, Any]]]:
    """The model at a path and what is known of its features, while what it was made into is kept.

    ``features`` are their names, unless it is an entry of a store; ``missing`` the places of those
    that may be missing.

    Raises:
        ModelError: it is missing, damaged, or of no kind that can be served; nothing is unpickled.
    """
    from plinth.engine import ModelStore
    from plinth.engine.models.convert import convert

    entry = store_entry(path)
    if entry is not None:
        root, model, version = entry
        store = ModelStore(root)
        yield store.load(model, version), {"missing": store.report(model, version).get("missing")}
        return
    with tempfile.TemporaryDirectory(prefix="plinth-serve-model-") as folder:
        store = ModelStore(Path(folder))
        found = convert(path, store, name=name or model_name(path), options=options)
        known = {key: found.report.get(key) for key in ("features", "missing")}
        yield store.load(found.spec.name, found.spec.version), known


def store_entry(path: Path) -> tuple[Path, str, str | None] | None:
    """Root, name and version of an entry of a store, or ``None`` when the path is none.

    Args:
        path: the folder of a version, of a model (then the newest version), or a file in it.
    """
    here = path.resolve()
    if here.is_file() and (here.parent / "manifest.json").is_file():
        here = here.parent
    if (here / "manifest.json").is_file():
        return here.parent.parent, here.parent.name, here.name
    if here.is_dir() and any(here.glob("[!.]*/manifest.json")):
        return here.parent, here.name, None
    return None


def model_name(path: Path) -> str:
    """A name that a model can have, from the file's."""
    found = re.sub(r"[^a-z0-9._-]+", "-", path.resolve().stem.lower()).strip("._-")
    return found[:64] or "model"


def body_bytes(model: Model) -> int:
    """Bytes that one record of the model may need as JSON; free sizes count nothing."""
    from math import prod

    numbers = sum(prod(size or 1 for size in tensor.shape) for tensor in model.spec.inputs)
    return numbers * _BYTES_OF_A_NUMBER + 1024
