"""A real Orthanc on loopback, and a study of the chest phantom to give it."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from pydicom import Dataset, dcmread
from serving import until

from plinth.verticals.medical.phantom.chest import Phantom
from plinth.verticals.medical.phantom.dicom import write_series

PROGRAM = shutil.which("Orthanc")
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
INSTALLED = PROGRAM is not None and PLUGIN.exists()


def free_port() -> int:
    with socket.socket() as plug:
        plug.bind(("127.0.0.1", 0))
        port: int = plug.getsockname()[1]
        return port


class Orthanc:
    """One archive: its data outlive being killed and started again.

    Args:
        folder: for its data.
        plinth_port: where it sends images to.
        tls: speak DICOM over TLS alone: folder of ``ca.pem``, ``orthanc.pem`` and ``orthanc.key``.
    """

    def __init__(self, folder: Path, plinth_port: int, tls: Path | None = None) -> None:
        self.folder = folder
        self.http_port, self.dicom_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.http_port}"
        self.web = f"{self.url}/dicom-web"
        self._process: subprocess.Popen[bytes] | None = None
        settings = {
            "Name": "test",
            "StorageDirectory": str(folder / "storage"),
            "IndexDirectory": str(folder / "storage"),
            "HttpPort": self.http_port,
            "DicomPort": self.dicom_port,
            "DicomAet": "ORTHANC",
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "DicomAlwaysAllowStore": True,
            "DicomModalities": {
                "plinth": {
                    "AET": "PLINTH",
                    "Host": "127.0.0.1",
                    "Port": plinth_port,
                    "UseDicomTls": tls is not None,
                }
            },
            "Plugins": [str(PLUGIN)],
        }
        if tls is not None:
            settings |= {
                "DicomTlsEnabled": True,
                "DicomTlsCertificate": str(tls / "orthanc.pem"),
                "DicomTlsPrivateKey": str(tls / "orthanc.key"),
                "DicomTlsTrustedCertificates": str(tls / "ca.pem"),
            }
        folder.mkdir(exist_ok=True)
        (folder / "orthanc.json").write_text(json.dumps(settings))

    def start(self) -> Orthanc:
        """Start it and wait until it answers."""
        with (self.folder / "said.txt").open("ab") as said:
            self._process = subprocess.Popen(
                [str(PROGRAM), str(self.folder / "orthanc.json")], stdout=said, stderr=said
            )
        until(self._answers)
        return self

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.folder / "said.txt").read_text()[-2000:]
        try:
            return httpx.get(f"{self.url}/system", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """End it at once."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def upload(self, files: list[Path]) -> str:
        """Give it files; Orthanc's own id of their study."""
        for path in files:
            told = httpx.post(f"{self.url}/instances", content=path.read_bytes(), timeout=60)
            told.raise_for_status()
        parent: str = told.json()["ParentStudy"]
        return parent

    def send_to_plinth(self, study: str) -> None:
        """Send a study by C-STORE, as a rule of an archive would."""
        told = httpx.post(f"{self.url}/modalities/plinth/store", content=study, timeout=60)
        told.raise_for_status()
        assert told.json()["FailedInstancesCount"] == 0

    def modalities(self, study_uid: str) -> Counter[str]:
        """Instances of a study by modality, found by query (QIDO-RS)."""
        found: Counter[str] = Counter()
        path = f"{self.web}/studies/{study_uid}/series"
        answer = httpx.get(path, params={"includefield": "00201209"}, timeout=60)
        answer.raise_for_status()
        for one in answer.json() if answer.content else []:
            found[one["00080060"]["Value"][0]] += one["00201209"]["Value"][0]
        return found

    def files(self, place: Path, study_uid: str) -> Iterator[Dataset]:
        """Each instance of a study, by way of a file."""
        for one in httpx.get(f"{self.url}/instances", timeout=60).json():
            answer = httpx.get(f"{self.url}/instances/{one}/file", timeout=60)
            place.write_bytes(answer.content)
            found = dcmread(place)
            if study_uid == found.StudyInstanceUID:
                yield found


def eventually(condition: Callable[[], bool]) -> None:
    """Look until it holds, for ten minutes at most: a study is analysed meanwhile."""
    pause = threading.Event()
    for _ in range(12_000):
        if condition():
            return
        pause.wait(0.05)
    raise AssertionError("it did not come true within ten minutes")


def study(folder: Path, seed: int = 0, **options: Any) -> list[Path]:
    """A chest of 24 slices, which has lungs."""
    small = {"shape": (80, 70, 24), "spacing": (4.3, 4.9, 8.5), "seed": seed}
    return write_series(Phantom(**{**small, **options}), folder)
