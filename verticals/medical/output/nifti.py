"""Values on a volume's native grid as NIfTI-1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from plinth.verticals.medical.volumes.volume import Volume

DESCRIPTION = 79
"""Bytes of ``descrip`` in a header of NIfTI-1, without its end."""


def write_nifti(
    values: npt.NDArray[Any], volume: Volume, path: Path, description: str = ""
) -> None:
    """Write values (z, y, x) on a volume's native grid as NIfTI-1, compressed.

    Args:
        values: uint8 for labels and shares, int16 or float32 for the volume's own.
        volume: whose affine says where they lie.
        path: ends with ``.nii.gz``.
        description: the first 79 bytes go into the header's ``descrip``.
    """
    import SimpleITK as sitk  # heavy: only when a file is written

    image: Any = sitk.GetImageFromArray(values)
    spacing = np.linalg.norm(volume.affine[:3, :3], axis=0)
    image.SetSpacing([float(mm) for mm in spacing])
    image.SetDirection((volume.affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(volume.affine[:3, 3].tolist())
    if description:
        fits = description.encode()[:DESCRIPTION].decode(errors="ignore")
        image.SetMetaData("ITK_FileNotes", fits)
    sitk.WriteImage(image, str(path), True, 1)
