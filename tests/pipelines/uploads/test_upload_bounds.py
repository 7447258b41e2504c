"""What one client can take: places, time, disk; and what is told when the disk gives out."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from archive_builders import FORM, ZIP, form, zipped
from serving import Raw, Running, error, running, until
from tiny_verticals import Shelf, Tiny

from plinth.engine import Engine, InputError, PlinthError, Sla
from plinth.pipelines.assembly import build_engine
from plinth.pipelines.config.settings import Config, UploadConfig
from plinth.pipelines.folders.jobs import Jobs
from plinth.pipelines.http.upload_routes import gathered, paced

ROUTE = "/v1/shelf/read"
GOOD = zipped([("a.txt", b"2")])
PLAIN = Config.model_validate({"engine": {"backend": "eager", "precision": "fp32"}})


# -- time and places -----------------------------------------------------------------------------
def test_slow_uploads_are_ended_and_their_places_go_to_others(tmp_path: Path) -> None:
    serve = {"request_timeout_seconds": 1.0, "upload": {"max_jobs": 3, "folder": tmp_path}}
    head = f"POST {ROUTE} HTTP/1.1\nHost: x\nContent-Type: application/zip\n"
    with (
        running({"shelf": Shelf()}, serve=serve) as server,
        contextlib.ExitStack() as open_connections,
    ):
        slow = [open_connections.enter_context(Raw(server)) for _ in range(3)]
        for one in slow:
            one.send(f"{head}Content-Length: 1000000\n\n", b"P")
        until(lambda: len(list(tmp_path.glob("*/*/in"))) == 3)
        refused = server.post(ROUTE, content=GOOD, headers=ZIP)
        error(refused, 429, "too_many_jobs")
        assert int(refused.headers["retry-after"]) >= 1
        until(lambda: server.post(ROUTE, content=GOOD, headers=ZIP).status_code == 202)
        for one in slow:
            status, _, body = one.answer()
            assert (status, body["error"]["reason"]) == (408, "body_too_slow")


class HandWound:
    """A clock, and a body each of whose chunks takes its sender some seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    async def body(self, *chunks: tuple[float, int]) -> AsyncIterator[bytes]:
        for seconds, size in chunks:
            self.now += seconds
            yield bytes(size)


async def received(clock: HandWound, body: AsyncIterator[bytes], **limits: float) -> int:
    config = UploadConfig.model_validate({"min_bytes_per_second": 1000, **limits})
    return sum([len(piece) async for piece in paced(body, config, 30.0, clock)])


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("chunks", "limits"),
    [
        ([(1.0, 1)] * 40, {}),
        ([(29.0, 10_000_000), (20.0, 1), (11.0, 1), (1.0, 1)], {}),
        ([(10.0, 1_000_000)] * 5, {"receive_seconds": 39}),
    ],
    ids=["a byte a second", "fast, then next to nothing", "steady, but too long"],
)
async def test_a_sender_out_of_pace_is_ended(
    chunks: list[tuple[float, int]], limits: dict[str, float]
) -> None:
    clock = HandWound()
    with pytest.raises(PlinthError, match="too slowly"):
        await received(clock, clock.body(*chunks), **limits)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "chunks",
    [[(29.0, 30_000)] * 20, [(1.0, 1000)] * 200, [(29.0, 3)], [(0.0, 1)] * 1000, []],
    ids=["bursts", "steady", "short", "many small chunks", "nothing"],
)
async def test_a_sender_in_pace_is_heard_to_the_end(chunks: list[tuple[float, int]]) -> None:
    clock = HandWound()
    assert await received(clock, clock.body(*chunks)) == sum(size for _, size in chunks)


@pytest.mark.anyio
async def test_small_chunks_are_gathered_for_the_disk() -> None:
    clock = HandWound()
    body = clock.body(*[(0.0, 50_000)] * 13)
    assert [len(piece) async for piece in gathered(body)] == [300_000, 300_000, 50_000]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_the_key_is_asked_for_before_a_byte_of_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPLOAD_KEY", "a-key-of-some-length")
    serve = {"api_key_env": "UPLOAD_KEY"}
    with running({"shelf": Shelf()}, serve=serve) as server, Raw(server) as connection:
        connection.send(
            f"POST {ROUTE} HTTP/1.1\nHost: x\nContent-Type: application/zip\n"
            "Content-Length: 1000000\n\n"
        )
        status, _, body = connection.answer()  # before anything of the body was sent
        assert (status, body["error"]["reason"]) == (401, "unauthorised")


def test_an_upload_says_what_it_is(shelf: Running) -> None:
    """A page of another site can make a browser post bytes without a type."""
    for kind in ({}, {"content-type": "text/plain"}, {"content-type": "application/json"}):
        error(shelf.post(ROUTE, content=GOOD, headers=kind), 415, "unsupported_media_type")


@pytest.mark.parametrize("size", [100_000, 1_000_000, 5_000_000])
def test_a_body_written_in_one_go_with_its_head_arrives_whole(shelf: Running, size: int) -> None:
    """The server stops reading such a connection until the upload has its place."""
    body = zipped([("a.txt", b"3"), ("noise.bin", os.urandom(size))])
    with Raw(shelf) as connection:
        connection.send(
            f"POST {ROUTE}?wait=true HTTP/1.1\nHost: x\nContent-Type: application/zip\n"
            f"Content-Length: {len(body)}\n\n",
            body,
        )
        status, _, job = connection.answer()
        assert status == 200
        assert job["items"][0]["result"]["twice"] == 6.0


@pytest.mark.parametrize(
    "page",
    [{"sec-fetch-site": "cross-site"}, {"origin": "https://evil.example"}, {"origin": "null"}],
    ids=str,
)
def test_a_page_of_another_site_cannot_upload_a_form(shelf: Running, page: dict[str, str]) -> None:
    """A form needs no leave of a browser to be sent to any address."""
    body = form([("a.txt", b"1")])
    error(shelf.post(ROUTE, content=body, headers={**FORM, **page}), 403, "cross_site")


# -- disk ----------------------------------------------------------------------------------------
@contextlib.contextmanager
def small_disk() -> Iterator[None]:
    """No file of this process may grow beyond 1 MiB: writing more fails like on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("packed", ["file", "zip", "form"])
def test_a_full_disk_is_507_and_leaves_nothing(engine: Engine, tmp_path: Path, packed: str) -> None:
    big = bytes(3 << 20)
    body, kind = {
        "file": (big, {"content-type": "application/octet-stream"}),
        "zip": (zipped([("a.txt", big)]), ZIP),
        "form": (form([("a.txt", big)]), FORM),
    }[packed]
    with (
        running({"shelf": Shelf()}, serve={"upload": {"folder": tmp_path}}) as server,
        small_disk(),
    ):
        refused = error(server.post(ROUTE, content=body, headers=kind), 507, "storage_full")
        assert str(tmp_path) not in str(refused)
        [root] = tmp_path.iterdir()
        assert [path.name for path in root.iterdir()] == ["lock"]
        assert server.post(ROUTE, content=GOOD, headers=ZIP, params={"wait": True}).is_success


class Verbose(Shelf):
    """Writes more than the disk holds, after a file that fits."""

    def write(self, result, folder):  # type: ignore[no-untyped-def]
        files = super().write(result, folder)
        (folder / "big.bin").write_bytes(bytes(3 << 20))
        return [*files, folder / "big.bin"]


def test_results_that_do_not_fit_on_the_disk_fail_their_job_whole() -> None:
    with running({"shelf": Verbose()}) as server, small_disk():
        job = server.post(ROUTE, content=GOOD, headers=ZIP).json()
        until(lambda: server.client.get(job["url"]).json()["state"] == "failed")
        job = server.client.get(job["url"]).json()
        assert job["error"]["reason"] == "storage_full"
        assert job["error"]["step"] == "writing the results"
        assert job["items"][0]["files"] == {}
        error(server.client.get(f"{job['url']}/files/twice.txt"), 404, "not_found")
        error(
            server.post(ROUTE, content=GOOD, headers=ZIP, params={"wait": True}),
            507,
            "storage_full",
        )


def test_a_folder_that_cannot_hold_jobs_is_said_at_the_start(
    engine: Engine, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    limits = UploadConfig(folder=tmp_path / "file" / "jobs")
    with pytest.raises(PlinthError, match=r"uploads cannot be kept in .*Not a directory"):
        Jobs({"shelf": Shelf()}, engine, {"shelf": Sla()}, limits)


def test_what_a_killed_server_left_is_removed_by_the_next(engine: Engine, tmp_path: Path) -> None:
    left = tmp_path / "plinth-jobs-killed"
    left.mkdir()
    (left / "lock").touch()
    (left / "upload").write_text("of a patient")
    limits = UploadConfig(folder=tmp_path)
    running_one = Jobs({"shelf": Shelf()}, engine, {"shelf": Sla()}, limits)
    beside = Jobs({"shelf": Shelf()}, engine, {"shelf": Sla()}, limits)
    assert not left.exists()
    for jobs in (running_one, beside):
        assert jobs.create("shelf").folder.is_dir()
        jobs.close(0.0)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with build_engine(PLAIN, {"shelf": Shelf()}) as engine:
        yield engine


# -- faults of a vertical ------------------------------------------------------------------------
class Exits(Shelf):
    """Ends the interpreter, as a command's main function would."""

    def load(self, item):  # type: ignore[no-untyped-def]
        if item.id == "exit":
            raise SystemExit("secret of a patient")
        return super().load(item)


def test_a_vertical_that_exits_fails_its_item_and_the_next_job_runs() -> None:
    with running({"shelf": Exits(), "tiny": Tiny()}) as server:
        body = zipped([("exit.txt", b"1"), ("b.txt", b"1")])
        job = server.post(ROUTE, content=body, headers=ZIP, params={"wait": True}).json()
        assert [item["state"] for item in job["items"]] == ["done", "failed"]
        told = job["items"][1]["error"]
        assert told["step"] == "reading the files"
        assert told["reason"] == "internal"
        assert "secret" not in str(told)
        assert server.post(ROUTE, content=GOOD, headers=ZIP, params={"wait": True}).is_success


class Leaky(Shelf):
    """Tells where its files lie."""

    def load(self, item):  # type: ignore[no-untyped-def]
        raise InputError(f"cannot read {item.paths[0]} in {item.paths[0].parent}")


def test_no_answer_tells_where_files_lie_on_the_server(tmp_path: Path) -> None:
    with running({"shelf": Leaky()}, serve={"upload": {"folder": tmp_path}}) as server:
        answer = server.post(ROUTE, content=GOOD, headers=ZIP, params={"wait": True})
        assert answer.json()["error"]["message"] == "cannot read a.txt in the upload"
        assert str(tmp_path) not in answer.text
