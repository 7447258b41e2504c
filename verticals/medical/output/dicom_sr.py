"""The measurements as a DICOM structured report by TID 1500 (PS3.16), beside their segments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydicom
from pydicom import Dataset

from plinth import __version__
from plinth.verticals.medical.ct.findings import Finding
from plinth.verticals.medical.output.derived import (
    clean_header,
    derived,
    made_by,
    source_headers,
)
from plinth.verticals.medical.output.report import RESEARCH_USE, RULES, CtReport, CtResult

SCHEME = "99PLINTH"
UNITS = {"mL": "milliliter", "HU": "Hounsfield unit", "%": "percent"}
UCUM = {"mL": "mL", "HU": "[hnsf'U]", "%": "%"}
PARTS = ("lung_right", "lung_left", "lungs", "airway", "body", "bone", "tissue")
"""What is measured, by the first part of a finding's key."""

TITLES = {"lung_right": "Right lung", "lung_left": "Left lung"}
"""Segments of the SEG that a part of the report is about."""


def write_measurements(result: CtResult, segmentation: Path | None, path: Path) -> None:
    """Write every measured number as a measurement of a Comprehensive 3D SR.

    Each lung refers to its segment; what has none is a group of measurements of the source images.
    Values that were withheld are left out. The file carries the patient's identity, as the
    archive needs it.

    Args:
        result: the report, and the volume whose images it is of.
        segmentation: the SEG of the same result, or ``None`` where none was written.
        path: the file.

    Raises:
        InputError: there are no source images, or their headers do not allow a report.
    """
    import highdicom  # heavy: only when a report is written

    sources = source_headers(result.artefacts.volume)
    seg = pydicom.dcmread(segmentation, stop_before_pixels=True) if segmentation else None
    evidence = [*sources, clean_header(seg)] if seg is not None else sources
    with derived("DICOM SR"):
        document = highdicom.sr.Comprehensive3DSR(
            evidence=evidence,
            content=_content(result.response, sources, seg),
            is_complete=True,
            is_final=False,
            **made_by(RULES, 901, "CT measurements, research use only"),
        )
    document.save_as(path)


def _content(report: CtReport, sources: list[Dataset], seg: Dataset | None) -> Any:
    from highdicom import sr
    from pydicom.sr.codedict import codes

    device = sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
            uid=_uid(), name=f"{RULES} {__version__}", manufacturer_name="Plinth"
        ),
    )
    groups = [_group(part, report, sources, seg) for part in PARTS]
    return sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=device),
        procedure_reported=codes.LN.CTUnspecifiedBodyRegion,
        imaging_measurements=[group for group in groups if group is not None],
    )


def _group(part: str, report: CtReport, sources: list[Dataset], seg: Dataset | None) -> Any:
    """The measurements of one structure, or ``None`` where nothing of it was measured."""
    from highdicom import sr

    found = [f for f in report.findings if _part(f) == part and f.value is not None]
    if not found:
        return None
    title = found[0].title.partition(",")[0].removesuffix(" volume")
    common: dict[str, Any] = {
        "tracking_identifier": sr.TrackingIdentifier(uid=_uid(), identifier=title),
        "finding_type": _concept(part, title),
        "measurements": [_measurement(one) for one in found],
        "algorithm_id": sr.AlgorithmIdentification(
            name=RULES, version=__version__, parameters=_parameters(report)
        ),
    }
    number = _segment_number(seg, TITLES.get(part))
    if seg is None or number is None:
        first = sr.SourceImageForMeasurementGroup.from_source_image(sources[0])
        return sr.MeasurementsAndQualitativeEvaluations(**common, source_images=[first])
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        **common,
        referenced_segment=sr.ReferencedSegment(
            sop_class_uid=seg.SOPClassUID,
            sop_instance_uid=seg.SOPInstanceUID,
            segment_number=number,
            source_series=sr.SourceSeriesForSegmentation(sources[0].SeriesInstanceUID),
        ),
    )


def _measurement(finding: Finding) -> Any:
    from highdicom import sr
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    known = {"volume": codes.SCT.Volume, "density": codes.DCM.MeanAttenuationCoefficient}
    kind = finding.key.rpartition("_")[2]
    assert finding.value is not None
    return sr.Measurement(
        name=known.get(kind) or _concept(kind, finding.title.rpartition(", ")[2]),
        value=finding.value,
        unit=CodedConcept(UCUM[finding.unit], "UCUM", UNITS[finding.unit]),
    )


def _parameters(report: CtReport) -> list[str]:
    return [RESEARCH_USE, *report.warnings]


def _part(finding: Finding) -> str:
    return finding.key.rpartition("_")[0]


def _segment_number(seg: Dataset | None, label: str | None) -> int | None:
    segments = seg.SegmentSequence if seg is not None else []
    return next((int(one.SegmentNumber) for one in segments if one.SegmentLabel == label), None)


def _concept(value: str, meaning: str) -> Any:
    """A concept of the project's own coding scheme."""
    from highdicom.sr import CodedConcept

    return CodedConcept(value.upper()[:16], SCHEME, meaning[:64])


def _uid() -> str:
    import highdicom

    return str(highdicom.UID())
