"""How good the nodule network is, measured on synthetic data it was not trained on.

A truth counts as found when a candidate's centre lies inside it, the rule of LUNA16 (Setio et
al., Med Image Anal 2017); every candidate beyond the first of a truth counts as false.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from plinth.engine import Engine, InputError
from plinth.verticals.medical.nodules.candidates import Nodule, find_candidates
from plinth.verticals.medical.nodules.network import NoduleUNet, windowed
from plinth.verticals.medical.phantom import chest as phantom
from plinth.verticals.medical.phantom.chest import LUNG_CENTRES, LUNG_RADII, Phantom
from plinth.verticals.medical.training.patches import patch
from plinth.verticals.medical.vertical import CtAnalysis, CtSettings, StudyRequest, phantom_volume

SEED = 90_000
"""Held-out data are drawn from seeds of SEED upwards; training uses one small seed."""

SMALL_MM = 6.0
SPACING_MM = 1.5
MARGIN_MM = 1.0
DIRECTIONS = np.random.default_rng(0).standard_normal((200, 3))
DIRECTIONS /= np.linalg.norm(DIRECTIONS, axis=1, keepdims=True)


@dataclass
class Tally:
    """Candidates held against the truth, scan by scan.

    Args:
        scans: how many were seen.
        false: candidates that match no truth, or one already matched.
        found: (true diameter mm, true HU, centre error mm, diameter error mm) of each truth
            found.
        missed: (true diameter mm, true HU) of each truth missed.
    """

    scans: int = 0
    false: int = 0
    found: list[tuple[float, float, float, float]] = field(default_factory=list)
    missed: list[tuple[float, float]] = field(default_factory=list)

    def add(self, truth: list[dict[str, Any]], candidates: list[Nodule]) -> None:
        """Count one scan.

        Args:
            truth: ``nodules`` of :meth:`Phantom.truth`.
            candidates: what was found.
        """
        self.scans += 1
        left = list(candidates)
        for one in truth:
            centre = np.asarray(one["centre_lps_mm"], float)
            diameter, hu = float(one["diameter_mm"]), float(one["hu"])
            off = [float(np.linalg.norm(centre - c.centre_lps_mm)) for c in left]
            nearest = int(np.argmin(off)) if off else -1
            if nearest < 0 or off[nearest] > diameter / 2:
                self.missed.append((diameter, hu))
                continue
            match = left.pop(nearest)
            self.found.append((diameter, hu, off[nearest], match.diameter_mm - diameter))
        self.false += len(left)

    def metrics(self) -> dict[str, float]:
        """Sensitivity whole and by kind, false candidates per scan, errors in mm."""
        found = np.asarray(self.found).reshape(-1, 4)
        missed = np.asarray(self.missed).reshape(-1, 2)

        def share(of_found: np.ndarray, of_missed: np.ndarray) -> float:
            total = int(of_found.sum()) + int(of_missed.sum())
            return float(of_found.sum()) / total if total else math.nan

        small = (found[:, 0] < SMALL_MM, missed[:, 0] < SMALL_MM)
        faint = (found[:, 1] < -300, missed[:, 1] < -300)
        metrics = {
            "scans": float(self.scans),
            "nodules": float(len(found) + len(missed)),
            "sensitivity": share(found[:, 0] > 0, missed[:, 0] > 0),
            "sensitivity_4_to_6_mm": share(*small),
            "sensitivity_from_6_mm": share(~small[0], ~small[1]),
            "sensitivity_ground_glass": share(*faint),
            "false_per_scan": self.false / max(1, self.scans),
        }
        if len(found):
            metrics["centre_error_mm_median"] = float(np.median(found[:, 2]))
            metrics["diameter_error_mm_median"] = float(np.median(np.abs(found[:, 3])))
        return {name: round(value, 4) for name, value in metrics.items() if math.isfinite(value)}


def on_patches(
    net: NoduleUNet, count: int = 64, shape: tuple[int, int, int] = (24, 40, 40)
) -> dict[str, float]:
    """Agreement on held-out synthetic patches, which hold more vessels than the phantom.

    Args:
        net: the network, for inference.
        count: patches.
        shape: (z, y, x) voxels of a patch.

    Returns:
        ``patch_dice``, 2 |A and B| / (|A| + |B|) over all patches' voxels;
        ``patch_sensitivity``, share of the nodules that the answer touches; and
        ``patch_false_per_litre``, pieces of the answer that touch no nodule.
    """
    random = np.random.default_rng(SEED)
    both = total = true = hit = false = voxels = 0
    for _ in range(count):
        hu, mask = patch(random, shape)
        with torch.inference_mode():
            logits = net(windowed(torch.from_numpy(hu))[None, None])
        said = logits.argmax(1).to(torch.uint8)[0]
        found = find_candidates(said)
        answer = found.labels > 0
        both += 2 * int(np.count_nonzero(answer & mask))
        total += int(np.count_nonzero(answer)) + int(np.count_nonzero(mask))
        truth, nodules = ndimage.label(mask)
        true += nodules
        hit += len(np.unique(truth[answer & mask]))
        false += len(found.boxes) - len(np.unique(found.labels[answer & mask]))
        voxels += mask.size
    return {
        "patch_dice": round(both / max(1, total), 4),
        "patch_sensitivity": round(hit / max(1, true), 4),
        "patch_false_per_litre": round(false / (voxels * SPACING_MM**3 / 1e6), 4),
    }


def on_phantoms(store: Path, version: str, count: int = 40) -> dict[str, float]:
    """Candidates on held-out chest phantoms, through the whole vertical and the engine.

    Args:
        store: model store with the network.
        version: of the network.
        count: phantoms.
    """
    vertical = CtAnalysis(CtSettings(nodules=True, store=store, version=version))
    tally = Tally()
    with Engine() as engine:
        for model in vertical.models():
            engine.add(model)
        for scan in held_out(count):
            request = StudyRequest(phantom_volume(scan))
            result = engine.run(vertical.infer([request])).value[0]
            if isinstance(result, InputError):
                raise result
            tally.add(scan.truth()["nodules"], result.response.nodules or [])
    return tally.metrics()


def held_out(count: int, seed: int = SEED) -> Iterator[Phantom]:
    """Chest phantoms whose nodules, noise, resolution and slice spacing are drawn anew.

    Args:
        count: how many.
        seed: of the first.
    """
    for number in range(count):
        random = np.random.default_rng(seed + number)
        step, pixel = random.uniform(1.0, 3.0), random.uniform(1.0, 1.8)
        columns = round(370 / pixel)
        yield Phantom(
            shape=(columns, round(280 / pixel), round(212 / step)),
            spacing=(pixel, pixel, step),
            seed=seed + number,
            noise_hu=random.uniform(5, 40),
            nodules=_drawn(random, int(random.integers(0, 9))),
        )


def _drawn(random: np.random.Generator, count: int) -> tuple[phantom.Nodule, ...]:
    """Spheres of 4 to 25 mm wholly inside a lung, apart from each other; vessels may touch."""
    drawn: list[phantom.Nodule] = []
    while len(drawn) < count:
        diameter = float(np.exp(random.uniform(np.log(4), np.log(25))))
        hu = random.uniform(0, 100) if random.random() < 0.75 else random.uniform(-650, -400)
        lung = np.asarray(LUNG_CENTRES["lung_right" if random.random() < 0.5 else "lung_left"])
        offset = random.uniform(-1, 1, 3) * LUNG_RADII
        surface = offset + (diameter / 2 + MARGIN_MM) * DIRECTIONS
        if (((surface / LUNG_RADII) ** 2).sum(axis=1) > 1).any():
            continue
        x, y, z = (float(v) for v in lung + offset)
        apart = all(
            math.dist((x, y, z), other.centre) > (diameter + other.diameter) / 2 + 5
            for other in drawn
        )
        if apart:
            drawn.append(phantom.Nodule((x, y, z), diameter, hu))
    return tuple(drawn)
