"""Files that people name by mistake: devices, pipes, files without end."""

import os
from pathlib import Path

import pytest

from plinth.engine import ConfigError
from plinth.pipelines.archive.settings import read
from plinth.pipelines.config.settings import load
from plinth.pipelines.lines import MAX_FILE, json_of, opened, whole
from plinth.pipelines.plan.demand import read_costs, read_outside, read_trace


def test_settings_that_are_too_large_are_not_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "plinth.toml"
    file.touch()
    os.truncate(file, 64 << 30)
    for reader in (load, read, whole, lambda path: read_costs(path, None, None, None), read_trace):
        with pytest.raises(ConfigError, match=r"plinth.toml is larger than [\d,]+ bytes"):
            reader(file)


def test_a_device_or_a_pipe_without_a_writer_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (Path("/dev/zero"), pipe, tmp_path):
        with pytest.raises(ConfigError, match="is not a file"):
            whole(path)
    with pytest.raises(ConfigError, match="/dev/zero is a device"):
        opened(Path("/dev/zero"))


def test_lists_in_lists_are_no_fault_of_the_software(tmp_path: Path) -> None:
    file = tmp_path / "outside.json"
    for text in ("[" * 200_000, '{"a":' * 200_000, "[" * 900 + "]" * 900, "{", "\xff"):
        file.write_text(text, "latin-1")
        with pytest.raises(ConfigError, match=r"outside\.json"):
            read_outside(file)
    assert len(file.read_bytes()) < MAX_FILE
    with pytest.raises(ValueError, match="too many lists"):
        json_of(b"[" * 200_000)
