"""Archives and forms for the tests of uploads, honest and hostile."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Iterable

Files = Iterable[tuple[str, bytes]]
BOUNDARY = "a-boundary"
FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
ZIP = {"content-type": "application/zip"}


def zipped(files: Files, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip archive; names may repeat."""
    packed = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(packed, "w", method) as archive:
        warnings.simplefilter("ignore", UserWarning)  # of a name that repeats
        for name, content in files:
            entry = zipfile.ZipInfo(name)
            entry.compress_type = method
            archive.writestr(entry, content)
    return packed.getvalue()


def form(files: Files) -> bytes:
    """A multipart form of file parts, as a browser writes it: names in UTF-8."""
    parts = [
        b'--%s\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\n%s\r\n'
        % (BOUNDARY.encode(), name.encode(), content)
        for name, content in files
    ]
    return b"".join(parts) + b"--%s--\r\n" % BOUNDARY.encode()
