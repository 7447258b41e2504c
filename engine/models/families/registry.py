"""The families by name: how each is built, what it takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn

from plinth.engine.errors import ModelError, nearest
from plinth.engine.models.families.images import Convnext, Mobilenet, Resnet, Vit
from plinth.engine.models.families.tables import FtTransformer, GatedMlp, Recurrent
from plinth.engine.models.families.text import Bert, DistilBert, Gpt2, Llama
from plinth.engine.models.families.volumes import Resnet3d, Unet3d
from plinth.engine.models.spec import ModelSpec, TensorSpec
from plinth.engine.models.store import Model, architecture

Tensors = tuple[TensorSpec, ...]
Contract = Callable[[Mapping[str, Any]], tuple[Tensors, Tensors]]
ROWS = 4


@dataclass(frozen=True)
class Family:
    """Models of one kind, built from a config.

    Args:
        name: of the family, and of the architecture in the store.
        summary: what it is for, in a few words.
        build: the module from a config's keyword arguments.
        contract: inputs and outputs for a whole config.
        small: a config that builds in a blink, for tests.
    """

    name: str
    summary: str
    build: Callable[..., nn.Module]
    contract: Contract
    small: Mapping[str, Any]

    def defaults(self) -> dict[str, Any]:
        """The config that is meant where nothing is said: that of the published model."""
        return {key: p.default for key, p in signature(self.build).parameters.items()}

    def model(
        self,
        config: Mapping[str, Any] | None = None,
        *,
        name: str | None = None,
        version: str = "1",
        seed: int = 0,
    ) -> Model:
        """A model with random weights; ``ModelStore.save`` keeps it, weights replace its own.

        Args:
            config: what differs from :meth:`defaults`.
            name: of the model; by default the family's.
            version: of the model.
            seed: of the weights.

        Raises:
            ModelError: the config has an unknown key, or sizes that do not go together.
        """
        given = dict(config or {})
        whole = self.defaults() | given
        for key in given:
            if key not in self.defaults():
                raise ModelError(
                    f"family {self.name} has no setting {key}", hint=nearest(key, self.defaults())
                )
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                module = self.build(**given).eval()
            inputs, outputs = self.contract(whole)
        except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
            raise ModelError(f"family {self.name} cannot be built: {error}") from error
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        spec = ModelSpec(
            name=name or self.name,
            version=version,
            architecture=self.name,
            config=given,
            inputs=inputs,
            outputs=outputs,
            description=self.summary,
        )
        return Model(spec, module, example=_example(inputs))


def _example(inputs: Tensors) -> dict[str, torch.Tensor]:
    """Rows of several lengths: masks show the first of their steps."""
    found = {}
    for tensor in inputs:
        rows = tensor.example(ROWS, free=16)
        if tensor.name in ("mask", "attention_mask"):
            steps = torch.arange(rows.shape[1])
            lengths = torch.linspace(1, rows.shape[1], ROWS).long()
            rows = (steps < lengths[:, None]).to(rows.dtype)
        found[tensor.name] = rows
    return found


def families() -> list[Family]:
    """All of them, in the order of the documentation."""
    return list(_FAMILIES.values())


def find(name: str) -> Family:
    """The family of a name.

    Raises:
        ModelError: there is none; names the nearest.
    """
    if name not in _FAMILIES:
        raise ModelError(f"there is no family {name}", hint=nearest(name, _FAMILIES))
    return _FAMILIES[name]


def _text(outputs: Callable[[Mapping[str, Any]], Tensors]) -> Contract:
    def contract(config: Mapping[str, Any]) -> tuple[Tensors, Tensors]:
        bounds = (0, config["vocabulary"] - 1)
        ids = TensorSpec(name="input_ids", shape=(None,), dtype="int64", bounds=bounds)
        mask = TensorSpec(name="attention_mask", shape=(None,), dtype="int64", bounds=(0, 1))
        return (ids, mask), outputs(config)

    return contract


def _encoded(config: Mapping[str, Any]) -> Tensors:
    tokens = TensorSpec(name="tokens", shape=(None, config["width"]))
    pooled = TensorSpec(name="pooled", shape=(config["width"],))
    return (tokens, pooled) if config.get("segments") else (tokens,)


def _logits(config: Mapping[str, Any]) -> Tensors:
    return (TensorSpec(name="logits", shape=(None, config["vocabulary"])),)


def _image(config: Mapping[str, Any]) -> tuple[Tensors, Tensors]:
    side = config.get("size")  # a table of positions fixes it
    pixels = TensorSpec(name="pixels", shape=(config["channels"], side, side))
    return (pixels,), (TensorSpec(name="logits", shape=(config["classes"],)),)


def _voxels(config: Mapping[str, Any]) -> tuple[Tensors, Tensors]:
    volume = TensorSpec(name="volume", shape=(config["channels"], None, None, None))
    return (volume,), (TensorSpec(name="logits", shape=(config["classes"], None, None, None)),)


def _volume(config: Mapping[str, Any]) -> tuple[Tensors, Tensors]:
    return _voxels(config)[0], (TensorSpec(name="logits", shape=(config["classes"],)),)


def _series(config: Mapping[str, Any]) -> tuple[Tensors, Tensors]:
    series = TensorSpec(name="series", shape=(config["steps"], config["features"]))
    mask = TensorSpec(name="mask", shape=(config["steps"],), dtype="int64", bounds=(0, 1))
    return (series, mask), (TensorSpec(name="output", shape=(config["outputs"],)),)


def _table(config: Mapping[str, Any]) -> tuple[Tensors, Tensors]:
    features = TensorSpec(name="features", shape=(config["features"],))
    return (features,), (TensorSpec(name="output", shape=(config["outputs"],)),)


_SMALL_TEXT = {"vocabulary": 60, "width": 16, "depth": 2, "heads": 2}
_ALL = (
    Family("bert", "texts to tokens and one vector", Bert, _text(_encoded),
           _SMALL_TEXT | {"inner": 32, "positions": 64}),
    Family("distilbert", "texts to tokens, half as deep", DistilBert, _text(_encoded),
           _SMALL_TEXT | {"inner": 32, "positions": 64}),
    Family("gpt2", "texts to next tokens; prefill only", Gpt2, _text(_logits),
           _SMALL_TEXT | {"positions": 64}),
    Family("llama", "texts to next tokens, rotary positions; prefill only", Llama, _text(_logits),
           _SMALL_TEXT | {"key_heads": 1, "inner": 32}),
    Family("vit", "images to classes, patches as tokens", Vit, _image,
           {"size": 16, "patch": 8, "width": 16, "depth": 2, "heads": 2, "inner": 32,
            "classes": 5}),
    Family("resnet", "images to classes, residual bottlenecks", Resnet, _image,
           {"stem": 8, "widths": [16, 32], "depths": [1, 2], "classes": 5}),
    Family("mobilenet", "images to classes on small devices", Mobilenet, _image,
           {"stem": 8, "widths": [8, 12], "depths": [1, 2], "strides": [1, 2], "last": 32,
            "classes": 5}),
    Family("convnext", "images to classes, large kernels", Convnext, _image,
           {"widths": [8, 16], "depths": [1, 2], "classes": 5}),
    Family("unet3d", "volumes to classes of voxels", Unet3d, _voxels, {"widths": [4, 8]}),
    Family("resnet3d", "volumes to classes", Resnet3d, _volume,
           {"widths": [4, 8], "depths": [1, 1]}),
    Family("recurrent", "series to numbers, GRU or LSTM", Recurrent, _series,
           {"features": 4, "width": 8, "steps": 6}),
    Family("gated-mlp", "tables to numbers, gated layers", GatedMlp, _table,
           {"features": 6, "width": 8, "depth": 2}),
    Family("ft-transformer", "tables to numbers, features as tokens", FtTransformer, _table,
           {"features": 6, "width": 16, "depth": 2, "heads": 2}),
)  # fmt: skip
_FAMILIES = {family.name: family for family in _ALL}
for _family in _ALL:
    architecture(_family.name)(_family.build)
