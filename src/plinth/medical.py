"""CT analysis from DICOM: the public names of ``plinth.verticals.medical``."""

from plinth.verticals.medical import (
    CtAnalysis,
    CtSettings,
    DICOMLoader,
    LoadedVolume,
    Volume,
    load_volume,
)

__all__ = ["CtAnalysis", "CtSettings", "DICOMLoader", "LoadedVolume", "Volume", "load_volume"]
