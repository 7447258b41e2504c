"""A volume through somebody's network: labels on the native grid and what they measure."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor

from plinth.engine import Call, Compute, Flow, InputError, Tiling, Told
from plinth.verticals.medical.ct.findings import Finding, finding
from plinth.verticals.medical.networks.agreement import Agreement, agree
from plinth.verticals.medical.networks.deepbet import narrowed
from plinth.verticals.medical.networks.load import Network, with_window
from plinth.verticals.medical.networks.prepare import Prepared, prepare
from plinth.verticals.medical.networks.recipe import Orient, Recipe, Triple
from plinth.verticals.medical.volumes.measured import Measured, measured
from plinth.verticals.medical.volumes.volume import HOW_TO_SAY_HU, Volume

Labels = npt.NDArray[np.uint8]
MIN_CELLS = 16
LONGEST = 64  # characters of a label's name
REST = ", rest"
FILLING = 0.98  # of all voxels


@dataclass(eq=False)
class Segmentation:
    """What a network made of a volume; what the files are made from.

    Args:
        volume: the volume, modality units.
        recipe: of the network.
        labels: (z, y, x) uint8 on the native grid.
        uncertainty: (z, y, x) uint8 there, where it was asked for; see
            :class:`plinth.engine.Tiling`.
        findings: volume of each label.
        structures: size and values of each label that was found, by key.
        warnings: what limits it, one sentence each.
        plan: how it was done.
        agreement: how the plan agreed with the reference, where it is another.
        seconds: wall time by stage.
    """

    volume: Volume
    recipe: Recipe
    labels: Labels
    uncertainty: Labels | None = None
    findings: list[Finding] = field(default_factory=list)
    structures: dict[str, Measured] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=dict)
    agreement: Agreement | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def check_modality(volume: Volume, recipe: Recipe) -> None:
    """Refuse a series that the network was not made for.

    Raises:
        InputError: another modality, or CT that is not in HU.
    """
    facts = volume.series
    if recipe.modality and facts.modality not in recipe.modality:
        raise InputError(
            f"series {facts.id} is {facts.modality or 'of no modality'}, {recipe.name} was made "
            f"for {' or '.join(recipe.modality)}",
            field="Modality",
            reason="modality",
        )
    if facts.modality == "CT" and facts.units != "HU":
        raise InputError(
            f"series {facts.id} is CT {facts.told_units}, expected HU",
            field="RescaleType",
            hint=HOW_TO_SAY_HU,
            reason="not_hu",
        )


def window_of(network: Network, memory_mb: int) -> Network:
    """The network with windows as large as memory allows, where their size is free.

    A network that is nothing but convolutions gives the same answer whatever the windows are, so
    they are cut across the first axis alone while that fits: a window's two largest
    intermediate results are held at once, and what is thrown away of it is the halo.

    Args:
        network: with a halo, or it is returned as it is.
        memory_mb: MB for one window, at least what twice the halo takes; backends that are foreseen
            to take more are not tried.
    """
    window = network.recipe.window
    if window.halo is None or window.size is None:
        return network
    size, halo, most = window.size, window.halo, memory_mb * 1_000_000
    taken, best = _taken(network), None
    for candidate in _candidates(size, halo):
        voxels = math.prod(candidate)
        count = math.prod(
            1 if c >= n else math.ceil((n - c) / (c - 2 * h)) + 1
            for n, c, h in zip(size, candidate, halo, strict=True)
        )
        found = (count * voxels, voxels, candidate)
        if taken(candidate) <= most and (best is None or found < best):
            best = found
    chosen = min(_candidates(size, halo), key=taken) if best is None else best[2]
    cut = with_window(network, chosen)
    return replace(cut, model=replace(cut.model, memory=most))


def _candidates(size: Triple, halo: Triple) -> list[Triple]:
    """Windows to choose from: along each axis all of it, or equal parts and their halos."""
    along = []
    for n, h in zip(size, halo, strict=True):
        found = {n}
        for parts in range(2, 17):
            inner = math.ceil((n - 2 * h) / parts) + 2 * h
            if inner < n and inner - 2 * h >= MIN_CELLS:
                found.add(inner)
        along.append(sorted(found))
    return [(z, y, x) for z in along[0] for y in along[1] for x in along[2]]


def _taken(network: Network) -> Callable[[Triple], int]:
    """Bytes that a forward over one window takes, beside the window."""
    tell = getattr(network.model.module, "forward_bytes", None)
    each = 4 * _floats_per_voxel(network)

    def of(window: Triple) -> int:
        found = None if tell is None else tell(window)
        return each * math.prod(window) if found is None else int(found)

    return of


def _floats_per_voxel(network: Network) -> int:
    """Channels of the two largest neighbouring results, from the weights of the convolutions."""
    pairs = [
        parameter.shape[0] + parameter.shape[1]
        for parameter in network.model.module.parameters()
        if parameter.ndim == 5
    ]
    if network.recipe.reduce == "labels" and len(pairs) > 1:
        pairs = pairs[:-1]
    return max(pairs, default=64) + 1


def segment(
    volume: Volume,
    network: Network,
    *,
    uncertainty: bool = False,
    overlap: float | None = None,
    agreed: Agreement | None = None,
) -> Flow[Segmentation]:
    """A flow: prepare, run, bring back, measure.

    What the engine computes in another way than the reference is held against it on windows of
    this study, and done again by the reference where it does not agree.

    Args:
        volume: of a series the network was made for.
        network: which.
        uncertainty: a map of how sure it is goes with the labels.
        overlap: of blended windows, instead of the network's own.
        agreed: what was found on another study, which then is not asked again for that plan.

    Raises:
        InputError: see :func:`check_modality` and :func:`prepare`.
    """
    recipe = network.recipe
    check_modality(volume, recipe)
    begun = time.perf_counter()
    if network.finds is not None:
        recipe = yield from _located(volume, network.finds, recipe)
    prepared: Prepared = yield Compute(prepare, volume, recipe)
    tiling = tiling_of(prepared, recipe, uncertainty, overlap)
    seconds = {"prepare": time.perf_counter() - begun}
    begun = time.perf_counter()
    names = network.model.spec.name, network.reference.spec.name
    failed = agreed is not None and not agreed.passed
    told: Told = yield Call(names[failed], prepared.rows, tiling=tiling, told=True)
    seconds["network"] = time.perf_counter() - begun
    exact = told.exact and (network.original is None or failed)
    if not exact and (agreed is None or agreed.plan != told.precision):
        begun = time.perf_counter()
        labels, _ = yield Compute(_native, prepared, told.value, tiling)
        agreed = yield from agree(names, prepared, recipe, tiling, labels)
        seconds["agreement"] = time.perf_counter() - begun
        if not agreed.passed:
            begun = time.perf_counter()
            told = yield Call(names[True], prepared.rows, tiling=tiling, told=True)
            seconds["network"] += time.perf_counter() - begun
    begun = time.perf_counter()
    prepared.rows = torch.empty(0)
    found = yield Compute(_bring_back, volume, recipe, prepared, told.value, tiling)
    told_of, *others = found
    done = Segmentation(volume, told_of, *others)
    done.plan = _plan(prepared, replace(network, recipe=recipe), tiling) | {
        "computed_in": told.precision
    }
    done.plan["computed"] = f"{told.precision}, the reference itself"
    if agreed is not None:
        done.agreement = agreed
        done.plan |= {"agreement": agreed.as_dict(), "computed": agreed.sentence()}
        if not agreed.passed:
            done.warnings.append(agreed.sentence())
    seconds["measure"] = time.perf_counter() - begun
    done.seconds = {stage: round(spent, 3) for stage, spent in seconds.items()}
    return done


def _located(volume: Volume, finds: Network, recipe: Recipe) -> Flow[Recipe]:
    """The recipe for the box that a first network finds, which runs as the reference."""
    seen: Prepared = yield Compute(prepare, volume, finds.recipe)
    tiling = tiling_of(seen, finds.recipe)
    labels = yield Call(finds.reference.spec.name, seen.rows, tiling=tiling)
    found: Recipe = yield Compute(narrowed, volume, finds.recipe, recipe, labels.numpy())
    return found


def _bring_back(
    volume: Volume,
    recipe: Recipe,
    prepared: Prepared,
    got: Tensor | dict[str, Tensor],
    tiling: Tiling,
) -> tuple[Recipe, Labels, Labels | None, list[Finding], dict[str, Measured], list[str]]:
    """The network's answer on the native grid, and what it measures; see :class:`Segmentation`."""
    labels, doubt = _native(prepared, got, tiling)
    recipe, covered = _covered(recipe, got)
    for k in volume.filled:
        labels[k] = 0
    for label in recipe.largest:
        _keep_largest(labels, label)
    for label in recipe.filled:
        _fill_holes(labels, label)
    counts = np.bincount(labels.ravel(), minlength=256)
    titles = {value: (f"label_{value}", name) for value, name in sorted(recipe.labels.items())}
    sizes = measured(volume, labels, titles)
    findings, warnings = _findings(counts, volume, recipe), _warnings(volume, counts, recipe)
    return recipe, labels, doubt, findings, sizes, warnings + covered


def _covered(recipe: Recipe, got: Tensor | dict[str, Tensor]) -> tuple[Recipe, list[str]]:
    """Structures of which a later one takes a part are called what is left of them.

    In one label map a voxel has one label; a whole whose core lies in it would else be measured
    without its core under its own name.
    """
    if not isinstance(got, dict) or "hidden" not in got:
        return recipe, []
    hidden = got["hidden"].tolist()
    counts = torch.bincount(got["labels"].flatten(), minlength=len(hidden) + 1).tolist()
    labels, said = dict(recipe.labels), []
    for value, name in sorted(recipe.labels.items()):
        if value <= len(hidden) and hidden[value - 1]:
            share = 100 * hidden[value - 1] / (hidden[value - 1] + counts[value])
            labels[value] = f"{name[: LONGEST - len(REST)]}{REST}"
            said.append(
                f"{share:.1f} % of {name} is also of a structure named after it, and is counted "
                f"there alone: {labels[value]} is what is left"
            )
    return recipe.model_copy(update={"labels": labels}), said


def tiling_of(
    prepared: Prepared, recipe: Recipe, uncertainty: bool = False, overlap: float | None = None
) -> Tiling:
    """How a prepared volume is cut, and what is made of the outputs on the way."""
    window = recipe.window
    size = window.size or prepared.shape
    halo = window.halo if window.halo is not None and size != prepared.shape else None
    labels = recipe.reduce == "labels"
    shared = window.overlap if overlap is None else overlap
    if labels and halo is None:  # labels cannot be blended: what windows share is cut in the middle
        a, b, c = (min(max(1, int(n * shared / 2)), (n - 1) // 2) for n in size)
        halo = (a, b, c)
    return Tiling(
        window=size,
        overlap=shared,
        blend=window.blend,
        reduce=recipe.reduce,
        halo=halo or (0, 0, 0),
        even=window.even,
        activation=recipe.activation,
        onto=None if labels or recipe.back == "nearest" else prepared.onto,
        interpolate="raw" if recipe.back == "raw" else "activated",
        uncertainty=uncertainty,
        hidden=recipe.reduce == "threshold" and len(recipe.labels) > 1,
    )


def _native(
    prepared: Prepared, got: Tensor | dict[str, Tensor], tiling: Tiling
) -> tuple[Labels, Labels | None]:
    if isinstance(got, dict):
        labels = got["labels"].numpy()
        doubt = got["uncertainty"].numpy() if "uncertainty" in got else None
    else:
        labels, doubt = got.numpy(), None
    if tiling.onto is None:
        labels = prepared.nearest(labels)
        doubt = None if doubt is None else prepared.nearest(doubt)
    return prepared.to_native(labels), None if doubt is None else prepared.to_native(doubt)


def _keep_largest(labels: Labels, label: int) -> None:
    """Only the largest 26-connected component of a label stays, in place."""
    (box,) = ndimage.find_objects((labels == label).astype(np.uint8)) or (None,)
    if box is None:
        return
    part = labels[box]
    components, count = ndimage.label(part == label, np.ones((3, 3, 3)))
    if count > 1:
        largest = int(np.bincount(components.ravel())[1:].argmax()) + 1
        part[(components > 0) & (components != largest)] = 0


def _fill_holes(labels: Labels, label: int) -> None:
    """What a label encloses, and no other label has, becomes part of it, in place."""
    (box,) = ndimage.find_objects((labels == label).astype(np.uint8)) or (None,)
    if box is not None:
        part = labels[box]
        part[ndimage.binary_fill_holes(part == label) & (part == 0)] = label


def _findings(counts: npt.NDArray[np.int64], volume: Volume, recipe: Recipe) -> list[Finding]:
    ml = volume.voxel_volume_mm3 / 1000
    how = f"voxels of label {{}} of {recipe.name} on the native grid"
    return [
        finding(
            f"label_{value}_volume",
            f"{name}, volume",
            float(counts[value]) * ml if counts[value] else None,
            "mL",
            how.format(value),
        )
        for value, name in sorted(recipe.labels.items())
    ]


def _plan(prepared: Prepared, network: Network, tiling: Tiling) -> dict[str, Any]:
    recipe = network.recipe
    return {
        "network": recipe.source,
        "network_files_sha256": network.digest,
        "steps": [step.model_dump(exclude_none=True) for step in recipe.steps],
        "network_grid": list(prepared.shape),
        "window": list(tiling.window),
        "cut": "at the halo, exact" if tiling.exact else f"blended, {tiling.blend}",
        "halo": list(tiling.halo),
        "overlap": 0.0 if tiling.exact else tiling.overlap,
        "flips": 8 if network.flips else 1,
        "labels_by": recipe.reduce,
    }


def _warnings(volume: Volume, counts: npt.NDArray[np.int64], recipe: Recipe) -> list[str]:
    warnings = [
        recipe.worth
        or f"{recipe.name} is a network of the user's own: what it is worth on these images is "
        "not known here"
    ]
    warnings += recipe.notes
    if not recipe.modality:
        warnings.append("the network does not say which modality it was made for")
    unnamed = [
        value for value in np.flatnonzero(counts).tolist() if value not in (0, *recipe.labels)
    ]
    if unnamed:
        warnings.append(
            f"the network gave labels that its description does not name ({_few(unnamed)}): they "
            "are in segmentation.nii.gz and nowhere else"
        )
    filling = [n for v, n in sorted(recipe.labels.items()) if counts[v] > FILLING * counts.sum()]
    if filling:
        warnings.append(
            f"{filling[0]} fills the field of view: look whether activation and values are right"
        )
    absent = [name for value, name in sorted(recipe.labels.items()) if not counts[value]]
    if absent:
        warnings.append(f"not found: {_few(absent)}")
    if not any(isinstance(step, Orient) for step in recipe.steps):
        warnings.append(
            "the network says nothing about orientation: it saw the images as they are stored"
        )
    if volume.filled:
        warnings.append(
            f"{len(volume.filled)} slices were interpolated; no label and no volume counts them"
        )
    return warnings


def _few(things: Sequence[object]) -> str:
    more = f" and {len(things) - 8} more" if len(things) > 8 else ""
    return ", ".join(map(str, things[:8])) + more
