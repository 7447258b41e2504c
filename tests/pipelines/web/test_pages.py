"""The pages, in a real browser where something moves, by HTTP where rights are at stake."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from serving import Running, running, until
from tiny_verticals import Page, Shelf, Tiny
from torch import nn

from plinth.engine import Flow, InputError, Model, ModelStore
from plinth.pipelines.identity.key_file import add
from plinth.pipelines.web.form import entries

DOUBLE = "/v1/tiny/double"
HTTP_LIVE = 'plinth_http_request_seconds_count{outcome="answered",route="/ui/engine/live"}'


def store_at(folder: Path) -> ModelStore:
    """A store with one model."""
    store = ModelStore(folder)
    net = nn.Linear(2, 1)
    store.add(Model.from_torch(net, example=torch.rand(4, 2), name="line", version="7"))
    return store


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    store = store_at(tmp_path_factory.mktemp("store"))
    serve = {"web": True, "oip": {"load_models": True}}
    with running(
        {"tiny": Tiny(), "shelf": Shelf()}, serve=serve, models={"store": store.root}
    ) as found:
        yield found


# -- in a browser ---------------------------------------------------------------------------------
@pytest.mark.needs("playwright")
def test_the_engines_page_follows_what_happens(server: Running, page: Any) -> None:
    page.goto(f"{server.server.url}/ui/engine")
    row = page.locator("section:has(#h-promises) tr", has_text="twice")
    before = int(row.locator("td").first.inner_text())
    for number in range(3):
        assert server.post(DOUBLE, json={"id": "a", "value": number}).status_code == 200
    page.wait_for_function(
        "(least) => [...document.querySelectorAll('section:has(#h-promises) tr')]"
        ".some((row) => row.innerText.startsWith('twice')"
        " && Number(row.cells[1].innerText) >= least)",
        arg=before + 3,
    )
    page.locator("#chart canvas").wait_for()
    page.get_by_role("button", name="Load line").click()
    page.get_by_text("line is loaded.").wait_for()
    assert "line" in server.engine.contracts()


@pytest.mark.needs("playwright")
def test_a_form_tries_a_vertical_by_the_keyboard_alone(server: Running, page: Any) -> None:
    page.goto(f"{server.server.url}/ui/verticals/tiny")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.locator("#f-value").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("21")
    page.keyboard.press("Enter")
    page.locator("#answer .good").wait_for()
    assert '"twice": 42' in page.locator("#answer").inner_text()
    assert re.search(r"device \d+\.\d+ ms", page.locator("#answer").inner_text())
    page.locator("#f-value").fill("13")
    page.get_by_role("button", name="Send").press("Enter")
    page.locator("#answer .bad").wait_for()
    assert "13 cannot be doubled" in page.locator("#answer").inner_text()


@pytest.mark.needs("playwright")
def test_an_upload_is_followed_to_its_files_or_to_why_it_failed(
    server: Running, page: Any, tmp_path: Path
) -> None:
    (tmp_path / "good.txt").write_text("21")
    (tmp_path / "bad.txt").write_text("no number")
    page.goto(f"{server.server.url}/ui/studies/shelf")
    page.set_input_files("input[type=file]", [tmp_path / "good.txt", tmp_path / "bad.txt"])
    page.get_by_role("button", name="Upload").click()
    page.wait_for_url("**/ui/studies/shelf/*")
    there = page.url

    def over() -> bool:
        page.goto(there)
        return ": done" in page.locator("h1").inner_text()

    until(over)
    told = page.locator("main").inner_text()
    assert "expected a number" in told
    study = page.locator("article", has_text="good")
    study.get_by_role("button", name="Accept").first.press("Enter")
    study.locator("> .verdict .good").wait_for()
    row = study.get_by_role("row", name="number")
    row.get_by_role("button", name="Reject").click()
    row.get_by_text("rejected").wait_for()
    job = server.client.get(f"/v1/shelf/jobs/{there.rpartition('/')[2]}").json()
    said = next(item for item in job["items"] if item["id"] == "good")
    assert {p: one["accepted"] for p, one in said["verdicts"].items()} == {
        "": True,
        "found 1": False,
    }
    assert server.client.get(said["files"]["verdicts.json"]).json() == said["verdicts"]
    page.goto(there)
    assert row.locator("[aria-pressed=true]").inner_text() == "Reject"
    assert page.get_by_role("cell", name="number").count() == 1  # a table of what was found
    with page.expect_download() as waiting:
        page.get_by_role("link", name="twice.txt").first.click()
    assert waiting.value.path().read_text() == "42.0\n"
    page.goto(f"{server.server.url}/ui/studies/shelf")
    assert "expected a number" in page.locator("#worklist").inner_text()
    page.get_by_role("button", name="Try again what failed").click()
    page.wait_for_url(there)
    until(over)
    again = server.client.get(f"/v1/shelf/jobs/{there.rpartition('/')[2]}").json()
    assert [item["state"] for item in again["items"]] == ["failed", "done"]
    assert again["items"][1] == said, "what was done stays as it was"
    assert again["retryable"]


@pytest.mark.needs("playwright")
@pytest.mark.soak
def test_pages_are_dark_where_the_system_is_and_remember_a_choice(
    server: Running, browser: Any
) -> None:
    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    page.goto(f"{server.server.url}/ui/engine")
    back = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(back) == "rgb(17, 22, 29)"
    page.get_by_role("button", name="Dark or light").click()
    assert page.evaluate(back) == "rgb(255, 255, 255)"
    page.goto(f"{server.server.url}/ui/verticals/tiny")
    assert page.evaluate(back) == "rgb(255, 255, 255)"
    context.close()


class Scan(Shelf):
    """Its items have a volume with a mask, and a place in them."""

    name = "scan"
    place: ClassVar = (-12.0, 7.0, 20.0)

    def infer(self, requests: Sequence[tuple[str, float]]) -> Flow[list[Page | InputError]]:
        pages = yield from super().infer(requests)
        return [
            page.model_copy(update={"found": [{"number": 1, "centre_lps_mm": list(self.place)}]})
            if isinstance(page, Page)
            else page
            for page in pages
        ]

    def write(self, result: Page, folder: Path) -> list[Path]:
        import SimpleITK as sitk

        z, y, x = np.mgrid[:24, :24, :24]
        ball = ((x - 12) ** 2 + (y - 12) ** 2 + (z - 12) ** 2) < 60
        for name, values in (
            ("volume", np.where(ball, -50, -900).astype(np.int16)),
            ("segmentation", ball.astype(np.uint8)),
        ):
            image: Any = sitk.GetImageFromArray(values)
            image.SetSpacing((2.0, 2.0, 2.0))
            image.SetOrigin((-24.0, -24.0, 0.0))
            sitk.WriteImage(image, str(folder / f"{name}.nii.gz"))
        return [folder / "volume.nii.gz", folder / "segmentation.nii.gz"]


@pytest.mark.needs("playwright")
def test_a_study_is_seen_with_its_mask_and_a_finding_is_jumped_to(page: Any) -> None:
    with running({"scan": Scan()}, serve={"web": True}) as server:
        sent = {"file": ("a.txt", b"1")}
        job = server.post("/v1/scan/read?wait=true", files=sent).json()
        page.goto(f"{server.server.url}/ui/studies/scan/{job['id']}")
        page.locator(".viewer[data-ready]").wait_for(timeout=90_000)

        def red() -> int:
            """Pixels of the viewer that the mask tints."""
            shot = Image.open(io.BytesIO(page.locator(".viewer canvas").screenshot()))
            pixels = np.asarray(shot.convert("RGB")).astype(int)
            return int((pixels[..., 0] - pixels[..., 2] > 40).sum())

        until(lambda: red() > 1000)
        page.get_by_role("button", name="Go there").click()
        page.wait_for_function("document.querySelector('[data-part=place]').textContent !== ''")
        shown = page.locator("[data-part=place]").inner_text()
        place = [float(n) for n in re.findall(r"-?[0-9.]+", shown.partition(" mm")[0])]
        assert place == pytest.approx(Scan.place, abs=1.01)  # half a voxel
        page.locator("[data-part=mask]").fill("0")
        until(lambda: red() == 0)


# -- rights and bounds ----------------------------------------------------------------------------
PAGES = ("/ui", "/ui/engine", "/ui/verticals/tiny", "/ui/studies/shelf")


def test_pages_run_nothing_that_stands_in_them(server: Running) -> None:
    for path in PAGES:
        answer = server.client.get(path)
        assert answer.status_code == 200, path
        assert "script-src 'self';" in answer.headers["content-security-policy"]
        assert "unsafe-inline" not in answer.headers["content-security-policy"]
        assert not re.search(r"<script(?![^>]*src=)|\son\w+=|\sstyle=|javascript:", answer.text)
        for linked in re.findall(r'(?:src|href)="(/ui/static/[^"]+)"', answer.text):
            assert server.client.get(linked).status_code == 200, linked


def test_what_is_vendored_has_its_licence(server: Running) -> None:
    for name in ("htmx", "uPlot", "niivue"):
        licence = server.client.get(f"/ui/static/vendor/{name}.LICENSE")
        assert "WARRANT" in licence.text.upper()
    for path in ("/ui/static/../pages.py", "/ui/static/%2e%2e/pages.py", "/ui/static/nothing"):
        assert server.client.get(path).status_code == 404


def test_roles_and_reach_count_for_pages_as_for_routes(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    roles: dict[str, dict[str, Any]] = {
        "reader": {"role": "read"},
        "desk": {"role": "score", "only": ("tiny",)},
        "boss": {"role": "admin"},
    }
    given = {who: {"x-api-key": add(keys, who, table)} for who, table in roles.items()}
    store = store_at(tmp_path / "store")
    serve = {"web": True, "keys": keys, "oip": {"load_models": True}}
    with running(
        {"tiny": Tiny(), "shelf": Shelf()}, serve=serve, models={"store": store.root}
    ) as server:

        def status(who: str | None, path: str, method: str = "GET") -> int:
            headers = {} if who is None else given[who]
            return server.client.request(method, path, headers=headers).status_code

        expected = {
            None: (401, 401, 401, 401),
            "reader": (200, 200, 200, 403),
            "desk": (200, 403, 200, 403),
            "boss": (200, 200, 200, 200),
        }
        for who, codes in expected.items():
            assert tuple(status(who, path) for path in PAGES) == codes, who
        changes = ("models/line/load", "models/twice/variant", "models/twice/back", "drain")
        for change in changes:
            for other in (None, "reader", "desk"):
                assert status(other, f"/ui/engine/{change}", "POST") in (401, 403)
        assert "line" not in server.engine.contracts()
        page = server.client.get("/ui/engine", headers=given["reader"]).text
        assert "<button>" not in page
        assert "reader (read)" in page
        assert "Drain" in server.client.get("/ui/engine", headers=given["boss"]).text
        assert "shelf" not in server.client.get("/ui", headers=given["desk"]).text
        foreign = {
            **given["boss"],
            "origin": "https://evil.example",
            "sec-fetch-site": "cross-site",
        }
        answer = server.client.post("/ui/engine/drain", headers=foreign)
        assert answer.status_code == 403
        assert server.client.get("/health/ready").status_code == 200


def test_what_cannot_be_changed_says_why_and_a_drain_ends_the_server() -> None:
    with running({"tiny": Tiny()}, serve={"web": True, "announce_seconds": 1.0}) as server:
        for path in ("twice/variant", "twice/back", "nobody/variant", "twice/unload"):
            answer = server.client.post(f"/ui/engine/models/{path}", data={"variant": "reference"})
            assert answer.status_code == 200
            assert "Refused: " in answer.text
        assert server.client.post("/ui/engine/drain", data={"a": "x" * 20_000}).status_code == 413
        for _ in range(2):  # pressed twice, it still answers what it has accepted
            answer = server.client.post("/ui/engine/drain")
            assert "Draining" in answer.text
        until(lambda: not server.thread.is_alive())


def test_the_engines_page_moves_with_what_has_an_address_of_its_own() -> None:
    serve = {"web": True, "admin": {"port": 0}}
    with running({"tiny": Tiny()}, serve=serve) as server:
        aside = server.server.admin_url
        assert server.client.get("/ui/engine").status_code == 404
        assert server.client.get("/ui/verticals/tiny").status_code == 200
        assert httpx.get(f"{aside}/ui/engine").status_code == 200
        for url in (server.server.url, aside):
            assert httpx.get(f"{url}/ui/static/plinth.css").status_code == 200


def test_without_a_word_there_are_no_pages() -> None:
    with running({"tiny": Tiny()}) as server:
        for path in (*PAGES, "/ui/static/plinth.css"):
            assert server.client.get(path).status_code == 404


def test_a_form_has_a_field_for_each_kind_of_value() -> None:
    schema = {
        "required": ["id", "kind"],
        "$defs": {"Kind": {"enum": ["a", "b"], "type": "string"}},
        "properties": {
            "id": {"type": "string", "maxLength": 8, "minLength": 1},
            "kind": {"$ref": "#/$defs/Kind"},
            "count": {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]},
            "share": {"type": "number", "exclusiveMaximum": 1, "description": "of all"},
            "urgent": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "either": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
        },
    }
    example = {"id": "x", "kind": "b", "tags": ["t"], "urgent": True}
    found = {entry.name: entry for entry in entries(schema, example)}
    kinds = {name: entry.kind for name, entry in found.items()}
    assert kinds == {
        "id": "text",
        "kind": "choice",
        "count": "number",
        "share": "number",
        "urgent": "flag",
        "tags": "json",
        "either": "json",
    }
    assert found["count"].whole
    assert not found["share"].whole
    assert found["kind"].choices == ("a", "b")
    assert found["share"].hint == "of all; below 1"
    assert found["id"].hint == "8 characters at most"
    assert [found[name].value for name in ("id", "kind", "urgent")] == ["x", "b", "true"]


def test_whoever_closes_the_engines_page_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    with running({"tiny": Tiny()}, serve={"web": True}) as server:
        with server.client.stream("GET", "/ui/engine/live") as live:
            assert next(live.iter_lines()).startswith("data: <section")
        until(lambda: HTTP_LIVE in server.client.get("/metrics").text)
    assert "unexpected" not in caplog.text
