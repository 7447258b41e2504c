"""From a path to a network that the engine can run, whatever format it has."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from plinth.engine import Model, ModelError, ModelSpec, TensorSpec
from plinth.verticals.medical.networks.deepbet import is_deepbet, read_deepbet
from plinth.verticals.medical.networks.meshnet import is_meshnet, read_meshnet
from plinth.verticals.medical.networks.monai_bundle import is_bundle, read_bundle
from plinth.verticals.medical.networks.nnunet import is_nnunet, read_nnunet
from plinth.verticals.medical.networks.recipe import Recipe, Triple
from plinth.verticals.medical.networks.texts import text_of
from plinth.verticals.medical.networks.weights import (
    graph_of,
    read_export,
    read_onnx,
    read_script,
)

INPUT, OUTPUT = "volume", "classes"
SCRIPTS = (".ts", ".pt", ".torchscript")
FLIPS = ((), (2,), (3,), (4,), (2, 3), (2, 4), (3, 4), (2, 3, 4))


@dataclass(frozen=True, eq=False)
class Network:
    """A network read from a user's files.

    Args:
        model: as the engine runs it: (n, 1, a, b, c) to (n, k, a, b, c).
        recipe: what it needs and gives.
        digest: SHA-256 over the files it was read from.
        flips: its answers over flipped volumes are averaged.

        original: the module as its file has it, where ``model`` runs a graph made of it.
        finds: a network that finds the box which this one sees; see
            :mod:`plinth.verticals.medical.networks.deepbet`.

    Attributes:
        reference: the same in float32 as its own library runs it, for windows of any size.
    """

    model: Model
    recipe: Recipe
    digest: str
    flips: bool = False
    original: nn.Module | None = None
    finds: Network | None = None
    reference: Model = field(init=False)

    def __post_init__(self) -> None:
        free = self.recipe.window.model_copy(update={"size": None})
        recipe = self.recipe.model_copy(update={"window": free})
        module = self.model.module if self.original is None else self.original
        made = _model(module, recipe, self.model.digest())
        spec = made.spec.model_copy(update={"name": f"{made.spec.name[:58]}-exact"})
        object.__setattr__(self, "reference", replace(made, spec=spec, exact=True))


class Flipped(nn.Module):
    """The mean of a network's answers over all eight ways to flip a volume, flipped back.

    Args:
        network: the network.
        activation: applied to each answer before the mean: ``"none"`` for nnU-Net, which
            averages what the network gives.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, volume: Tensor) -> Tensor:
        """(n, c, z, y, x) to the mean over flips."""
        total = cast(Tensor, self.network(volume))
        for axes in FLIPS[1:]:
            total = total + torch.flip(self.network(torch.flip(volume, axes)), axes)
        return total / len(FLIPS)


class _Chosen(nn.Module):
    """One output of a network that gives several, such as deep supervision's.

    Args:
        network: the network.
        recipe: whose ``output`` it is; the first one, if it has ``channels`` to be told by.
    """

    def __init__(self, network: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.network = network
        self.output = recipe.output
        self.told = recipe.channels is not None

    def forward_bytes(self, size: Triple) -> int | None:
        """What a forward over one volume (z, y, x) takes, where the network makes it in parts."""
        tell = getattr(self.network, "forward_bytes", None)
        return None if tell is None else cast("int | None", tell(size))

    def forward(self, volume: Tensor) -> Tensor:
        """(n, c, z, y, x) to the output."""
        output = self.network(volume)
        while isinstance(output, list | tuple | dict):
            several = list(output.values()) if isinstance(output, dict) else list(output)
            if self.output is None and len(several) > 1 and not self.told:
                raise ModelError(
                    f"the network gives {len(several)} outputs, and which of them has the "
                    "classes is not said",
                    hint='write "output": 0 for the first, or "channels", into its description',
                )
            if (self.output or 0) >= len(several):
                raise ModelError(
                    f"output {self.output} is wanted of a network that gives {len(several)}"
                )
            output = several[self.output or 0]
        return cast(Tensor, output)


def load_network(path: Path, *, flips: bool = False, uncertainty: bool = False) -> Network:
    """Read a network and what it says about itself.

    Args:
        path: a MONAI bundle, an nnU-Net v2 results folder, a MeshNet folder of brainchop, the
            folder of deepbet's networks, or a
            TorchScript, torch.export or ONNX file with a JSON file of the same name beside it
            (:class:`plinth.verticals.medical.networks.recipe.Recipe`).
        flips: average over flips.
        uncertainty: probabilities are needed beside labels.

    Raises:
        ModelError: names the file, what in it cannot be used, and what to do.
    """
    path = Path(path)
    if not path.exists():
        raise ModelError(f"there is no network at {path}")
    finds = None
    try:
        if is_deepbet(path):
            (module, recipe), (first, small) = read_deepbet(path)
            digest = hashlib.sha256(f"{small.name} {files_digest(path)}".encode()).hexdigest()
            finds = Network(_model(_whole(first, small), small, digest), small, digest)
        elif is_bundle(path):
            module, recipe = read_bundle(path)
        elif is_nnunet(path):
            module, recipe = read_nnunet(path)
        elif is_meshnet(path):
            module, recipe = read_meshnet(path, uncertainty or flips)
        elif path.is_file():
            module, recipe = _file(path)
        else:
            raise ModelError(
                f"{path.name} is no network that is known",
                hint="a MONAI bundle (configs/metadata.json), an nnU-Net folder (plans.json), a "
                "MeshNet folder (model.json), or a .ts, .pt2 or .onnx file with its .json",
            )
    except ValidationError as error:
        raise _invalid(path, error) from None
    return _network(module, recipe, files_digest(path), flips, uncertainty, finds)


def _network(
    module: nn.Module,
    recipe: Recipe,
    digest: str,
    flips: bool = False,
    uncertainty: bool = False,
    finds: Network | None = None,
) -> Network:
    """TorchScript runs as a graph that every backend can take, where one can be made of it."""
    original = None
    if isinstance(module, torch.jit.ScriptModule):
        graph = graph_of(module, recipe.window.size)
        module, original = (module, None) if graph is None else (graph, module)
    whole, plain = (
        None if each is None else _whole(each, recipe, flips) for each in (module, original)
    )
    made_from = hashlib.sha256(f"{recipe.name} {digest} {flips} {uncertainty}".encode())
    model = _model(cast(nn.Module, whole), recipe, made_from.hexdigest())
    return Network(model, recipe, digest, flips, plain, finds)


def _whole(module: nn.Module, recipe: Recipe, flips: bool = False) -> nn.Module:
    chosen = _Chosen(module, recipe).eval()
    return Flipped(chosen).eval() if flips else chosen


def _file(path: Path) -> tuple[nn.Module, Recipe]:
    beside = path.with_suffix(".json")
    if not beside.is_file():
        raise ModelError(
            f"{path.name} does not say what it needs, and there is no {beside.name} beside it",
            hint="write one with labels, steps and window: docs/medical.md, your own network",
        )
    try:
        recipe = Recipe.model_validate_json(text_of(beside))
    except ValidationError as error:
        raise _invalid(beside, error) from None
    if path.suffix == ".onnx":
        return read_onnx(path, recipe), recipe
    if path.suffix == ".pt2":
        return read_export(path, recipe.window), recipe
    if path.suffix in SCRIPTS:
        return read_script(path), recipe
    raise ModelError(f"{path.name} is neither .ts, .pt2 nor .onnx")


def _model(module: nn.Module, recipe: Recipe, made_from: str) -> Model:
    size: tuple[int | None, ...] = recipe.window.size or (None, None, None)
    spec = ModelSpec(
        name=_plain(recipe.name)[:64] or "network",
        version=f"{_plain(recipe.version)[:40] or '1'}-{made_from[:12]}",
        inputs=(TensorSpec(name=INPUT, shape=(1, *size), bounds=(0.0, 1.0)),),
        outputs=(
            TensorSpec(
                name=OUTPUT,
                shape=(recipe.channels, *size),
                dtype="uint8" if recipe.reduce == "labels" else "float32",
            ),
        ),
        description=recipe.description,
        licence=recipe.licence,
        source=recipe.source,
    )
    return Model(spec, module, made_from=made_from)


def _plain(text: str) -> str:
    """A text as the name of a model: lower case, ``[a-z0-9._-]``."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")


def files_digest(path: Path) -> str:
    """SHA-256 over the names and bytes of a file (and its JSON), or of the files of a folder."""
    digest = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    if path.is_file() and path.with_suffix(".json").is_file():
        files.append(path.with_suffix(".json"))
    for file in files:
        digest.update(str(file.relative_to(path if path.is_dir() else path.parent)).encode())
        with file.open("rb") as opened:
            while data := opened.read(1 << 20):
                digest.update(data)
    return digest.hexdigest()


def _invalid(path: Path, error: ValidationError) -> ModelError:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))  # nothing where the whole is wrong
    said = first["msg"].removeprefix("Value error, ")
    return ModelError(f"{path.name}: {where}: {said}" if where else f"{path.name}: {said}")


def with_window(network: Network, size: Triple) -> Network:
    """The same network with windows of another size."""
    recipe = network.recipe
    window = recipe.window.model_copy(update={"size": size})
    recipe = recipe.model_copy(update={"window": window})
    model = _model(network.model.module, recipe, network.model.digest())
    return replace(network, model=model, recipe=recipe)
