"""From an archive to an archive: images come in by C-STORE or DICOMweb, results go out by STOW."""
