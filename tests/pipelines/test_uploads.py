"""The HTTP door for folders: uploads, jobs, their files, and what is refused."""

from __future__ import annotations

import io
import os
import stat
import struct
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import Running, error, running, until
from tiny_verticals import GATE, Gate, Shelf

from plinth.engine import Engine, InputError, Sla
from plinth.pipelines.assembly import build_engine
from plinth.pipelines.config.settings import Config, UploadConfig
from plinth.pipelines.folders.archives import Sink, stored_path, unzip
from plinth.pipelines.folders.jobs import Jobs, TooManyJobs
from plinth.pipelines.folders.storage import StorageFull
from plinth.verticals import Item

ROUTE = "/v1/shelf/read"
PLAIN = Config.model_validate({"engine": {"backend": "eager", "precision": "fp32"}})
ZIP = {"content-type": "application/zip"}


@pytest.fixture(scope="module")
def shelf() -> Iterator[Running]:
    limits = {"max_files": 4, "max_unpacked_bytes": 200_000, "max_bytes": 100_000, "max_jobs": 3}
    with running({"shelf": Shelf()}, serve={"upload": limits}) as server:
        yield server


def zipped(files: Mapping[str, str | bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()


def upload(server: Running, body: bytes, wait: bool = True) -> httpx.Response:
    return server.post(ROUTE, content=body, headers=ZIP, params={"wait": wait})


# -- what is answered ---------------------------------------------------------------------------
def test_a_zip_becomes_a_finished_job_with_files(shelf: Running) -> None:
    response = upload(shelf, zipped({"study/a.txt": "2"}))
    assert response.status_code == 200
    job = response.json()
    assert job["state"] == "done"
    assert job["items"][0]["result"] == {
        "id": "a",
        "twice": 4.0,
        "found": [{"key": "number", "value": 2.0}, {"title": "none"}],
    }
    assert job["items"][0]["models"] == {"page": "3"}
    assert job["items"][0]["timing"]["device_ms"] > 0
    assert shelf.client.get(job["items"][0]["files"]["twice.txt"]).text == "4.0\n"
    report = shelf.client.get(f"{job['url']}/files/report.html")
    assert report.headers["content-type"].startswith("text/html")
    assert "sandbox" in report.headers["content-security-policy"]
    assert report.headers["x-content-type-options"] == "nosniff"


def test_without_waiting_the_job_is_polled(
    shelf: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(GATE, str(tmp_path))
    gate = Gate(tmp_path)
    response = upload(shelf, zipped({"a.txt": "hold", "b.txt": "1"}), wait=False)
    assert response.status_code == 202
    url = response.json()["url"]
    assert response.headers["location"] == url
    gate.await_arrival()
    job = shelf.client.get(url).json()
    assert job["state"] == "running"
    assert job["progress"] == {"items": 2, "finished": 0, "stage": "load"}
    assert error(shelf.client.get(f"{url}/files/twice.txt"), 404, "not_found")
    gate.open()
    # the next upload waits for this one: one worker
    assert upload(shelf, zipped({"c.txt": "1"})).json()["state"] == "done"
    assert shelf.client.get(url).json()["state"] == "done"


def test_a_form_of_files_and_a_form_with_a_zip(shelf: Running) -> None:
    parts = [("file", (f"dir/{n}.txt", str(n).encode())) for n in range(3)]
    job = shelf.post(ROUTE, files=parts, params={"wait": True}).json()
    assert [item["result"]["twice"] for item in job["items"]] == [0.0, 2.0, 4.0]
    packed = {"file": ("all.zip", zipped({"x.txt": "21"}))}
    job = shelf.post(ROUTE, files=packed, params={"wait": True}).json()
    assert job["items"][0]["result"]["twice"] == 42.0


def test_one_bad_item_never_stops_the_rest(shelf: Running) -> None:
    job = upload(shelf, zipped({"a.txt": "x", "b.txt": "bug", "c.txt": "3"})).json()
    assert job["state"] == "done"
    assert [item["state"] for item in job["items"]] == ["failed", "failed", "done"]
    assert job["items"][0]["error"]["field"] == "a.txt"
    assert job["items"][1]["error"]["reason"] == "internal"


class Panic(BaseException):
    """As the Rust libraries of Python raise it when they meet a fault of their own."""


class Panicking(Shelf):
    def load(self, item: Item) -> tuple[str, float]:
        if item.paths[0].read_text() == "panic":
            raise Panic("secret 4111111111111111")
        return super().load(item)


def test_what_failed_is_tried_again_and_what_is_done_stays() -> None:
    class Recovers(Shelf):
        """Reads ``b.txt`` from its second time on, as after a full disk or an outage."""

        asked = 0

        def load(self, item: Item) -> tuple[str, float]:
            self.asked += item.id == "b"
            if item.id == "b" and self.asked == 1:
                raise InputError("b: cannot be read now")
            return super().load(item)

    with running({"shelf": Recovers()}) as server:
        job = upload(server, zipped({"a.txt": "2", "b.txt": "3"})).json()
        assert [item["state"] for item in job["items"]] == ["done", "failed"]
        assert job["retryable"]
        answer = server.client.post(f"{job['url']}/retry")
        assert answer.status_code == 202
        until(lambda: server.client.get(job["url"]).json()["state"] == "done")
        again = server.client.get(job["url"]).json()
        assert again["items"][0] == job["items"][0]
        assert again["items"][1]["result"]["twice"] == 6.0
        assert not again["retryable"]
        assert not list(Path(tempfile.gettempdir()).glob(f"plinth-jobs-*/{job['id']}/in"))
        error(server.client.post(f"{job['url']}/retry"), 422, "not_failed")
        server.client.delete(job["url"])
        error(server.client.post(f"{job['url']}/retry"), 404, "not_found")


def test_a_panic_of_a_library_ends_its_job_and_not_those_after_it() -> None:
    with running({"shelf": Panicking()}) as server:
        found = upload(server, zipped({"a.txt": "panic"}))
        assert upload(server, zipped({"a.txt": "2"})).json()["state"] == "done"
    assert "4111" not in str(error(found, 500, "internal"))


def test_nothing_readable_is_422(shelf: Running) -> None:
    assert error(upload(shelf, zipped({"a.txt": "x"})), 422, "invalid_input")["field"] == "a.txt"
    error(upload(shelf, zipped({"a.pdf": "x"})), 422, "nothing_found")


def test_a_deleted_job_is_gone_with_its_files(shelf: Running) -> None:
    url = upload(shelf, zipped({"a.txt": "2"})).json()["url"]
    assert shelf.client.delete(url).status_code == 204
    for path in (url, f"{url}/files/twice.txt"):
        error(shelf.client.get(path), 404, "not_found")
    error(shelf.client.delete(url), 404, "not_found")


def test_ids_cannot_be_guessed_and_files_not_climbed_to(shelf: Running) -> None:
    job = upload(shelf, zipped({"a.txt": "2"})).json()
    assert len(job["id"]) >= 24
    for name in ("../in/a.txt", "..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd", "a"):
        error(shelf.client.get(f"{job['url']}/files/{name}"), 404, "not_found")


def test_old_results_make_room_for_new_jobs(shelf: Running) -> None:
    urls = [upload(shelf, zipped({"a.txt": "2"})).json()["url"] for _ in range(4)]
    assert [shelf.client.get(url).status_code for url in urls] == [404, 200, 200, 200]


# -- what is refused ----------------------------------------------------------------------------
def _special(kind: int) -> bytes:
    """An archive whose file is a link, a device or a pipe."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        entry = zipfile.ZipInfo("link.txt")
        entry.external_attr = (kind | 0o777) << 16
        archive.writestr(entry, "/etc/passwd")
    return packed.getvalue()


def _encrypted() -> bytes:
    body = bytearray(zipped({"a.txt": "1"}))
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        body[body.index(signature) + at] |= 1
    return bytes(body)


def _claims_many() -> bytes:
    body = bytearray(zipped({"a.txt": "1"}))
    struct.pack_into("<HH", body, body.rindex(b"PK\x05\x06") + 8, 60_000, 60_000)
    return bytes(body)


def _damaged() -> bytes:
    body = bytearray(zipped({"a.txt": os.urandom(500)}))
    body[100] ^= 0xFF
    return bytes(body)


@pytest.mark.parametrize(
    ("body", "status", "reason", "said"),
    [
        (b"", 400, "malformed_upload", "not a zip"),
        (b"PK\x03\x04 not really", 400, "malformed_upload", "not a zip"),
        (zipped({"../a.txt": "1"}), 400, "malformed_upload", "leaves its folder"),
        (zipped({"/a.txt": "1"}), 400, "malformed_upload", "leaves its folder"),
        (zipped({"C:\\a.txt": "1"}), 400, "malformed_upload", "leaves its folder"),
        (_special(stat.S_IFLNK), 400, "malformed_upload", "is a link or a device"),
        (_special(stat.S_IFCHR), 400, "malformed_upload", "is a link or a device"),
        (_special(stat.S_IFIFO), 400, "malformed_upload", "is a link or a device"),
        (_encrypted(), 400, "malformed_upload", "is encrypted"),
        (_damaged(), 400, "malformed_upload", "damaged"),
        (_claims_many(), 413, "body_too_large", "more than 4 files"),
        (zipped({f"{n}.txt": "1" for n in range(5)}), 413, "body_too_large", "than 4 files"),
        (zipped(dict.fromkeys("ab", bytes(150_000))), 413, "body_too_large", "200,000 bytes"),
        (os.urandom(100_001), 413, "body_too_large", "100,000 bytes"),
    ],
)  # fmt: skip
def test_unsafe_and_oversized_archives(
    shelf: Running, body: bytes, status: int, reason: str, said: str
) -> None:
    response = upload(shelf, body)
    assert said in error(response, status, reason)["message"]
    assert upload(shelf, zipped({"a.txt": "1"})).status_code == 200


def test_a_bomb_is_stopped_by_its_ratio(tmp_path: Path) -> None:
    archive = tmp_path / "bomb.zip"
    archive.write_bytes(zipped({"a.txt": bytes(50_000_000)}))
    target = tmp_path / "in"
    target.mkdir()
    with pytest.raises(InputError, match=r"more than 200\.0 bytes per packed byte"):
        unzip(archive, Sink(target, UploadConfig()))


def test_broken_forms_and_other_types(shelf: Running) -> None:
    whole = b'--b\r\nContent-Disposition: form-data; name="f"; filename="a.txt"\r\n\r\n1\r\n--b--'
    kind = {"content-type": "multipart/form-data; boundary=b"}
    ok = shelf.post(ROUTE, content=whole, headers=kind, params={"wait": True})
    assert ok.json()["state"] == "done"
    for body in (whole[:-9], b"rubbish", b"", b"--b\r\nX" + b"y" * 9000):
        error(shelf.post(ROUTE, content=body, headers=kind), 400, "malformed_upload")
    no_boundary = {"content-type": "multipart/form-data"}
    error(shelf.post(ROUTE, content=whole, headers=no_boundary), 400, "malformed_upload")
    climbing = whole.replace(b"a.txt", b"../a.txt")
    error(shelf.post(ROUTE, content=climbing, headers=kind), 400, "malformed_upload")
    fields_only = b'--b\r\nContent-Disposition: form-data; name="f"\r\n\r\n1\r\n--b--'
    error(shelf.post(ROUTE, content=fields_only, headers=kind), 400, "malformed_upload")
    error(shelf.post(ROUTE, json={"a": 1}), 415, "unsupported_media_type")


@given(st.text(max_size=300))
def test_no_name_leaves_the_folder(name: str) -> None:
    try:
        path = stored_path(name, 1)
    except InputError:
        return
    assert not path.is_absolute()
    assert path.parts
    for part in path.parts:
        assert part not in ("", ".", "..")
        assert set(part) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


# -- bounds in time and number, with a hand-wound clock -------------------------------------------
@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with build_engine(PLAIN, {"shelf": Shelf()}) as engine:
        yield engine


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def finished(jobs: Jobs, **files: str) -> Any:
    job = jobs.create("shelf")
    for name, text in files.items():
        (job.folder / "in" / f"{name}.txt").write_text(text)
    jobs.submit(job)
    job.ended.result(60)
    return job


def test_finished_jobs_age_out(engine: Engine, tmp_path: Path) -> None:
    clock = Clock()
    limits = UploadConfig(keep_seconds=60, folder=tmp_path)
    jobs = Jobs({"shelf": Shelf()}, engine, {"shelf": Sla()}, limits, clock)
    job = finished(jobs, a="1")
    clock.now = 59.0
    assert jobs.get("shelf", job.id) is job
    assert jobs.get("other", job.id) is None
    assert not (job.folder / "in").exists()
    clock.now = 60.0
    assert jobs.get("shelf", job.id) is None
    jobs.purge()
    assert not job.folder.exists()
    assert jobs.close(1.0)
    assert not list(tmp_path.iterdir())


def test_unfinished_jobs_are_never_pushed_out(engine: Engine, tmp_path: Path) -> None:
    limits = UploadConfig(max_jobs=2, folder=tmp_path)
    jobs = Jobs({"shelf": Shelf()}, engine, {"shelf": Sla()}, limits)
    kept = jobs.create("shelf")
    for _ in range(3):
        finished(jobs, a="1")
    assert jobs.get("shelf", kept.id) is kept
    jobs.create("shelf")
    with pytest.raises(Exception, match="2 uploads are in work"):
        jobs.create("shelf")
    jobs.close(0.0)


def test_old_results_make_room_on_the_disk_for_new_ones(engine: Engine, tmp_path: Path) -> None:
    limits = UploadConfig(max_job_bytes=160, folder=tmp_path)
    jobs = Jobs({"shelf": Shelf()}, engine, {"shelf": Sla()}, limits)
    first = finished(jobs, a="1")
    assert 80 < first.bytes <= 160
    second = finished(jobs, a="1")
    assert jobs.get("shelf", first.id) is None
    assert not first.folder.exists()
    assert jobs.get("shelf", second.id) is second
    jobs.close(0.0)


def test_uploads_in_work_share_the_disk_allowance(engine: Engine, tmp_path: Path) -> None:
    limits = UploadConfig(max_job_bytes=70, folder=tmp_path)
    jobs = Jobs({"shelf": Shelf()}, engine, {"shelf": Sla()}, limits)
    one, other = jobs.create("shelf"), jobs.create("shelf")
    jobs.spend(one, 50)
    with pytest.raises(TooManyJobs, match="2 uploads are in work"):
        jobs.spend(other, 21)
    jobs.delete(other)
    with pytest.raises(StorageFull, match="more disk than all uploads may take"):
        jobs.spend(one, 21)
    jobs.close(0.0)


def test_a_job_whose_results_do_not_fit_fails_and_serves_nothing(
    engine: Engine, tmp_path: Path
) -> None:
    limits = UploadConfig(max_job_bytes=10, folder=tmp_path)
    jobs = Jobs({"shelf": Shelf()}, engine, {"shelf": Sla()}, limits)
    job = finished(jobs, a="1")
    assert job.state == "failed"
    assert job.error["reason"] == "storage_full"
    assert job.error["step"] == "writing the results"
    assert not job.files
    assert not (job.folder / "out" / "a").exists()
    jobs.close(0.0)
