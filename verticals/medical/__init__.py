"""Chest CT from DICOM: volumes with their true geometry, measurements, nodules and reports."""

from verticals.medical.loader import DICOMLoader, LoadedVolume, load_volume
from verticals.medical.vertical import CtAnalysis, CtSettings
from verticals.medical.volume import Volume

__all__ = ["CtAnalysis", "CtSettings", "DICOMLoader", "LoadedVolume", "Volume", "load_volume"]
