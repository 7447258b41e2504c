"""Folders of Hugging Face: ``config.json`` and ``model.safetensors``, through transformers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plinth.engine.errors import ModelError
from plinth.engine.models.convert.source import Request, Source
from plinth.engine.models.signature import Rows, Wishes, derive, given_rows
from plinth.engine.models.spec import TensorSpec
from plinth.engine.models.store import Model

MAX_CONFIG_BYTES = 16 << 20
PADDING = 1e-3
"""How far the answer to a text may be from that to the same text with padding."""
_TEXT, _LENGTH, _ROWS = "input_ids", 16, 4
_PICKLES = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".ckpt")


class _Text(nn.Module):
    """A model of texts as tokens and a mask, without a cache of earlier tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
        return _tensors(found)


class _Image(nn.Module):
    """A model of images (n, channels, height, width)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return _tensors(self.model(pixel_values=pixel_values, return_dict=True))


def _tensors(found: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in found.items() if isinstance(value, Tensor)}


def read(path: Path, request: Request) -> Source:
    """A folder with a model whose code is in transformers, and weights as safetensors.

    Raises:
        ModelError: no such folder, code of its own, weights as pickles or with tensors missing,
            a model that takes neither texts nor images, or one that padding changes.
    """
    config = _config(path)
    model, facts = _model(path, config)
    wrapped, inputs, rows = _wrapped(path, model)
    rows = given_rows(request.name, inputs, request.example) or rows
    options = request.options
    wishes = Wishes(
        request.name,
        request.version,
        free=options.free or ({_TEXT: [1], "attention_mask": [1]} if _TEXT in rows else {}),
        outputs=options.outputs,
        rows_dim=options.rows_dim,
        source=path.resolve().name,
    )
    found = derive(wrapped, rows, wishes)
    made = Model(found.spec, found.module, example=found.example)
    if _TEXT in rows:
        facts["padding_difference"] = _check_padding(made)
    return Source(made, facts=facts, libraries=("transformers", "torch"))


def _config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise ModelError(
            f"{path} has no config.json", hint="give a folder that save_pretrained wrote"
        )
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"more than {MAX_CONFIG_BYTES} bytes")
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a table")
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    if config.get("auto_map"):
        raise ModelError(
            f"{path} has code of its own (auto_map), which is not run",
            hint="load it where you trust it, and give the module to Model.from_torch",
        )
    weights = [*path.glob("*.safetensors")]
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in _PICKLES)
    if not weights:
        what = f"its weights are pickles ({pickles[0]})" if pickles else "there are no weights"
        raise ModelError(
            f"{path} has no model.safetensors: {what}",
            hint="where you trust it: AutoModel.from_pretrained(...).save_pretrained(folder)",
        )
    return config


def _model(path: Path, config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            f"{path} needs the package transformers", hint="pip install 'plinth-engine[convert]'"
        ) from error
    names = config.get("architectures") or ["AutoModel"]
    kind: Any = getattr(transformers, str(names[0]), None)
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if not known and names[0] != "AutoModel":
        raise ModelError(
            f"{path} is a {names[0]}, which transformers {transformers.__version__} does not know",
            hint="install the version that it was saved with",
        )
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, loading = kind.from_pretrained(
                str(path),
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                attn_implementation="eager",
                output_loading_info=True,
            )
    except Exception as error:  # transformers raises errors of every kind
        reason = str(error).strip().partition("\n")[0][:300]
        raise ModelError(f"{path} cannot be loaded: {type(error).__name__}: {reason}") from error
    finally:
        transformers.logging.set_verbosity(before)
    for key in ("missing_keys", "mismatched_keys", "error_msgs"):
        if loading.get(key):
            raise ModelError(
                f"{path}: {key.replace('_', ' ')}: {sorted(map(str, loading[key]))[:3]}; "
                "they would be filled with noise",
                hint="copy the whole folder, with the config that belongs to the weights",
            )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{path} has an encoder and a decoder", hint=_WRAP)
    model.config.use_cache = False
    labels = getattr(model.config, "id2label", None)
    classes = [labels[i] for i in sorted(labels)] if labels and "Classif" in names[0] else None
    facts = {"kind": "huggingface", "architecture": names[0]}
    return model, facts | ({"classes": classes} if classes else {})


_WRAP = "write a module whose forward takes the tensors you have, and give it to Model.from_torch"


def _wrapped(path: Path, model: Any) -> tuple[nn.Module, tuple[TensorSpec, ...], Rows]:
    """The model with named inputs, and rows in which texts have several lengths."""
    if model.main_input_name == _TEXT:
        vocabulary = int(model.get_input_embeddings().num_embeddings)
        ids = TensorSpec(name=_TEXT, shape=(None,), dtype="int64", bounds=(0, vocabulary - 1))
        mask = TensorSpec(name="attention_mask", shape=(None,), dtype="int64", bounds=(0, 1))
        lengths = torch.tensor([_LENGTH, _LENGTH, _LENGTH // 2, 3])[:_ROWS, None]
        rows = {
            _TEXT: ids.example(_ROWS, free=_LENGTH),
            "attention_mask": (torch.arange(_LENGTH)[None] < lengths).long(),
        }
        return _Text(model), (ids, mask), rows
    if model.main_input_name == "pixel_values":
        size = getattr(model.config, "image_size", None) or 224
        sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
        channels = int(getattr(model.config, "num_channels", 3))
        spec = TensorSpec(name="pixel_values", shape=(channels, *sides))
        return _Image(model), (spec,), {"pixel_values": spec.example(2)}
    raise ModelError(f"{path} takes {model.main_input_name}, neither texts nor images", hint=_WRAP)


def _check_padding(model: Model) -> float:
    """How far padding moves an answer; raises ModelError where it is too far to batch texts."""
    ids = model.rows(2)[_TEXT][:1]
    length = ids.shape[1]
    wide = torch.cat([ids, torch.zeros_like(ids)], 1)
    mask = (torch.arange(2 * length)[None] < length).long()
    try:
        padded = model.run({_TEXT: wide, "attention_mask": mask})
    except (IndexError, RuntimeError):  # longer than its table of positions
        half = length // 2
        padded = model.run(
            {_TEXT: ids, "attention_mask": (torch.arange(length)[None] < half).long()}
        )
        ids, length = ids[:, :half], half
    alone = model.run({_TEXT: ids, "attention_mask": torch.ones_like(ids)})
    worst = 0.0
    for name, want in alone.items():
        got = padded[name]
        if got.shape != want.shape:
            got = got[:, :length]
        scale = float(want.abs().max()) or 1.0
        worst = max(worst, float((got - want).abs().max()) / scale)
    if worst > PADDING:
        raise ModelError(
            f"model {model.spec.name}: padding to the right changes answers by {worst:.3g}, so "
            "texts of several lengths cannot share a batch",
            hint="it may need padding on the left or a padding token in its config; serve it "
            "with texts of one length through Model.from_torch",
        )
    return worst
