"""The whole way with a real Orthanc: study in, SEG, SR and RT Structure Set back, found by query.

Outages, lost answers and kills in between: each result is stored once.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from certificates import signed
from orthanc import Orthanc, eventually, free_port, study
from pydicom import dcmread

if not os.environ.get("PLINTH_REQUIRE_EXTRAS"):
    pytest.importorskip("pynetdicom", reason="not installed: make extras")

from commands import Command
from medical.canaries import found_in, in_preamble, planted
from prometheus_client import generate_latest
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE
from pynetdicom.sop_class import CTImageStorage

from plinth.engine import Engine
from plinth.engine.metrics import REGISTRY
from plinth.pipelines.archive.dicomweb import Unreachable
from plinth.pipelines.archive.dimse import DicomPeer
from plinth.pipelines.archive.listener import Listener
from plinth.pipelines.archive.queue import Queue, connected, status_of
from plinth.pipelines.archive.service import Service
from plinth.pipelines.archive.settings import Archive, Listen, Peer
from plinth.verticals import registry

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.needs("pynetdicom"),
    pytest.mark.usefixtures("orthanc_installed"),
]
RESULTS = {"SEG": 1, "SR": 1, "RTSTRUCT": 1}
LUNGS = {"contours": True, "page": False, "pictures": False}


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    server = Orthanc(tmp_path_factory.mktemp("orthanc"), free_port()).start()
    yield server
    server.kill()


def settings(folder: Path, **tables: Any) -> Archive:
    analyses = {"lungs": {"vertical": "medical", **LUNGS}}
    rules = [{"analysis": "lungs", "modality": "CT", "min_images": 8}]
    whole = {"folder": folder, "analyses": analyses, "rules": rules, **tables}
    return Archive.model_validate(whole)


@contextmanager
def service(wanted: Archive) -> Iterator[Queue]:
    """The service in this process, until the block ends."""
    vertical = registry.load("medical", wanted.analyses["lungs"].model_extra)
    queue = Queue(wanted.folder)
    with Engine(backend="eager") as engine:
        running = Service(wanted, {"lungs": vertical}, engine, queue)
        opened, failure = threading.Event(), list[BaseException]()

        def work() -> None:
            try:
                running.run(opened.set)
            except BaseException as error:  # noqa: BLE001 - told below
                failure.append(error)
                opened.set()

        thread = threading.Thread(target=work)
        thread.start()
        assert opened.wait(60)
        try:
            yield queue
        finally:
            running.stop()
            thread.join(60)
            assert not thread.is_alive()
            queue.close()
    assert not failure, failure


def port_of(orthanc: Orthanc) -> int:
    """Where the archive sends."""
    settings = json.loads((orthanc.folder / "orthanc.json").read_text())
    found: int = settings["DicomModalities"]["plinth"]["Port"]
    return found


def listening(orthanc: Orthanc) -> dict[str, Any]:
    return {"port": port_of(orthanc), "callers": ["ORTHANC"], "quiet_seconds": 4.0}


def peer_of(orthanc: Orthanc) -> dict[str, Any]:
    """How results go to it by C-STORE."""
    return {
        "title": "ORTHANC",
        "host": "127.0.0.1",
        "port": orthanc.dicom_port,
        "commitment": True,
    }


def uid(files: list[Path]) -> str:
    return str(dcmread(files[0], specific_tags=["StudyInstanceUID"]).StudyInstanceUID)


def test_a_study_that_an_archive_has_is_fetched_and_one_that_no_rule_wants_is_not(
    orthanc: Orthanc, tmp_path: Path
) -> None:
    """Results go back by C-STORE, and count as sent once the archive has committed itself."""
    files, other = study(tmp_path / "study", seed=2), study(tmp_path / "other", seed=3)
    for path in other:
        image = dcmread(path)
        image.Modality, image.SeriesDescription = "CT", "Topogram"
        image.save_as(path)
    orthanc.upload(files)
    orthanc.upload(other)
    table = {"url": orthanc.web, "days": 0, "every_seconds": 0.5, "quiet_seconds": 0.5}
    door = {**listening(orthanc), "quiet_seconds": 0.5}
    wanted = settings(tmp_path / "archive", poll=table, listen=door, store=peer_of(orthanc))
    rules = [{"analysis": "lungs", "description": ["*", "!topogram"], "modality": "CT"}]
    wanted = Archive.model_validate({**wanted.model_dump(), "rules": rules})
    with service(wanted) as queue:
        eventually(lambda: orthanc.modalities(uid(files)) == {"CT": 24, **RESULTS})
        assert not queue.has(uid(other), str(dcmread(other[0]).SOPInstanceUID))
        assert queue.status()["told"] == []
    assert orthanc.modalities(uid(other)) == {"CT": 24}
    source = dcmread(files[0])
    for result in orthanc.files(tmp_path / "got.dcm", uid(files)):
        assert result.PatientID == source.PatientID
        assert result.get("FrameOfReferenceUID", source.FrameOfReferenceUID) == (
            source.FrameOfReferenceUID
        )


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[Orthanc]:
    """An archive that speaks TLS alone, and wants a certificate of who calls."""
    signed(tmp_path, "orthanc", rsa=True)
    (tmp_path / "archive").mkdir()
    server = Orthanc(tmp_path / "archive", free_port(), tls=tmp_path).start()
    yield server
    server.kill()


def test_an_object_is_stored_once_and_the_archive_commits_itself(
    secure: Orthanc, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """By C-FIND, C-STORE and storage commitment, whose report comes by the door; all over TLS."""
    orthanc = secure
    certificate, key = signed(tmp_path, "plinth", rsa=True)
    ours = {"certificate": certificate, "key": key}
    over = {"tls": True, "ca": tmp_path / "ca.pem", **ours}
    queue = Queue(tmp_path / "taken")
    request.addfinalizer(queue.close)
    door = {**listening(orthanc), "tls": {**ours, "client_ca": tmp_path / "ca.pem"}}
    files = study(tmp_path / "study", seed=5, shape=(20, 20, 3), spacing=(17.0, 17.0, 60.0))
    image = dcmread(files[0])
    names = (image.StudyInstanceUID, image.SeriesInstanceUID, image.SOPInstanceUID)
    peer = DicomPeer(Peer.model_validate(peer_of(orthanc) | over))
    with Listener(Listen.model_validate(door), queue, peer.reported):
        assert not peer.has(*names)
        for _ in range(2):  # as after an answer that was lost
            peer.store(files[0].read_bytes())
        assert peer.has(*names)
        assert orthanc.modalities(names[0]) == {"CT": 1}
        peer.confirm(image.SOPClassUID, names[2])
        other = dcmread(files[1]).SOPInstanceUID
        with pytest.raises(Unreachable, match="does not commit itself"):
            peer.confirm(image.SOPClassUID, other)
        assert not queue.status()["images"]
        orthanc.send_to_plinth(orthanc.upload(files[1:2]))
        assert queue.has(names[0], names[2])
        assert queue.has(names[0], other)
    for wrong in ({}, {"tls": True, "ca": tmp_path / "ca.pem"}):  # in the open; without our name
        stranger = DicomPeer(Peer.model_validate(peer_of(orthanc) | wrong))
        with pytest.raises(Unreachable, match="is not there"):
            stranger.store(files[0].read_bytes())
    alone = DicomPeer(Peer.model_validate(peer_of(orthanc) | over | {"commitment_seconds": 0.2}))
    with pytest.raises(Unreachable, match="no report on storage commitment came in time"):
        alone.confirm(image.SOPClassUID, names[2])
    closed = DicomPeer(Peer.model_validate({**peer_of(orthanc), "port": free_port()}))
    with pytest.raises(Unreachable, match="is not there"):
        closed.store(files[0].read_bytes())


class Lossy(BaseHTTPRequestHandler):
    """Passes requests on; of the first two that store something the answer is lost."""

    archive = ""
    stored: list[bytes]

    def do_GET(self) -> None:
        headers = {"Accept": self.headers["Accept"]}
        try:
            self._answer(httpx.get(self.archive + self.path, headers=headers, timeout=60))
        except httpx.TransportError:
            self.close_connection = True

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.stored.append(body)
        headers = {name: self.headers[name] for name in ("Accept", "Content-Type")}
        try:
            answer = httpx.post(self.archive + self.path, content=body, headers=headers, timeout=60)
        except httpx.TransportError:
            self.close_connection = True
            return
        if len(self.stored) <= 2:
            self.close_connection = True
            return
        self._answer(answer)

    def _answer(self, answer: httpx.Response) -> None:
        self.send_response(answer.status_code)
        self.send_header("Content-Type", answer.headers.get("content-type", "text/plain"))
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def test_an_outage_is_survived_and_what_was_stored_is_not_sent_again(tmp_path: Path) -> None:
    """The archive dies before results are there; we end, start again; then answers are lost."""
    orthanc = Orthanc(tmp_path / "orthanc", free_port()).start()
    files = study(tmp_path / "study", seed=4)
    sent = orthanc.upload(files)

    class Between(Lossy):
        archive = orthanc.url
        stored: list[bytes] = []  # noqa: RUF012 - of this test alone

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Between)
    threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
    to = {"url": f"http://127.0.0.1:{proxy.server_port}/dicom-web"}
    wanted = settings(tmp_path / "archive", listen=listening(orthanc), send=to)
    try:
        with service(wanted) as queue:
            orthanc.send_to_plinth(sent)
            orthanc.kill()
            eventually(lambda: queue.status()["files"] == {"waiting": 3})
            eventually(lambda: bool(queue.status()["told"]))
            assert queue.status()["told"][0]["reason"] == "not sent"
        Between.stored.clear()
        orthanc.start()
        with service(wanted) as queue:
            eventually(lambda: queue.status()["files"] == {"sent": 3})
        assert len(Between.stored) == 3
        assert orthanc.modalities(uid(files)) == {"CT": 24, **RESULTS}
    finally:
        proxy.shutdown()
        proxy.server_close()
        orthanc.kill()


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
def test_no_canary_is_in_logs_metrics_names_or_the_queue(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """In by C-STORE and by DICOMweb, an outage in between; what goes back carries the identity."""
    caplog.set_level("DEBUG", "plinth")
    orthanc = Orthanc(tmp_path / "orthanc", free_port())
    files, burned = study(tmp_path / "study", seed=8), study(tmp_path / "burned", seed=9)
    for number, path in enumerate((*files, *burned)):
        image = dcmread(path)
        planted(image, number)
        if path in burned:
            image.SeriesInstanceUID, image.BurnedInAnnotation = (
                f"{image.SeriesInstanceUID}.9",
                "YES",
            )
        image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
        image.save_as(path, enforce_file_format=True)
        in_preamble(path)
    door = {**listening(orthanc), "callers": ["*"], "quiet_seconds": 1.0}
    wanted = settings(tmp_path / "first", listen=door, send={"url": orthanc.web})
    metrics = b""
    try:
        with service(wanted) as queue:
            send(port_of(orthanc), [*files, *burned])
            eventually(lambda: bool(queue.status()["told"]))  # the archive is away
            orthanc.start()
            eventually(lambda: queue.status()["files"] == {"sent": 3})
            metrics += generate_latest(REGISTRY)
        assert orthanc.modalities(uid(files)) == RESULTS
        orthanc.upload(files)
        table = {"url": orthanc.web, "days": 0, "every_seconds": 0.5, "quiet_seconds": 0.5}
        with service(settings(tmp_path / "second", poll=table)) as queue:
            eventually(lambda: queue.status()["analyses"].get("done") == 1)
            metrics += generate_latest(REGISTRY)
    finally:
        orthanc.kill()
    said = [caplog.text, *capfd.readouterr()]
    assert "burned_in" in caplog.text
    assert not found_in("\n".join(said).encode() + metrics)
    for folder in (tmp_path / "first", tmp_path / "second"):
        for path in folder.rglob("*"):
            assert not found_in(str(path.relative_to(tmp_path)).encode())
            if path.is_file() and path.suffix != ".dcm":
                assert not found_in(path.read_bytes()), path


def send(port: int, files: list[Path]) -> None:
    """Files by C-STORE, as a scanner sends them."""
    entity = AE(ae_title="CT1")
    entity.add_requested_context(CTImageStorage, ExplicitVRLittleEndian)
    association = entity.associate("127.0.0.1", port, ae_title="PLINTH")
    assert association.is_established
    for path in files:
        assert association.send_c_store(dcmread(path)).Status == 0
    association.release()


ARCHIVE_TOML = """
folder = "archive"
[listen]
port = {port}
callers = ["ORTHANC"]
quiet_seconds = 4
[send]
url = "{url}"
[analyses.lungs]
contours = true
page = false
[[rules]]
analysis = "lungs"
modality = "CT"
"""


@pytest.mark.soak
def test_the_command_goes_on_where_it_was_killed(orthanc: Orthanc, tmp_path: Path) -> None:
    files = study(tmp_path / "study", seed=6)
    sent = orthanc.upload(files)
    text = ARCHIVE_TOML.format(port=port_of(orthanc), url=orthanc.web)
    (tmp_path / "archive.toml").write_text(text)
    words = ["plinth", "archive", "run", "archive.toml"]
    env = {"PLINTH_ENGINE__BACKEND": "eager", "NO_COLOR": "1", "COLUMNS": "200"}
    first = Command(words, tmp_path, env, tmp_path / "first.txt")
    try:
        eventually(lambda: "listening as PLINTH" in first.said)
        orthanc.send_to_plinth(sent)
        database = tmp_path / "archive"
        db = connected(database, read_only=True)
        eventually(lambda: "begun" in status_of(db)["analyses"])
    finally:
        first.signal(signal.SIGKILL)
        first.wait(30)
    db.close()
    second = Command(words, tmp_path, env, tmp_path / "second.txt")
    try:
        eventually(lambda: orthanc.modalities(uid(files)) == {"CT": 24, **RESULTS})
        orthanc.send_to_plinth(sent)  # images and results, all of them again
        db = connected(tmp_path / "archive", read_only=True)
        eventually(lambda: status_of(db)["images"] == 27)
        eventually(lambda: status_of(db)["studies"] == {"done": 1})
        assert status_of(db)["files"] == {"sent": 3}
        db.close()
        second.signal(signal.SIGTERM)
        assert second.wait(60) == 0, second.said
        assert "ended, nothing is lost" in second.said
        assert "Phantom" not in first.said + second.said
        assert "PHANTOM" not in first.said + second.said
    finally:
        second.end()
    tried = Command(["plinth", "archive", "try", "archive.toml", "study"], tmp_path, env,
                    tmp_path / "tried.txt")  # fmt: skip
    assert tried.wait(60) == 0, tried.said
    assert "1 chosen" in tried.said
    status = Command(["plinth", "archive", "status", "archive.toml"], tmp_path, env,
                     tmp_path / "status.txt")  # fmt: skip
    assert status.wait(60) == 0, status.said
    assert "sent" in status.said
