"""The measurements as a DICOM structured report by TID 1500 (PS3.16), beside their segments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydicom
from pydicom import Dataset

from plinth import __version__
from plinth.engine import InputError
from plinth.verticals.medical.output.derived import (
    clean_header,
    derived,
    made_by,
    source_headers,
)
from plinth.verticals.medical.output.report import CtReport
from plinth.verticals.medical.volumes.measured import Measured, Range
from plinth.verticals.medical.volumes.volume import Volume

SCHEME = "99PLINTH"
LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"
"""Label Map Segmentation Storage."""
UCUM = {
    "mL": ("mL", "milliliter"),
    "mm": ("mm", "millimeter"),
    "cm²": ("cm2", "square centimeter"),
    "HU": ("[hnsf'U]", "Hounsfield unit"),
    "%": ("%", "percent"),
    "bit": ("bit", "bit"),
    "SUVbw": ("g/ml{SUVbw}", "Standardized Uptake Value body weight"),
    "BQML": ("Bq/ml", "Becquerels/milliliter"),
    "": ("1", "no units"),
}
"""Code and meaning of a unit, by how the report calls it; all others are arbitrary units."""

SIZES = {
    "volume_ml": ("mL", "YEKZ", "Volume from Voxel Summation"),
    "mesh_volume_ml": ("mL", "RNU0", "Volume of Mesh"),
    "surface_cm2": ("cm²", "C0JK", "Surface Area of Mesh"),
    "sphericity": ("", "QCFX", "Sphericity"),
    "diameter_mm": ("mm", "L0JK", "Maximum 3D Diameter of a Mesh"),
    "diameter_slice_mm": ("mm", "", "Maximum diameter in one slice"),
    "diameter_column_mm": ("mm", "", "Maximum diameter at one row index"),
    "diameter_row_mm": ("mm", "", "Maximum diameter at one column index"),
}
"""Unit, IBSI code and meaning of what a structure's size is told as; without a code, our own."""

STATISTICS = {
    "mean": ("Q4LE", "Mean intensity"),
    "standard_deviation": ("", "Standard deviation of intensity"),
    "minimum": ("1GSF", "Minimum intensity"),
    "percentile_10": ("QG58", "10th intensity percentile"),
    "median": ("Y12H", "Median intensity"),
    "percentile_90": ("8DWT", "90th intensity percentile"),
    "maximum": ("84IY", "Maximum intensity"),
    "interquartile_range": ("SALO", "Intensity interquartile range"),
    "mean_absolute_deviation": ("", "Mean absolute deviation of intensity"),
    "skewness": ("KE2A", "Intensity skewness"),
    "kurtosis": ("", "Kurtosis, 3 for a normal distribution"),
    "entropy": ("TLU2", "Intensity histogram entropy"),
    "uniformity": ("BJ5W", "Intensity histogram uniformity"),
}
"""IBSI code and meaning of a statistic of a structure's values."""

OWN_UNIT = {"skewness": "", "kurtosis": "", "entropy": "bit", "uniformity": ""}
"""Units of the statistics that are not in the unit of the values."""


def write_measurements(
    report: CtReport, volume: Volume, model: str, segmentation: Path | None, path: Path
) -> None:
    """Write every measured number as a measurement of a Comprehensive 3D SR.

    Each structure refers to its segment; what has none is a group of measurements of the source
    images. A structure in a label map refers to the whole map and carries the Tracking UID of its
    segment: validators and viewers of 2026 do not take segment numbers in references to that class.
    Each names the algorithm or network that made it, its version and the digest of its weights.
    Values that were withheld are left out. The file carries the patient's identity, as the archive
    needs it.

    Args:
        report: the numbers.
        volume: whose images they are of.
        model: the rules or the network that made them.
        segmentation: the SEG of the same result, or ``None`` where none was written.
        path: the file.

    Raises:
        InputError: nothing was measured, there are no source images, or their headers do not allow
            a report.
    """
    import highdicom  # heavy: only when a report is written

    if not report.structures and all(one.value is None for one in report.findings):
        raise InputError("nothing was measured", reason="empty")
    sources = source_headers(volume)
    seg = pydicom.dcmread(segmentation, stop_before_pixels=True) if segmentation else None
    if seg is not None:
        del seg.PerFrameFunctionalGroupsSequence  # long, and nothing here refers to a frame
    # A SEG refers to every image; beside it the first one stands for them.
    evidence = [sources[0], clean_header(seg)] if seg is not None else sources
    with derived("DICOM SR", sources):
        content = _content(report, volume, model, sources, seg)[0]
        document = highdicom.sr.Comprehensive3DSR(
            evidence=evidence,
            content=_without_numbers(content),
            is_complete=True,
            is_final=False,
            **made_by(model, 901, "Measurements, research use only"),
        )
        document.ContentSequence = content.ContentSequence
    document.save_as(path)


def _content(
    report: CtReport, volume: Volume, model: str, sources: list[Dataset], seg: Dataset | None
) -> Any:
    from highdicom import sr
    from pydicom.sr.codedict import codes

    device = sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
            uid=_uid(), name=f"{model} {__version__}", manufacturer_name="Plinth"
        ),
    )
    procedures = {
        "CT": codes.LN.CTUnspecifiedBodyRegion,
        "MR": codes.LN.MRIUnspecifiedBodyRegion,
        "PT": codes.LN.PETUnspecifiedBodyRegion,
    }
    modality = volume.series.modality
    return sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=device),
        procedure_reported=procedures.get(modality) or _concept(modality, f"{modality} images"),
        imaging_measurements=[
            _group(part, title, numbers, report, sources, seg)
            for part, title, numbers in _parts(report)
        ],
    )


def _without_numbers(item: Dataset) -> Dataset:
    """A container without its measurements: highdicom copies all of it twice, to look at its
    references, which measurements have none of."""
    if item.ValueType != "CONTAINER":
        return item
    thin = Dataset()
    thin.update({e.tag: e for e in item if e.keyword != "ContentSequence"})
    thin.ContentSequence = [
        _without_numbers(one) for one in item.ContentSequence if one.ValueType != "NUM"
    ]
    return thin


def _parts(report: CtReport) -> list[tuple[str, str, list[Any]]]:
    """Key, title and measurements of each structure that something was measured of."""
    titles = {key: one.title for key, one in report.structures.items()}
    parts: dict[str, list[Any]] = {}
    for one in report.findings:
        if one.value is None:
            continue
        key, _, kind = one.key.rpartition("_")
        what = one.title.rpartition(", ")[2]
        titles.setdefault(key, one.title.partition(",")[0].removesuffix(" volume"))
        parts.setdefault(key, []).append(_measurement(kind, what, one.value, one.unit))
    for key, structure in report.structures.items():
        parts.setdefault(key, []).extend(_of_structure(structure))
    return [(key, titles[key], numbers) for key, numbers in parts.items()]


def _of_structure(structure: Measured) -> list[Any]:
    apart = structure.uncertainty
    numbers = [
        _measurement(
            key.partition("_mm")[0], meaning, getattr(structure, key), unit, code, apart.get(key)
        )
        for key, (unit, code, meaning) in SIZES.items()
    ]
    numbers += [
        _measurement(
            key,
            meaning,
            getattr(structure.values, key),
            OWN_UNIT.get(key, structure.unit),
            code,
            apart.get(key),
        )
        for key, (code, meaning) in STATISTICS.items()
    ]
    return numbers


def _group(
    part: str,
    title: str,
    numbers: list[Any],
    report: CtReport,
    sources: list[Dataset],
    seg: Dataset | None,
) -> Any:
    from highdicom import sr

    segment, maker = _segment(seg, title), report.maker(part)
    common: dict[str, Any] = {
        "tracking_identifier": sr.TrackingIdentifier(
            uid=segment.TrackingUID if segment is not None else _uid(), identifier=title
        ),
        "finding_type": _concept(part, title),
        "measurements": numbers,
        "algorithm_id": sr.AlgorithmIdentification(
            name=maker.name,
            version=maker.version,
            parameters=[*maker.origin.plain, *report.warnings],
        ),
    }
    if seg is None or segment is None or seg.SOPClassUID == LABEL_MAP:
        images = [sr.SourceImageForMeasurementGroup.from_source_image(sources[0])]
        if seg is not None and segment is not None:
            whole = sr.SourceImageForMeasurementGroup(seg.SOPClassUID, seg.SOPInstanceUID)
            images.append(whole)
        return sr.MeasurementsAndQualitativeEvaluations(**common, source_images=images)
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        **common,
        referenced_segment=sr.ReferencedSegment(
            sop_class_uid=seg.SOPClassUID,
            sop_instance_uid=seg.SOPInstanceUID,
            segment_number=int(segment.SegmentNumber),
            source_series=sr.SourceSeriesForSegmentation(sources[0].SeriesInstanceUID),
        ),
    )


def _measurement(
    kind: str,
    meaning: str,
    value: float,
    unit: str,
    ibsi: str = "",
    apart: Range | None = None,
) -> Any:
    from highdicom import sr
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    known = {"density": codes.DCM.MeanAttenuationCoefficient}
    if not ibsi:
        known["volume"] = codes.SCT.Volume
    name = CodedConcept(ibsi, "IBSI", meaning) if ibsi else None
    code, spelled = UCUM.get(unit, ("[arb'U]", "arbitrary unit"))
    in_unit = CodedConcept(code, "UCUM", spelled)
    return sr.Measurement(
        name=name or known.get(kind) or _concept(kind, meaning),
        value=value,
        unit=in_unit,
        properties=None if apart is None else _uncertainty(apart, in_unit),
    )


def _uncertainty(apart: Range, unit: Any) -> Any:
    """Upper and lower range of uncertainty (TID 310), in the unit of the measurement."""
    from highdicom import sr

    properties = sr.MeasurementProperties(
        upper_measurement_uncertainty=apart.upper, lower_measurement_uncertainty=apart.lower
    )
    for item in properties:  # highdicom writes them without a unit
        item.MeasuredValueSequence[0].MeasurementUnitsCodeSequence = [unit]
    return properties


def _segment(seg: Dataset | None, label: str) -> Dataset | None:
    segments = seg.SegmentSequence if seg is not None else []
    return next((one for one in segments if one.SegmentLabel == label[:64]), None)


def _concept(value: str, meaning: str) -> Any:
    """A concept of the project's own coding scheme."""
    from highdicom.sr import CodedConcept

    return CodedConcept(value.upper()[:16], SCHEME, meaning[:64])


def _uid() -> str:
    import highdicom

    return str(highdicom.UID())
