"""One model behind three doors: JSON records, binary REST and gRPC, in one run.

``python benchmarks/open_inference.py``: a server in a process of its own, and clients that send the
next request when the last is answered, alone and sixteen together, doors in turn in every round.
``tritonclient`` speaks for both tensor doors (``make extras``). ``--triton`` puts Triton beside,
with the same network for a row, in an environment of its own (as ``benchmarks/serving/run.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import torch
from head import parser_of, print_json, print_rows
from safetensors.torch import load_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "serving"))
servers: Any = importlib.import_module("servers")
fraud_mlp: Any = importlib.import_module("fraud_mlp")

PROMISE_MS = 900
SIZES = {"row": (64,), "picture": (3, 224, 224)}
Ask = Callable[[], Awaitable[object]]
Rows = npt.NDArray[np.float32]


def net(shape: tuple[int, ...]) -> nn.Module:
    """The comparison's small network for a row; a mean over patches for a picture."""
    if len(shape) == 1:
        found: nn.Module = fraud_mlp.network()
        found.load_state_dict(load_file(weights()))
        return found.eval()
    torch.manual_seed(0)
    return nn.Sequential(nn.AvgPool2d(32), nn.Flatten(), nn.Linear(147, 1)).eval()


def weights() -> Path:
    """The file of the comparison's network, made if it is not there."""
    path: Path = servers.WEIGHTS
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        fraud_mlp.make(path)
    return path


@contextlib.contextmanager
def triton() -> Iterator[int]:
    """Triton with the comparison's network; its port for HTTP, below that for gRPC.

    Raises:
        SystemExit: it cannot be installed here.
    """
    [server] = [one for one in servers.SERVERS if one.name == "triton"]
    weights()
    if why := servers.install(server):
        raise SystemExit(f"Triton cannot be installed: {why}")
    with socket.create_server((servers.HOST, 0)) as free:
        place = servers.Place(port=free.getsockname()[1], sla_ms=PROMISE_MS)
    words = server.command(place)
    log = servers.BUILD / "open-inference-triton.log"
    with (
        log.open("w") as said,
        subprocess.Popen(
            words, env=servers.environment(server, place), stdout=said, stderr=said
        ) as process,
    ):
        try:
            yield place.port
        finally:
            process.terminate()


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
        verticals[name] = served(Model(spec, net(shape)), sla=Sla(deadline_ms=PROMISE_MS))
    table = {"port": 0, "max_body_bytes": 16 << 20, "grpc": {"port": 0}}
    config = Config.model_validate({"serve": table, "engine": {"threads": 1}})
    bound: socket.socket = bind("127.0.0.1", 0)
    with running(config, verticals) as engine:
        server = Server(create_app(verticals, engine, config), config, bound)
        server.run(lambda: print(json.dumps([server.url, server.grpc_address]), flush=True))


async def measure(
    url: str, grpc_address: str, beside: int | None, seconds: float, rounds: int
) -> list[dict[str, object]]:
    """Answers per second and latency of every door, size and number of clients.

    Args:
        url, grpc_address: of Plinth; beside: port of Triton, if it is there.
        seconds: of each part of a round; rounds: of which the median counts.
    """
    import tritonclient.grpc.aio
    import tritonclient.http.aio

    http = tritonclient.http.aio.InferenceServerClient(url.removeprefix("http://"), conn_limit=64)
    grpc = tritonclient.grpc.aio.InferenceServerClient(grpc_address)
    plain = httpx.AsyncClient(base_url=url, limits=httpx.Limits(max_connections=64))
    others: list[Any] = []
    if beside is not None:
        others.append(tritonclient.http.aio.InferenceServerClient(f"{servers.HOST}:{beside}"))
        others.append(tritonclient.grpc.aio.InferenceServerClient(f"{servers.HOST}:{beside + 1}"))
        await there(others[0])
    found: dict[tuple[str, str, int], list[float]] = {}
    rates: dict[tuple[str, str, int], list[float]] = {}
    while (await plain.get("/health/ready")).status_code != 200:
        await asyncio.sleep(0.1)
    try:
        for _ in range(rounds):
            for size, shape in SIZES.items():
                doors = asks(size, shape, plain, [http, grpc])
                if others and size == "row":
                    doors |= asks_of_triton(shape, others)
                for clients in (1, 16):
                    for door, ask in doors.items():
                        taken, rate = await closed_loop(ask, clients, seconds)
                        found.setdefault((size, door, clients), []).extend(taken)
                        rates.setdefault((size, door, clients), []).append(rate)
    finally:
        for client in (http, grpc, *others):
            await client.close()
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


async def there(client: Any) -> None:
    """Until Triton's model answers, a minute and a half at most."""
    for _ in range(900):
        with contextlib.suppress(Exception):
            if await client.is_model_ready("fraud"):
                return
        await asyncio.sleep(0.1)
    raise SystemExit(f"Triton did not start: see {servers.BUILD}/open-inference-triton.log")


def rows_of(shape: tuple[int, ...]) -> Rows:
    """One row, the same for every door."""
    return np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)


def tensors_of(
    shape: tuple[int, ...], names: tuple[str, str, str], clients: list[Any]
) -> list[Ask]:
    """A request by binary REST and one by gRPC; bodies are made anew each time.

    Args:
        shape: of a row.
        names: of model, input and output.
        clients: of ``tritonclient``, for REST and for gRPC.
    """
    import tritonclient.grpc
    import tritonclient.http

    rows = rows_of(shape)

    def ask(client: Any, kind: Any) -> Ask:
        async def one() -> object:
            tensor = kind.InferInput(names[1], list(rows.shape), "FP32")
            tensor.set_data_from_numpy(rows)
            return (await client.infer(names[0], [tensor])).as_numpy(names[2])

        return one

    return [ask(clients[0], tritonclient.http), ask(clients[1], tritonclient.grpc)]


def asks_of_triton(shape: tuple[int, ...], clients: list[Any]) -> dict[str, Ask]:
    """The same request through Triton's doors."""
    rest, remote = tensors_of(shape, ("fraud", "features", "score"), clients)
    return {"Triton, binary REST": rest, "Triton, gRPC": remote}


def asks(size: str, shape: tuple[int, ...], plain: Any, clients: list[Any]) -> dict[str, Ask]:
    """One request through each door of Plinth, with the same numbers."""
    rows = rows_of(shape)

    async def record() -> object:
        body = json.dumps({"x": rows[0].tolist()}).encode()
        headers = {"content-type": "application/json"}
        answer = await plain.post(f"/v1/{size}/predict", content=body, headers=headers)
        return answer.raise_for_status().json()["y"]

    rest, remote = tensors_of(shape, (size, "x", "y"), clients)
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
    parser.add_argument("--triton", action="store_true", help="Triton beside it (downloads)")
    given = parser.parse_args()
    if given.serve:
        serve()
        return
    words = [sys.executable, str(Path(__file__)), "--serve"]
    beside = triton() if given.triton else contextlib.nullcontext(None)
    with beside as port, subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url, grpc_address = json.loads(server.stdout.readline())
            rows = asyncio.run(measure(url, grpc_address, port, given.seconds, given.rounds))
        finally:
            server.terminate()
    if given.json:
        print_json(rows)
        return
    headings = ("tensor", "door", "clients", "answers /s", "p50 ms", "p99 ms")
    print_rows(headings, [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()
