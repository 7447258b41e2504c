"""The C-STORE door, by pynetdicom's own sender, and by callers who keep to no protocol."""

from __future__ import annotations

import io
import os
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from certificates import signed
from orthanc import study
from pydicom import dcmread
from pydicom.dataset import Dataset
from serving import until

if not os.environ.get("PLINTH_REQUIRE_EXTRAS"):
    pytest.importorskip("pynetdicom", reason="not installed: make extras")

from pynetdicom import AE
from pynetdicom.sop_class import CTImageStorage, Verification

from plinth.engine import ConfigError, Engine
from plinth.pipelines.archive.listener import Listener
from plinth.pipelines.archive.queue import Queue, digest
from plinth.pipelines.archive.service import Service
from plinth.pipelines.archive.settings import Archive, Listen

pytestmark = pytest.mark.needs("pynetdicom")


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return study(tmp_path / "study", shape=(20, 20, 3), spacing=(17.0, 17.0, 60.0))


@contextmanager
def door(folder: Path, **settings: Any) -> Iterator[tuple[int, Queue]]:
    """A door whose images go into a queue; its port."""
    queue = Queue(folder / "archive", max_bytes=settings.pop("max_bytes", 1 << 30))
    table = {"port": 0, "callers": ["CT1"], "idle_seconds": 5, **settings}
    with Listener(Listen.model_validate(table), queue) as listener:
        yield listener.port, queue
    queue.close()


@contextmanager
def caller(port: int, title: str = "CT1", called: str = "PLINTH", **more: Any) -> Iterator[Any]:
    entity = AE(ae_title=title)
    entity.add_requested_context(CTImageStorage)
    entity.add_requested_context(Verification)
    association = entity.associate("127.0.0.1", port, ae_title=called, **more)
    try:
        yield association
    finally:
        if association.is_established:
            association.release()


def changed(path: Path, **values: str) -> Dataset:
    image = dcmread(path)
    for name, value in values.items():
        setattr(image, name, value)
    return image


def test_an_image_is_on_disk_before_it_is_answered(tmp_path: Path, images: list[Path]) -> None:
    with door(tmp_path) as (port, queue), caller(port) as sender:
        assert sender.send_c_echo().Status == 0
        for path in images:
            assert sender.send_c_store(dcmread(path)).Status == 0
            image = dcmread(path)
            assert queue.has(image.StudyInstanceUID, image.SOPInstanceUID)
        ready = queue.ready(0)
        assert ready is not None
        kept = {dcmread(path).SOPInstanceUID: path for path in ready.folder.iterdir()}
    for path in images:
        sent, got = dcmread(path), dcmread(kept[dcmread(path).SOPInstanceUID])
        assert got == sent
        assert "Phantom" not in str(kept.values())  # neither name nor number of the patient


def aborts(sender: Any) -> None:
    sender.abort()


def is_cut_off(sender: Any, last: bytes = b"") -> None:
    plug = sender.dul.socket.socket
    plug.sendall(last)
    plug.shutdown(socket.SHUT_RDWR)
    until(lambda: not sender.is_alive())
    plug.close()


BEGUN = struct.pack(">BBL", 4, 0, 100) + bytes(10)


def stops_in_a_message(sender: Any) -> None:
    is_cut_off(sender, BEGUN)


def falls_silent_in_a_message(sender: Any) -> None:
    sender.dul.socket.socket.sendall(BEGUN)


@pytest.mark.parametrize("end", [aborts, is_cut_off, stops_in_a_message, falls_silent_in_a_message])
def test_a_study_that_its_sender_broke_off_is_not_whole(
    tmp_path: Path, images: list[Path], end: Callable[[Any], None]
) -> None:
    """Half a chest is a chest with small lungs: nothing in what came says that more was to come."""
    with door(tmp_path, idle_seconds=1) as (port, queue):
        key = digest(dcmread(images[0]).StudyInstanceUID)
        with caller(port) as sender:
            assert sender.send_c_store(dcmread(images[0])).Status == 0
            end(sender)
            until(lambda: queue.broken_off(key) == 1)
        ready = queue.ready(0)
        assert ready is not None
        queue.finish(ready, "broken off", "incomplete")
        with caller(port) as sender:  # all of it again, though some was here
            for path in images:
                assert sender.send_c_store(dcmread(path)).Status == 0
        until(lambda: queue.broken_off(key) == 0)
        assert queue.ready(0) is not None


def test_what_was_broken_off_is_told_and_not_analysed(tmp_path: Path) -> None:
    settings = Archive.model_construct(
        listen=Listen(port=0, callers=("CT1",), quiet_seconds=0.001), rules=()
    )
    with closing(Queue(tmp_path / "archive")) as queue:
        queue.put("1.2", "1.2.1", b"an image")
        queue.ended("1.2", "1.2.7", queue.sending("1.2", "1.2.7"), whole=False)
        service = Service(settings, {}, cast(Engine, None), queue)
        working = threading.Thread(target=service.run)
        working.start()
        try:
            until(lambda: queue.status()["studies"] == {"incomplete": 1})
        finally:
            service.stop()
            working.join()
        (told,) = queue.status()["told"]
        assert "the sender broke off while it sent 1 series of it" in told["message"]
        assert "plinth archive retry" in told["message"]


@pytest.mark.parametrize(
    ("settings", "end"),
    [
        pytest.param({}, lambda sender: sender.release(), id="release"),
        pytest.param({"idle_seconds": 0.3}, lambda sender: sender.send_c_echo(), id="silence"),
        pytest.param({"needs_release": False}, lambda sender: sender.abort(), id="setting"),
    ],
)
def test_a_release_a_silence_and_a_setting_end_a_study(
    tmp_path: Path,
    images: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    end: Callable[[Any], None],
) -> None:
    told: list[bool] = []
    monkeypatch.setattr(Queue, "ended", lambda queue, *_, whole: told.append(whole))
    with door(tmp_path, **settings) as (port, _), caller(port) as sender:
        assert sender.send_c_store(dcmread(images[0])).Status == 0
        end(sender)
        until(lambda: bool(told))
    assert told == [True]


def test_an_image_that_was_not_kept_leaves_its_study_incomplete(
    tmp_path: Path, images: list[Path]
) -> None:
    with door(tmp_path, max_bytes=4000) as (port, queue), caller(port) as sender:
        assert sender.send_c_store(dcmread(images[0])).Status == 0
        while sender.send_c_store(dcmread(images[1])).Status != 0xA700:
            images.pop(0)
        sender.release()
        until(lambda: queue.broken_off(digest(dcmread(images[0]).StudyInstanceUID)) == 1)


@pytest.mark.parametrize(
    ("title", "called"), [("OTHER", "PLINTH"), ("CT1", "OTHER"), ("ct1", "PLINTH")]
)
def test_a_stranger_is_refused(tmp_path: Path, title: str, called: str) -> None:
    with door(tmp_path) as (port, _), caller(port, title, called) as sender:
        assert sender.is_rejected


def test_any_caller_may_send_where_the_file_says_so(tmp_path: Path) -> None:
    with door(tmp_path, callers="*") as (port, _), caller(port, "ANY") as sender:
        assert sender.is_established


def test_what_cannot_be_kept_is_told_to_the_sender(tmp_path: Path, images: list[Path]) -> None:
    with door(tmp_path, max_bytes=4000) as (port, queue), caller(port) as sender:
        assert sender.send_c_store(dcmread(images[0])).Status == 0
        assert [sender.send_c_store(dcmread(path)).Status for path in images].count(0xA700) >= 1
        assert queue.status()["bytes"] <= 4000


def test_an_image_never_takes_the_place_of_another_patient_s(
    tmp_path: Path, images: list[Path]
) -> None:
    """Under one set of UIDs, as anonymisers write them: what is left of the first would be half."""
    with door(tmp_path) as (port, queue), caller(port) as sender:
        first = dcmread(images[0])
        assert sender.send_c_store(first).Status == 0
        assert sender.send_c_store(changed(images[0], PatientID="OTHER")).Status == 0xA900
        kept = queue.kept(first.StudyInstanceUID, first.SOPInstanceUID)
        assert kept is not None
        assert dcmread(io.BytesIO(kept)).PatientID == first.PatientID
        corrected = changed(images[0], SeriesDescription="corrected")
        assert sender.send_c_store(corrected).Status == 0  # of the same patient


def test_an_image_without_a_study_is_not_taken(tmp_path: Path, images: list[Path]) -> None:
    with door(tmp_path) as (port, queue), caller(port) as sender:
        assert sender.send_c_store(changed(images[0], StudyInstanceUID="")).Status == 0xA900
        assert queue.status()["images"] == 0


def test_an_image_beyond_the_bound_ends_the_connection(tmp_path: Path) -> None:
    large = study(tmp_path / "large", shape=(1200, 1200, 1), spacing=(0.3, 0.3, 180.0))[0]
    with door(tmp_path, max_object_bytes=1 << 16) as (port, queue), caller(port) as sender:
        assert "Status" not in sender.send_c_store(dcmread(large))
        until(lambda: not sender.is_alive())
        with caller(port) as another:
            assert another.is_established
        assert queue.status()["images"] == 0


def test_too_many_callers_are_refused_and_the_others_served(
    tmp_path: Path, images: list[Path]
) -> None:
    with door(tmp_path, max_associations=2) as (port, _), caller(port) as one, caller(port) as two:
        with caller(port) as three:
            assert not three.is_established
        for sender in (one, two):
            assert sender.send_c_store(dcmread(images[0])).Status == 0


REQUEST = struct.pack(">BBL", 1, 0, 1 << 31)


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"", id="says nothing"),
        pytest.param(REQUEST[:3], id="begins and stops"),
        pytest.param(REQUEST, id="announces 2 GiB"),
        pytest.param(struct.pack(">BBL", 1, 0, 100) + b"\0" * 50, id="stops in the middle"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="speaks HTTP"),
        pytest.param(struct.pack(">BBL", 4, 0, 8) + b"\xff" * 8, id="data before a request"),
    ],
)
def test_who_keeps_to_no_protocol_is_hung_up_on(tmp_path: Path, sent: bytes) -> None:
    with door(tmp_path, idle_seconds=0.3) as (port, _):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as plug:
            plug.sendall(sent)
            while plug.recv(1000):  # an abort, perhaps
                pass
        with caller(port) as sender:
            assert sender.is_established


def test_a_crowd_that_says_nothing_is_bounded(tmp_path: Path) -> None:
    with door(tmp_path, max_associations=2, idle_seconds=0.3) as (port, _):
        crowd = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(40)]
        for plug in crowd:
            assert plug.recv(10) == b"" or plug.recv(1000) is not None
            plug.close()
        until(lambda: established(port))


def established(port: int) -> bool:
    with caller(port) as sender:
        return bool(sender.is_established)


def test_tls_and_who_must_show_a_certificate(tmp_path: Path, images: list[Path]) -> None:
    certificate, key = signed(tmp_path, "localhost")
    client = signed(tmp_path, "scanner")
    tls = {"certificate": certificate, "key": key, "client_ca": tmp_path / "ca.pem"}
    trusting = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    with door(tmp_path, tls=tls, callers="*", idle_seconds=2) as (port, _):
        silent = socket.create_connection(("127.0.0.1", port), timeout=20)
        with caller(port, tls_args=(trusting, "localhost")) as stranger:
            assert not stranger.is_established
        with caller(port) as plain:
            assert not plain.is_established
        trusting.load_cert_chain(*client)
        with caller(port, tls_args=(trusting, "localhost")) as sender:
            assert sender.send_c_store(dcmread(images[0])).Status == 0
        silent.close()


def test_a_port_that_is_taken_and_a_certificate_that_is_none_are_named(tmp_path: Path) -> None:
    with (
        door(tmp_path) as (port, queue),
        pytest.raises(ConfigError, match=f"127.0.0.1:{port} cannot"),
    ):
        Listener(Listen(port=port, callers=("CT1",)), queue)
    (tmp_path / "no.pem").write_text("no certificate")
    tls = {"certificate": tmp_path / "no.pem", "key": tmp_path / "no.pem"}
    settings = Listen.model_validate({"port": 0, "callers": "CT1", "tls": tls})
    with pytest.raises(ConfigError, match=r"listen\.tls: certificate"):
        Listener(settings, queue)
