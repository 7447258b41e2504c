"""CT analysis in a worker process gives what it gives in this one, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pydicom
import pytest

from plinth.engine import Engine, Sla
from plinth.pipelines.folders.items import Finished, analyse
from plinth.verticals.medical.phantom.chest import Phantom
from plinth.verticals.medical.phantom.dicom import write_series
from plinth.verticals.medical.vertical import CtAnalysis, CtSettings

pytestmark = pytest.mark.slow


def analysed(folder: Path, out: Path, workers: int, **settings: Any) -> Finished:
    """One study from its files to its outputs."""
    vertical, before = CtAnalysis(CtSettings(**settings)), set(psutil.Process().children())
    with Engine(compute_workers=workers) as engine:
        for model in vertical.models():
            engine.add(model, batch_range=vertical.batch_range or (1, 4))
        (item,) = vertical.discover(folder)
        done = analyse(vertical, engine, item, out, sla=Sla())
        begun = set(psutil.Process().children()) - before
        assert len(begun) == workers
    return done


def untimed(path: Path) -> Any:
    """A file's content without what differs between two runs anyway: times and new UIDs."""
    if path.suffix == ".json":
        found = json.loads(path.read_text())
        assert set(found.pop("seconds")) >= {"rules", "measure", "outputs"}
        return {name: value for name, value in found.items() if name != "peak_memory_mb"}
    if path.suffix == ".dcm":
        data = pydicom.dcmread(path)
        return data.SOPClassUID, data.get("PixelData"), len(data.get("ContentSequence", ()))
    return path.read_bytes() if path.suffix in (".png", ".gz") else None


def test_a_study_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    write_series(Phantom(shape=(90, 70, 54), spacing=(3.9, 3.9, 4.0)), tmp_path / "in")
    here, there = (
        analysed(
            *(tmp_path / "in", tmp_path / f"out{n}", n),
            nodules=True,
            nifti=True,
            working_spacing_mm=3.5,
        )
        for n in (0, 1)
    )
    one, other = (done.answer.value[0] for done in (here, there))
    assert one.response.model_dump() == other.response.model_dump()
    assert one.response.nodules
    labels, theirs = one.artefacts.analysis.labels, other.artefacts.analysis.labels
    assert np.array_equal(labels, theirs)
    assert labels.any()
    assert here.encoded == there.encoded
    assert here.files == there.files
    assert len(here.files) > 5
    for name in here.files:
        assert untimed(here.folder / name) == untimed(there.folder / name), name
