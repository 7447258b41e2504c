"""The OpenAPI document is true of the server, and its page needs nothing but the server."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urljoin

import pytest
import schemathesis
from archive_builders import ZIP, zipped
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import Running, error, running
from tiny_verticals import Shelf, Tiny

from plinth.verticals import registry

CHECKS = [
    status_code_conformance,  # a 500 is in no document
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
EACH = int(os.environ.get("PLINTH_FUZZ_CASES", "10"))
"""Requests made up for each route; more of them with ``make fuzz``."""


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    verticals = {"finance": registry.load("finance"), "shelf": Shelf(), "tiny": Tiny()}
    with running(verticals, serve={"upload": {"max_jobs": 64}}) as server:
        yield server


@pytest.fixture(scope="module")
def document(server: Running) -> Any:
    """The server's document, which is valid in itself."""
    document = schemathesis.openapi.from_url(f"{server.server.url}/openapi.json")
    document.validate()
    return document


@pytest.mark.timeout(60 + EACH * 2)
def test_every_route_answers_as_the_document_says(document: Any) -> None:
    """But those of ``tiny``, whose large numbers wait for a test, and those of another page."""
    routes = [found.ok() for found in document.get_all_operations()]
    routes = [route for route in routes if "tiny" not in route.path and "/v2" not in route.path]
    assert len(routes) == 17
    for route in routes:

        @given(case=route.as_strategy())
        @settings(
            max_examples=EACH,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            derandomize=EACH == 10,
        )
        def check(case: Any) -> None:
            case.call_and_validate(checks=CHECKS)

        check()


def test_jobs_and_their_files_are_as_the_document_says(server: Running, document: Any) -> None:
    body = zipped([("a.txt", b"1"), ("b.txt", b"x")])
    for wait in (True, False):
        response = server.post("/v1/shelf/read", content=body, headers=ZIP, params={"wait": wait})
        document["/v1/shelf/read"]["POST"].validate_response(response)
    url = response.json()["url"]
    job = url.rpartition("/")[2]
    one = document["/v1/shelf/jobs/{job}"]["GET"]
    one.Case(path_parameters={"job": job}).call_and_validate(checks=CHECKS)
    file = document["/v1/shelf/jobs/{job}/files/{name}"]["GET"]
    for name in ("a/twice.txt", "a/report.html", "b/twice.txt"):
        file.Case(path_parameters={"job": job, "name": name}).call_and_validate(checks=CHECKS)
    gone = document["/v1/shelf/jobs/{job}"]["DELETE"]
    for _ in range(2):  # 204, then 404
        gone.Case(path_parameters={"job": job}).call_and_validate(checks=CHECKS)


def test_a_list_of_records_is_answered_as_the_document_says(document: Any) -> None:
    route = document["/v1/tiny/double"]["POST"]
    for body in ({"id": "a", "value": 1}, [{"id": "a", "value": 1}, {"id": "b", "value": 13}, {}]):
        case = route.Case(body=body, media_type="application/json")
        case.call_and_validate(checks=CHECKS)


def test_methods_a_route_does_not_have_are_refused_as_such(document: Any) -> None:
    route = document["/v1/tiny/double"]["POST"]
    case = route.Case(method="PUT", body={"id": "a", "value": 1}, media_type="application/json")
    assert case.call().status_code == 405


def test_a_locked_server_says_how_to_unlock_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCS_KEY", "a-key-of-some-length")
    with running({"tiny": Tiny()}, serve={"api_key_env": "DOCS_KEY"}) as server:
        error(server.client.get("/openapi.json"), 401, "unauthorised")
        key = {"x-api-key": "a-key-of-some-length"}
        told = server.client.get("/openapi.json", headers=key).json()
        route = told["paths"]["/v1/tiny/double"]["post"]
        assert route["security"] == [{"bearer": []}, {"header": []}]
        assert "401" in route["responses"]
        assert told["components"]["securitySchemes"]["header"]["name"] == "X-API-Key"
        assert "security" not in told["paths"]["/health/live"]["get"]


# -- the page ------------------------------------------------------------------------------------
class Links(HTMLParser):
    """Collects what a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in ("src", "href") and value]


def test_the_page_loads_everything_from_its_own_server(server: Running) -> None:
    page = server.client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    links = Links()
    links.feed(page.text)
    assert len(links.found) == 3
    documents = re.findall(r"url: '([^']+)'", page.text)
    assert documents == ["/openapi.json"]
    for link in (*links.found, *documents):
        url = urljoin(str(page.url), link)
        assert url.startswith(server.server.url), link
        assert server.client.get(url).is_success
    assert "connect-src 'self'" in page.headers["content-security-policy"]
    assert "default-src 'none'" in page.headers["content-security-policy"]
    style = server.client.get("/docs/swagger-ui.css").text
    assert not re.search(r"@import|url\((?!\"?data:|#)", style)


def test_the_page_has_no_other_files(server: Running) -> None:
    for name in ("redoc.standalone.js", "..%2f__init__.py", "x"):
        error(server.client.get(f"/docs/{name}"), 404, "not_found")
