"""The ONNX file of a stored model, made by a process of its own before anybody waits for it.

To export a model takes seconds of the interpreter; in a process that answers, these are seconds in
which it hardly does.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from plinth.engine.backends.export import onnx_file, onnx_place, why_not_onnx
from plinth.engine.models.store import Model, ModelStore, module_of

SECONDS = 120.0
"""In which the process has ended; one that has not is killed."""
NICENESS = 5
_START = (
    "import json, sys; given = json.loads(sys.argv[1]); sys.path[:] = given['path']; "
    f"from {__name__} import main; main(given)"
)
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
_log = logging.getLogger(__name__)


def export_ahead(model: Model) -> bool:
    """Have the cache hold the ONNX file of a stored model; whether a process was started for it.

    Where that fails, whoever loads the model makes the file, or says why it cannot.
    """
    registered = module_of(model.spec.architecture)
    if model.variants is None or registered == "__main__" or why_not_onnx(model) is not None:
        return False
    place = onnx_place(model)
    if place is None or place.is_file():
        return False
    version, name, root = model.variants.folder.parents[:3]
    told = {
        "path": sys.path,
        "root": str(root.absolute()),
        "name": name.name,
        "version": version.name,
        "module": registered,
    }
    command = [sys.executable, "-P", "-c", _START, json.dumps(told)]
    try:
        ended = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
            env={**os.environ, **_ONE_THREAD},
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        _log.warning("model %s was not exported ahead: %s", model.spec.name, error)
        return True
    if ended.returncode or not place.is_file():
        words = ended.stderr.decode(errors="replace").strip().rpartition("\n")[2][:300]
        why = words or f"its process ended with {ended.returncode}"
        _log.warning("model %s was not exported ahead: %s", model.spec.name, why)
    return True


def main(given: Mapping[str, str]) -> None:
    """Export one model of a store; run in the process of its own.

    Args:
        given: the store's ``root``, ``name`` and ``version``, and the ``module`` that registers
            its architecture.
    """
    os.nice(NICENESS)
    if given["module"]:
        import_module(given["module"])
    onnx_file(ModelStore(Path(given["root"])).load(given["name"], given["version"]))
