"""``plinth compress``: a model whose file is a fraction of its size, within an allowed loss."""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plinth.pipelines.cli.variants.rows import read_rows
from plinth.pipelines.console import FAILED, say, show_json, show_table

if TYPE_CHECKING:
    from plinth.engine.compression.registry import Recipe
    from plinth.engine.optimize.recipes import Frontier, Small

EPILOG = "Example: plinth compress risk --target 3.2MB --data rows.npz --metric ap --max-loss 0.005"


def compress(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="Name of a model in the store.")],
    data: Annotated[
        Path,
        typer.Option(
            help=".npz or .safetensors of rows by input name, and 'labels' where the metric needs "
            "them; or .npy."
        ),
    ],
    max_loss: Annotated[float, typer.Option(help="What may be lost by the metric, 0 to 1.")],
    target: Annotated[
        str | None,
        typer.Option(help="Size on disk, as 3.2MB, 200kB or 32x smaller; default: what is lost."),
    ] = None,
    metric: Annotated[
        str, typer.Option(help="cosine, top1, accuracy, dice, auc, ap or command.")
    ] = "cosine",
    command: Annotated[
        str | None,
        typer.Option(help="For metric command: a program that prints the loss of two .npz files."),
    ] = None,
    sparsity: Annotated[
        list[float] | None,
        typer.Option(help="Only this share of weights 0; repeat it for several."),
    ] = None,
    bits: Annotated[
        list[str] | None,
        typer.Option(help="Only these: int8, even, int4, int3, ternary; repeat it for several."),
    ] = None,
    channels: Annotated[
        float, typer.Option(min=0, max=0.99, help="Share of channels to remove: faster too.")
    ] = 0.0,
    low_rank: Annotated[
        float,
        typer.Option(min=0, max=0.999, help="Layers as products that keep this share: faster too."),
    ] = 0.0,
    epochs: Annotated[int, typer.Option(min=0, help="How often training sees the rows.")] = 6,
    step: Annotated[int, typer.Option(min=2, help="Rows of a step of training.")] = 64,
    rate: Annotated[float, typer.Option(min=0, help="Of training, at its highest.")] = 1e-3,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of rows.")] = 0,
    backend: Annotated[str, typer.Option(help="What runs the variants.")] = "eager",
    version: Annotated[str | None, typer.Option(help="Version; default: the newest.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a timed run.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of training and runs.")] = 1,
    minutes: Annotated[
        float,
        typer.Option(min=0.1, help="After which nothing new is tried; the best so far counts."),
    ] = 30.0,
    picture: Annotated[Path | None, typer.Option(help="Where to draw the frontier, .png.")] = None,
    store: Annotated[
        Path | None, typer.Option("--store", help="Folder of the store; default: models.store.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="TOML file.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON on stdout, for scripts.")
    ] = False,
) -> None:
    """Prune, factor, quantise and distil a model until its file is small; keep what nothing beats.

    Recipes are trained on four fifths of the rows, with the model itself as teacher; the others
    judge. The best becomes the default of the model, those that nothing beats in size and loss are
    kept beside it. Exit code 1: none is within the loss and the target.
    """
    from plinth.engine import ModelStore
    from plinth.engine.compression.registry import Recipe
    from plinth.engine.devices.device import pick
    from plinth.engine.optimize.keep import keep_small
    from plinth.engine.optimize.measures import loss_of
    from plinth.engine.optimize.recipes import Goal, shrink
    from plinth.pipelines.assembly import store_path
    from plinth.pipelines.config.settings import load

    settings = load(config, overrides={"models.store": store})
    models = ModelStore(store_path(settings))
    model = models.load(name, version)
    size = models.size(name, model.spec.version)
    rows, labels = read_rows(data, [tensor.name for tensor in model.spec.inputs])
    goal = Goal(
        model,
        rows,
        loss_of(metric, shlex.split(command) if command else None),
        max_loss,
        size,
        pick("cpu" if settings.engine.device == "auto" else settings.engine.device),
        None if target is None else bytes_of(target, size),
        labels,
        _recipes(
            Recipe(epochs=epochs, batch=step, rate=rate, seed=seed),
            *(sparsity, bits, channels, low_rank),
        ),
        backend,
        batch=batch,
        threads=threads,
        seconds=60 * minutes,
    )
    with tempfile.TemporaryDirectory(prefix="plinth-compress-") as folder:
        found = shrink(goal, Path(folder), say)
        variants = models.variants(name, model.spec.version)
        written = keep_small(found, goal, variants, metric=metric, data=data.name)
    if picture is not None:
        draw(found, goal.target, max_loss, metric, picture)
    if as_json:
        show_json(
            {
                "default": variants.default,
                "reference_bytes": size,
                "target_bytes": goal.target,
                "variants": [variant.model_dump(mode="json") for variant in written],
                "points": [_facts(point, size) for point in found.points],
                "front": [point.label for point in found.front],
                "refused": found.refused,
            }
        )
    else:
        _show(found, size, goal.target, max_loss)
    for label, why in found.refused.items():
        say(f"not tried: {label}: {why}")
    if found.best is None:
        say(f"nothing is within {max_loss} and the target: what {name} is served as stays")
        raise typer.Exit(FAILED)
    say(
        f"{name} is served as {variants.default} in precision auto, {size / found.best.bytes:.1f} "
        f"times smaller on disk; plinth models switch {name} reference goes back"
    )


_UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def bytes_of(target: str, reference: int) -> int:
    """A size such as 3.2MB, 200 KiB or 32x, that many times smaller than ``reference``.

    Raises:
        ConfigError: it is no size.
    """
    from plinth.engine import ConfigError

    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", target.lower())
    number = float(found[1]) if found else 0.0
    unit = found[2] if found else ""
    if number and unit in (*_UNITS, "x"):
        size = reference / number if unit == "x" else number * _UNITS[unit]
        if 1 <= size < 1 << 62:
            return int(size)
    raise ConfigError(f"--target {target} is no size", hint="such as 3.2MB, 200KiB or 32x")


def _recipes(
    settings: Recipe,
    sparsity: list[float] | None,
    bits: list[str] | None,
    channels: float,
    energy: float,
) -> list[Recipe]:
    from plinth.engine.optimize.recipes import LADDER, ladder

    feedback = settings.epochs == 0
    if sparsity is None and bits is None:
        return ladder(settings, channels, energy=energy, feedback=feedback)
    shares = sorted(set(sparsity or [share for share, _ in LADDER]))
    words = bits or sorted({word for _, word in LADDER})
    rungs = [(share, word) for share in shares for word in words]
    return ladder(settings, channels, rungs, energy, feedback)


def _facts(point: Small, reference: int) -> dict[str, Any]:
    return {
        "label": point.label,
        "recipe": {key: dict(value) for key, value in point.recipe.steps.items()},
        "bytes": point.bytes,
        "smaller": reference / point.bytes,
        "bits_per_weight": point.bits_per_weight,
        "sparsity": point.sparsity,
        "loss": point.loss,
        "speed": point.speed,
        "memory": point.memory,
        "seconds": point.seconds,
    }


def _show(found: Frontier, reference: int, target: int | None, max_loss: float) -> None:
    def word(point: Small) -> str:
        if point is found.best:
            return "taken"
        if point.loss > max_loss:
            return "loses too much"
        return "too large" if target is not None and point.bytes > target else ""

    rows = [
        (
            point.label,
            f"{point.bytes / 1e3:.1f}",
            f"{reference / point.bytes:.1f}",
            f"{point.bits_per_weight:.2f}",
            f"{point.loss:.5f}",
            f"{point.speed:.2f}",
            word(point) + (" (front)" if point in found.front else ""),
        )
        for point in sorted(found.points, key=lambda p: -p.bytes)
    ]
    columns = ("recipe", "kB", "x smaller", "bits a weight", "loss", "x fp32 speed", "")
    show_table(f"Recipes, against {reference / 1e3:.1f} kB", columns, rows)


def draw(found: Frontier, target: int | None, max_loss: float, metric: str, path: Path) -> None:
    """Draw size against loss of each recipe, and the frontier.

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
    _plot(axes, found.points, "o", 1.0)
    front = found.front
    axes.plot([p.bytes / 1e3 for p in front], [p.loss for p in front], "-", color="C0", alpha=0.5)
    if found.best is not None:
        axes.plot(found.best.bytes / 1e3, found.best.loss, "o", color="C3", label="taken")
    axes.axhline(max_loss, color="0.5", linestyle="--", label="allowed")
    if target is not None:
        axes.axvline(target / 1e3, color="0.5", linestyle=":", label="target")
    axes.set(xlabel="kB on disk", ylabel=f"loss ({metric})", xscale="log")
    axes.legend()
    figure.savefig(path, dpi=150)


def _plot(axes: Any, points: Sequence[Small], mark: str, alpha: float) -> None:
    for point in points:
        axes.plot(point.bytes / 1e3, point.loss, mark, color="C0", alpha=alpha)
        axes.annotate(point.label, (point.bytes / 1e3, point.loss), fontsize=7)
