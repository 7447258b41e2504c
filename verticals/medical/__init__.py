"""Chest CT from DICOM: volumes with their true geometry, measurements, nodules and reports."""

from typing import TYPE_CHECKING

from plinth.faces import loads_on_demand

if TYPE_CHECKING:
    from plinth.verticals.medical.dicom.loader import DICOMLoader, LoadedVolume, load_volume
    from plinth.verticals.medical.vertical import CtAnalysis, CtSettings
    from plinth.verticals.medical.volumes.volume import Volume

__all__ = ["CtAnalysis", "CtSettings", "DICOMLoader", "LoadedVolume", "Volume", "load_volume"]

__getattr__ = loads_on_demand(
    __name__,
    {
        "dicom.loader": "DICOMLoader LoadedVolume load_volume",
        "vertical": "CtAnalysis CtSettings",
        "volumes.volume": "Volume",
    },
)
