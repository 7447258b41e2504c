"""The heavy steps of a CT study: each runs apart from the flow, in a process of its own if need be.

They change nothing that they are given; what they found is what they return.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from plinth.engine.mapped import trim
from plinth.engine.parallel import import_ahead
from plinth.verticals.medical.ct.analysis import (
    LUNG_LEFT,
    LUNG_RIGHT,
    NODULE,
    Analysis,
    analyse,
)
from plinth.verticals.medical.dicom.decode import MAX_BYTES
from plinth.verticals.medical.dicom.discover import Found, Series, survey
from plinth.verticals.medical.dicom.loader import Gaps, load_volume
from plinth.verticals.medical.dicom.walk import Ignored
from plinth.verticals.medical.nodules.candidates import (
    Candidates,
    NetworkInput,
    Nodule,
    Thresholds,
    confidences,
    find_candidates,
    measure,
    prepare_input,
    recheck,
)
from plinth.verticals.medical.volumes.labelled import Patch
from plinth.verticals.medical.volumes.measured import Measured, measured
from plinth.verticals.medical.volumes.suv import suv_by_weight
from plinth.verticals.medical.volumes.volume import Volume


class StageClock:
    """Wall seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def mark(self, stage: str) -> None:
        """A stage ends."""
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._last, 3)
        self._last = now

    def skip(self) -> None:
        """What was since the last stage is told elsewhere."""
        self._last = time.perf_counter()


@dataclass(eq=False)
class RuleFindings:
    """What the HU rules found, and what the network is to see.

    Args:
        analysis: labels and findings.
        network_input: ``None`` without lungs, or where no network looks for nodules.
        sizes: of the lungs, where no network runs after.
        seconds: wall time by stage.
    """

    analysis: Analysis
    network_input: NetworkInput | None
    sizes: dict[str, Measured]
    seconds: dict[str, float]


@dataclass(eq=False)
class NoduleFindings:
    """What became of the network's candidates.

    Args:
        patches: where they lie over the labels that the rules found.
        nodules: the largest first.
        sizes: of lungs and nodules.
        seconds: wall time by stage.
    """

    patches: list[Patch]
    nodules: list[Nodule]
    sizes: dict[str, Measured]
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reading:
    """How series are read.

    Args:
        strict: as :func:`load_volume`.
        gaps: as :func:`load_volume`.
        max_bytes: as :func:`load_volume`.
        suv: PET as SUV by body weight.
    """

    strict: bool = False
    gaps: Gaps = "refuse"
    max_bytes: int = MAX_BYTES
    suv: bool = True


def load(where: Series | Path, name: str, how: Reading) -> Volume:
    """Read a series.

    Args:
        where: the series, or the folder that it is found in again.
        name: its id there.
        how: to read it.
    """
    series = None if isinstance(where, Series) else name
    volume = load_volume(where, how.strict, series=series, gaps=how.gaps, max_bytes=how.max_bytes)
    return suv_by_weight(volume) if how.suv and volume.series.modality == "PT" else volume


def survey_whole(folder: Path) -> list[Found | Ignored]:
    """Series and files left out below a folder, told when all of it was seen."""
    return list(survey(folder, settled=None))


def find_by_rules(
    volume: Volume,
    max_slice_spacing_mm: float,
    working_spacing_mm: float | None,
    dicom: bool = False,
) -> RuleFindings:
    """Segment and measure by rules, then prepare what the network sees.

    Args:
        volume: HU.
        max_slice_spacing_mm: a step between slices above this draws a warning.
        working_spacing_mm: of the network's grid; ``None``: no network runs after.
        dicom: DICOM objects will be written: what that needs is imported meanwhile.

    Raises:
        InputError: see :func:`analyse`.
    """
    clock = StageClock()
    analysis = analyse(volume, max_slice_spacing_mm)
    clock.mark("rules")
    seen, sizes = None, {}
    if working_spacing_mm is not None:
        seen = prepare_input(volume, analysis, working_spacing_mm)
    if seen is not None:
        clock.mark("resample")
    else:
        sizes = measured(volume, analysis.labels, titles([]))
        clock.mark("measure")
    if dicom:
        import_ahead("highdicom", "pydicom.sr.codedict")
    trim()  # what the rules held on their way is not held beside the network's results
    return RuleFindings(analysis, seen, sizes, clock.seconds)


def look_closer(
    answer: Tensor, seen: NetworkInput, window: tuple[int, int, int]
) -> tuple[Candidates, Tensor | None]:
    """The network's candidates, and a window around each for a second look.

    Args:
        answer: (Z, Y, X) uint8 labels on the working grid.
        seen: what the network was shown.
        window: (z, y, x) voxels.

    Returns:
        The candidates, and rows (candidates, 1, z, y, x); ``None`` where there are no candidates.
    """
    found = find_candidates(answer)
    return found, recheck(seen, found, window) if found.boxes else None


def measure_nodules(
    volume: Volume,
    analysis: Analysis,
    seen: NetworkInput,
    found: Candidates,
    logits: Tensor | None,
    thresholds: Thresholds,
) -> NoduleFindings:
    """Measure the candidates, then everything that is labelled.

    Args:
        volume: HU.
        analysis: by rules.
        seen: what the network was shown.
        found: its candidates.
        logits: (candidates, 2, z, y, x), its second look; ``None`` where there are no candidates.
        thresholds: what a candidate must reach to be told.
    """
    clock = StageClock()
    probabilities = [] if logits is None else confidences(logits, found)
    nodules, patches = measure(volume, analysis, seen, found, probabilities, thresholds)
    clock.mark("nodules")
    trim()
    sizes = measured(volume, analysis.labels, titles(nodules), patches)
    clock.mark("measure")
    trim()
    return NoduleFindings(patches, nodules, sizes, clock.seconds)


def titles(nodules: list[Nodule]) -> dict[int, tuple[str, str]]:
    """Key and title of each structure, by its label."""
    named = {LUNG_RIGHT: ("lung_right", "Right lung"), LUNG_LEFT: ("lung_left", "Left lung")}
    for one in nodules:
        name = f"Nodule candidate {one.number}"
        named[NODULE + one.number - 1] = f"nodule_{one.number}", name
    return named
