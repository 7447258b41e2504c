"""``plinth optimize``: the fastest way to compute a model within an allowed loss."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plinth.pipelines.cli.variants.rows import read_rows
from plinth.pipelines.console import say, show_json, show_table

if TYPE_CHECKING:
    from plinth.engine.optimize.search import Found, Point

EPILOG = "Example: plinth optimize risk --data rows.npz --max-loss 0.002"


def optimize(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="Name of a model in the store.")],
    data: Annotated[
        Path,
        typer.Option(
            help=".npz or .safetensors of rows by input name, and 'labels' where the metric needs "
            "them; or .npy."
        ),
    ],
    max_loss: Annotated[float, typer.Option(help="What may be lost by the metric, 0 to 1.")],
    metric: Annotated[
        str, typer.Option(help="cosine, top1, accuracy, dice, auc, ap or command.")
    ] = "cosine",
    command: Annotated[
        str | None,
        typer.Option(help="For metric command: a program that prints the loss of two .npz files."),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Try this backend; repeat it for several.", show_default="all fit ones"),
    ] = None,
    version: Annotated[str | None, typer.Option(help="Version; default: the newest.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a timed run.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of a run.")] = 1,
    minutes: Annotated[
        float,
        typer.Option(min=0.1, help="After which nothing new is tried; the best so far counts."),
    ] = 15.0,
    picture: Annotated[Path | None, typer.Option(help="Where to draw the curve, .png.")] = None,
    store: Annotated[
        Path | None, typer.Option("--store", help="Folder of the store; default: models.store.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="TOML file.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON on stdout, for scripts.")
    ] = False,
) -> None:
    """Search the precisions and backends for the fastest within a loss; keep it as a variant.

    Half of the rows choose, the other half check. The best becomes the default of the model,
    which an engine in precision auto serves; the others that nothing beats are kept beside it.
    """
    from plinth.engine import ModelStore
    from plinth.engine.devices.device import pick
    from plinth.engine.optimize.keep import keep
    from plinth.engine.optimize.measures import loss_of
    from plinth.engine.optimize.search import Task, search
    from plinth.pipelines.assembly import store_path
    from plinth.pipelines.config.settings import load

    settings = load(config, overrides={"models.store": store})
    models = ModelStore(store_path(settings))
    model = models.load(name, version)
    rows, labels = read_rows(data, [tensor.name for tensor in model.spec.inputs])
    task = Task(
        model,
        rows,
        loss_of(metric, shlex.split(command) if command else None),
        max_loss,
        pick("cpu" if settings.engine.device == "auto" else settings.engine.device),
        labels,
        **({"backends": tuple(backend)} if backend else {}),
        batch=batch,
        threads=threads,
        seconds=60 * minutes,
    )
    with tempfile.TemporaryDirectory(prefix="plinth-optimize-") as folder:
        found = search(task, Path(folder), say)
        variants = models.variants(name, model.spec.version)
        written = keep(found, task, variants, metric=metric, data=data.name)
    if picture is not None:
        draw(found.points, found.best, max_loss, metric, picture)
    if as_json:
        show_json(
            {
                "default": variants.default,
                "variants": [variant.model_dump(mode="json") for variant in written],
                "points": [_facts(point) for point in found.points],
                "damage": found.damage,
                "refused": found.refused,
            }
        )
        return
    _show(found, max_loss)
    for label, why in found.refused.items():
        say(f"not tried: {label}: {why}")
    say(
        f"{name} is served as {variants.default} in precision auto, by servers that run already too"
        if variants.default
        else f"nothing is faster than float32 within {max_loss}: {name} stays as it is"
    )


def _facts(point: Point) -> dict[str, Any]:
    return {
        "label": point.label,
        "backend": point.backend,
        "precision": point.policy.as_dict(),
        "loss": point.loss,
        "speed": point.speed,
        "memory": point.memory,
    }


def _show(found: Found, max_loss: float) -> None:
    rows = [
        (
            point.label,
            f"{point.speed:.2f}",
            f"{point.loss:.6f}",
            f"{point.memory / 1e6:.1f}",
            "taken" if point is found.best else "" if point.loss <= max_loss else "loses too much",
        )
        for point in sorted(found.points, key=lambda p: -p.speed)
    ]
    show_table("Candidates", ("candidate", "x fp32", "loss", "weights MB", ""), rows)


def draw(
    points: Sequence[Point], best: Point | None, max_loss: float, metric: str, path: Path
) -> None:
    """Draw speed against loss of each candidate.

    Raises:
        ConfigError: matplotlib is missing.
    """
    from plinth.distribution import install_hint
    from plinth.engine import ConfigError

    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--picture needs matplotlib", hint=install_hint("matplotlib")) from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    floor = max_loss / 1000 or 1e-9
    for point in points:
        taken = point is best
        axes.plot(point.speed, max(point.loss, floor), "o", color="C3" if taken else "C0")
        axes.annotate(point.label, (point.speed, max(point.loss, floor)), fontsize=7)
    axes.axhline(max_loss, color="0.5", linestyle="--", label="allowed")
    axes.set(xlabel="times as fast as eager fp32 (CPU time)", ylabel=f"loss ({metric})")
    axes.set_yscale("log")
    axes.legend()
    figure.savefig(path, dpi=150)
