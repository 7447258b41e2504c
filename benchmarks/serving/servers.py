"""The servers of the comparison: how each is installed, started, asked and read.

Every server gets an environment of its own, made from ``requirements/<name>.txt``. What each is
set to, and by which page of its documentation, stands in its ``serve_<name>.py``.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "serving"
WEIGHTS = BUILD / "fraud-mlp.safetensors"
STORE = BUILD / "models"
HOST = "127.0.0.1"
INSTALL_SECONDS = 1800

Body = Callable[[list[float]], Any]


@dataclass(frozen=True)
class Place:
    """Where one server runs.

    Args:
        port: for HTTP; the two above it are free too.
        sla_ms: the promise, and the queue timeout where a server has one.
    """

    port: int
    sla_ms: int


@dataclass(frozen=True)
class Server:
    """One server of the table.

    Args:
        name: of its files and its environment.
        package: the distribution whose version is reported.
        command: arguments after the environment's ``bin/``.
        path: where it is asked.
        body: one row of features to the JSON it takes.
        read: the JSON it answers to the score.
        variables: environment variables it is started with.
        settings: batching and time limits in words, for the report.
        install: pip arguments after the requirements, each a call that ends with a folder.
        prepare: run before each start.
    """

    name: str
    package: str
    command: Callable[[Place], list[str]]
    settings: str
    path: str = "/score"
    body: Body = lambda row: {"features": row}
    read: Callable[[Any], float] = lambda answer: answer["score"]
    variables: Callable[[Place], Mapping[str, str]] = lambda place: {}
    install: tuple[tuple[str, ...], ...] = ()
    prepare: Callable[[Place], None] = field(default=lambda place: None)

    @property
    def home(self) -> Path:
        """Its environment."""
        return BUILD / "envs" / self.name


def _v2(row: list[float]) -> dict[str, Any]:
    """The Open Inference Protocol, version 2, which MLServer and Triton speak."""
    tensor = {"name": "features", "shape": [1, len(row)], "datatype": "FP32", "data": row}
    return {"inputs": [tensor]}


def _of_v2(answer: Any) -> float:
    return float(answer["outputs"][0]["data"][0])


def _python(file: str, unit: float) -> Callable[[Place], list[str]]:
    """``python serve_x.py host port sla``, the promise in units of so many per millisecond."""
    return lambda place: [
        *("python", str(HERE / file), HOST, str(place.port), f"{place.sla_ms * unit:g}")
    ]


def _plinth_config(place: Place) -> None:
    if not STORE.is_dir():
        python = PLINTH.home / "bin" / "python"
        run([python, "-m", "plinth_fraud_mlp", WEIGHTS, STORE], PLINTH, place)
    (BUILD / "plinth.toml").write_text(
        f'[engine]\ndevice = "cpu"\nthreads = 1\nbackend = "auto"\n'
        f'[serve]\nhost = "{HOST}"\nport = {place.port}\n'
        f'[models]\nstore = "{STORE}"\n'
        f"[verticals.fraud_mlp.sla]\ndeadline_ms = {place.sla_ms}\n"
    )


PLINTH = Server(
    name="plinth",
    package="plinth-engine",
    command=lambda _: ["plinth", "serve", "fraud_mlp", "--config", str(BUILD / "plinth.toml")],
    settings="batches up to 128 by deadline, SLA 150 ms, refuses what cannot be in time, "
    "backend auto",
    path="/v1/fraud_mlp/score",
    install=(
        ("--no-deps", "--no-build-isolation", "--editable", str(ROOT)),
        ("--no-deps", "--no-build-isolation", "--editable", str(HERE / "plinth_fraud_mlp")),
    ),
    prepare=_plinth_config,
)

SERVERS = (
    PLINTH,
    Server(
        name="fastapi",
        package="fastapi",
        command=lambda place: [
            *("uvicorn", "serve_fastapi:app", "--host", HOST, "--port", str(place.port)),
            *("--loop", "uvloop", "--http", "httptools", "--no-access-log"),
            *("--log-level", "warning"),
        ],
        settings="no batching, no limit",
    ),
    Server(
        name="litserve",
        package="litserve",
        command=_python("serve_litserve.py", 1e-3),
        settings="batches up to 128 within 2 ms, timeout 150 ms, fast_queue",
    ),
    Server(
        name="mosec",
        package="mosec",
        command=lambda place: [
            *("python", str(HERE / "serve_mosec.py"), "--address", HOST),
            *("--port", str(place.port), "--timeout", str(place.sla_ms)),
            *("--log-level", "warning"),
        ],
        settings="batches up to 128 within 2 ms, timeout 150 ms, queue of 1024",
    ),
    Server(
        name="bentoml",
        package="bentoml",
        command=lambda place: [
            *("bentoml", "serve", "serve_bentoml:Fraud", "--host", HOST),
            *("--port", str(place.port)),
        ],
        settings="adaptive batches up to 128, max_latency_ms 100, timeout 150 ms",
        body=lambda row: {"features": [row]},
        read=lambda answer: float(answer[0]),
        variables=lambda place: {
            "SLA_MS": str(place.sla_ms),
            "BENTOML_DO_NOT_TRACK": "True",
            "BENTOML_HOME": str(BUILD / "bentoml"),
        },
    ),
    Server(
        name="ray",
        package="ray",
        command=_python("serve_ray.py", 1e-3),
        settings="batches up to 128 within 2 ms, request timeout 150 ms, queue of 1024",
        variables=lambda _: {
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
        },
    ),
    Server(
        name="mlserver",
        package="mlserver",
        command=lambda _: ["mlserver", "start", str(HERE / "mlserver_settings")],
        settings="batches up to 128 within 2 ms, no queue timeout to set",
        path="/v2/models/fraud/infer",
        body=_v2,
        read=_of_v2,
        variables=lambda place: {
            "MLSERVER_HOST": HOST,
            "MLSERVER_HTTP_PORT": str(place.port),
            "MLSERVER_GRPC_PORT": str(place.port + 1),
            "MLSERVER_METRICS_PORT": str(place.port + 2),
        },
    ),
    Server(
        name="triton",
        package="nvidia-pytriton",
        command=_python("serve_triton.py", 1e3),
        settings="batches up to 128 within 2 ms, queue timeout 150 ms, queue of 1024",
        path="/v2/models/fraud/infer",
        body=_v2,
        read=_of_v2,
        # Its Python backend is linked to libpython and must find the interpreter's own:
        # https://triton-inference-server.github.io/pytriton/latest/installation/
        variables=lambda _: {"LD_LIBRARY_PATH": str(sysconfig.get_config_var("LIBDIR"))},
    ),
)


def environment(server: Server, place: Place) -> dict[str, str]:
    """The variables a server's process gets: no thread pools, the shared model, its own."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    found = {"PATH": f"{server.home / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(HERE)}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return {**kept, **threads, **found, "FRAUD_MLP": str(WEIGHTS), **server.variables(place)}


def install(server: Server) -> str | None:
    """Make a server's environment unless it is there; returns why it cannot be, if so."""
    wanted = HERE / "requirements" / f"{server.name}.txt"
    files = [wanted, *(Path(call[-1]) / "pyproject.toml" for call in server.install)]
    key = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    stamp = server.home / "installed"
    if stamp.is_file() and stamp.read_text() == key:
        return None
    pip = [server.home / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"]
    calls: list[list[Any]] = [[sys.executable, "-m", "venv", server.home]]
    calls += [[*pip, "--requirement", wanted], *([*pip, *more] for more in server.install)]
    for call in calls:
        try:
            run(call)
        except (subprocess.SubprocessError, OSError) as error:
            return _why(error)
    stamp.write_text(key)
    return None


def run(call: list[Any], server: Server | None = None, place: Place | None = None) -> str:
    """Run a program to its end and return what it printed; in a server's environment if named.

    Raises:
        subprocess.SubprocessError: it failed.
    """
    variables = environment(server, place) if server and place else None
    done = subprocess.run(
        [str(part) for part in call],
        env=variables,
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=INSTALL_SECONDS,
    )
    return done.stdout


def _why(error: Exception) -> str:
    lines = str(getattr(error, "stderr", "") or error).strip().splitlines()
    said = [line for line in lines if line.startswith("ERROR")] or lines
    return " ".join(said[-2:])[:400] or type(error).__name__


def version(server: Server) -> str:
    """The version of its distribution in its environment."""
    script = f"from importlib.metadata import version; print(version({server.package!r}))"
    return run([server.home / "bin" / "python", "-c", script]).strip()
