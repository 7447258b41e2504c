"""The container image, for real: built on a base that is made here, started as a cluster would.

No registry of images is asked: the base is Debian with its Python, from Debian's archive. It is
started by the kernel's own means, with what the image itself says of user, words and probe: a user
without capabilities, a read-only root, a network and processes of its own. Beside it run what
compose.yml names and what is installed here: Apache Kafka, Prometheus.

    make image-test      # as root, with buildah and debootstrap; about twenty minutes, 6 GB of disk
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "pipelines"))
from kafka_fixtures import required_home  # noqa: E402 - after the path is set
from serving import until  # noqa: E402

from plinth.pipelines.identity.key_file import add  # noqa: E402

NEEDED = ("buildah", "debootstrap", "unshare", "nsenter", "ip")
MISSING = [name for name in NEEDED if shutil.which(name) is None]
pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(3_000),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts and other users need root"),
]
RELEASE = "bookworm"
"""Debian with Python 3.11, whose wheels the hashes of the lock are of."""
NOBODY = 10001
PATIENCE = 10
"""Minutes for models to be warm: nothing is compiled or learned before."""
COMPOSE = ROOT / "deploy" / "compose"
CONTAINER = """
mount --bind "$1" "$1"
mount -t proc proc "$1/proc"
mount -t tmpfs -o mode=1777 tmp "$1/tmp"
mount -t tmpfs -o mode=755 dev "$1/dev"
for one in null zero full random urandom; do
  touch "$1/dev/$one"
  mount --bind "/dev/$one" "$1/dev/$one"
done
mkdir "$1/dev/shm"
mount -t tmpfs -o mode=1777 shm "$1/dev/shm"
for one in cache state; do mount --bind "$2/$one" "$1/$one"; done
mount --bind "$2/etc" "$1/etc/plinth"
mount -o remount,bind,ro "$1/etc/plinth"
mount -o remount,bind,ro "$1"
root=$1 user=$3
shift 3
exec chroot "$root" setpriv --reuid "$user" --regid "$user" --clear-groups \\
  --bounding-set=-all --no-new-privs "$@"
"""
"""What runs a container does: mounts and devices; then the image's words."""
ASK = """
import json, sys, urllib.request
told = urllib.request.Request(
    "http://127.0.0.1:8000/v1/finance/score",
    sys.argv[2].encode(),
    {"content-type": "application/json", "x-api-key": sys.argv[1], "x-slo-deadline-ms": "60000"},
)
print(urllib.request.urlopen(told, timeout=60).read().decode())
"""
EXAMPLE = "from plinth.verticals.registry import load; print(load('finance').example().{}())"
GET = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=30).read().decode())"
WRITE = """
import sys
from kafka import KafkaProducer
producer = KafkaProducer(bootstrap_servers="kafka:9092")
for n in range(8):
    raw = sys.argv[1].replace("example-1", f"p{n}").replace("42.5", "9000.5")
    producer.send("payments", raw.encode(), b"card").get(30)
producer.close()
"""


class Buildah:
    """buildah with a storage of its own."""

    def __init__(self, folder: Path) -> None:
        self._words = [
            *("buildah", "--root", str(folder / "store"), "--runroot", str(folder / "run")),
            *("--storage-driver", "vfs"),
        ]

    def __call__(self, *words: str | Path) -> str:
        done = subprocess.run(
            [*self._words, *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-3_000:] + done.stderr[-3_000:]
        return done.stdout.strip()


@pytest.fixture(scope="module")
def buildah() -> Iterator[Buildah]:
    folder = Path(tempfile.mkdtemp(prefix="plinth-image-", dir="/var/tmp"))
    made = Buildah(folder)
    try:
        yield made
    finally:
        made("umount", "--all")
        shutil.rmtree(folder)


def packages_from_here(folder: Path) -> list[str]:
    """Options by which pip finds in the build what it finds on this machine, files included."""
    said = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    found = dict(re.findall(r"(?m)^[^.\n]+\.([\w-]+)='(.*)'$", said))
    lines = [f"{name} = {value}\n" for name, value in found.items() if name != "constraint"]
    (folder / "pip.conf").write_text("[global]\nretries = 1\n" + "".join(lines))
    files = {
        path
        for value in lines
        for path in re.findall(r"(?:file://)?(/[^\s']+)", re.sub(r"https?://\S+", "", value))
        if Path(path).exists()
    }
    # beside an index of files lie the files themselves
    files = {str(Path(path).parent) if path.endswith("/simple") else path for path in files}
    return [
        f"--volume={folder / 'pip.conf'}:/etc/pip.conf:ro",
        *(f"--volume={path}:{path}:ro" for path in sorted(files)),
    ]


class Image:
    """What was built: its root, which nobody can write to, and what it says of how it is run."""

    def __init__(self, buildah: Buildah, name: str) -> None:
        told = json.loads(buildah("inspect", "--type", "image", name))["Docker"]["config"]
        self.user, self.env, self.words = told["User"], told["Env"], told["Entrypoint"]
        self.default, self.probe = told["Cmd"], told["Healthcheck"]["Test"][1:]
        self.folder = told["WorkingDir"]
        self.root = buildah("mount", buildah("from", name))


@pytest.fixture(scope="module")
def image(buildah: Buildah, tmp_path_factory: pytest.TempPathFactory) -> Image:
    base = buildah("from", "scratch")
    debian = buildah("mount", base)
    packages = ("--variant=minbase", "--include=python3,python3-venv")
    done = subprocess.run(
        ["debootstrap", *packages, RELEASE, debian], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3_000:]
    buildah("umount", base)
    buildah("commit", "--rm", base, "localhost/python-base")
    buildah(
        *("build", "--isolation", "chroot", "--format", "docker", "--network", "host"),
        *("--build-arg", "BASE=localhost/python-base", "--build-arg", "ACCELERATOR=cpu"),
        *("--build-arg", "COMPILED=yes"),
        *("--ignorefile", "deploy/Dockerfile.dockerignore", "-f", "deploy/Dockerfile"),
        *packages_from_here(tmp_path_factory.mktemp("pip")),
        *("-t", "localhost/plinth", "."),
    )
    return Image(buildah, "localhost/plinth")


class Network:
    """A network of its own, with nothing in it but itself; kept by a process that waits."""

    def __init__(self) -> None:
        words = ["unshare", "--net", "sh", "-ec", "ip link set lo up; echo up; exec cat"]
        self._holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"up\n"
        self.enter = ("nsenter", "--target", str(self._holder.pid), "--net")

    def end(self) -> None:
        self._holder.kill()
        self._holder.communicate()


@pytest.fixture
def network() -> Iterator[Network]:
    found = Network()
    yield found
    found.end()


class Container:
    """A process in a container; ``pid`` is the one that is number 1 inside."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, env: Sequence[str]) -> None:
        self.process, self._log, self._env = process, log, env
        inside: list[psutil.Process] = []

        def began() -> bool:
            assert process.poll() is None, self.said
            inside[:] = psutil.Process(process.pid).children()
            return bool(inside) and inside[0].uids().real == NOBODY

        until(began)
        self.pid = inside[0].pid

    @property
    def said(self) -> str:
        return self._log.read_text()

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run something beside it, as ``docker exec`` does."""
        enter = ("nsenter", "--target", str(self.pid), "--mount", "--pid", "--net", "--root")
        user = ("setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups")
        return subprocess.run(
            [*enter, *user, "env", *self._env, *words],
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    def python(self, program: str, *words: str) -> str:
        """What a Python program of the image prints."""
        done = self.run("python3", "-c", program, *words)
        assert done.returncode == 0, done.stderr + self.said[-3_000:]
        return done.stdout

    def drain(self) -> str:
        """End it as a cluster does; all that it said."""
        os.kill(self.pid, signal.SIGTERM)
        assert self.process.wait(90) == 0, self.said
        return self.said


@contextlib.contextmanager
def started(
    image: Image,
    network: Network,
    folder: Path,
    words: Sequence[str] | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[Container]:
    """Run the image with ``etc``, ``cache`` and ``state`` of a folder mounted."""
    log, root = folder / "log.txt", image.root
    told = ["-i", "-C", image.folder, *image.env]
    told += [f"{name}={value}" for name, value in (env or {}).items()]
    inside = ["env", *told, *image.words, *(words or image.default)]
    shutil.copy(folder / "hosts", Path(root) / "etc" / "hosts")
    for part in ("cache", "state"):
        (folder / part).mkdir(exist_ok=True)
        os.chown(folder / part, NOBODY, NOBODY)
    apart = ("unshare", "--mount", "--pid", "--ipc", "--fork", "--kill-child")
    script = ("bash", "-ec", CONTAINER, "bash", root, str(folder), str(NOBODY))
    with log.open("wb") as said:
        process = subprocess.Popen(
            [*network.enter, *apart, *script, *inside], stdout=said, stderr=said
        )
    try:
        yield Container(process, log, told)
    finally:
        # another user's child does not die with its parent
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in psutil.Process(process.pid).children(recursive=True):
                one.kill()
        process.kill()
        process.wait(60)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "etc").mkdir()
    (tmp_path / "hosts").write_text("127.0.0.1 localhost kafka serve stream orthanc\n")
    return tmp_path


def test_it_is_built_starts_as_nobody_on_a_read_only_root_answers_and_drains(
    image: Image, network: Network, folder: Path
) -> None:
    assert image.user == f"{NOBODY}:{NOBODY}"
    etc = folder / "etc"
    (etc / "plinth.toml").write_text('[serve]\nhost = "0.0.0.0"\nkeys = "/etc/plinth/keys.toml"\n')
    key = add(etc / "keys.toml", "shop", {"role": "score"})
    (etc / "keys.toml").chmod(0o644)
    with started(image, network, folder) as container:

        def probe() -> bool:
            assert container.process.poll() is None, container.said
            return container.run(*image.probe).returncode == 0

        until(probe, PATIENCE)
        status = Path(f"/proc/{container.pid}/status").read_text()
        assert re.search(r"(?m)^CapEff:\s0+$", status)
        assert re.search(r"(?m)^NoNewPrivs:\s1$", status)
        written = container.run("touch", "/opt/plinth/here", "/here", "/etc/plinth/here")
        assert written.stderr.count("Read-only file system") == 3
        payment = container.python(EXAMPLE.format("model_dump_json"))
        decision = json.loads(container.python(ASK, key, payment))
        assert decision["transaction_id"] == json.loads(payment)["transaction_id"]
        assert 0 <= decision["score"] <= 1
        assert "401" in container.run("python3", "-c", ASK, "no key", "{}").stderr
        assert "drained" in container.drain()
    assert list((folder / "cache").iterdir()), "what was learned is kept for the next start"


# -- compose.yml --------------------------------------------------------------------------------
@contextlib.contextmanager
def native(words: Sequence[str | Path], network: Network, hosts: Path, log: Path) -> Iterator[None]:
    """A program of this machine in the place of its image, with the names of the others."""
    named = ("unshare", "--mount", "sh", "-ec", 'mount --bind "$0" /etc/hosts; exec "$@"', hosts)
    with log.open("wb") as said:
        process = subprocess.Popen(
            [*network.enter, *named, *words],
            stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)


def broker(home: Path, service: Mapping[str, Any], folder: Path) -> list[str | Path]:
    """Formats a Kafka with the properties that its image makes of the environment."""
    given = {
        name.removeprefix("KAFKA_").lower().replace("_", "."): value
        for name, value in service["environment"].items()
    }
    given["log.dirs"] = str(folder / "kafka")
    path = folder / "server.properties"
    path.write_text("".join(f"{name}={value}\n" for name, value in given.items()))
    words = ["format", "--config", path, "--cluster-id", "5L6g3nShT-eMCtK--X86sw"]
    subprocess.run([home / "bin/kafka-storage.sh", *words], check=True, capture_output=True)
    return [home / "bin/kafka-server-start.sh", path]


def test_what_compose_starts_works_together(
    image: Image, network: Network, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Plinth's image twice, with a real Kafka and a real Prometheus, as compose.yml has them."""
    if shutil.which("prometheus") is None:
        pytest.skip("not installed: prometheus")
    services = yaml.safe_load((COMPOSE / "compose.yml").read_text())["services"]
    hosts, aside = folder / "hosts", tmp_path_factory.mktemp("stream")
    shutil.copy(COMPOSE / "plinth.toml", folder / "etc")
    shutil.copytree(folder, aside, dirs_exist_ok=True)
    kafka = broker(required_home(), services["kafka"], folder)
    scraper = [
        *("prometheus", f"--config.file={COMPOSE / 'prometheus.yml'}"),
        *(f"--storage.tsdb.path={folder / 'prometheus'}", "--web.listen-address=:9091"),
    ]
    stream, serve = services["stream"], services["serve"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(native(kafka, network, hosts, folder / "kafka.txt"))
        stack.enter_context(native(scraper, network, hosts, folder / "prometheus.txt"))
        server = stack.enter_context(
            started(image, network, folder, serve["command"], serve["environment"])
        )
        until(lambda: server.run(*image.probe).returncode == 0, PATIENCE)
        worker = stack.enter_context(started(image, network, aside, stream["command"]))
        until(lambda: "streaming payments -> decisions" in worker.said, PATIENCE)
        until(lambda: "hot code: compiled" in worker.said)
        payment = server.python(EXAMPLE.format("model_dump_json"))
        server.python(WRITE, payment)

        def decided() -> int:
            told = json.loads(server.python(GET, "http://serve:8000/v1/finance/tape"))
            return int(told["approved"] + told["reviewed"] + told["declined"])

        until(lambda: decided() == 8, PATIENCE)
        query = "http://127.0.0.1:9091/api/v1/query?query=up"

        def up() -> dict[str, str]:
            found = json.loads(server.python(GET, query))["data"]["result"]
            return {one["metric"]["job"]: one["value"][1] for one in found}

        until(lambda: up() == {"plinth": "1", "plinth-stream": "1"})
        assert "finance desk" in server.python(GET, "http://serve:8000/ui/desk/finance")
        assert "drained" in server.drain()
        worker.drain()
