"""The report of one study: what travels as JSON, and what its outputs are written from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from plinth import __version__
from plinth.verticals.contract import WithArtefacts
from plinth.verticals.medical.ct.analysis import Analysis
from plinth.verticals.medical.ct.findings import Finding
from plinth.verticals.medical.nodules.candidates import Nodule
from plinth.verticals.medical.volumes.measured import Measured
from plinth.verticals.medical.volumes.volume import Volume

RULES = "Plinth CT rules"
RESEARCH_USE = "Research use only, not for diagnosis."
SYNTHETIC = (
    "The nodule network was trained and measured on synthetic phantoms only; it was never "
    "validated on patients."
)


PLAN = (
    *("coarse_grid_mm", "thresholds_hu", "lungs_told_apart_by", "working_spacing_mm"),
    *("window_zyx", "network_grid", "window", "cut", "flips"),
)
"""What of a plan every output names; all of it stands in the report."""
BRIEF = 79
"""Characters that the header of a NIfTI file has for a description."""


@dataclass(frozen=True, slots=True)
class Origin:
    """How a result was made, as every output of it says.

    Args:
        told: research use, algorithm and version, network and digest of its weights, how it was
            computed and agreed with the reference, and the plan; a sentence each.
        brief: the same in at most 79 characters.
    """

    told: tuple[str, ...]
    brief: str

    @property
    def plain(self) -> tuple[str, ...]:
        """The sentences in ASCII: an object in DICOM has the character set of its source."""
        return tuple(one.replace("×", "x").encode("ascii", "replace").decode() for one in self.told)

    def text(self, most: int) -> str:
        """All sentences in ASCII, in at most ``most`` characters."""
        return " ".join(self.plain)[:most]


@dataclass(frozen=True, slots=True)
class Maker:
    """What made one part of a result, as its segment and its measurements name it.

    Args:
        name: of the algorithm or the network.
        version: of it.
        origin: how it did; it names no network that took no part.
    """

    name: str
    version: str
    origin: Origin


class Network(BaseModel):
    """The network that ran.

    Args:
        name: of the model.
        version: of the model.
        digest: SHA-256 over its weights, structure and code.
        description: what its manifest says it is.
        metrics: quality measured on synthetic phantoms, by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: str
    digest: str
    description: str
    metrics: dict[str, float]


@dataclass(frozen=True, eq=False)
class CtArtefacts:
    """What the outputs are drawn from; stays in memory.

    Args:
        volume: HU.
        analysis: its labels and regions.
        seconds: wall time by stage of the analysis.
    """

    volume: Volume
    analysis: Analysis
    seconds: dict[str, float]


class CtReport(BaseModel):
    """What was found in one CT series.

    Args:
        statement: research use only.
        algorithm: version by name of the rules that measured.
        study: pseudonym of the Study Instance UID, or the UID where the settings keep it.
        series: pseudonym of the Series Instance UID, or the UID.
        source: facts of the series, without personal data.
        geometry: the loader's verdict: ``status``, ``ok`` and ``issues`` with mm.
        grid: (x, y, z) ``voxels`` and ``spacing_mm`` of the analysed volume.
        findings: the measured numbers, with units and methods.
        nodules: candidates, largest first; ``None`` when they were not looked for
            (switched off, or no lungs).
        network: the network that looked for them.
        plan: grids, windows and thresholds the numbers depend on.
        warnings: what limits the numbers.
        seconds: time by stage; written with the outputs, empty in the engine's answer.
        peak_memory_mb: largest resident memory of the process so far, where it is known.
        structures: size and values of each segment by the definitions of pyradiomics, by key.
        outputs: by output, ``"written"`` or why not; filled in when they are written.
    """

    model_config = ConfigDict(extra="forbid")

    statement: str = RESEARCH_USE
    algorithm: dict[str, str] = Field(default_factory=lambda: {RULES: __version__})
    study: str
    series: str
    source: dict[str, Any]
    geometry: dict[str, Any]
    grid: dict[str, list[float]]
    findings: list[Finding]
    nodules: list[Nodule] | None
    network: Network | None
    plan: dict[str, Any]
    warnings: list[str]
    seconds: dict[str, float] = Field(default_factory=dict)
    peak_memory_mb: float | None = None
    structures: dict[str, Measured] = Field(default_factory=dict)
    outputs: dict[str, str] = Field(default_factory=dict)

    def origin(self) -> Origin:
        """How the result was made."""
        told = [self.statement, f"Algorithm: {words(self.algorithm)}."]
        brief = ["research use only"]
        if self.network is not None:
            by = f"{self.network.name} {self.network.version}"
            told.append(f"Network: {by}, weights SHA-256 {self.network.digest}.")
        if "computed" in self.plan:
            told.append(f"Computed by {self.plan['computed']}.")
            worst = self.plan.get("agreement", {}).get("worst")
            dice = "" if worst is None else f" Dice {worst:.4f}"
            brief.append(f"{self.plan['computed_in']}{dice}")
        if self.network is not None:
            brief += [f"weights {self.network.digest[:12]}", by]
        else:
            brief.append(words(self.algorithm))
        plan = {name: self.plan[name] for name in PLAN if name in self.plan}
        told.append(f"Plan: {words(plan)}.")
        short = "; ".join(brief).encode("ascii", "replace").decode()
        return Origin(tuple(told), short[:BRIEF])

    def maker(self, part: str) -> Maker:
        """What made a part of the result: nodules are a network's, all else by rules is not.

        Args:
            part: its key, such as ``"nodule_1"`` or ``"lung_left"``.
        """
        network, rules = self.network, RULES in self.algorithm
        if network is not None and (part.startswith("nodule_") or not rules):
            name = f"Plinth {network.name}" if rules else network.name
            return Maker(name, network.version, self.origin())
        alone = self.model_copy(update={"network": None})
        return Maker(RULES, __version__, alone.origin())

    def finding(self, key: str) -> Finding:
        """One finding by its key.

        Raises:
            KeyError: no such finding.
        """
        for one in self.findings:
            if one.key == key:
                return one
        raise KeyError(key)


CtResult = WithArtefacts[CtReport, CtArtefacts]
"""What the vertical answers: the report, and what its files are drawn from."""


def words(value: Any) -> str:
    """A setting as people write it: sizes with times, names without underscores."""
    if isinstance(value, dict):
        return ", ".join(f"{words(key)} {words(one)}" for key, one in value.items())
    if isinstance(value, list | tuple):
        return " × ".join(map(words, value))
    return value.replace("_", " ") if isinstance(value, str) else f"{value:g}"


def pseudonym(uid: str) -> str:
    """A short stand-in for a UID; whoever has the UID can compute it again."""
    return hashlib.sha256(uid.encode()).hexdigest()[:16]
