"""Chest CT from DICOM: volumes with their true geometry, measurements, nodules and reports."""

from plinth.verticals.medical.dicom.loader import DICOMLoader, LoadedVolume, load_volume
from plinth.verticals.medical.vertical import CtAnalysis, CtSettings
from plinth.verticals.medical.volumes.volume import Volume

__all__ = ["CtAnalysis", "CtSettings", "DICOMLoader", "LoadedVolume", "Volume", "load_volume"]
