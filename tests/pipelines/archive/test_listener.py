"""The C-STORE door, by pynetdicom's own sender, and by callers who keep to no protocol."""

from __future__ import annotations

import os
import socket
import ssl
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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

from plinth.engine import ConfigError
from plinth.pipelines.archive.listener import Listener
from plinth.pipelines.archive.queue import Queue
from plinth.pipelines.archive.settings import Listen

pytestmark = pytest.mark.needs("pynetdicom")


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return study(tmp_path / "study", shape=(20, 20, 3), spacing=(17.0, 17.0, 60.0))


@contextmanager
def door(folder: Path, **settings: Any) -> Iterator[tuple[int, Queue]]:
    """A door whose images go into a queue; its port."""
    queue = Queue(folder / "archive", max_bytes=settings.pop("max_bytes", 1 << 30))
    table = {"port": 0, "callers": ["CT1"], "idle_seconds": 5, **settings}
    with Listener(Listen.model_validate(table), queue.put) as listener:
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
    with door(tmp_path) as (port, _), pytest.raises(ConfigError, match=f"127.0.0.1:{port} cannot"):
        Listener(Listen(port=port, callers=("CT1",)), lambda *_: None)
    (tmp_path / "no.pem").write_text("no certificate")
    tls = {"certificate": tmp_path / "no.pem", "key": tmp_path / "no.pem"}
    settings = Listen.model_validate({"port": 0, "callers": "CT1", "tls": tls})
    with pytest.raises(ConfigError, match=r"listen\.tls: certificate"):
        Listener(settings, lambda *_: None)
