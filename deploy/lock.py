"""Write deploy/requirements.txt: what the container installs, each file by its SHA-256.

    python deploy/lock.py        # asks pip, with the versions of requirements.lock

torch is left out: each accelerator has its own build of it, so deploy/torch.txt has its version.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXTRAS = ("serve", "web", "grpc", "kafka", "medical", "onnx", "oidc", "otel", "avro")
LOCKS = ("requirements.lock", "requirements-extras.lock")
FROM_TORCH = re.compile(r"^(torch|triton|nvidia-.*|cuda-.*|pytorch-triton.*)$")
HEAD = (
    "# Written by deploy/lock.py: exact versions, each file by its hash. torch is in torch.txt.\n"
)


def main() -> int:
    """Ask pip what would be installed, and write it down."""
    constraints = [word for lock in LOCKS for word in ("-c", str(ROOT / lock))]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"),
            *("--report", "-", *constraints, f"{ROOT}[{','.join(EXTRAS)}]"),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    lines, torch = [], ""
    for one in json.loads(done.stdout)["install"]:
        name, version = one["metadata"]["name"], one["metadata"]["version"]
        if FROM_TORCH.match(name.lower()):
            torch = version.partition("+")[0] if name == "torch" else torch
        elif name != "plinth-engine":
            digest = one["download_info"]["archive_info"]["hashes"]["sha256"]
            lines.append(f"{name.lower().replace('_', '-')}=={version} --hash=sha256:{digest}\n")
    (ROOT / "deploy" / "requirements.txt").write_text(HEAD + "".join(sorted(lines)))
    (ROOT / "deploy" / "torch.txt").write_text(f"torch=={torch}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
