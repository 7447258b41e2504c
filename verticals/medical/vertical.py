"""CT analysis as a vertical: folders of DICOM in; report, segmentation and pictures out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from plinth import __version__
from plinth.engine import Call, Compute, Flow, InputError, Model, ModelStore, Sla, Tiling
from plinth.verticals.contract import Item, LeftOut, Settings, Vertical, WithArtefacts
from plinth.verticals.medical.ct.analysis import MIN_SLICES, Analysis
from plinth.verticals.medical.ct.findings import Finding
from plinth.verticals.medical.ct.segment import BONE_HU, COARSE_MM, LUNG_HU, TISSUE_HU
from plinth.verticals.medical.dicom.choose import LISTED
from plinth.verticals.medical.dicom.discover import SETTLED, Found, Series, survey
from plinth.verticals.medical.dicom.walk import Ignored
from plinth.verticals.medical.mr.brain import (
    SOURCE,
    WORTH,
    check_head,
    check_labels,
    check_tissue,
)
from plinth.verticals.medical.networks.agreement import Agreement
from plinth.verticals.medical.networks.analysis import Segmentation, segment, window_of
from plinth.verticals.medical.networks.load import Network as UserNetwork
from plinth.verticals.medical.networks.load import load_network
from plinth.verticals.medical.networks.outputs import write_segmentation_outputs
from plinth.verticals.medical.nodules.candidates import NetworkInput, Nodule, Thresholds
from plinth.verticals.medical.nodules.network import STRIDE
from plinth.verticals.medical.output.derived import absent_uids
from plinth.verticals.medical.output.outputs import write_outputs
from plinth.verticals.medical.output.report import (
    SYNTHETIC,
    CtArtefacts,
    CtReport,
    CtResult,
    Network,
    pseudonym,
)
from plinth.verticals.medical.phantom.chest import Phantom
from plinth.verticals.medical.steps import (
    NoduleFindings,
    Reading,
    StageClock,
    find_by_rules,
    load,
    look_closer,
    measure_nodules,
    survey_whole,
)
from plinth.verticals.medical.volumes.volume import SeriesFacts, Verdict, Volume

STORE = Path(__file__).parent / "store"
MODEL = "nodules"
KEPT = 64
"""Series whose headers are kept from when they are found until they are loaded."""


class NetworkSettings(Settings):
    """The table ``[verticals.medical.network]``: a network of the user's own.

    Args:
        model: a MONAI bundle, an nnU-Net v2 or MeshNet folder, or a ``.ts``, ``.pt2`` or
            ``.onnx`` file with its JSON beside it.
        flips: average its answers over all eight ways to flip a window.
        uncertainty: also write how sure it is of each voxel, ``uncertainty.nii.gz``.
        overlap: of blended windows, instead of the network's own.
        memory_mb: MB for the intermediate results of one window, where its size is free.
    """

    model: Path
    flips: bool = False
    uncertainty: bool = False
    overlap: float | None = Field(default=None, ge=0, le=0.9)
    memory_mb: int = Field(default=1000, ge=50)


class BrainSettings(Settings):
    """The table ``[verticals.medical.brain]``: brain tissue of T1-weighted MR beside CT.

    Args:
        model: a MeshNet folder of brainchop that labels grey and white matter.
        memory_mb: MB for the intermediate results of one window.
    """

    model: Path
    memory_mb: int = Field(default=1000, ge=50)


class CtSettings(Settings):
    """The table ``[verticals.medical]``.

    Args:
        store: model store with the model ``nodules``; the one in the package by default.
        version: of the model; the newest by default.
        nodules: look for nodules; off, since the network was never measured on patients.
        strict: refuse series whose geometry is not regular instead of repairing them.
        burned_in: ``"skip"`` series whose Burned In Annotation is YES, or ``"analyse"`` them.
        gaps: ``"refuse"`` series with slices missing, or ``"fill"`` the gaps by interpolation.
        max_volume_mb: MiB of voxels of one series, at most; more is refused before it is read.
        pet: PET as ``"suv"`` by body weight, refused where the headers do not allow it for
            certain, or the ``"stored"`` values in their own unit.
        working_spacing_mm: isotropic spacing of the network's grid. The packaged weights were
            trained at 1.5; others need others.
        window: (z, y, x) voxels of one window, multiples of 4. Windows are the units that
            urgent work interleaves with, so small ones keep others' promises.
        overlap: share of a window shared with its neighbour.
        min_nodule_mm: equivalent diameter below which candidates are dropped.
        min_confidence: confidence below which candidates are dropped.
        max_slice_spacing_mm: steps between slices above this draw a warning.
        page: write ``report.html``.
        pictures: write PNGs.
        key_images: nodules that get a picture, at most.
        segmentation: write ``segmentation.dcm``, which carries the source's patient identity.
        segmentation_type: ``"binary"``, or ``"labelmap"``: smaller, not yet read everywhere.
        contours: write ``structures.dcm``, an RT Structure Set with the same identity.
        nifti: write ``segmentation.nii.gz``; a network's own is always written.
        volume: write ``volume.nii.gz``, the images as one file, which a page of studies shows.
        captures: write the pictures as DICOM too, marked not for diagnosis.
        measurements: write ``measurements.dcm``, a structured report with the same identity.
        keep_uids: put the source's UIDs into the report instead of pseudonyms.
        network: a network of the user's own, which then runs instead of the CT analysis.
        brain: T1-weighted MR of heads is analysed beside CT: grey and white matter.
    """

    store: Path | None = None
    version: str | None = None
    nodules: bool = False
    strict: bool = False
    burned_in: Literal["skip", "analyse"] = "skip"
    gaps: Literal["refuse", "fill"] = "refuse"
    max_volume_mb: int = Field(default=4096, ge=1)
    pet: Literal["suv", "stored"] = "suv"
    working_spacing_mm: float = Field(default=1.5, ge=0.5, le=4)
    window: tuple[int, int, int] = (32, 48, 48)
    overlap: float = Field(default=0.25, ge=0, le=0.9)
    min_nodule_mm: float = Field(default=4.0, ge=0, le=100)
    min_confidence: float = Field(default=0.5, ge=0, le=1)
    max_slice_spacing_mm: float = Field(default=3.0, gt=0)
    page: bool = True
    pictures: bool = True
    key_images: int = Field(default=6, ge=0, le=50)
    segmentation: bool = True
    segmentation_type: Literal["binary", "labelmap"] = "binary"
    contours: bool = False
    nifti: bool = False
    volume: bool = False
    captures: bool = False
    measurements: bool = True
    keep_uids: bool = False
    network: NetworkSettings | None = None
    brain: BrainSettings | None = None

    @field_validator("window")
    @classmethod
    def _whole(cls, window: tuple[int, int, int]) -> tuple[int, int, int]:
        if any(size % STRIDE or not 16 <= size <= 256 for size in window):
            raise ValueError(f"expected multiples of {STRIDE} from 16 to 256")
        return window


@dataclass(frozen=True, eq=False)
class StudyRequest:
    """One series to analyse.

    Args:
        volume: HU with geometry, verdict and the facts of its series.
    """

    volume: Volume


SegmentationResult = WithArtefacts[CtReport, Segmentation]
"""What the vertical answers where a network of the user's own runs."""


@dataclass(eq=False)
class Installed:
    """A network, and what is known of it from one study to the next.

    Args:
        network: read once for all studies.
        agreed: how its plan agreed with the reference on the first study.
    """

    network: UserNetwork
    agreed: Agreement | None = None

    def models(self) -> list[Model]:
        """As the engine runs it, and the reference."""
        finds = self.network.finds
        models = [self.network.model, self.network.reference]
        return models if finds is None else [*models, finds.reference]

    def segment(
        self, volume: Volume, uncertainty: bool = False, overlap: float | None = None
    ) -> Flow[Segmentation]:
        """A flow that labels a volume; see :func:`segment`."""
        found = yield from segment(
            volume, self.network, uncertainty=uncertainty, overlap=overlap, agreed=self.agreed
        )
        self.agreed = found.agreement or self.agreed
        return found


class CtAnalysis(Vertical[StudyRequest, CtResult | SegmentationResult]):
    """Volumes, lung density, bone and nodule candidates of CT series, or anybody's network."""

    name = "medical"
    summary = "CT analysis from DICOM folders: lungs, bone, body, nodule candidates; research use"
    action = "analyse"
    request = None
    response = CtReport
    settings_type = CtSettings
    settings: CtSettings
    sla = Sla()
    heavy = True
    preloaded = ("highdicom.seg", "highdicom.sr", "highdicom.spatial", "pydicom.sr.codedict")

    def __init__(self, settings: CtSettings | None = None) -> None:
        super().__init__(settings)
        self._found: dict[str, Series] = {}
        self._models: list[Model] | None = None
        self._network: Network | None = None
        self._own: Installed | None = None
        self._brain: Installed | None = None
        # Windows fill a CPU one by one; more of them at once only cost memory.
        self.batch_range = (1, 4) if self.settings.network is None else (1, 1)

    # -- what it needs -----------------------------------------------------------------------
    def models(self) -> Sequence[Model]:
        if self.settings.network is not None:
            return self._user_network(self.settings.network).models()
        brain = [] if self.settings.brain is None else self._tissue(self.settings.brain).models()
        if not self.settings.nodules:
            return brain
        if self._models is None:
            store = ModelStore(self.settings.store or STORE)
            model = store.load(MODEL, self.settings.version)
            self._models, self._network = [model], _described(model)
        return [*self._models, *brain]

    def _user_network(self, wanted: NetworkSettings) -> Installed:
        """The user's network, read once for all studies."""
        if self._own is None:
            found = load_network(wanted.model, flips=wanted.flips, uncertainty=wanted.uncertainty)
            self._own = Installed(window_of(found, wanted.memory_mb))
        return self._own

    def _tissue(self, wanted: BrainSettings) -> Installed:
        """The network for brain tissue, read once for all studies."""
        if self._brain is None:
            found = load_network(wanted.model)
            check_labels(found.recipe.labels)
            told = {"source": SOURCE, "worth": WORTH}
            found = replace(found, recipe=found.recipe.model_copy(update=told))
            self._brain = Installed(window_of(found, wanted.memory_mb))
        return self._brain

    def example(self) -> StudyRequest:
        """A slab of the chest phantom, built in memory."""
        phantom = Phantom(shape=(88, 72, 12), spacing=(4.0, 4.0, 3.0))
        return StudyRequest(phantom_volume(phantom))

    # -- folders -----------------------------------------------------------------------------
    def discover(self, folder: Path) -> Iterator[Item]:
        """CT series below a folder, zip or DICOMDIR, when all of it was seen.

        Raises:
            InputError: there are images, but no CT series that can be analysed.
        """
        found = self._sorted(folder, survey(folder, settled=None))
        yield from (one for one in found if isinstance(one, Item))

    def survey(self, folder: Path) -> Iterator[Item | LeftOut]:
        """CT series as they become complete; all else is left out with its reason.

        Raises:
            InputError: there are images, but no CT series that can be analysed.
        """
        return self._sorted(folder, survey(folder, settled=SETTLED))

    def surveying(self, folder: Path) -> Flow[list[Item | LeftOut]]:
        found: list[Found | Ignored] = yield Compute(survey_whole, folder)
        return list(self._sorted(folder, found))

    def _sorted(
        self, folder: Path, all_found: Iterable[Found | Ignored]
    ) -> Iterator[Item | LeftOut]:
        """Of all series those that can be analysed; what is left out tells why."""
        own = self.settings.network
        modalities: tuple[str, ...] = ("CT",) if self.settings.brain is None else ("CT", "MR")
        if own is not None:
            modalities = self._user_network(own).network.recipe.modality
        left: dict[str, tuple[Series, LeftOut]] = {}
        fit = 0
        for found in all_found:
            if isinstance(found, Ignored):
                yield LeftOut(Path(found.name), found.code, found.reason, failed=found.damaged)
                continue
            series = found.series
            for name in found.replaces:
                left.pop(name, None)
            unfit = _unfit(series, modalities, self.settings.burned_in)
            if unfit is not None:
                left[series.id] = series, _left_out(series, *unfit)
                continue
            fit += 1
            self._keep(series)
            facts: dict[str, Any] = {"modality": series.modality, "images": len(series.frames)}
            yield Item(series.id, _paths(series), facts, found.replaces)
        yield from (one for _, one in left.values())
        if left and not fit:
            lines = [f"{series.describe()}: {one.message}" for series, one in left.values()]
            more = [f"and {len(lines) - LISTED} more"] * (len(lines) > LISTED)
            raise InputError(
                f"{folder.name} holds no {' or '.join(modalities) or 'image'} series to analyse: "
                f"{'; '.join(lines[:LISTED] + more)}",
                hint=f"give axial images of at least {MIN_SLICES} slices",
                reason="no_ct",
            )

    def _keep(self, series: Series) -> None:
        """Remember a series until it is loaded; the oldest is found again if it is needed."""
        self._found[series.id] = series
        while len(self._found) > KEPT:
            self._found.pop(next(iter(self._found)), None)

    def hand_over(self, item: Item) -> Series | None:
        return self._found.pop(item.id, None)

    def take_over(self, item: Item, known: Series | None) -> None:
        if known is not None:
            self._keep(known)

    def load(self, item: Item) -> StudyRequest:
        return StudyRequest(self._loaded(item).run())

    def loading(self, item: Item) -> Flow[StudyRequest]:
        return StudyRequest((yield self._loaded(item)))

    def _loaded(self, item: Item) -> Compute:
        where: Series | Path | None = self._found.pop(item.id, None)
        if where is None:
            where = Path(os.path.commonpath(item.paths))
        settings = self.settings
        how = Reading(
            settings.strict, settings.gaps, settings.max_volume_mb << 20, settings.pet == "suv"
        )
        return Compute(load, where, item.id, how)

    def write(self, result: CtResult | SegmentationResult, folder: Path) -> list[Path]:
        files: list[Path] = self._written(result, folder).run()
        return files

    def writing(self, result: CtResult | SegmentationResult, folder: Path) -> Flow[list[Path]]:
        files: list[Path] = yield self._written(result, folder)
        return files

    def _written(self, result: CtResult | SegmentationResult, folder: Path) -> Compute:
        if isinstance(result.artefacts, Segmentation):
            given = (result.response, result.artefacts, folder, self.settings)
            return Compute(write_segmentation_outputs, *given)
        return Compute(write_outputs, result, folder, self.settings)

    # -- inference ---------------------------------------------------------------------------
    def infer(
        self, requests: Sequence[StudyRequest]
    ) -> Flow[list[CtResult | SegmentationResult | InputError]]:
        results: list[CtResult | SegmentationResult | InputError] = []
        own = self.settings.network
        for request in requests:
            try:
                if own is not None:
                    results.append((yield from self._segmented(request.volume, own)))
                    continue
                brain = self.settings.brain
                if brain is not None and request.volume.series.modality == "MR":
                    results.append((yield from self._brain_tissue(request.volume, brain)))
                    continue
                results.append((yield from self._study(request.volume)))
            except InputError as error:
                results.append(error)
        return results

    def _segmented(self, volume: Volume, own: NetworkSettings) -> Flow[SegmentationResult]:
        installed = self._user_network(own)
        found = yield from installed.segment(volume, own.uncertainty, own.overlap)
        return self._of_network(installed, found)

    def _brain_tissue(self, volume: Volume, wanted: BrainSettings) -> Flow[SegmentationResult]:
        installed = self._tissue(wanted)
        limits = yield Compute(check_head, volume)
        found = yield from installed.segment(volume)
        yield Compute(check_tissue, volume, found.labels, found.recipe.labels)
        found.warnings += limits
        return self._of_network(installed, found)

    def _of_network(self, installed: Installed, found: Segmentation) -> SegmentationResult:
        volume = found.volume
        warnings = [issue.message for issue in volume.verdict.issues] + found.warnings
        report = self._report_of(volume, found.findings, found.plan, warnings)
        told = {
            "algorithm": {"Plinth": __version__},
            "network": _described(installed.network.model),
            "structures": found.structures,
        }
        return WithArtefacts(report.model_copy(update=told), found)

    def _study(self, volume: Volume) -> Flow[CtResult]:
        settings, clock = self.settings, StageClock()
        spacing = settings.working_spacing_mm if settings.nodules else None
        wanted = settings.segmentation or settings.measurements or settings.contours
        given = (volume, settings.max_slice_spacing_mm, spacing, wanted)
        rules = yield Compute(find_by_rules, *given)
        clock.seconds |= rules.seconds
        analysis: Analysis = rules.analysis
        sizes, nodules, plan = rules.sizes, None, self._plan(analysis)
        if rules.network_input is not None:
            plan["network_grid_zyx"] = list(rules.network_input.grid.size)
            found = yield from self._nodules(volume, analysis, rules.network_input, clock)
            nodules, sizes = found.nodules, found.sizes
            for patch in found.patches:
                patch.put(analysis.labels)
        elif settings.nodules:
            analysis.warnings.append("no lungs were found, so nodules were not looked for")
        report = self._report(volume, analysis, nodules, plan)
        report = report.model_copy(update={"structures": sizes})
        return WithArtefacts(report, CtArtefacts(volume, analysis, clock.seconds))

    def _nodules(
        self, volume: Volume, analysis: Analysis, seen: NetworkInput, clock: StageClock
    ) -> Flow[NoduleFindings]:
        """Windows over the lungs, then one more window around each candidate."""
        settings = self.settings
        tiling = Tiling(settings.window, settings.overlap, reduce="argmax")
        clock.skip()
        answer = yield Call(MODEL, seen.rows, tiling=tiling)
        found, rows = yield Compute(look_closer, answer, seen, settings.window)
        logits = None if rows is None else (yield Call(MODEL, rows))
        if found.dropped:
            analysis.warnings.append(
                f"{found.dropped} smaller nodule candidates beyond the largest "
                f"{len(found.boxes)} were left out: these lungs are unlike what the network knows"
            )
        clock.mark("network")
        thresholds = Thresholds(settings.min_nodule_mm, settings.min_confidence)
        given = (volume, analysis, seen, found, logits, thresholds)
        told: NoduleFindings = yield Compute(measure_nodules, *given)
        clock.seconds |= told.seconds
        return told

    def _plan(self, analysis: Analysis) -> dict[str, Any]:
        plan: dict[str, Any] = {
            "coarse_grid_mm": COARSE_MM,
            "coarse_grid_zyx": list(analysis.regions.grid.size),
            "thresholds_hu": {"tissue": TISSUE_HU, "lung": LUNG_HU, "bone": BONE_HU},
            "lungs_told_apart_by": analysis.regions.split,
        }
        if self.settings.nodules:
            plan |= {
                "working_spacing_mm": self.settings.working_spacing_mm,
                "window_zyx": list(self.settings.window),
                "overlap": self.settings.overlap,
                "blend": "gaussian",
                "nodule_edge": "half maximum on native voxels",
                "min_nodule_mm": self.settings.min_nodule_mm,
                "min_confidence": self.settings.min_confidence,
            }
        return plan

    def _report(
        self,
        volume: Volume,
        analysis: Analysis,
        nodules: list[Nodule] | None,
        plan: dict[str, Any],
    ) -> CtReport:
        warnings = [issue.message for issue in volume.verdict.issues] + analysis.warnings
        if nodules is not None:
            self.models()
            warnings.append(SYNTHETIC)
        report = self._report_of(volume, analysis.findings, plan, warnings)
        network = self._network if nodules is not None else None
        return report.model_copy(update={"nodules": nodules, "network": network})

    def _report_of(
        self, volume: Volume, findings: list[Finding], plan: dict[str, Any], warnings: list[str]
    ) -> CtReport:
        facts, keep = volume.series, self.settings.keep_uids
        study = facts.study_instance_uid or facts.id
        series = facts.series_instance_uid or facts.id
        absent = absent_uids(facts)
        if absent:
            told = f"the images have no {absent}: DICOM objects made of them carry stand-ins"
            warnings = [*warnings, told]
        z, y, x = volume.shape
        return CtReport(
            study=study if keep else pseudonym(study),
            series=series if keep else pseudonym(series),
            source=facts.public(),
            geometry=volume.verdict.as_dict(),
            grid={"voxels": [x, y, z], "spacing_mm": [round(v, 4) for v in volume.spacing]},
            findings=findings,
            nodules=None,
            network=None,
            plan=plan,
            warnings=warnings,
        )


def phantom_volume(phantom: Phantom) -> Volume:
    """A phantom as a volume, without a detour through files.

    Args:
        phantom: without tilt or uneven steps.
    """
    slices = [np.rint(phantom.slice_hu(k)).astype(np.int16) for k in range(phantom.shape[2])]
    affine = np.eye(4)
    affine[:3, :3] = phantom.axes * np.asarray(phantom.spacing)
    affine[:3, 3] = phantom.position(0)
    x, y, z = phantom.shape
    facts = SeriesFacts("phantom", "CT", "", y, x, phantom.spacing, z, units="HU")
    return Volume(np.stack(slices), affine, Verdict(), replace(facts, number_of_slices=z))


def _described(model: Model) -> Network:
    spec = model.spec
    return Network(
        name=spec.name,
        version=spec.version,
        digest=model.digest(),
        description=spec.description,
        metrics=spec.metrics,
    )


def _unfit(
    series: Series, modalities: tuple[str, ...], burned_in: Literal["skip", "analyse"]
) -> tuple[str, str] | None:
    """Why a series is not analysed, in a word and in a sentence."""
    kind = series.frames[0].kind
    if series.problem is not None:
        return "not_a_volume", series.problem
    if modalities and series.modality not in modalities:
        return "other_modality", f"not {' or '.join(modalities)}"
    if series.localiser:
        return "localiser", "a localiser"
    if kind is not None:
        return "derived", f"{kind}, whose values are not analysed as HU"
    marked = any(frame.header.burned_in == "YES" for frame in series.frames)
    if marked and burned_in == "skip":
        return "burned_in", "Burned In Annotation is YES: the pixels may show who the patient is"
    if len(series.frames) < MIN_SLICES:
        return "few_images", f"fewer than {MIN_SLICES} images"
    return None


def _left_out(series: Series, reason: str, message: str) -> LeftOut:
    paths = _paths(series)
    place = paths[0] if len(paths) == 1 else Path(os.path.commonpath(paths))
    return LeftOut(place, reason, message, len(paths))


def _paths(series: Series) -> tuple[Path, ...]:
    unique = {frame.header.source.path: None for frame in series.frames}
    return tuple(sorted(unique))
