"""An archive that answers garbage, slowly, or something else than what it was asked for."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from orthanc import eventually
from pydicom import Dataset, FileMetaDataset, dcmwrite
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from plinth.engine import Engine
from plinth.pipelines.archive.dicomweb import DicomWeb, NotWanted, Unreachable, bounded
from plinth.pipelines.archive.queue import Queue, digest
from plinth.pipelines.archive.service import Service, check_asked
from plinth.pipelines.archive.settings import Archive, Web

Answers = dict[str, Any]


class Pacs(ThreadingHTTPServer):
    """Answers each path with what it is told: bytes, or JSON."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: Answers = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        """Of its DICOMweb service."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Pacs

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.server.asked.append(path)
        found = self.server.answers.get(path)
        body = found if isinstance(found, bytes) else json.dumps(found).encode()
        self.send_response(404 if found is None else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture
def pacs() -> Iterator[Pacs]:
    server = Pacs()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def client(pacs: Pacs) -> DicomWeb:
    return DicomWeb(Web(url=pacs.url))


def image(study: str, own: str) -> bytes:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.StudyInstanceUID = (
        CTImageStorage, own, study,
    )  # fmt: skip
    out = io.BytesIO()
    dcmwrite(out, dataset, enforce_file_format=True)
    return out.getvalue()


@pytest.mark.parametrize(
    "garbage", [{"error": "busy"}, [1, 2], ["x"], "text", b"<html>", [None], b"[", 7]
)
def test_what_is_no_answer_is_tried_again_later(pacs: Pacs, garbage: object) -> None:
    pacs.answers["series"] = garbage
    with client(pacs) as web, pytest.raises(Unreachable):
        list(web.ask("series"))


@pytest.mark.parametrize(
    "odd", [{"nonsense": {"Value": ["1"]}}, {"00080060": {"Value": {"a": 1}}}, {"00080060": "CT"}]
)
def test_attributes_that_are_none_are_passed_over(pacs: Pacs, odd: dict[str, object]) -> None:
    pacs.answers["series"] = [odd | {"00080061": {"vr": "CS", "Value": ["CT"]}}]
    with client(pacs) as web:
        assert list(web.ask("series")) == [{"ModalitiesInStudy": "CT"}]


@pytest.mark.parametrize(
    "answer",
    [{"00081198": []}, {"00081198": {"Value": [{}]}}, {"00081198": {"Value": [{"00081197": 1}]}}],
)
def test_whether_it_was_stored_has_to_be_said(pacs: Pacs, answer: object) -> None:
    pacs.answers["studies"] = answer
    with client(pacs) as web, pytest.raises(Unreachable, match="whether it has stored"):
        web.store(b"x")
    pacs.answers["studies"] = {}
    with client(pacs) as web:
        web.store(b"x")


def test_an_answer_that_drips_is_ended() -> None:
    now = iter(range(1000))

    def clock() -> float:
        return float(next(now))

    with pytest.raises(Unreachable, match="slower"):
        bounded((b"x" for _ in range(900)), 1 << 20, 30.0, clock)
    fast = (bytes(1 << 15) for _ in range(60))
    assert len(bounded(fast, 1 << 22, 30.0, clock)) == 60 << 15
    with pytest.raises(NotWanted, match="more than"):
        bounded([bytes(11)], 10, 30.0, clock)


@pytest.mark.parametrize(("study", "own"), [("1.2", "1.9"), ("1.8", "1.3")])
def test_another_image_than_was_asked_for_is_not_taken(study: str, own: str) -> None:
    check_asked(image("1.2", "1.3"), "1.2", "1.3")
    with pytest.raises(NotWanted, match="another image"):
        check_asked(image(study, own), "1.2", "1.3")
    with pytest.raises(NotWanted):
        check_asked(b"\0" * 128 + b"DICM" + b"\xff" * 50, "1.2", "1.3")


def test_a_series_that_cannot_be_fetched_keeps_no_other_waiting(
    pacs: Pacs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One lists fewer than it counts, one gives another image, one fails; the last is whole."""
    series: list[Answers] = []

    def has(study: str, listed: list[str], counted: int, given: Callable[[str], bytes]) -> None:
        number = len(series)
        series.append(
            {
                "0020000D": {"Value": [study]},
                "0020000E": {"Value": [f"9.{number}"]},
                "00080060": {"Value": ["CT"]},
                "00201209": {"Value": [counted]},
            }
        )
        place = f"studies/{study}/series/9.{number}/instances"
        pacs.answers[place] = [{"00080018": {"Value": [own]}} for own in listed]
        for own in listed:
            pacs.answers[f"{place}/{own}"] = given(own)

    has("1.1", ["3.1", "3.2"], 5, lambda own: image("1.1", own))
    has("1.2", ["3.3"], 1, lambda _: image("1.2", "3.9"))
    has("1.3", ["3.4"], 1, lambda _: b"no DICOM")
    has("1.4", ["3.5", "3.6"], 2, lambda own: image("1.4", own))
    uncounted = {"0020000D": {"Value": ["1.5"]}, "0020000E": {"Value": ["9.9"]}}
    pacs.answers["series"] = [uncounted, *series]
    wanted = Archive.model_validate(
        {
            "folder": tmp_path,
            "analyses": {"lungs": {"vertical": "medical"}},
            "rules": [{"analysis": "lungs", "modality": "CT", "min_images": 1}],
            "poll": {"url": pacs.url, "quiet_seconds": 0, "every_seconds": 3600, "days": 0},
        }
    )
    queue = Queue(tmp_path)
    with Engine(backend="eager") as engine:
        running = Service(wanted, {}, engine, queue)
        thread = threading.Thread(target=running.run)
        thread.start()
        last = digest("1.4")
        eventually(lambda: len(queue.contents(last)) == 2 or not thread.is_alive())
        said = "series of the archive are not fetched: 1 that does not say how many images it has"
        eventually(lambda: said in caplog.text)
        running.stop()
        thread.join(30)
    try:
        assert len(queue.contents(digest("1.4"))) == 2
        assert queue.contents(digest("1.2")) == queue.contents(digest("1.3")) == {}
        ready = queue.ready(0.0)
        assert ready is None or ready.study == digest("1.4"), "a part of a series is not ready"
    finally:
        queue.close()
