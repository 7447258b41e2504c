"""The same streams of bytes to Plinth's HTTP server and to uvicorn: who reads what as a request?

    python benchmarks/http_fuzz.py [--streams 100000] [--seed 1] [--json]

A stream is one to four requests, whole or damaged, cut anywhere, and a last one that ends the
connection. Behind both servers lies an echo that answers a POST of JSON with the hash and the
length of its body, so an answer shows where each server saw a body begin and end.

- A stream of *plain* requests must be answered the same by both.
- In any other stream Plinth may refuse what uvicorn (httptools, llhttp) takes, for it keeps to the
  canonical grammar; but every body that Plinth answers must be one that uvicorn answers, in the
  same order. Otherwise a proxy in front could be made to see other requests than the server.
- uvicorn gets another field of the same length for ``Upgrade``: Plinth must answer as if it were
  any field.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import random
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httptools
import torch
import uvicorn
from head import parser_of, print_json
from pydantic import BaseModel
from torch import Tensor, nn

from plinth.engine import Call, Flow, InputError, Model, ModelSpec, Sla, TensorSpec
from plinth.pipelines.assembly import build_engine
from plinth.pipelines.config.settings import Config
from plinth.pipelines.http.server import Server, bind, create_app
from plinth.verticals import Vertical

PATH = "/v1/echo/say"
TOGETHER = 48  # streams on their way at once
_UPGRADE = re.compile(rb"upgrade:", re.IGNORECASE)
QUIET = 0.4  # seconds without a byte after which a server is thought to wait for more
INCOMPLETE = "incomplete"
PATIENT = 10.0  # the same, for a second look
LAST = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
LAST += b'Connection: close\r\nContent-Length: 12\r\n\r\n{"id":"end"}'


# -- what both servers answer --------------------------------------------------------------------
def digest(body: bytes) -> str:
    """Tells bodies apart, but not the ``Upgrade`` lines of one server from what stands for them."""
    return hashlib.sha256(_without_upgrade(body)).hexdigest()[:16]


def _without_upgrade(stream: bytes) -> bytes:
    """A plain field of the same length for each ``Upgrade``; a damaged head counts it as body."""
    return _UPGRADE.sub(b"X-grade:", stream)


class Body(BaseModel):
    """Any JSON object."""


class Said(BaseModel):
    """What came."""

    sha: str
    bytes: int


class _Ones(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        return rows


class Echo(Vertical[bytes, Said]):
    """Answers each record with the hash of its bytes."""

    name = "echo"
    summary = "Tells what came."
    action = "say"
    request = Body
    response = Said
    sla = Sla(deadline_ms=60_000)

    def models(self) -> Sequence[Model]:
        """One that does nothing."""
        row = (TensorSpec(name="row", shape=(1,)),)
        return [Model(ModelSpec(name="ones", inputs=row, outputs=row), _Ones())]

    def example(self) -> bytes:
        """An empty object."""
        return b"{}"

    def parse(self, raw: bytes) -> bytes:
        """The bytes themselves."""
        return bytes(raw)

    def infer(self, requests: Sequence[bytes]) -> Flow[list[Said | InputError]]:
        """Hash each."""
        yield Call("ones", torch.ones(len(requests), 1))
        return [Said(sha=digest(raw), bytes=len(raw)) for raw in requests]


async def reference(scope: Any, receive: Any, send: Any) -> None:
    """The same route as a plain ASGI application."""
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message.get("body", b"")
        more = message.get("more_body", False)
    kind = dict(scope["headers"]).get(b"content-type", b"").partition(b";")[0].strip().lower()
    status = 200 if kind == b"application/json" else 415
    status = status if scope["method"] == "POST" else 405
    status = status if scope["path"] == PATH else 404
    told = json.dumps({"sha": digest(body), "bytes": len(body)}).encode()
    fields = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(told))]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": told})


@contextlib.contextmanager
def plinth_server() -> Iterator[int]:
    """The port of Plinth's server while the block runs."""
    serve = {"port": 0, "request_timeout_seconds": 2.0, "max_connections": 1024}
    config = Config.model_validate({"engine": {"backend": "eager"}, "serve": serve})
    bound = bind(config.serve.host, config.serve.port)
    verticals = {"echo": Echo()}
    with build_engine(config, verticals) as engine:
        server = Server(create_app(verticals, engine, config), config, bound)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            yield bound.getsockname()[1]
        finally:
            server.drain()
            thread.join(60)


@contextlib.contextmanager
def uvicorn_server() -> Iterator[int]:
    """The port of uvicorn's while the block runs."""
    bound = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        reference, http="httptools", loop="asyncio", ws="none", log_config=None, access_log=False
    )
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        yield bound.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(60)
        bound.close()


# -- streams -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Stream:
    """What is sent over one connection.

    Args:
        segments: for Plinth; each is one write.
        requests: for uvicorn, without ``Upgrade``; each is sent when the one before has its
            answer, since uvicorn forgets a request when what follows it is damaged.
        plain: nothing in it is damaged.
    """

    segments: tuple[bytes, ...]
    requests: tuple[bytes, ...]
    plain: bool


class Streams:
    """Makes streams; the same seed makes the same.

    Args:
        seed: of the random generator.
    """

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self._plain = True

    def make(self) -> Stream:
        """The next stream."""
        self._plain = True
        damaged = self._dice.random() < 0.7
        parts = [self._request(damaged) for _ in range(self._dice.choice((1, 1, 1, 2, 2, 3, 4)))]
        whole = b"".join([*parts, LAST])
        cuts = sorted(self._dice.randrange(len(whole)) for _ in range(self._dice.choice((0, 1, 4))))
        segments = [whole[a:b] for a, b in zip((0, *cuts), (*cuts, len(whole)), strict=True)]
        return Stream(tuple(filter(None, segments)), messages(_without_upgrade(whole)), self._plain)

    def _maybe(self, share: float) -> bool:
        """Whether to damage something; if so the stream is not plain any more."""
        if self._dice.random() >= share:
            return False
        self._plain = False
        return True

    def _body(self) -> bytes:
        kind = self._dice.randrange(6)
        if kind == 0:
            return b'{"id":"\\r\\n\\r\\n"}' + b" " * self._dice.randrange(5)
        if kind == 1:
            return b'{"p":"' + LAST.replace(b'"', b"'") + b'"}'
        if kind == 2:
            return b'{"a":"' + b"x" * self._dice.choice((100, 4000, 33_000, 70_000)) + b'"}'
        return json.dumps({"id": self._dice.choice("abc"), "n": self._dice.randrange(99)}).encode()

    def _chunked(self, body: bytes, share: float) -> bytes:
        out, at = b"", 0
        while at < len(body):
            part = body[at : at + self._dice.choice((1, 7, 64, 5000, len(body)))]
            at += len(part)
            size, extension, ending = b"%x" % len(part), b"", b"\r\n"
            if self._dice.random() < 0.1:
                extension = self._dice.choice((b";a=b", b';x="y"', b";" + b"e" * 50))
            if self._maybe(share):
                size = self._dice.choice(
                    (
                        size + b" ;x=y",
                        b"+" + size,
                        b"0x" + size,
                        b" " + size,
                        b"f" * 16 + size,
                        b"-1",
                        size + b" ",
                    )
                )
            if self._maybe(share):
                ending = self._dice.choice((b"\n", b"\r", b"\r\r\n", b""))
            out += size + extension + ending + part
            out += self._dice.choice((b"\n", b"", b"\r")) if self._maybe(share) else b"\r\n"
            if len(out) > 3 * len(body) + 4000:  # one byte a chunk
                out += b"%x\r\n%b\r\n" % (len(body) - at, body[at:]) if at < len(body) else b""
                break
        trailer = self._dice.choice((b"", b"", b"X-T: 1\r\n"))
        if self._maybe(share):
            trailer = self._dice.choice(
                (b"bad trailer\r\n", b": x\r\n", b"a:b\n", b"Content-Length: 3\r\n")
            )
        return out + b"0\r\n" + trailer + b"\r\n"

    def _request(self, damaged: bool) -> bytes:
        dice, share = self._dice, 0.12 if damaged else 0.0
        body = self._body()
        method, path, version = b"POST", PATH.encode(), b"HTTP/1.1"
        if dice.random() < 0.1 and len(body) < 60_000:  # a longer one ends the connection there
            method, path = dice.choice(((b"GET", path), (b"POST", b"/nope"), (b"PUT", b"/nope")))
        if self._maybe(share):
            method = dice.choice((b"post", b"PRI", b"CONNECT", b"FOO", b"POST\t", b"P(ST", b""))
        if self._maybe(share):
            path = dice.choice(PATHS)
        if self._maybe(share):
            version = dice.choice(VERSIONS)
        fields = [b"Host: x", b"Content-Type: application/json"]
        if self._maybe(share):
            fields[0] = dice.choice(HOSTS)
        chunked = dice.random() < 0.25
        fields.append(
            b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(body)
        )
        payload = self._chunked(body, share / 4) if chunked else body
        if self._maybe(share):
            fields[-1] = dice.choice(FRAMINGS) % {b"n": len(body), b"d": max(0, len(body) - 3)}
        if dice.random() < 0.1:
            fields.append(dice.choice(UPGRADES))
        if self._maybe(share):
            fields.append(dice.choice(FIELDS))
        dice.shuffle(fields)
        if dice.random() < 0.2:
            fields.append(b"X-Request-Id: %d" % dice.randrange(1 << 30))
        ends = [dice.choice((b"\n", b"\r", b"\r\r\n")) if self._maybe(share / 9) else b"\r\n"
                for _ in range(len(fields) + 2)]  # fmt: skip
        lines = [b"%b %b %b" % (method, path, version), *fields, b""]
        before = dice.choice((b"\n", b" ", b"\x00")) if self._maybe(share / 9) else b""
        return before + b"".join(a + b for a, b in zip(lines, ends, strict=True)) + payload


class _End:
    """Notes the end of a message; called by the parser."""

    def __init__(self) -> None:
        self.seen = False

    def on_message_complete(self) -> None:
        """A message is whole."""
        self.seen = True


def messages(stream: bytes) -> tuple[bytes, ...]:
    """A stream cut where uvicorn's parser sees its messages end; what it cannot read is one."""
    end = _End()
    parser = httptools.HttpRequestParser(end)
    found, begin = [], 0
    with contextlib.suppress(httptools.HttpParserError, httptools.HttpParserUpgrade):
        for at in range(len(stream)):
            parser.feed_data(stream[at : at + 1])
            if end.seen:
                found.append(stream[begin : at + 1])
                begin, end.seen = at + 1, False
    return tuple(filter(None, (*found, stream[begin:])))


UPGRADES = (b"Upgrade: h2c", b"Upgrade: websocket", b"UPGRADE: foo/2")
PATHS = (
    *(b"/v1/echo/say?x=1", b"/v1/echo/say/", b"//v1/echo/say", b"/v1/echo/say#f", b"*", b"/a b"),
    *(b"/v1/echo/../echo/say", b"/v1/echo/say\x80", b"\x7f", b"/v1/echo/s\x00y", b""),
)
VERSIONS = (
    *(b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9", b"http/1.1", b"HTTP/1.1 ", b"HTTP/01.1", b""),
    *(b"HTTP/1.2", b"HTTP/1.10", b"HTTPS/1.1"),
)
HOSTS = (b"host: x:80", b"Host: a\r\nHost: b", b"Host:", b"Host: x\x00y", b"Host: a b", b"X: y")
FRAMINGS = (
    *(b"Content-Length: %(n)d ", b"Content-Length:\t%(n)d", b"Content-Length: 0%(n)d"),
    *(b"Content-Length: +%(n)d", b"Content-Length: %(n)d, %(n)d", b"content-length:%(n)d"),
    *(b"Content-Length : %(n)d", b"Content_Length: %(n)d", b"Content-Length: %(n)d\x0b"),
    *(b"Content-Length: 0x%(n)x", b"Content-Length: " + b"0" * 400 + b"%(n)d", b"X: y"),
    *(b"Content-Length: 18446744073709551616", b"Content-Length: -1", b"Content-Length:"),
    *(b"Content-Length: %(n)d\r\nContent-Length: %(d)d", b"Content-Length: %(d)d"),
    *(b"Content-Length: %(n)d\r\nTransfer-Encoding: chunked", b"Content-Length: %(n)d\r\n "),
    *(b"Transfer-Encoding: identity", b"Transfer-Encoding: chunked, identity"),
    *(b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding:\x0bchunked"),
    *(b"Transfer-Encoding : chunked", b"X: y\r\n Transfer-Encoding: chunked"),
    *(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity", b"TRANSFER-ENCODING: CHUNKED"),
    *(b"X: \rTransfer-Encoding: chunked", b"Transfer-Encoding: chunked "),
)
FIELDS = (
    *(b"X: a\nY: b", b"X: a\rY: b", b" folded: x", b"X:a\r\n\tb", b"X\x00: 1", b"(): 1"),
    *(b": novalue", b"NoColon", b"X: \x7f", b"X: a\r\n", b"X: \xff\xfe", b"Connection: close"),
    *(b"Connection: Keep-Alive", b"Connection: close, keep-alive", b"Expect: 200-ok"),
    *(b"Connection: Content-Length", b"X-Long: " + b"a" * 9000, b"Content-Type: text/xml"),
)


# -- playing them --------------------------------------------------------------------------------
Answers = list[tuple[int, str]]
"""Status and body of each answer; the body only of 200."""


async def play(port: int, segments: Sequence[bytes], *, in_turn: bool, quiet: float) -> Answers:
    """Send a stream and take what is answered until the server closes or waits for more.

    Args:
        port: of the server.
        segments: each is one write.
        in_turn: wait for an answer after each.
        quiet: seconds without a byte after which the server is thought to wait for more.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    said, last = b"", len(segments) - 1
    with contextlib.suppress(OSError):
        for number, segment in enumerate(segments):
            writer.write(segment)
            await asyncio.sleep(0)
            while in_turn or number == last:
                try:
                    data = await asyncio.wait_for(reader.read(1 << 16), quiet)
                except TimeoutError:
                    break
                said += data
                if not data or (number != last and whole(said) > number):
                    break
    writer.close()
    return answers(said)


def whole(said: bytes) -> int:
    """How many answers there are to their end: head and body may come apart."""
    return sum(told != INCOMPLETE for _, told in answers(said))


def answers(said: bytes) -> Answers:
    """The answers in what a server said."""
    found: Answers = []
    while said.startswith(b"HTTP/1.1 "):
        head, end, rest = said.partition(b"\r\n\r\n")
        if not end:
            found.append((0, INCOMPLETE))
            break
        lengths = [int(line[15:]) for line in head.lower().split(b"\r\n")
                   if line.startswith(b"content-length:")]  # fmt: skip
        length = lengths[0] if lengths else len(rest)
        status = int(head[9:12])
        if len(rest) < length:  # a slow machine; looked at again with more patience
            found.append((status, INCOMPLETE))
            break
        if status >= 200:
            told = json.loads(rest[:length]) if status == 200 else {}
            found.append((status, f"{told.get('sha')} {told.get('bytes')}" if told else ""))
        said = rest[length:] if lengths else rest
    return found


def fault(stream: Stream, ours: Answers, theirs: Answers) -> str | None:
    """What is wrong with our answers, if anything."""
    if stream.plain:
        return None if ours == theirs else "a plain stream is answered in another way"
    good = [one for one in theirs if one[0] == 200]
    for answer in ours:
        if answer[0] == 200 and (not good or good.pop(0) != answer):
            return "answered a body that uvicorn does not see there"
    return None


@dataclass
class Report:
    """What came of a run.

    Args:
        streams: how many.
        plain: of them without damage.
        same: answered with the same statuses by both.
        stricter: refused by Plinth, taken by uvicorn.
        faults: what is wrong, with the stream.
    """

    streams: int = 0
    plain: int = 0
    same: int = 0
    stricter: int = 0
    faults: list[tuple[str, Stream, Answers, Answers]] = field(default_factory=list)


async def _compare(streams: Iterator[Stream], ours: int, theirs: int) -> Report:
    report = Report()

    async def both(stream: Stream, quiet: float) -> tuple[Answers, Answers]:
        return await asyncio.gather(
            play(ours, stream.segments, in_turn=False, quiet=quiet),
            play(theirs, stream.requests, in_turn=True, quiet=quiet),
        )

    async def work() -> None:
        for stream in streams:
            here, there = await both(stream, QUIET)
            wrong = fault(stream, here, there)
            if wrong is not None:  # a machine with other things to do may just have been slow
                here, there = await both(stream, PATIENT)
                wrong = fault(stream, here, there)
            if wrong is not None:
                report.faults.append((wrong, stream, here, there))
            took = [sum(one[0] == 200 for one in side) for side in (here, there)]
            report.streams += 1
            report.plain += stream.plain
            report.same += [one[0] for one in here] == [one[0] for one in there]
            report.stricter += took[0] < took[1]

    await asyncio.gather(*(work() for _ in range(TOGETHER)))
    return report


def fuzz(count: int, seed: int) -> Report:
    """Play so many streams to both servers."""
    made = Streams(seed)
    streams = (made.make() for _ in range(count))
    with plinth_server() as ours, uvicorn_server() as theirs:
        return asyncio.run(_compare(streams, ours, theirs))


def main() -> int:
    """Run and print; the exit code is 1 if there are faults."""
    parser = parser_of(__doc__)
    parser.add_argument("--streams", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    report = fuzz(given.streams, given.seed)
    counts = Counter(kind for kind, *_ in report.faults)
    told = {
        **{name: getattr(report, name) for name in ("streams", "plain", "same", "stricter")},
        "faults": dict(counts),
    }
    if given.json:
        print_json(told)
    else:
        print(", ".join(f"{name}: {value}" for name, value in told.items()))
        for kind, stream, ours, theirs in report.faults[:10]:
            print(f"{kind}\n  sent {stream.segments!r:.1500}\n  plinth {ours}\n  uvicorn {theirs}")
    return 1 if report.faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
