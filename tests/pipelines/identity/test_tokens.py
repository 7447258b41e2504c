"""Tokens of a small real issuer: what it signed is taken, and whatever else comes is not."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from serving import error, running, until
from tiny_verticals import Tiny

from plinth.pipelines.config.settings import Config, OidcConfig
from plinth.pipelines.identity.callers import AccessDenied, Identity, Need

pytestmark = pytest.mark.needs("joserfc")
RECORD = {"id": "a", "value": 2}
DOUBLE = "/v1/tiny/double"


class Issuer:
    """Signs tokens, and tells its keys at ``url``."""

    def __init__(self) -> None:
        from joserfc.jwk import ECKey, RSAKey

        self.rsa = RSAKey.generate_key(2048, {"kid": "r1"}, private=True)
        self.curve = ECKey.generate_key("P-256", {"kid": "e1"}, private=True)
        self.told: Any = {"keys": [key.as_dict(private=False) for key in (self.rsa, self.curve)]}
        self.asked = 0
        self.instead: Callable[[Any], None] | None = None
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if issuer.instead is not None:
                    issuer.instead(self)
                    return
                body, status = issuer.answer(self.path)
                self.send_response(status)
                if status == 302:
                    self.send_header("location", f"{issuer.url}/keys")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def answer(self, path: str) -> tuple[bytes, int]:
        """Body and status for a path."""
        if path == "/.well-known/openid-configuration":
            return json.dumps({"issuer": self.url, "jwks_uri": f"{self.url}/keys"}).encode(), 200
        if path == "/keys":
            self.asked += 1
            told = self.told
            return (told if isinstance(told, bytes) else json.dumps(told).encode()), 200
        return b"", 302 if path == "/moved" else 404

    def end(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(60)

    def claims(self, **changed: Any) -> dict[str, Any]:
        """Those of a good token; ``None`` leaves one out."""
        now = int(time.time())
        good = {"iss": self.url, "aud": "plinth", "sub": "alice", "scope": "openid plinth.score"}
        whole = {**good, "iat": now, "exp": now + 600, **changed}
        return {name: value for name, value in whole.items() if value is not None}

    def token(self, key: Any = None, alg: str = "RS256", **changed: Any) -> str:
        """A signed token."""
        from joserfc import jwt

        key = key or self.rsa
        header = {"alg": alg, "kid": key.kid or "r1"}
        return str(jwt.encode(header, self.claims(**changed), key, algorithms=[alg]))


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    found = Issuer()
    yield found
    found.end()


def identity(issuer: Issuer, **table: Any) -> Identity:
    """Knows the issuer's tokens; its keys are fetched."""
    from plinth.pipelines.identity.tokens import IssuerTokens

    config = OidcConfig.model_validate({"issuer": issuer.url, "audience": "plinth", **table})
    tokens = IssuerTokens(config)
    tokens.fetch()
    return Identity([], tokens)


def ask(known: Identity, token: str) -> Any:
    return known.caller({b"authorization": f"Bearer {token}".encode()})


def unsigned(header: dict[str, Any], claims: dict[str, Any], signature: bytes = b"") -> str:
    parts = (json.dumps(header).encode(), json.dumps(claims).encode(), signature)
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)


def test_what_the_issuer_signed_is_taken(issuer: Issuer) -> None:
    known = identity(issuer)
    for token in (
        issuer.token(),
        issuer.token(issuer.curve, "ES256"),
        issuer.token(aud=["x", "plinth"]),
    ):
        caller = ask(known, token)
        assert caller.name == "oidc:alice"
        caller.check(Need("score", "tiny"))
        with pytest.raises(AccessDenied):
            caller.check(Need("admin", "tiny"))
    many = ask(known, issuer.token(scope="plinth.read plinth.admin"))
    many.check(Need("admin"))


def test_claims_become_roles_and_reach(issuer: Issuer) -> None:
    table = {"role_claim": "realm.roles", "roles": {"desk": "score"}, "only_claim": "models"}
    known = identity(issuer, **table, per_second=1e-6, burst=2)
    token = issuer.token(realm={"roles": ["other", "desk"]}, models=["tiny"])
    caller = ask(known, token)
    caller.check(Need("score", "tiny"))
    with pytest.raises(AccessDenied, match="reaches tiny only"):
        caller.check(Need("score", "other"))
    assert caller.bucket is ask(known, issuer.token(realm={"roles": ["desk"]}, models=["x"])).bucket
    for wrong in (
        {"realm": {"roles": ["other"]}, "models": ["tiny"]},
        {"realm": {"roles": ["desk"]}},
    ):
        with pytest.raises(AccessDenied):
            ask(known, issuer.token(**wrong))


HOSTILE: dict[str, Any] = {
    "another issuer": lambda i: i.token(iss="https://evil.example"),
    "another audience": lambda i: i.token(aud="other"),
    "no audience": lambda i: i.token(aud=None),
    "no end": lambda i: i.token(exp=None),
    "an end that is no number": lambda i: i.token(exp="tomorrow"),
    "expired beyond the leeway": lambda i: i.token(exp=int(time.time()) - 31),
    "not valid yet": lambda i: i.token(nbf=int(time.time()) + 60),
    "no subject": lambda i: i.token(sub=None),
    "a subject that is none": lambda i: i.token(sub=7),
    "no role": lambda i: i.token(scope="openid"),
    "huge": lambda i: i.token(sub="a" * 20_000),
    "alg none": lambda i: unsigned({"alg": "none"}, i.claims()),
    "alg None, with a kid": lambda i: unsigned({"alg": "None", "kid": "r1"}, i.claims(), b"x"),
    "an algorithm not in the list": lambda i: i.token(alg="PS256"),
    "signed by somebody else": lambda i: i.token(Issuer_key()),
    "an unknown kid": lambda i: i.token(Issuer_key("r9")),
    "its own key in its head": lambda i: unsigned(
        {"alg": "RS256", "jwk": i.rsa.as_dict(private=False)}, i.claims(), b"x" * 256
    ),
    "a changed claim": lambda i: changed(i.token()),
    "two parts": lambda i: i.token().rpartition(".")[0],
    "nonsense": lambda i: "a.b.c",
    "claims that are a list": lambda i: unsigned({"alg": "RS256", "kid": "r1"}, [], b"x"),  # type: ignore[arg-type]
    "deep claims": lambda i: ".".join(
        (b64(b'{"alg":"RS256","kid":"r1"}'), b64(b"[" * 3000), b64(b"x"))
    ),
    "a public key used as a shared secret": lambda i: confused(i),
}


def b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def Issuer_key(kid: str = "r1") -> Any:
    """A key that the issuer does not have."""
    from joserfc.jwk import RSAKey

    return RSAKey.generate_key(2048, {"kid": kid}, private=True)


def changed(token: str) -> str:
    head, claims, signature = token.split(".")
    told = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))
    return ".".join((head, b64(json.dumps({**told, "scope": "plinth.admin"}).encode()), signature))


def confused(issuer: Issuer) -> str:
    """HMAC with the public key, which everybody has, as the secret."""
    import hashlib
    import hmac

    head = b64(b'{"alg":"HS256","kid":"r1"}')
    signed = f"{head}.{b64(json.dumps(issuer.claims()).encode())}"
    secret = issuer.rsa.as_pem(private=False)
    return f"{signed}.{b64(hmac.digest(secret, signed.encode(), hashlib.sha256))}"


@pytest.mark.parametrize("what", HOSTILE)
def test_whatever_else_comes_is_not(issuer: Issuer, what: str) -> None:
    known = identity(issuer)
    token = HOSTILE[what](issuer)
    for _ in range(2):
        with pytest.raises(AccessDenied) as refused:
            ask(known, token)
        assert refused.value.reason == "unauthorised"
        assert token not in str(refused.value)


def test_clocks_may_be_a_little_apart_and_a_token_ends(issuer: Issuer) -> None:
    now = int(time.time())
    known = identity(issuer)
    ask(known, issuer.token(exp=now - 10, nbf=now + 20))
    from plinth.pipelines.identity.tokens import IssuerTokens

    clock = [float(now)]
    config = OidcConfig(issuer=issuer.url, audience="plinth")
    tokens = IssuerTokens(config, clock=lambda: clock[0])
    tokens.fetch()
    later = Identity([], tokens, clock=lambda: clock[0])
    token = issuer.token(exp=now + 100)
    ask(later, token)
    clock[0] = now + 131.0  # it is remembered, and has ended all the same
    with pytest.raises(AccessDenied):
        ask(later, token)


@pytest.mark.parametrize(
    "told",
    [
        b"nothing",
        b"[]",
        b"{}",
        b'{"keys": {}}',
        b'{"keys": []}',
        b'{"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "r1"}]}',
        b'{"keys": [7]}',
        json.dumps({"keys": [{"kty": "RSA"}] * 101}).encode(),
        b'{"keys": [' + b" " * (1 << 20) + b"]}",
        b"[" * 100_000,
    ],
    ids=["text", "list", "empty", "no list", "none", "secret", "number", "many", "huge", "deep"],
)
def test_keys_that_are_none_change_nothing(issuer: Issuer, told: bytes) -> None:
    known, token = identity(issuer), issuer.token()
    whole = issuer.told
    issuer.told = told
    try:
        known._tokens.fetch()  # type: ignore[union-attr]
        assert ask(known, token).name == "oidc:alice"
    finally:
        issuer.told = whole


ODD: dict[str, dict[str, Any]] = {
    "of a curve that is not known": {"kty": "EC", "crv": "P-999", "x": "AA", "y": "AA"},
    "of a kind that is not known": {"kty": "AKP", "alg": "ML-DSA-44", "pub": "AA"},
    "without its parts": {"kty": "RSA", "kid": "odd"},
    "with parts that are no numbers": {"kty": "RSA", "n": "!", "e": 7},
    "with a point beside its curve": {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"},
    "whose use is no text": {"kty": "RSA", "n": "AA", "e": "AQAB", "use": ["sig"]},
    "without a kind": {"kid": "odd"},
}


@pytest.mark.parametrize("what", ODD)
def test_an_odd_key_is_left_out_and_takes_no_other_along(
    issuer: Issuer, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = issuer.told
    issuer.told = {"keys": [ODD[what], *whole["keys"]]}
    try:
        known = identity(issuer)
    finally:
        issuer.told = whole
    assert ask(known, issuer.token()).name == "oidc:alice"
    assert ask(known, issuer.token(issuer.curve, "ES256")).name == "oidc:alice"
    assert "left out of the keys" in caplog.text
    assert "key 1 of 3" in caplog.text


def test_no_token_outlives_the_keys_that_signed_it(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The issuer withdraws a key in the moment in which a token of it is being checked."""
    from plinth.pipelines.identity import tokens as module

    known, token, whole = identity(issuer), issuer.token(), issuer.told
    decode, new = module.jwt.decode, Issuer_key("r2")

    def withdrawn(*words: Any, **options: Any) -> Any:
        found = decode(*words, **options)
        issuer.told = {"keys": [new.as_dict(private=False)]}
        known._tokens.fetch()  # type: ignore[union-attr]
        return found

    try:
        with monkeypatch.context() as patch:
            patch.setattr(module.jwt, "decode", withdrawn)
            ask(known, token)
        with pytest.raises(AccessDenied):
            ask(known, token)
        assert ask(known, issuer.token(new)).name == "oidc:alice"
    finally:
        issuer.told = whole


@pytest.mark.parametrize("part", ["head", "body"])
def test_an_issuer_that_drips_is_cut(
    part: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A byte each moment never lets the timeout of a socket pass."""
    from plinth.pipelines.identity import tokens

    monkeypatch.setattr(tokens, "_SECONDS", 0.5)
    issuer, over = Issuer(), threading.Event()

    def drip(handler: Any) -> None:
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n")
        handler.wfile.write(b"x-slow: " if part == "head" else b"content-length: 99999\r\n\r\n")
        with contextlib.suppress(OSError):
            while not over.wait(0.05):
                handler.wfile.write(b" ")

    issuer.instead = drip
    try:
        known = identity(issuer)
    finally:
        over.set()
        issuer.end()
    assert "was not whole within 0.5 s" in caplog.text
    with pytest.raises(AccessDenied):
        ask(known, issuer.token())


@pytest.mark.parametrize(
    "address", ["http://keys.example/k", "file:///etc/passwd", "{}/moved", "{}/none"]
)
def test_keys_are_fetched_from_nowhere_else(
    issuer: Issuer, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    known = identity(issuer, keys_url=address.format(issuer.url))
    assert "the keys of the issuer in force stay" in caplog.text
    with pytest.raises(AccessDenied):
        ask(known, issuer.token())


def test_a_server_takes_tokens_and_follows_new_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    from plinth.pipelines.identity import tokens

    monkeypatch.setattr(tokens, "AGAIN", 0.2)
    issuer = Issuer()
    oidc = {"issuer": issuer.url, "audience": "plinth"}
    try:
        with running({"tiny": Tiny()}, serve={"oidc": oidc}) as server:

            def post(token: str) -> Any:
                headers = {"authorization": f"Bearer {token}"}
                return server.post(DOUBLE, json=RECORD, headers=headers)

            until(lambda: post(issuer.token()).status_code == 200)
            error(post(issuer.token(scope="plinth.read")), 403, "forbidden")
            error(post(issuer.token(iss="x")), 401, "unauthorised")
            error(server.post(DOUBLE, json=RECORD), 401, "unauthorised")
            new = Issuer_key("r2")
            issuer.told = {"keys": [new.as_dict(private=False)]}
            until(lambda: post(issuer.token(new)).status_code == 200)
            error(post(issuer.token()), 401, "unauthorised")
    finally:
        issuer.end()


def test_an_issuer_needs_an_audience() -> None:
    with pytest.raises(ValueError, match="needs an audience"):
        Config.model_validate({"serve": {"oidc": {"issuer": "https://login.example"}}})
    with pytest.raises(ValueError, match="algorithms"):
        OidcConfig.model_validate({"algorithms": ["HS256"]})
