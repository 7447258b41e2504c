"""One training for all algorithms: weights in the forward, a loss, codes at the end."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from plinth.engine.compression import low_rank, packing, pruning, quantization_aware
from plinth.engine.compression.distillation import Distillation, apart
from plinth.engine.compression.feedback import moments
from plinth.engine.compression.graph import NORMS, chains
from plinth.engine.compression.packed_layers import unpack_layers
from plinth.engine.compression.packing import STORED, Coded
from plinth.engine.compression.registry import Recipe, Weight
from plinth.engine.errors import ConfigError, InputError

ALGORITHMS = (
    low_rank.Factors,
    pruning.Pruning,
    quantization_aware.QuantizationAware,
    Distillation,
)
"""Of this room, in the order in which they work; others register when they are imported."""

Rows = Mapping[str, Tensor]
Forward = Callable[[Callable[..., Any], Rows], dict[str, Tensor]]
"""Calls a module, or what stands for it, on rows (n, ...) by input name: outputs by name."""
Say = Callable[[str], None]

_LEAST = 32  # numbers of a tensor that algorithms work on
_CLIP = 5.0  # norm of the gradient, at most
_WARM = 0.05  # of training, in which the rate rises
_NORM_ROWS = 1024  # that batch norms are measured on again
_MOMENT_ROWS = 256  # that show how inputs go together
_HALF_MOST = 60000.0


@dataclass(frozen=True)
class Compressed:
    """A module whose weights are those that are stored.

    Args:
        module: in eval mode.
        tensors: its state by name, coded where an algorithm says so.
        shared: alias -> name of tensors that are one.
        weights: how many numbers its weights have; ``zeros``: of them.
    """

    module: nn.Module
    tensors: dict[str, Tensor | Coded]
    shared: dict[str, str]
    weights: int
    zeros: int

    def as_now(self) -> Compressed:
        """The same with what is not coded as the module has it now, its buffers say."""
        state = self.module.state_dict()
        tensors = {
            name: value if isinstance(value, Coded) else state[name].detach().clone()
            for name, value in self.tensors.items()
        }
        return replace(self, tensors=tensors)

    def write(self, path: Path) -> None:
        """As a packed file."""
        packing.write(path, self.tensors, self.shared)


class _As:
    """A module called with other weights than its own."""

    def __init__(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self.module, self.weights = module, dict(weights)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.module, self.weights, args, kwargs)


def compress(
    module: nn.Module,
    rows: Rows,
    recipe: Recipe,
    forward: Forward,
    labels: Tensor | None = None,
    say: Say = lambda _: None,
) -> Compressed:
    """Train a copy of a module by a recipe, with the module itself as its teacher.

    The same module, rows, recipe and number of CPU threads give the same weights.

    Args:
        module: in float32 on the host; stays as it is.
        rows: to train on, (n, ...) by input name.
        recipe: what is done.
        forward: calls a module on rows.
        labels: of the rows: classes (n, ...) int64 for logits (n, classes, ...) where the recipe
            does not distil or shares its loss. Of a module without such an output they are not
            used.
        say: is told what goes on, a sentence at a time.

    Raises:
        ConfigError: the recipe has an unknown algorithm or setting, or the module no weights.
        InputError: there are no rows, the module's weights or its outputs for them are not all
            finite, or training diverges.
    """
    return _Training(module, rows, recipe, forward, labels, say).run()


class _Training:
    def __init__(
        self,
        module: nn.Module,
        rows: Rows,
        recipe: Recipe,
        forward: Forward,
        labels: Tensor | None,
        say: Say,
    ) -> None:
        self.rows, self.recipe, self.forward, self.say = rows, recipe, forward, say
        self.count = len(next(iter(rows.values()), ()))
        if not self.count:
            raise InputError("there are no rows to train on")
        _check_weights(module)
        self.transforms = recipe.build()
        with warnings.catch_warnings():  # torch's own, of how it copies an exported program
            warnings.filterwarnings("ignore", "`isinstance", FutureWarning)
            self.module = unpack_layers(copy.deepcopy(module)).eval()
        _make_gradients_dense(self.module)
        with torch.no_grad():
            self.teacher = _outputs(self.forward, self.module, rows, recipe.batch)
        _check_outputs(self.teacher)
        self.labels = labels if _has_classes(self.teacher, labels) else None
        for transform in self.transforms:
            transform.reshape(self.module, say)
        self.weights = _weights(self.module)
        if not self.weights:
            kinds = {str(value.dtype).removeprefix("torch.") for value in module.parameters()}
            raise ConfigError(
                "the model has no float32 weights of two or more dimensions to compress; its "
                f"parameters are {', '.join(sorted(kinds)) or 'none'}",
                hint="bring others to float32 first: module.float()",
            )
        for transform in self.transforms:
            transform.begin(self.weights)

    def run(self) -> Compressed:
        self.module.requires_grad_(True)
        parameters = list(self.module.parameters())
        optimizer = torch.optim.Adam(parameters, lr=self.recipe.rate)
        total = self.recipe.epochs * math.ceil(self.count / self.recipe.batch)
        step, summed = 0, 0.0
        _train_mode(self.module)
        for epoch in range(self.recipe.epochs):
            for chosen in self._batches(epoch):
                progress = step / max(1, total - 1)
                for group in optimizer.param_groups:
                    group["lr"] = self.recipe.rate * _rate(progress)
                loss = self._loss(chosen, progress)
                if not torch.isfinite(loss):
                    raise InputError(
                        f"the loss is {loss.item()} at step {step}",
                        hint="try a lower rate, or a recipe that removes less",
                    )
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(parameters, _CLIP)
                optimizer.step()
                step, summed = step + 1, summed + float(loss.detach())
            of_epoch = math.ceil(self.count / self.recipe.batch)
            self.say(f"epoch {epoch + 1} of {self.recipe.epochs}: loss {summed / of_epoch:.5f}")
            summed = 0.0
        return self._finish()

    def _batches(self, epoch: int) -> Iterator[Tensor]:
        noise = torch.Generator().manual_seed(self.recipe.seed * 100_003 + epoch)
        order = torch.randperm(self.count, generator=noise)
        yield from torch.split(order, self.recipe.batch)

    def _loss(self, chosen: Tensor, progress: float) -> Tensor:
        for transform in self.transforms:
            transform.at(progress)
        rows = {name: tensor[chosen] for name, tensor in self.rows.items()}
        found = self.forward(_As(self.module, self._effective()), rows)
        pairs = [
            (found[name], want[chosen])
            for name, want in self.teacher.items()
            if want.is_floating_point()
        ]
        taught = [
            part
            for transform in self.transforms
            for got, want in pairs
            if (part := transform.loss(got, want)) is not None
        ]
        if self.labels is None:
            return torch.stack(taught or [apart(got, want) for got, want in pairs]).sum()
        hard = nn.functional.cross_entropy(pairs[0][0], self.labels[chosen])
        share = next((t.share for t in self.transforms if hasattr(t, "share")), 0.0)
        return hard * (1 - share) + share * torch.stack(taught).sum() if taught else hard

    def _effective(self) -> dict[str, Tensor]:
        found = {}
        for weight in self.weights:
            value: Tensor = weight.value
            for transform in self.transforms:
                value = transform.forward(weight, value)
            found[weight.name] = value
        return found

    # -- once training is over -----------------------------------------------------------------
    def _finish(self) -> Compressed:
        for transform in self.transforms:
            transform.at(1.0)
            if transform.asks_moments:
                transform.see(self._moments())
        coded = self._codes()
        with torch.no_grad():
            for weight in self.weights:
                weight.value.copy_(_dense(coded.get(weight.name), weight.value))
            if self.recipe.epochs:
                self._measure_norms()
            self.module.eval()
            self._fold(coded)
            self._round(coded)
        state = self.module.state_dict()
        kept, shared = _distinct(state)
        tensors: dict[str, Tensor | Coded] = {
            name: coded.get(name, value.detach().clone()) for name, value in kept.items()
        }
        numbers = [weight.value for weight in self.weights]
        zeros = sum(int((value == 0).sum()) for value in numbers)
        self.module.requires_grad_(False)
        return Compressed(
            self.module, tensors, shared, sum(value.numel() for value in numbers), zeros
        )

    def _moments(self) -> dict[str, Tensor]:
        """How the inputs of the layers go together on some of the rows."""
        noise = torch.Generator().manual_seed(self.recipe.seed)
        some = torch.randperm(self.count, generator=noise)[:_MOMENT_ROWS]
        batches = (
            {name: tensor[chosen] for name, tensor in self.rows.items()}
            for chosen in torch.split(some, self.recipe.batch)
        )
        training = self.module.training
        self.module.eval()
        names = {weight.name for weight in self.weights}
        found = moments(self.module, (self.forward(self.module, rows) for rows in batches), names)
        if training:
            _train_mode(self.module)
        return found

    def _codes(self) -> dict[str, Coded]:
        found = {}
        with torch.no_grad():
            for weight in self.weights:
                value: Tensor = weight.value
                for transform in self.transforms:
                    if (codes := transform.coded(weight, value)) is not None:
                        found[weight.name] = codes
                    value = transform.forward(weight, value)
                if weight.name not in found:
                    weight.value.copy_(value)
        return found

    def _measure_norms(self) -> None:
        """Mean and variance of batch norms anew, under the weights that are stored."""
        norms: list[Any] = [part for part in self.module.modules() if _is_counting(part)]
        if not norms:
            return
        before = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
        noise = torch.Generator().manual_seed(self.recipe.seed)
        some = torch.randperm(self.count, generator=noise)[:_NORM_ROWS]
        for chosen in torch.split(some, max(2, self.recipe.batch)):
            if len(chosen) > 1:
                rows = {name: tensor[chosen] for name, tensor in self.rows.items()}
                self.forward(self.module, rows)
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum

    def _fold(self, coded: dict[str, Coded]) -> None:
        """Batch norms into the scales of what they read: what is left of each is its bias."""
        for link in chains(self.module):
            name = f"{link.producer}.weight"
            norm: Any = self.module.get_submodule(link.norm) if link.norm else None
            if norm is None or name not in coded or not _is_counting(norm):
                continue
            codes = coded[name]
            slope = _slope(norm)
            scales = (codes.scales.float() * slope).half()
            if not bool(torch.isfinite(scales).all()):
                continue
            bias = getattr(self.module.get_submodule(link.producer), "bias", None)
            shift = (norm.bias if norm.bias is not None else 0.0) - norm.running_mean * slope
            if bias is not None:
                shift = shift + bias * slope
                bias.zero_()
            coded[name] = Coded(codes.codes, scales, codes.axis)
            self.module.get_parameter(name).copy_(coded[name].dense())
            _let_pass(norm, shift)

    def _round(self, coded: Mapping[str, Coded]) -> None:
        """Vectors that were trained to float16, where it has a number near."""
        for name, value in self.module.named_parameters():
            if name in coded or value.ndim >= 2 or value.dtype != torch.float32:
                continue
            if not value.numel() or float(value.abs().max()) < _HALF_MOST:
                value.copy_(value.half().float())


def _is_counting(part: nn.Module) -> bool:
    return isinstance(part, NORMS) and part.running_mean is not None


def _slope(norm: Any) -> Tensor:
    scale = torch.rsqrt(norm.running_var + norm.eps)
    return scale if norm.weight is None else norm.weight * scale


def _let_pass(norm: Any, shift: Tensor) -> None:
    """A batch norm that adds ``shift`` and does nothing else."""
    norm.running_mean.zero_()
    norm.running_var.fill_(1.0)
    root = torch.sqrt(torch.tensor(1.0 + norm.eps))
    norm.num_batches_tracked.zero_()
    if norm.weight is not None:
        norm.weight.fill_(float(root))
        norm.bias.copy_(shift)


def _dense(codes: Coded | None, value: Tensor) -> Tensor:
    return value if codes is None else codes.dense()


def _rate(progress: float) -> float:
    """A short rise, then a cosine down to 0."""
    if progress < _WARM:
        return (progress + 1e-3) / (_WARM + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (progress - _WARM) / (1 - _WARM)))


def _train_mode(module: nn.Module) -> None:
    """Training mode, but for what draws random numbers: the teacher answers without."""
    module.train()
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.eval()


def _weights(module: nn.Module) -> list[Weight]:
    turned = {
        id(part.weight)
        for part in module.modules()
        if isinstance(part, nn.modules.conv._ConvTransposeNd)
    }
    found = [
        (name, value)
        for name, value in module.named_parameters()
        if value.ndim >= 2 and value.numel() >= _LEAST and value.dtype == torch.float32
    ]
    last = len(found) - 1
    return [
        Weight(name, value, 1 if id(value) in turned else 0, number in (0, last))
        for number, (name, value) in enumerate(found)
    ]


def _distinct(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    first: dict[tuple[Any, ...], str] = {}
    shared: dict[str, str] = {}
    for name, value in state.items():
        place = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        if value.numel() and place in first:
            shared[name] = first[place]
        else:
            first[place] = name
    return {name: value for name, value in state.items() if name not in shared}, shared


def _outputs(forward: Forward, module: nn.Module, rows: Rows, batch: int) -> dict[str, Tensor]:
    count = len(next(iter(rows.values())))
    parts = [
        forward(module, {name: tensor[first : first + batch] for name, tensor in rows.items()})
        for first in range(0, count, batch)
    ]
    return {name: torch.cat([part[name] for part in parts]).clone() for name in parts[0]}


def _check_weights(module: nn.Module) -> None:
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor) and value.dtype not in STORED:
            kind = str(value.dtype).removeprefix("torch.")
            raise ConfigError(
                f"tensor {name} is {kind}, which a packed file does not hold",
                hint="make it two real tensors" if value.is_complex() else "bring it to float32",
            )
    for name, value in module.named_parameters():
        if not torch.isfinite(value).all():
            raise InputError(
                f"weight {name} has values that are NaN or infinite",
                hint="a model that is not whole cannot be a teacher; train it anew",
            )


def _make_gradients_dense(module: nn.Module) -> None:
    """Look-up tables with sparse gradients are trained like others: Adam takes none."""
    for part in module.modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag):
            part.sparse = False


def _check_outputs(teacher: Rows) -> None:
    for name, value in teacher.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            row = int((~torch.isfinite(value)).flatten(1).any(1).nonzero()[0])
            raise InputError(
                f"output {name} of the model is NaN or infinite for row {row}",
                hint="leave out the rows that the model has no number for",
            )


def _has_classes(teacher: Rows, labels: Tensor | None) -> bool:
    """Whether labels are classes of the first output: (n, ...) for logits (n, classes, ...)."""
    first = next((value for value in teacher.values() if value.is_floating_point()), None)
    if first is None:
        raise InputError("no output is of floats, so that nothing can be learned from it")
    if labels is None or labels.is_floating_point() or first.ndim < 2 or first.shape[1] < 2:
        return False
    shape = (first.shape[0], *first.shape[2:])
    fits = labels.shape == shape and int(labels.min()) >= 0 and int(labels.max()) < first.shape[1]
    return fits and not (float(first.min()) >= 0 and float(first.max()) <= 1)
