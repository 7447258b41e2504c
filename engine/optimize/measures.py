"""What a faster model loses: one number, 0 for nothing, by the measure of the task."""

from __future__ import annotations

import hashlib
import math
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plinth.engine.errors import ConfigError, InputError, nearest

Rows = Mapping[str, Tensor]
Loss = Callable[[Rows, Rows, Tensor | None], float]
"""From outputs, those of the reference, and labels, to what is lost."""

Run = Callable[[Rows], dict[str, Tensor]]

COMMAND_SECONDS = 600


def outputs_of(run: Run, rows: Rows, batch: int) -> dict[str, Tensor]:
    """What a model gives for all rows (n, ...), run in batches."""
    count = len(next(iter(rows.values())))
    parts = [
        run({name: tensor[first : first + batch] for name, tensor in rows.items()})
        for first in range(0, count, batch)
    ]
    return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}


def digest_of(rows: Rows) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of rows."""
    sha = hashlib.sha256()
    for name, tensor in sorted(rows.items()):
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.contiguous().flatten().view(torch.uint8).numpy(force=True).tobytes())
    return sha.hexdigest()


def loss_of(metric: str, command: Sequence[str] | None = None) -> Loss:
    """The measure of a name.

    Args:
        metric: ``cosine``: 1 - mean cosine of each row with the reference's; ``top1``: share of
            rows whose largest entry along dimension 1 is another; ``accuracy``: what is lost of
            the share of rows whose largest entry is at their label; ``dice``: 1 - mean Dice of
            the classes along dimension 1, background left out; ``auc``, ``ap``: what is lost of
            the area under the ROC or precision-recall curve against labels; ``command``: what a
            program prints.
        command: the program and its arguments; it is given two more, the .npz files of the
            outputs and of the reference's outputs, and prints the loss.

    Raises:
        ConfigError: unknown, or ``command`` without one.
    """
    if metric == "command":
        if not command:
            raise ConfigError("metric command needs a program", hint="--command './measure.py'")
        return lambda got, want, _: _by_command(command, got, want)
    if metric not in _MEASURES:
        raise ConfigError(f"there is no metric {metric!r}", hint=nearest(metric, METRICS))
    return _MEASURES[metric]


def _worst(one: Callable[[Tensor, Tensor], float]) -> Loss:
    """The largest loss of the float outputs, each taken alone."""

    def loss(got: Rows, want: Rows, _: Tensor | None) -> float:
        floats = [name for name, tensor in want.items() if tensor.is_floating_point()]
        if not floats:
            raise InputError("no output is of floats, so that nothing can be compared")
        found = [one(got[name].double(), want[name].double()) for name in floats]
        # What is no number is no match: max() would pass over NaN.
        return max(value if value == value else float("inf") for value in found)

    return loss


def _cosine(got: Tensor, want: Tensor) -> float:
    a, b = got.flatten(1), want.flatten(1)
    both_zero = (a.norm(dim=1) == 0) & (b.norm(dim=1) == 0)
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1, eps=1e-30)
    return float(1 - torch.where(both_zero, 1.0, cosine).mean())


def _top1(got: Tensor, want: Tensor) -> float:
    if want.ndim < 2 or want.shape[1] < 2:
        raise InputError(
            f"top1 needs outputs (rows, classes, ...), got {tuple(want.shape)}",
            hint="use cosine, auc or ap for a single score",
        )
    return float((got.argmax(1) != want.argmax(1)).double().mean())


def _scored(want: Rows) -> str:
    """The output that scores: the first of floats, since labels of classes are none."""
    return next((n for n, tensor in want.items() if tensor.is_floating_point()), next(iter(want)))


def _accuracy(got: Rows, want: Rows, labels: Tensor | None) -> float:
    if labels is None:
        raise ConfigError("accuracy needs labels", hint="give the data an array 'labels'")
    name = _scored(want)
    if want[name].ndim != 2 or want[name].shape[1] < 2 or labels.shape != want[name].shape[:1]:
        raise InputError(
            f"accuracy needs outputs (rows, classes) and a label for each row, got "
            f"{tuple(want[name].shape)} and {tuple(labels.shape)}"
        )
    before, after = (
        float((each[name].argmax(1) == labels).double().mean()) for each in (want, got)
    )
    return before - after if bool(got[name].isfinite().all()) else float("inf")


def _dice(got: Tensor, want: Tensor) -> float:
    if want.ndim < 3 or want.shape[1] < 2:
        raise InputError(f"dice needs outputs (rows, classes, ...), got {tuple(want.shape)}")
    ours, theirs = got.argmax(1), want.argmax(1)
    scores = []
    for label in range(1, want.shape[1]):
        a, b = ours == label, theirs == label
        size = int(a.sum() + b.sum())
        if size:
            scores.append(2 * int((a & b).sum()) / size)
    return 1 - sum(scores) / len(scores) if scores else 0.0


def check_labels(labels: Tensor | None, rows: Rows) -> None:
    """Refuse labels that do not belong to some rows.

    Args:
        labels: (n, ...), or ``None``.
        rows: (n, ...) by input name.

    Raises:
        InputError: there are more or fewer, or one is not a number; names it.
    """
    if labels is None:
        return
    count = len(next(iter(rows.values())))
    if not labels.ndim or len(labels) != count:
        given = len(labels) if labels.ndim else "one"
        raise InputError(f"there are {given} labels for {count} rows", field="labels")
    if labels.is_floating_point() and not bool(labels.isfinite().all()):
        row = int((~labels.isfinite()).reshape(count, -1).any(1).nonzero()[0])
        raise InputError(
            f"the label of row {row} is not a number",
            field="labels",
            hint="leave out the rows whose label nobody knows",
        )


def check_tells(loss: Loss, want: Rows, labels: Tensor | None, max_loss: float) -> None:
    """Refuse rows by which a model that always says the same would be good enough.

    As where all rows are equal, or where ``cosine`` measures single scores.

    Args:
        loss: the measure.
        want: outputs (n, ...) of the reference by name.
        labels: of the rows, or ``None``.
        max_loss: what may be lost.

    Raises:
        ConfigError: what may be lost is no number from 0 on.
        InputError: they cannot tell a good model from a bad one; names what would be lost.
    """
    if not 0 <= max_loss < math.inf:
        raise ConfigError(f"max_loss is {max_loss}", hint="a number from 0 on, such as 0.01")
    same = {
        name: (tensor.mean(0, keepdim=True) if tensor.is_floating_point() else tensor[:1]).expand(
            tensor.shape
        )
        for name, tensor in want.items()
    }
    lost = loss(same, want, labels)
    if lost <= max_loss:
        raise InputError(
            f"these rows cannot tell a good model from a bad one: one that gave the same answer to "
            f"all {len(next(iter(want.values())))} that judge would lose {max(0.0, lost):.5f}, "
            f"allowed is {max_loss}",
            hint="give rows that differ as those to come do, allow less, or use another metric; "
            "cosine is for vectors, auc or ap for single scores",
        )


def _against_labels(area: Callable[[Any, Any], float]) -> Loss:
    def loss(got: Rows, want: Rows, labels: Tensor | None) -> float:
        if labels is None:
            raise ConfigError("auc and ap need labels", hint="give the data an array 'labels'")
        name = _scored(want)
        column = _score_column(want[name])
        if labels.numel() != len(want[name]) or not bool(((labels == 0) | (labels == 1)).all()):
            raise InputError(
                f"auc and ap need one label for each row, 0 or 1; they are {tuple(labels.shape)}, "
                f"{labels.min().item():g} to {labels.max().item():g}",
                field="labels",
            )
        truth = labels.numpy(force=True).astype(bool).ravel()
        if truth.all() or not truth.any():
            raise InputError("auc and ap need rows of both labels, 0 and 1")
        before, after = (
            area(truth, each[name].flatten(1)[:, column].double().numpy(force=True))
            for each in (want, got)
        )
        return before - after if after == after else float("inf")

    return loss


def _score_column(want: Tensor) -> int:
    """Where the one score of each row is; columns that are the same for all rows are none."""
    flat = want.flatten(1)
    if flat.shape[1] == 1:
        return 0
    scores = (flat != flat[:1]).any(0).nonzero().flatten().tolist()
    if len(scores) != 1:
        raise InputError(
            f"auc and ap need one score per row, got {tuple(want.shape)}, of which {len(scores)} "
            "differ from row to row"
        )
    return int(scores[0])


def roc_auc(truth: Any, scores: Any) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative; ties half."""
    if np.isnan(scores).any():
        return float("nan")
    _values, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    positive = int(truth.sum())
    negative = len(truth) - positive
    return float((ranks[truth].sum() - positive * (positive + 1) / 2) / (positive * negative))


def average_precision(truth: Any, scores: Any) -> float:
    """Sum of precision times the step in recall, over distinct scores from above."""
    if np.isnan(scores).any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    hits, ranked = np.cumsum(truth[order]), scores[order]
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    recall, precision = hits[last] / hits[-1], hits[last] / (last + 1)
    return float(np.sum(np.diff(recall, prepend=0) * precision))


def _by_command(command: Sequence[str], got: Rows, want: Rows) -> float:
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for name, rows in (("got", got), ("want", want)):
            files.append(str(Path(folder) / f"{name}.npz"))
            arrays: dict[str, Any] = {k: tensor.numpy(force=True) for k, tensor in rows.items()}
            np.savez(files[-1], **arrays)
        try:
            done = subprocess.run(
                [*command, *files], capture_output=True, text=True, timeout=COMMAND_SECONDS
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigError(f"{command[0]} cannot be run: {error}") from error
    try:
        if done.returncode:
            raise ValueError(done.stderr.strip()[-300:])
        return float(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError) as error:
        raise ConfigError(
            f"{command[0]} gave no number (exit code {done.returncode}): {error}",
            hint="its last line must be the loss",
        ) from error


_MEASURES: dict[str, Loss] = {
    "cosine": _worst(_cosine),
    "top1": _worst(_top1),
    "accuracy": _accuracy,
    "dice": _worst(_dice),
    "auc": _against_labels(roc_auc),
    "ap": _against_labels(average_precision),
}
METRICS = (*_MEASURES, "command")
"""The names that :func:`loss_of` knows."""
