"""Names the server goes by, pages of other sites, and an address for metrics alone."""

from __future__ import annotations

import pytest
from serving import error, running
from tensor_rows import ROWS
from tiny_verticals import Tiny

RECORD = {"id": "a", "value": 2}
DOUBLE = "/v1/tiny/double"
DESK = "https://desk.example"


def test_beyond_loopback_any_name_will_do_unless_names_are_listed() -> None:
    """Whoever reaches the server by a name of their own choice is told so where that matters."""
    for names, status in (([], 200), (["scores.bank.example"], 403), (["*"], 200)):
        serve = {"host": "0.0.0.0", "insecure": True, "allowed_hosts": names}  # noqa: S104
        with running({"tiny": Tiny()}, serve=serve) as server:
            for host, expected in (("other.example", status), ("scores.bank.example", 200)):
                found = server.post(DOUBLE, json=RECORD, headers={"host": host})
                assert found.status_code == expected, (names, host)


def test_pages_of_other_sites_may_ask_if_their_site_is_listed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DESK_KEY", "s3cret")
    asked = {
        "origin": DESK,
        "sec-fetch-site": "cross-site",
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type,x-api-key",
    }
    sent = {"origin": DESK, "sec-fetch-site": "cross-site", "x-api-key": "s3cret"}
    table = {"api_key_env": "DESK_KEY"}
    with running({"tiny": Tiny()}, serve=table) as server:
        assert (
            "access-control-allow-origin"
            not in server.client.options(DOUBLE, headers=asked).headers
        )
        error(server.post(DOUBLE, json=RECORD, headers=sent), 403, "cross_site")
    with running({"tiny": Tiny()}, serve={**table, "cors_origins": [DESK]}) as server:
        preflight = server.client.options(DOUBLE, headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == DESK
        for path, body in ((DOUBLE, RECORD), ("/v2/models/twice/infer", {"inputs": [ROWS]})):
            answer = server.post(path, json=body, headers=sent)
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == DESK
        error(server.post(DOUBLE, json=RECORD, headers={"origin": DESK}), 401, "unauthorised")
        other = {**sent, "origin": "https://desk.example.evil"}
        error(server.post(DOUBLE, json=RECORD, headers=other), 403, "cross_site")
        plain = server.post(DOUBLE, json=RECORD, headers={"x-api-key": "s3cret"})
        assert "access-control-allow-origin" not in plain.headers


def test_metrics_and_models_may_have_an_address_of_their_own() -> None:
    serve = {"admin": {"port": 0}, "oip": {"load_models": True}}
    administrative = (
        ("GET", "/metrics"),
        ("GET", "/v1/status"),
        ("POST", "/v2/repository/models/none/load"),
        ("POST", "/v2/repository/models/none/%75nload"),
    )
    with running({"tiny": Tiny()}, serve=serve) as server:
        aside = server.server.admin_url
        for method, path in administrative:
            here = server.client.request(method, path)
            assert here.status_code == 404
            assert "another address" in here.text
            there = server.client.request(method, f"{aside}{path}")
            assert "another address" not in there.text
            assert there.status_code == (200 if method == "GET" else 404)
        for path in ("/v2", DOUBLE, "/docs"):
            assert "another address" in server.client.get(f"{aside}{path}").text
        assert server.client.get(f"{aside}/health/ready").status_code == 200
        assert server.post(DOUBLE, json=RECORD).status_code == 200
