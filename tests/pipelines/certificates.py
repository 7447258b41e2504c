"""Certificates of an authority of the test's own, by ``openssl``."""

from __future__ import annotations

import subprocess
from pathlib import Path


def signed(folder: Path, name: str, days: int = 30, rsa: bool = False) -> tuple[Path, Path]:
    """Certificate and key of ``name``, signed by the folder's own authority, ``ca.pem``.

    Args:
        folder: where the files are.
        name: of the subject.
        days: it is valid from now on; negative: it was valid that long ago.
        rsa: with a key of RSA, as DICOM's profiles of TLS want it, instead of a curve's.
    """

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    kind = ("rsa:2048",) if rsa else ("ec", "-pkeyopt", "ec_paramgen_curve:P-256")
    new = ("req", "-newkey", *kind, "-nodes")
    if not (folder / "ca.pem").exists():
        openssl(*new, "-x509", "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.pem")
    openssl(*new, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    openssl(
        *("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key"),
        *("-CAcreateserial", "-extfile", "names", "-days", str(days), "-out", f"{name}.pem"),
    )
    return folder / f"{name}.pem", folder / f"{name}.key"
