"""``plinth models``: what is in the model store."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plinth.pipelines.console import FAILED, say, show_error, show_json, show_table

if TYPE_CHECKING:
    from plinth.engine import ModelSpec, ModelStore

models = typer.Typer(
    help="List, show and verify the models in the store.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

StoreOption = Annotated[
    Path | None,
    typer.Option(
        "--store", help="Folder of the store; default: models.store, then PLINTH_MODEL_STORE."
    ),
]
ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="TOML file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for scripts.")]
VersionOption = Annotated[str | None, typer.Option(help="Version; default: the newest.")]


@models.command("list", epilog="Example: plinth models list --json")
def list_models(
    store: StoreOption = None, config: ConfigOption = None, as_json: JsonOption = False
) -> None:
    """List every model and version."""
    target = store_of(store, config)
    specs = target.list()
    if as_json:
        show_json([spec.model_dump(mode="json") for spec in specs])
        return
    rows = [(s.name, s.version, s.licence or "", s.description) for s in specs]
    show_table(f"Models in {target.root}", ("name", "version", "licence", "description"), rows)


@models.command(epilog="Example: plinth models show fraud")
def show(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    version: VersionOption = None,
    store: StoreOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one model: inputs, outputs, licence, metrics, source, sizes, variants with evidence."""
    target = store_of(store, config)
    spec = _find(target, name, version)
    facts = spec.model_dump(mode="json")
    if report := target.report(spec.name, spec.version):
        facts["converted"] = report
    facts["bytes"] = target.size(spec.name, spec.version)
    facts["memory_bytes"] = target.memory(spec.name, spec.version)
    variants = _variant_facts(target, spec)
    if as_json:
        show_json(facts | {"variants": variants})
        return
    rows = [(key, _cell(value)) for key, value in facts.items() if value]
    show_table(f"{spec.name} {spec.version}", ("field", "value"), rows)
    if variants:
        lines = [_variant_cells(one) for one in variants]
        columns = (
            *("variant", "compression", "kB on disk", "MB in memory", "x fp32", "loss"),
            "measured on",
        )
        show_table("Variants", columns, lines)


def _variant_facts(store: ModelStore, spec: ModelSpec) -> list[dict[str, Any]]:
    variants = store.variants(spec.name, spec.version)
    return [
        {
            **variant.model_dump(mode="json", exclude={"reference"}),
            "default": variant.name == variants.default,
            "bytes": variant.bytes,
        }
        for variant in variants.list()
    ]


def _variant_cells(one: dict[str, Any]) -> tuple[str, ...]:
    found = one["evidence"]
    return (
        one["name"] + (" (default)" if one["default"] else ""),
        one["compression"] or "",
        f"{one['bytes'] / 1e3:.1f}" if one["bytes"] else "the reference's",
        f"{found['memory'] / 1e6:.1f} of {found['reference_memory'] / 1e6:.1f}",
        f"{found['speed']:.2f}",
        f"{found['loss']:.2g} {found['metric']}",
        f"{found['held_out']} rows of {found['data']}, {found['machine']}",
    )


@models.command("cache", epilog="Example: PLINTH_CACHE_MB=5000 plinth models cache")
def show_cache(as_json: JsonOption = False) -> None:
    """Show what the cache of compiled models holds, after bringing it within its bound."""
    from plinth.engine.cache import KINDS, cache_bound, cache_root, entries, keep_bound

    gone, held = keep_bound(), entries()
    kinds = {kind: [entry.bytes for entry in held if entry.kind == kind] for kind in KINDS}
    if as_json:
        told = {kind: {"entries": len(found), "bytes": sum(found)} for kind, found in kinds.items()}
        facts = {"folder": str(cache_root()), "bound_bytes": cache_bound(), "let_go_bytes": gone}
        show_json(facts | {"bytes": sum(entry.bytes for entry in held), "kinds": told})
        return
    rows = [(k, str(len(found)), f"{sum(found) / 1e6:.1f}") for k, found in kinds.items() if found]
    total = sum(entry.bytes for entry in held)
    rows.append(("all", str(len(held)), f"{total / 1e6:.1f} of {cache_bound() / 1e6:.0f}"))
    show_table(f"Cache in {cache_root()}", ("kind", "entries", "MB"), rows)


@models.command("families", epilog="Example: plinth models families --json")
def list_families(as_json: JsonOption = False) -> None:
    """List the model families that are built from a config, with their settings."""
    from plinth.engine.models.families import families

    found = [{"name": f.name, "summary": f.summary, "settings": f.defaults()} for f in families()]
    if as_json:
        show_json(found)
        return
    rows = [(f["name"], f["summary"], ", ".join(f["settings"])) for f in found]
    show_table("Model families", ("name", "what it is for", "settings"), rows)


@models.command(epilog="Example: plinth models verify")
def verify(
    name: Annotated[str | None, typer.Argument(help="Name; default: all.")] = None,
    version: VersionOption = None,
    store: StoreOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check the files of models against the checksums in their manifests."""
    from plinth.engine.errors import ModelError

    target = store_of(store, config)
    specs = [_find(target, name, version)] if name else target.list()
    results = []
    for one, which in ((spec.name, spec.version) for spec in specs):
        try:
            target.verify(one, which)
            results.append({"name": one, "version": which, "ok": True, "message": ""})
        except ModelError as error:
            results.append({"name": one, "version": which, "ok": False, "message": str(error)})
    if as_json:
        show_json(results)
    else:
        rows = [
            (r["name"], r["version"], "ok" if r["ok"] else "DAMAGED", r["message"]) for r in results
        ]
        show_table("Checksums", ("name", "version", "state", "message"), rows)
    broken = [str(r["name"]) for r in results if not r["ok"]]
    if broken:
        show_error(f"damaged or missing: {', '.join(broken)}", "bring them into the store again")
        raise typer.Exit(FAILED)


@models.command(epilog="Example: plinth models switch risk onnxruntime-int8")
def switch(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    variant: Annotated[
        str | None, typer.Argument(help="Name of a variant, or 'reference' for none.")
    ] = None,
    back: Annotated[bool, typer.Option("--back", help="The one that was taken before.")] = False,
    server: Annotated[
        str | None, typer.Option(help="URL of a plinth serve: wait until it has taken it up.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="How long to wait for it.")] = 120.0,
    api_key_env: Annotated[
        str | None, typer.Option(help="Variable that holds the server's API key.")
    ] = None,
    version: VersionOption = None,
    store: StoreOption = None,
    config: ConfigOption = None,
) -> None:
    """Choose the variant that answers; servers in precision auto take it up within seconds.

    They load and check it first, and switch between two batches. What cannot be loaded there
    changes nothing.
    """
    from plinth.engine import ConfigError

    if (variant is None) is not back:
        raise ConfigError(
            "name a variant, 'reference', or --back", hint=f"plinth models show {name}"
        )
    target = store_of(store, config)
    variants = target.variants(name, version)
    wanted = variants.before if back else None if variant == "reference" else variant
    before = variants.set_default(wanted)
    say(f"{name}: {before or 'reference'} -> {wanted or 'reference'}")
    if server is not None:
        key = os.environ.get(api_key_env) if api_key_env else None
        facts = _await_default(server, name, wanted, key, seconds)
        say(f"{server} answers as {facts['backend']}/{facts['precision']}")


def _await_default(
    server: str, name: str, wanted: str | None, key: str | None, seconds: float
) -> dict[str, Any]:
    """What a server says of a model once it serves a default of the store.

    Raises:
        ModelError: it refuses it, has no such model, does not follow the store, or is late.
    """
    from plinth.engine import ModelError

    until = time.monotonic() + seconds
    pause = threading.Event()
    while True:
        facts = _status(server, key).get(name)
        if facts is None:
            raise ModelError(f"{server} has no model {name}")
        if facts.get("default_refused"):
            raise ModelError(f"{server} keeps what it serves: {facts['default_refused']}")
        if facts.get("default") == wanted == facts.get("variant"):
            return dict(facts)
        if time.monotonic() > until:
            raise ModelError(
                f"{server} still serves {name} as {facts['backend']}/{facts['precision']}",
                hint="does it read this store, in precision and backend auto?",
            )
        pause.wait(0.2)


def _status(server: str, key: str | None) -> dict[str, Any]:
    import urllib.request

    from plinth.engine import ConfigError

    if not server.startswith(("http://", "https://")):
        raise ConfigError(f"{server} is not a URL", hint="such as http://127.0.0.1:8000")
    headers = {"X-API-Key": key} if key else {}
    asked = urllib.request.Request(f"{server}/v1/status", headers=headers)  # noqa: S310
    try:
        with urllib.request.urlopen(asked, timeout=10) as answer:  # noqa: S310
            return dict(json.load(answer)["models"])
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{server}/v1/status cannot be read: {error}") from error


def store_of(path: Path | None, config_file: Path | None) -> ModelStore:
    """The store named on the command line, else in the config, else the default one."""
    from plinth.engine import ModelStore
    from plinth.pipelines.assembly import store_path
    from plinth.pipelines.config.settings import load

    config = load(config_file, overrides={"models.store": path})
    return ModelStore(store_path(config))


def _find(store: ModelStore, name: str, version: str | None) -> ModelSpec:
    """The spec of a version, the newest unless one is named; its code need not be there."""
    from plinth.engine.errors import ModelError, nearest

    specs = store.list()
    found = [s for s in specs if s.name == name and version in (None, s.version)]
    if not found:
        words = sorted({s.name for s in specs} | {f"{s.name} {s.version}" for s in specs})
        wanted = f"{name} {version}" if version else name
        raise ModelError(
            f"there is no model {wanted} in {store.root}",
            hint=nearest(wanted, words) if words else "the store is empty",
        )
    return found[-1]


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "(" + ", ".join("any" if v is None else _cell(v) for v in value) + ")"
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_cell(v)}" for key, v in value.items())
    return str(value)
