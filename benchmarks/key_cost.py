"""What keys, the log of requests and TLS cost a record request, in CPU time of the server.

    python benchmarks/key_cost.py [--rounds 5] [--requests 20000] [--before CHECKOUT] [--json]

Servers of one small model, a process each: without keys, with a file of 100 keys, with the log of
requests too, and with TLS. Sixteen connections each send the next record when the last is
answered; the servers take turns in every round, and what counts is the CPU time of the server's
process for each request. ``--before`` adds a server of another checkout, without keys.
"""

from __future__ import annotations

import argparse
import os
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from head import parser_of, print_json

CONNECTIONS = 16
BODY = b'{"input": [0.1, 0.2, 0.3, 0.4]}'


def serve(table: dict[str, Any]) -> None:
    """Serve the model; says on stdout where."""
    import torch

    from plinth.engine import Model, Sla
    from plinth.pipelines.assembly import running
    from plinth.pipelines.config.settings import Config
    from plinth.pipelines.http.server import Server, bind, create_app
    from plinth.pipelines.served_model import served

    net = torch.nn.Linear(4, 1).eval()
    model = Model.from_torch(net, example=torch.rand(4, 4), name="line", version="1")
    vertical = served(model, sla=Sla(deadline_ms=1000.0))
    engine = {"threads": 1, "backend": "eager", "precision": "fp32"}
    config = Config.model_validate({"serve": {"port": 0, **table}, "engine": engine})
    bound = bind("127.0.0.1", 0)
    with running(config, {vertical.name: vertical}) as running_engine:
        app = create_app({vertical.name: vertical}, running_engine, config)
        server = Server(app, config, bound)
        server.run(lambda: print(server.url, f"/v1/{vertical.name}/{vertical.action}", flush=True))


def tables(folder: Path) -> tuple[dict[str, dict[str, str]], str]:
    """``[serve]`` of each server, and a key that those with keys know."""
    from plinth.pipelines.identity.key_file import add

    path = folder / "keys.toml"
    keys = [add(path, f"user{number}", {"per_second": 1e9}) for number in range(100)]
    pair = {"certificate": str(folder / "c.pem"), "key": str(folder / "c.key")}
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-subj", "/CN=x", "-keyout", pair["key"], "-out", pair["certificate"]),
        ],
        check=True,
        capture_output=True,
    )
    with_keys = {"keys": str(path)}
    log = {**with_keys, "request_log": str(folder / "requests.jsonl")}
    return {"no keys": {}, "keys": with_keys, "keys, log": log, "TLS": {"tls": pair}}, keys[50]  # type: ignore[dict-item]


class Served:
    """A server in a process of its own, and connections to it.

    Args:
        table: its ``[serve]``.
        key: sent with each request.
        source: of the checkout it runs from.
    """

    def __init__(self, table: dict[str, Any], key: str, source: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", repr(table)],
            env={**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        url, path = self._process.stdout.readline().split()
        self._watched = psutil.Process(self._process.pid)
        base = urlsplit(url)
        self._sockets = [self._open(base.hostname or "", base.port or 0, url) for _ in range(16)]
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\nx-api-key: {key}\r\n"
        fields = f"content-type: application/json\r\ncontent-length: {len(BODY)}\r\n\r\n"
        self._request = (head + fields).encode() + BODY
        tries = 0
        while not self._answered():  # it warms up
            if (tries := tries + 1) > 20_000:
                raise SystemExit("requests are not answered with 200")

    def _open(self, host: str, port: int, url: str) -> socket.socket:
        plug = socket.create_connection((host, port), timeout=60)
        if url.startswith("https"):
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            return context.wrap_socket(plug)
        return plug

    def _answered(self) -> bool:
        """One request on each connection; whether all were answered with 200."""
        for plug in self._sockets:
            plug.sendall(self._request)
        answers = [plug.recv(65_536) for plug in self._sockets]
        return all(answer.startswith(b"HTTP/1.1 200") for answer in answers)

    def cost(self, requests: int) -> float:
        """Microseconds of CPU for each of so many requests."""
        before = sum(self._watched.cpu_times()[:2])
        for _ in range(requests // CONNECTIONS):
            if not self._answered():
                raise SystemExit("a request was not answered with 200")
        return 1e6 * (sum(self._watched.cpu_times()[:2]) - before) / requests

    def end(self) -> None:
        """End the server."""
        for plug in self._sockets:
            plug.close()
        self._process.terminate()
        self._process.wait(60)


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=20_000, help="of each server in a round")
    parser.add_argument("--before", type=Path, help="a checkout to compare with")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        import ast

        serve(ast.literal_eval(options.serve))
        return
    own = Path(__file__).parents[1] / "src"
    with tempfile.TemporaryDirectory() as folder:
        arms, key = tables(Path(folder))
        servers = {name: Served(table, key, own) for name, table in arms.items()}
        if options.before:
            servers = {"before": Served({}, key, options.before / "src"), **servers}
        costs: dict[str, list[float]] = {name: [] for name in servers}
        for _ in range(options.rounds):
            for name, server in servers.items():
                costs[name].append(server.cost(options.requests))
        for server in servers.values():
            server.end()
    medians = {name: round(statistics.median(found), 1) for name, found in costs.items()}
    if options.json:
        print_json({"microseconds": medians, "rounds": costs})
    else:
        for name, cost in medians.items():
            spread = f"{min(costs[name]):.1f} to {max(costs[name]):.1f}"
            print(f"{name:10} {cost:6.1f} µs of CPU for each request ({spread})")


if __name__ == "__main__":
    main()
