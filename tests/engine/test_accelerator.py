"""What devices there are, what they can do, and why the others are absent.

Only the CPU is real here; placement on an accelerator is tried on a device made of Python.
"""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from plinth.engine import ConfigError, DeviceError
from plinth.engine.devices.device import Absent, Device, cgroup_memory, cores, devices, pick

ROOT = Path(__file__).resolve().parents[2]
FAKE = Path(__file__).with_name("fake_accelerator.py")


def test_the_cpu_is_always_there_and_every_other_kind_is_there_or_has_a_reason():
    found = devices()
    assert {entry.kind for entry in found} >= {"cpu", "cuda", "npu", "xpu", "mps"}
    assert all(entry.reason for entry in found if isinstance(entry, Absent))
    cpu = next(entry for entry in found if entry.kind == "cpu")
    assert isinstance(cpu, Device)
    assert (str(cpu), cpu.torch) == ("cpu", torch.device("cpu"))
    assert cpu.native("fp32")


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs /proc/cpuinfo")
def test_native_precisions_are_those_of_the_processor():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert pick("cpu").native("bf16") == bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    assert pick("cpu").native("int8") == bool(
        flags & {"avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "asimddp"}
    )


def test_auto_is_the_cpu_where_there_is_no_accelerator():
    if torch.accelerator.is_available():
        assert pick("auto").kind == torch.accelerator.current_accelerator().type
    else:
        assert pick("auto") == pick("cpu")


def test_a_device_that_is_not_there_is_refused_with_the_reason():
    absent = next(entry for entry in devices() if isinstance(entry, Absent))
    with pytest.raises(DeviceError) as refusal:
        pick(absent.kind)
    assert absent.reason in str(refusal.value)
    assert "there are cpu" in str(refusal.value)
    with pytest.raises(DeviceError, match="index is too high"):
        pick("cpu:1")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:", "CUDA", ""])
def test_a_word_that_names_no_device_is_a_setting_gone_wrong(name):
    with pytest.raises(ConfigError, match="not the name of a device"):
        pick(name)


def test_memory_of_the_host_is_bounded_by_what_it_has():
    memory = pick("cpu").memory()
    assert 0 < memory.allocated < memory.total <= psutil.virtual_memory().total
    assert 0 < memory.available <= memory.total
    assert 1 <= cores() <= psutil.cpu_count()


def test_the_tightest_cgroup_limit_above_a_process_counts(tmp_path):
    def limit(folder: Path, most: str, used: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text(f"{used}\n")

    own = tmp_path / "cgroup"
    own.write_text("0::/pod/box\n")
    root = tmp_path / "fs"
    assert cgroup_memory(root, own) == (0, 0)
    limit(root / "pod" / "box", "max", 10)
    assert cgroup_memory(root, own) == (0, 0)
    limit(root / "pod", "1000", 900)
    assert cgroup_memory(root, own) == (1000, 900)
    limit(root / "pod" / "box", "500", 10)
    assert cgroup_memory(root, own) == (1000, 900)
    (root / "pod" / "memory.stat").write_text("anon 100\ninactive_file 350\nactive_file 200\n")
    assert cgroup_memory(root, own) == (1000, 550), "pages of files that the kernel would drop"
    own.write_text("4:cpu,memory:/box\n0::/\n")
    old = root / "memory" / "box"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("400\n")
    (old / "memory.usage_in_bytes").write_text("350\n")
    assert cgroup_memory(root, own) == (400, 350), "of the first version"


def test_a_network_is_placed_on_an_accelerator_and_the_original_stays():
    pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot make a device of Python")
    ran = subprocess.run(
        [sys.executable, str(FAKE)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    facts = json.loads(ran.stdout)
    assert facts["device"] == "fakeacc:0"
    assert facts["on"] == "fakeacc"
    assert facts["equal"]
    assert facts["original"] == "cpu"
    assert any("addmm" in op or "linear" in op for op in facts["ran"])
