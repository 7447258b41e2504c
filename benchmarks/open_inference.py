"""One model behind three doors: JSON records, binary REST and gRPC, in one run.

``python benchmarks/open_inference.py``: a server in a process of its own, and clients that send the
next request when the last is answered, alone and sixteen together, doors in turn in every round.
``tritonclient`` speaks for both tensor doors (``make extras``).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from head import parser_of, print_json
from torch import nn

SIZES = {"row": (64,), "picture": (3, 224, 224)}
Ask = Callable[[], Awaitable[object]]


def net(shape: tuple[int, ...]) -> nn.Module:
    """The comparison's small network for a row; a mean over patches for a picture."""
    torch.manual_seed(0)
    if len(shape) == 1:
        widths = [*shape, 256, 256, 256]
        pairs = [(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(widths)]
        layers: list[nn.Module] = [layer for pair in pairs for layer in pair]
        return nn.Sequential(*layers, nn.Linear(256, 1)).eval()
    return nn.Sequential(nn.AvgPool2d(32), nn.Flatten(), nn.Linear(147, 1)).eval()


def serve() -> None:
    """Both models behind all doors; says on stdout where."""
    from plinth.engine import Model, ModelSpec, Sla, TensorSpec
    from plinth.pipelines.assembly import running
    from plinth.pipelines.config.settings import Config
    from plinth.pipelines.http.server import Server, bind, create_app
    from plinth.pipelines.served_model import served

    verticals = {}
    for name, shape in SIZES.items():
        inputs, outputs = TensorSpec(name="x", shape=shape), TensorSpec(name="y", shape=(1,))
        spec = ModelSpec(name=name, inputs=(inputs,), outputs=(outputs,))
        verticals[name] = served(Model(spec, net(shape)), sla=Sla(deadline_ms=1000.0))
    table = {"port": 0, "max_body_bytes": 16 << 20, "grpc": {"port": 0}}
    config = Config.model_validate({"serve": table, "engine": {"threads": 1}})
    bound: socket.socket = bind("127.0.0.1", 0)
    with running(config, verticals) as engine:
        server = Server(create_app(verticals, engine, config), config, bound)
        server.run(lambda: print(json.dumps([server.url, server.grpc_address]), flush=True))


async def measure(
    url: str, grpc_address: str, seconds: float, rounds: int
) -> list[dict[str, object]]:
    """Answers per second and latency of every door, size and number of clients."""
    import tritonclient.grpc.aio
    import tritonclient.http.aio

    http = tritonclient.http.aio.InferenceServerClient(url.removeprefix("http://"), conn_limit=64)
    grpc = tritonclient.grpc.aio.InferenceServerClient(grpc_address)
    plain = httpx.AsyncClient(base_url=url, limits=httpx.Limits(max_connections=64))
    found: dict[tuple[str, str, int], list[float]] = {}
    rates: dict[tuple[str, str, int], list[float]] = {}
    while (await plain.get("/health/ready")).status_code != 200:
        await asyncio.sleep(0.1)
    try:
        for _ in range(rounds):
            for size, shape in SIZES.items():
                doors = asks(size, shape, plain, http, grpc)
                for clients in (1, 16):
                    for door, ask in doors.items():
                        taken, rate = await closed_loop(ask, clients, seconds)
                        found.setdefault((size, door, clients), []).extend(taken)
                        rates.setdefault((size, door, clients), []).append(rate)
    finally:
        await http.close()
        await grpc.close()
        await plain.aclose()
    return [
        {
            "size": size,
            "door": door,
            "clients": clients,
            "per_second": round(statistics.median(rates[size, door, clients])),
            "p50_ms": round(float(np.quantile(taken, 0.5)) * 1e3, 2),
            "p99_ms": round(float(np.quantile(taken, 0.99)) * 1e3, 2),
        }
        for (size, door, clients), taken in found.items()
    ]


def asks(size: str, shape: tuple[int, ...], plain: Any, http: Any, grpc: Any) -> dict[str, Ask]:
    """One request through each door, with the same numbers; bodies are made anew each time."""
    import tritonclient.grpc
    import tritonclient.http

    rows = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)

    def inputs(kind: Any) -> list[Any]:
        tensor = kind.InferInput("x", list(rows.shape), "FP32")
        tensor.set_data_from_numpy(rows)
        return [tensor]

    async def record() -> object:
        body = json.dumps({"x": rows[0].tolist()}).encode()
        headers = {"content-type": "application/json"}
        answer = await plain.post(f"/v1/{size}/predict", content=body, headers=headers)
        return answer.raise_for_status().json()["y"]

    async def rest() -> object:
        answer = await http.infer(size, inputs(tritonclient.http))
        return answer.as_numpy("y")

    async def remote() -> object:
        answer = await grpc.infer(size, inputs(tritonclient.grpc))
        return answer.as_numpy("y")

    return {"JSON records": record, "binary REST": rest, "gRPC": remote}


async def closed_loop(ask: Ask, clients: int, seconds: float) -> tuple[list[float], float]:
    """Seconds of each answer, and answers per second, of clients that wait for their answers."""
    taken: list[float] = []
    begun = time.perf_counter()

    async def one() -> None:
        while (start := time.perf_counter()) - begun < seconds:
            await ask()
            taken.append(time.perf_counter() - start)

    await asyncio.gather(*(one() for _ in range(clients)))
    return taken, len(taken) / (time.perf_counter() - begun)


def main() -> None:
    """Measure, and print the table as Markdown."""
    parser = parser_of(__doc__)
    parser.add_argument("--serve", action="store_true", help="be the server")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each part of a round")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if given.serve:
        serve()
        return
    words = [sys.executable, str(Path(__file__)), "--serve"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url, grpc_address = json.loads(server.stdout.readline())
            rows = asyncio.run(measure(url, grpc_address, given.seconds, given.rounds))
        finally:
            server.terminate()
    if given.json:
        print_json(rows)
        return
    print("| tensor | door | clients | answers /s | p50 ms | p99 ms |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    main()
