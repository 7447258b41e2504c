"""TLS at the HTTP door and at gRPC: certificates on both sides, expired ones, and new ones."""

from __future__ import annotations

import shutil
import socket
import ssl
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from certificates import signed
from serving import Running, running, until
from tiny_verticals import Tiny

from plinth.engine import ConfigError
from plinth.pipelines.http.wire.tls import TlsFiles

DOUBLE = "/v1/tiny/double"


def trusting(folder: Path, *own: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=folder / "ca.pem")
    if own:
        context.load_cert_chain(*own)
    return context


def certificate_of(server: Running) -> str:
    """Serial number of the certificate that a new connection is shown."""
    url = server.client.base_url
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection((url.host, url.port or 0), timeout=60) as plug,
        context.wrap_socket(plug) as tls,
    ):
        return ssl.DER_cert_to_PEM_cert(tls.getpeercert(binary_form=True) or b"")


def test_https_by_records_lists_and_bodies_of_many_tls_records(tmp_path: Path) -> None:
    certificate, key = signed(tmp_path, "server")
    serve = {"tls": {"certificate": certificate, "key": key}}
    with running({"tiny": Tiny()}, serve=serve, client={"verify": trusting(tmp_path)}) as server:
        assert server.server.url.startswith("https://")
        record = {"id": "a", "value": 2}
        for _ in range(3):  # on one connection
            assert server.post(DOUBLE, json=record).json() == {"id": "a", "twice": 4.0}
        many = server.post(DOUBLE, json=[record | {"id": "x" * 900} for _ in range(1000)])
        assert len(many.json()["results"]) == 1000
        assert len(server.client.get("/openapi.json").content) > 16_384
        url = server.client.base_url
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://{url.host}:{url.port}/v2", timeout=60)
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
            httpx.get(f"{server.server.url}/v2")
        with socket.create_connection((url.host, url.port or 0), timeout=60) as silent:
            silent.sendall(b"\x16\x03")  # the beginning of a handshake that never goes on
            assert server.post(DOUBLE, json=record).status_code == 200


def test_clients_without_a_valid_certificate_are_refused(tmp_path: Path) -> None:
    certificate, key = signed(tmp_path, "server")
    good, expired = signed(tmp_path, "client"), signed(tmp_path, "old", days=-1)
    (tmp_path / "other").mkdir()
    foreign = signed(tmp_path / "other", "client")
    tls = {"certificate": certificate, "key": key, "client_ca": tmp_path / "ca.pem"}
    options = {"verify": trusting(tmp_path, *good)}
    with running({"tiny": Tiny()}, serve={"tls": tls}, client=options) as server:
        assert server.post(DOUBLE, json={"id": "a", "value": 2}).status_code == 200
        for own in ((), expired, foreign):
            with pytest.raises(httpx.HTTPError):
                httpx.get(f"{server.server.url}/v2", verify=trusting(tmp_path, *own), timeout=60)
        assert server.client.get("/v2").status_code == 200


def test_a_new_certificate_is_taken_over_and_a_wrong_one_is_not(tmp_path: Path) -> None:
    certificate, key = signed(tmp_path, "server")
    serve = {"tls": {"certificate": certificate, "key": key}}
    with running({"tiny": Tiny()}, serve=serve, client={"verify": trusting(tmp_path)}) as server:
        first = certificate_of(server)
        assert first == certificate.read_text()
        whole = certificate.read_text()
        certificate.write_text("nothing")
        files = TlsFiles.__new__(TlsFiles)  # the same files are refused at a start
        with pytest.raises(ConfigError, match="TLS with"):
            files.__init__((certificate, key))  # type: ignore[misc]
        assert certificate_of(server) == whole
        assert server.client.get("/v2").status_code == 200
        new, new_key = signed(tmp_path, "next")
        shutil.copy(new_key, key)
        shutil.copy(new, certificate)
        until(lambda: certificate_of(server) == new.read_text())
        assert httpx.get(f"{server.server.url}/v2", verify=trusting(tmp_path)).status_code == 200


@pytest.mark.needs("tritonclient", "grpc", "rapidjson")
def test_grpc_refuses_expired_certificates_and_takes_new_ones_over(tmp_path: Path) -> None:
    import tritonclient.grpc as kind

    certificate, key = signed(tmp_path, "server")
    good, expired = signed(tmp_path, "client"), signed(tmp_path, "old", days=-1)
    tls = {"certificate": certificate, "key": key, "client_ca": tmp_path / "ca.pem"}
    rows = kind.InferInput("rows", [1, 1], "FP32")
    rows.set_data_from_numpy(np.full((1, 1), 3.0, "f4"))
    with running({"tiny": Tiny()}, serve={"grpc": {"port": 0, **tls}}) as server:

        def ask(own: tuple[Path, Path]) -> Any:
            client = kind.InferenceServerClient(
                server.server.grpc_address,
                ssl=True,
                root_certificates=str(tmp_path / "ca.pem"),
                certificate_chain=str(own[0]),
                private_key=str(own[1]),
            )
            try:
                return client.infer("twice", [rows], client_timeout=30).as_numpy("twice").tolist()
            finally:
                client.close()

        assert ask(good) == [[6.0]]
        with pytest.raises(kind.InferenceServerException, match="UNAVAILABLE"):
            ask(expired)
        shown = shown_by(server.server.grpc_address, good)
        assert shown == certificate.read_text()
        new, new_key = signed(tmp_path, "next")
        shutil.copy(new_key, key)
        shutil.copy(new, certificate)
        until(lambda: shown_by(server.server.grpc_address, good) == new.read_text())
        assert ask(good) == [[6.0]]


def shown_by(address: str, own: tuple[Path, Path]) -> str:
    """The certificate that gRPC shows a new connection."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(*own)
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=60) as plug,
        context.wrap_socket(plug) as tls,
    ):
        return ssl.DER_cert_to_PEM_cert(tls.getpeercert(binary_form=True) or b"")
