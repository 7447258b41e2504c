"""A small HTTP server in a process of its own, with every mood a load generator may meet.

    python moody_server.py      prints its port, then serves until stdin closes

The path chooses the mood; ``/double`` doubles four numbers through a real engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import httptools
import torch
from torch import nn

from plinth.engine import Call, Engine, Flow, Model, ModelSpec, Refused, Sla, TensorSpec

STALL_SECONDS = 0.2
PLAIN = b"HTTP/1.1 %s\r\n%scontent-length: %d\r\n\r\n%s"


class Double(nn.Module):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows * 2


def stall(seconds: float) -> None:
    """Be a server that hangs for a while."""
    threading.Event().wait(seconds)


def double(rows: torch.Tensor) -> Flow[torch.Tensor]:
    return (yield Call("double", rows))


def plain(body: bytes, status: bytes = b"200 OK", head: bytes = b"") -> bytes:
    return PLAIN % (status, head, len(body), body)


class Moody(asyncio.Protocol):
    engine: Engine
    seen: ClassVar[Counter[str]] = Counter()
    heads: ClassVar[dict[str, dict[str, str]]] = {}
    tasks: ClassVar[set[asyncio.Task[None]]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_begin(self) -> None:
        self.url, self.body, self.head = b"", b"", {}

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.head[name.decode()] = value.decode()

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        path = self.url.decode().partition("?")[0].strip("/")
        answer = getattr(self, f"do_{path.replace('.', '_')}", self.do_missing)()
        if answer is not None:
            self.transport.write(answer)

    def do_missing(self) -> bytes:
        return plain(b"no such mood", b"404 Not Found")

    def do_openapi_json(self) -> bytes:
        content = {"application/json": {"example": [1.0, 2.0, 3.0, 4.0]}}
        paths = {"/double": {"post": {"requestBody": {"content": content}}}}
        return plain(json.dumps({"paths": paths}).encode())

    def do_plain(self) -> bytes:
        return plain(b"hello")

    def do_note(self) -> bytes:
        method, url = self.parser.get_method().decode(), self.url.decode()
        Moody.seen[f"{method} {url} {self.body.decode()}"] += 1
        Moody.heads[url] = self.head
        return plain(b"noted")

    def do_seen(self) -> bytes:
        return plain(json.dumps([Moody.seen, Moody.heads]).encode())

    def do_stall(self) -> bytes:
        if self.body == b"stall":
            stall(STALL_SECONDS)
        return plain(b"at last")

    def do_chunked(self) -> bytes:
        return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"

    def do_early(self) -> bytes:
        return b"HTTP/1.1 103 Early Hints\r\n\r\n" + plain(b"hello")

    def do_last(self) -> bytes:
        return plain(b"bye", head=b"connection: close\r\n")

    def do_unsized(self) -> None:
        self.transport.write(b"HTTP/1.1 200 OK\r\n\r\nuntil the end")
        self.transport.close()

    def do_cut(self) -> None:
        self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\nhalf")
        self.transport.close()

    def do_hangup(self) -> None:
        self.transport.abort()

    def do_silence(self) -> None:
        return None

    def do_noise(self) -> bytes:
        return b"220 mail.example.org ESMTP\r\n"

    def do_busy(self) -> bytes:
        return plain(b"", b"429 Too Many Requests", b"Retry-After: 1\r\n")

    def do_blind(self) -> bytes:
        return plain(b"", b"503 Service Unavailable")

    def do_fault(self) -> bytes:
        return plain(b"", b"500 Internal Server Error")

    def do_double(self) -> None:
        task = asyncio.create_task(self.double(torch.tensor([json.loads(self.body)]).float()))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def double(self, rows: torch.Tensor) -> None:
        try:
            answer = await self.engine.run_async(double(rows))
        except Refused:
            self.transport.write(plain(b"", b"503 Service Unavailable", b"retry-after: 1\r\n"))
            return
        self.transport.write(plain(json.dumps(answer.value.tolist()).encode()))


@contextlib.contextmanager
def running() -> Iterator[str]:
    """The URL of a server in another process, so that it and the client do not share a GIL."""
    here = Path(__file__).resolve()
    process = subprocess.Popen(
        [sys.executable, str(here)],
        env={**os.environ, "PYTHONPATH": str(here.parents[2]), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    process.stdin.close()
    assert process.wait(60) == 0
    process.stdout.close()


async def serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Moody, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


def main() -> None:
    shape = (TensorSpec(name="x", shape=(4,)),)
    model = Model(ModelSpec(name="double", inputs=shape, outputs=shape), Double())
    Moody.engine = Engine()
    Moody.engine.add(model, sla=Sla(deadline_ms=1000))
    with Moody.engine:
        asyncio.run(serve())


if __name__ == "__main__":
    main()
