"""MONAI bundles: metadata and transforms are read as data, never run.

``_target_`` names are looked up in an allow-list; a ``$`` expression is taken only if it is a
literal once its references are filled in. What is not known is refused by name.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import nn

from plinth.engine import ModelError
from plinth.verticals.medical.networks.recipe import (
    Clip,
    Crop,
    Normalise,
    Orient,
    Pad,
    Recipe,
    Scale,
    Space,
    Step,
    Triple,
    Window,
)
from plinth.verticals.medical.networks.texts import object_of, text_of
from plinth.verticals.medical.networks.weights import fill, read_script, read_state, tensors_of

CONFIGS = ("inference.json", "inference.yaml", "inference.yml", "predict.json")
NETWORKS = (
    *("UNet", "BasicUNet", "BasicUNetPlusPlus", "DynUNet", "SegResNet", "SegResNetDS", "VNet"),
    *("AttentionUnet", "UNETR", "SwinUNETR", "HighResNet", "RegUNet"),
)
NOTHING = frozenset(
    {
        *("EnsureChannelFirst", "AddChannel"),
        *("ToDevice", "SaveImage", "Identity", "DataStats", "SqueezeDim", "ToNumpy"),
        *("CopyItems", "DeleteItems", "SelectItems", "ToMetaTensor", "FromMetaTensor"),
    }
)
"""Transforms that change no value here: files are read, and results brought back, anyway."""

HARMLESS = frozenset(
    {
        *("dtype", "image_only", "meta_keys", "meta_key_postfix", "ensure_channel_first", "name"),
        *("source_key", "start_coord_key", "end_coord_key", "channel_wise", "is_onehot"),
        *("track_meta", "recompute_affine", "dim", "keepdim", "overwrite"),
        *("sw_batch_size", "sw_device", "progress", "cache_roi_weight_map", "buffer_steps"),
        *("buffer_dim", "with_coord", "process_fn", "kwargs_fn", "meta_dicts", "num_workers"),
    }
)
"""Options that change no value of a single image with one channel."""

PLAIN: dict[str, tuple[Any, ...]] = {
    "padding_mode": ("border", "constant"),
    "align_corners": (False, None),
    "labels": (None, [["L", "R"], ["P", "A"], ["I", "S"]], (("L", "R"), ("P", "A"), ("I", "S"))),
    "threshold": (None,),
    "connectivity": (None, 3),
    "mode": ("constant",),
    "sigma_scale": (0.125,),
    "min_pixdim": (None,),
    "max_pixdim": (None,),
    "to_onehot": (None, False),
    "rounding": (None,),
    "num_components": (1,),
    "return_coords": (False,),
}
"""Values of options that nothing here reads, with which they change nothing."""

PASSED: dict[str, tuple[str, ...]] = {
    "": ("_target_", "_disabled_", "keys", "device", "allow_missing_keys", "lazy", "dtype"),
    "LoadImage": ("simple_keys", "prune_meta_pattern", "prune_meta_sep", "expanduser"),
    "EnsureType": ("data_type", "wrap_sequence"),
    "ToTensor": ("wrap_sequence",),
    "Invert": ("transform", "orig_keys", "to_tensor", "post_func", "orig_meta_keys"),
}
"""Options that are not looked at, by transform: they are no values, or are read elsewhere."""

WEIGHTS = re.compile(r"[^\s'\"$+,()]*\.(?:pt|pth|ts|safetensors)\b")
"""A path of weights in a text of a config."""
READ_WEIGHTS = re.compile(
    r"(?:@bundle_root)?(?:\.?/)?(?:models/)?model(?:_autocast)?\.(?:pt|ts|safetensors)"
)
REFERENCE = re.compile(r"@[\w]+(?:(?:::|#)[\w]+)*")
DEPTH = 32
_WHERE = {"preprocessing": "to an image before", "postprocessing": "to the output of"}
READER = re.compile(r"\$?[\w.]+(\(\))?")
"""A reader of MONAI that is named, or made without options."""
AXES = {"reverse_indexing": False, "affine_lps_to_ras": True, "swap_ij": True}
"""What MONAI's readers do to the axes, where it is not said."""


@dataclass(eq=False)
class _Config:
    """A bundle's config, whose references are followed and whose expressions are literals."""

    root: Mapping[str, Any]
    file: str

    def get(self, *path: str) -> Any:
        """The raw value at a path, references followed, or ``None``."""
        value: Any = self.root
        for key in path:
            value = self.follow(value)
            if isinstance(value, list) and key.isdigit() and int(key) < len(value):
                value = value[int(key)]
            elif isinstance(value, Mapping) and key in value:
                value = value[key]
            else:
                return None
        return self.follow(value)

    def follow(self, value: Any, depth: int = 0) -> Any:
        """A value that is one reference, or a macro, replaced by what it refers to."""
        while isinstance(value, str) and REFERENCE.fullmatch(value.replace("%", "@", 1)):
            depth += 1
            if depth > DEPTH:
                raise ModelError(f"{self.file}: {value} refers to itself")
            value = self._raw(value[1:])
        return value

    def _raw(self, name: str) -> Any:
        value: Any = self.root
        for key in re.split(r"::|#", name):
            if isinstance(value, list) and key.isdigit() and int(key) < len(value):
                value = value[int(key)]
            elif isinstance(value, Mapping) and key in value:
                value = value[key]
            else:
                raise ModelError(f"{self.file}: there is nothing named @{name}")
        return value

    def literal(self, value: Any, where: str, depth: int = 0) -> Any:
        """A value without references and expressions.

        Raises:
            ModelError: an expression that is no literal; names it.
        """
        if depth > DEPTH:
            raise ModelError(f"{self.file}: {where} is nested too deep")
        value = self.follow(value)
        if isinstance(value, str) and value.startswith("$"):
            return self._expression(value, where, depth)
        if isinstance(value, Mapping):
            return {k: self.literal(v, f"{where}.{k}", depth + 1) for k, v in value.items()}
        if isinstance(value, list):
            return [self.literal(v, f"{where}[{n}]", depth + 1) for n, v in enumerate(value)]
        return value

    def _expression(self, text: str, where: str, depth: int) -> Any:
        def filled(match: re.Match[str]) -> str:
            return repr(self.literal(match.group(), where, depth + 1))

        try:
            return ast.literal_eval(REFERENCE.sub(filled, text[1:]).strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise ModelError(
                f"{self.file}: {where} is the expression {text[:80]!r}, and expressions of a "
                "bundle are not executed",
                hint="write the value itself there",
            ) from None


@dataclass(eq=False)
class _Plan:
    """What the transforms of a bundle come to."""

    steps: list[Step] = field(default_factory=list)
    activation: str = "none"
    reduce: str | None = None
    largest: tuple[int, ...] = ()
    back: str = "linear"
    monai: tuple[int, int] = (99, 0)


def is_bundle(folder: Path) -> bool:
    """Whether a folder looks like a MONAI bundle."""
    return folder.is_dir() and (folder / "configs" / "metadata.json").is_file()


def read_bundle(folder: Path) -> tuple[nn.Module, Recipe]:
    """Network and recipe of a bundle.

    Args:
        folder: with ``configs/metadata.json``, ``configs/inference.json`` and ``models/``.

    Raises:
        ModelError: names the file and what in it cannot be used.
    """
    metadata = _load(folder / "configs" / "metadata.json")
    configs = [folder / "configs" / n for n in CONFIGS if (folder / "configs" / n).is_file()]
    if not configs:
        raise ModelError(f"{folder.name}/configs has none of {', '.join(CONFIGS)}")
    config = _Config(_load(configs[0]), configs[0].name)
    plan = _Plan(monai=_version(metadata))
    _check_keys(config)
    for part, known in (("preprocessing", _PRE), ("postprocessing", _POST)):
        for number, transform in enumerate(_transforms(config, part)):
            _read_transform(config, transform, f"{part}[{number}]", known, plan)
    recipe = _recipe(folder.name, metadata, config, plan)
    return _network(folder, config), recipe


def _version(metadata: Mapping[str, Any]) -> tuple[int, int]:
    """Of MONAI, for defaults that it changed; where it is not said, the newest."""
    found = re.match(r"(\d+)\.(\d+)", str(metadata.get("monai_version", "")))
    return (99, 0) if found is None else (int(found[1]), int(found[2]))


def _load(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".json":
        return object_of(path)
    try:
        import yaml  # type: ignore[import-untyped]  # only for those who have such bundles

        found = yaml.safe_load(text_of(path))
    except ImportError:
        raise ModelError(
            f"reading {path.name} needs the package PyYAML", hint="pip install pyyaml"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} cannot be read: {type(error).__name__}") from error
    except Exception as error:
        if not type(error).__module__.startswith("yaml"):
            raise
        raise ModelError(f"{path.name} is no plain YAML: {type(error).__name__}") from None
    if not isinstance(found, Mapping):
        raise ModelError(f"{path.name} holds no object")
    return found


def _transforms(config: _Config, part: str) -> list[Mapping[str, Any]]:
    composed = config.get(part)
    if composed is None:
        raise ModelError(
            f"{config.file} has no {part}: what is done {_WHERE[part]} the network is not said",
            hint=f"name it {part}, or write an empty one: "
            f'"{part}": {{"_target_": "Compose", "transforms": []}}',
        )
    named = composed.get("_target_", "Compose") if isinstance(composed, Mapping) else composed
    if not isinstance(composed, Mapping) or str(named).rpartition(".")[2] != "Compose":
        raise ModelError(
            f"{config.file}: {part} is {str(named)[:60]!r}, expected a Compose of transforms"
        )
    found = config.get(part, "transforms")
    if not isinstance(found, list):
        raise ModelError(f"{config.file}: {part}.transforms is no list")
    followed = [config.follow(one) for one in found]
    if bad := next((one for one in followed if not isinstance(one, Mapping)), None):
        raise ModelError(f"{config.file}: {part} holds {str(bad)[:60]!r}, expected a transform")
    return [one for one in followed if one.get("_disabled_") is not True]


def _check_keys(config: _Config) -> None:
    """Every step of the preprocessing takes the image, which is what the first of them takes.

    Raises:
        ModelError: one that takes something else, which would here be done to the image.
    """
    image: set[str] = set()
    for number, transform in enumerate(_transforms(config, "preprocessing")):
        where = f"preprocessing[{number}]"
        found = config.literal(transform.get("keys", []), f"{where}.keys")
        keys = {found} if isinstance(found, str) else {str(key) for key in found}
        image = image or keys
        if keys and not keys & image:
            raise ModelError(
                f"{config.file}: {where} takes {', '.join(sorted(keys))}, and the image is "
                f"{', '.join(sorted(image))}",
                hint="one image goes through the network; leave out what is done to others",
            )


def _short(target: str) -> str:
    """``monai.transforms.Spacingd`` and ``SpacingDict`` are both ``Spacing``."""
    name = target.rpartition(".")[2]
    for ending in ("Dict", "d", "D"):
        if name.endswith(ending) and len(name) > len(ending) + 2:
            shorter = name.removesuffix(ending)
            if shorter in NOTHING or shorter in _PRE or shorter in _POST:
                return shorter
    return name


Reader = Callable[[dict[str, Any], _Plan], None]


def _read_transform(
    config: _Config,
    transform: Mapping[str, Any],
    where: str,
    known: Mapping[str, Reader],
    plan: _Plan,
) -> None:
    name = _short(str(transform.get("_target_", "")))
    if name in NOTHING:
        return
    if name not in known:
        raise ModelError(
            f"{config.file}: {where} is {transform.get('_target_')!r}, which is not among the "
            "transforms that are understood",
            hint=f"understood are {', '.join(sorted(known))}",
        )
    options = {
        key: value
        if key == "reader" and READER.fullmatch(str(value))
        else config.literal(value, f"{where}.{key}")
        for key, value in transform.items()
        if key not in PASSED.get(name, ()) + PASSED[""]
    }
    given = _Options(options)
    if known is _PRE:
        _check_type(transform.get("dtype"), f"{config.file}: {where} ({name})")
    try:
        known[name](given, plan)
    except (TypeError, ValueError, KeyError) as error:
        what = str(error).partition("\n")[0][:120]
        raise ModelError(f"{config.file}: {where} ({name}) cannot be read: {what}") from None
    _check_unread(given, f"{config.file}: {where} ({name})")


def _check_type(dtype: object, where: str) -> None:
    """A type of values that keeps fractions.

    Raises:
        ModelError: one that cuts them off.
    """
    kind = str(dtype).rpartition(".")[2]
    if dtype is not None and re.search(r"int|bool|byte|char|short|long", kind):
        raise ModelError(
            f"{where}: dtype = {str(dtype)[:60]!r} is not understood, and would change the result",
            hint="values are floating point numbers here; leave it out if it changes none",
        )


class _Options(dict[str, Any]):
    """Options of a transform, which know the ones that were looked at."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)


def _check_unread(options: _Options, where: str) -> None:
    """Options that nobody has read must be such as change nothing here.

    Raises:
        ModelError: one that does, or is not known.
    """
    for key in sorted(options.keys() - options.read - HARMLESS):
        value = dict.__getitem__(options, key)
        single = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
        if key not in PLAIN or single not in PLAIN[key]:
            raise ModelError(
                f"{where}: {key} = {str(value)[:60]!r} is not understood, and would change the "
                "result",
                hint="leave it out if the network was trained without it",
            )


def _triple(value: Any, of: Callable[[Any], Any] = int) -> tuple[Any, Any, Any]:
    if isinstance(value, list | tuple):
        parts = [of(one) for one in value]
        parts += parts[-1:] * (3 - len(parts))
    else:
        parts = [of(value)] * 3
    if len(parts) != 3:
        raise ValueError(f"expected one or three numbers, got {len(parts)}")
    return parts[0], parts[1], parts[2]


def _orientation(options: dict[str, Any], plan: _Plan) -> None:
    if options.get("as_closest_canonical"):
        options["axcodes"] = "RAS"
    plan.steps.append(Orient(codes=str(options["axcodes"])))


def _load_image(options: dict[str, Any], plan: _Plan) -> None:
    """Files are read anyway; what a reader does to the axes is not passed over."""
    reader = options.get("reader")
    made: Mapping[str, Any] = reader if isinstance(reader, Mapping) else {}
    for name, plain in AXES.items():
        for given in (options, made):
            if given.get(name, plain) is not plain:
                raise ValueError(f"{name} of {given[name]!r} is not supported")
    if options.get("as_closest_canonical") or made.get("as_closest_canonical"):
        plan.steps.append(Orient(codes="RAS"))


def _same(options: dict[str, Any], plan: _Plan) -> None:
    """Only the type of the values changes."""


def _invert(options: dict[str, Any], plan: _Plan) -> None:
    """Back to the images' grid: MONAI takes the nearest voxel unless it is told not to."""
    nearest = options.get("nearest_interp", True)
    nearest = all(nearest) if isinstance(nearest, list | tuple) else nearest
    between = "raw" if plan.activation == "none" else "linear"
    plan.back = "nearest" if nearest or plan.reduce is not None else between


def _spacing(options: dict[str, Any], plan: _Plan) -> None:
    mode = options.get("mode", "bilinear")
    mode = mode[0] if isinstance(mode, list | tuple) else mode
    orders = {"bilinear": 1, "nearest": 0, "trilinear": 1, 0: 0, 1: 1}
    if mode not in orders or options.get("diagonal") or options.get("scale_extent"):
        raise ValueError(f"mode {mode!r}, diagonal or scale_extent are not supported")
    mm = _triple(options["pixdim"], float)
    plan.steps.append(Space(mm=mm, order=orders[mode]))  # type: ignore[arg-type]


def _scale_range(options: dict[str, Any], plan: _Plan) -> None:
    low, high = options.get("b_min"), options.get("b_max")
    to = (0.0, 1.0) if low is None or high is None else (float(low), float(high))
    clip, whole = bool(options.get("clip", False)), (low is None) == (high is None)
    scale = Scale(low=options["a_min"], high=options["a_max"], to=to, clip=clip and whole)
    plan.steps += [scale] if whole or not clip else [scale, Clip(low=low, high=high)]


def _scale_percentiles(options: dict[str, Any], plan: _Plan) -> None:
    if options.get("relative") or options.get("b_min") is None or options.get("b_max") is None:
        raise ValueError("relative, or no b_min and b_max, is not supported")
    plan.steps.append(
        Scale(
            low=options["lower"],
            high=options["upper"],
            to=(options["b_min"], options["b_max"]),
            clip=bool(options.get("clip", False)),
            percentiles=True,
        )
    )


def _scale_intensity(options: dict[str, Any], plan: _Plan) -> None:
    if options.get("factor") is not None:
        raise ValueError("factor is not supported")
    plan.steps.append(Scale(to=(options.get("minv", 0.0), options.get("maxv", 1.0))))


def _normalize(options: dict[str, Any], plan: _Plan) -> None:
    def one(value: Any) -> float | None:
        if isinstance(value, list | tuple):
            (value,) = value
        return None if value is None else float(value)

    plan.steps.append(
        Normalise(
            mean=one(options.get("subtrahend")),
            deviation=one(options.get("divisor")),
            nonzero=bool(options.get("nonzero", False)),
        )
    )


def _threshold(options: dict[str, Any], plan: _Plan) -> None:
    above, value = bool(options.get("above", True)), float(options["threshold"])
    if float(options.get("cval", 0.0)) != value:
        raise ValueError("cval other than threshold is not supported")
    plan.steps.append(Clip(low=value) if above else Clip(high=value))


def _crop_foreground(options: dict[str, Any], plan: _Plan) -> None:
    if options.get("select_fn") is not None or options.get("channel_indices") is not None:
        raise ValueError("select_fn and channel_indices are not supported")
    _constant_only(options)
    if float(options.get("value", 0.0)) != 0.0:
        raise ValueError("value other than 0 is not supported")
    smaller = bool(options.get("allow_smaller", plan.monai < (1, 5)))
    multiple = _triple(options.get("k_divisible", 1))
    margin = _triple(options.get("margin", 0))
    plan.steps.append(Crop(above=True, margin=margin, multiple=multiple, beyond=not smaller))


def _spatial_pad(options: dict[str, Any], plan: _Plan) -> None:
    _constant_only(options)
    if options.get("method", "symmetric") != "symmetric":
        raise ValueError("method other than symmetric is not supported")
    least = _triple(options["spatial_size"])
    plan.steps.append(Pad(least=least, value=float(options.get("value", 0.0))))


def _divisible_pad(options: dict[str, Any], plan: _Plan) -> None:
    _constant_only(options)
    if options.get("method", "symmetric") != "symmetric":
        raise ValueError("method other than symmetric is not supported")
    plan.steps.append(Pad(multiple=_triple(options["k"]), value=float(options.get("value", 0.0))))


def _constant_only(options: dict[str, Any]) -> None:
    if options.get("mode", "constant") != "constant":
        raise ValueError("mode other than constant is not supported")


def _activations(options: dict[str, Any], plan: _Plan) -> None:
    if options.get("other") is not None:
        raise ValueError("other is not supported")
    if options.get("softmax"):
        plan.activation = "softmax"
    if options.get("sigmoid"):
        plan.activation = "sigmoid"


def _discrete(options: dict[str, Any], plan: _Plan) -> None:
    if options.get("argmax"):
        plan.reduce = "argmax"
    elif options.get("threshold") is not None:
        if float(options["threshold"]) != 0.5:
            raise ValueError("a threshold other than 0.5 is not supported")
        plan.reduce = "threshold"


def _keep_largest(options: dict[str, Any], plan: _Plan) -> None:
    if options.get("applied_labels") is None:
        raise ValueError("applied_labels must be named")
    if options.get("independent") is False or int(options.get("num_components", 1)) != 1:
        raise ValueError("only the largest component of each label by itself is supported")
    labels = options["applied_labels"]
    labels = labels if isinstance(labels, list | tuple) else [labels]
    plan.largest = (*plan.largest, *(int(label) for label in labels))


_PRE: dict[str, Reader] = {
    "LoadImage": _load_image,
    "EnsureType": _same,
    "ToTensor": _same,
    "CastToType": _same,
    "Orientation": _orientation,
    "Spacing": _spacing,
    "ScaleIntensityRange": _scale_range,
    "ScaleIntensityRangePercentiles": _scale_percentiles,
    "ScaleIntensity": _scale_intensity,
    "NormalizeIntensity": _normalize,
    "ThresholdIntensity": _threshold,
    "CropForeground": _crop_foreground,
    "SpatialPad": _spatial_pad,
    "DivisiblePad": _divisible_pad,
}
_POST: dict[str, Reader] = {
    "LoadImage": _same,
    "EnsureType": _same,
    "ToTensor": _same,
    "CastToType": _same,
    "Invert": _invert,
    "Activations": _activations,
    "AsDiscrete": _discrete,
    "KeepLargestConnectedComponent": _keep_largest,
}


def _recipe(name: str, metadata: Mapping[str, Any], config: _Config, plan: _Plan) -> Recipe:
    formats = metadata.get("network_data_format") or {}
    pred: dict[str, Any] = next(iter((formats.get("outputs") or {}).values()), {})
    image: dict[str, Any] = next(iter((formats.get("inputs") or {}).values()), {})
    if int(image.get("num_channels", 1)) != 1:
        raise ModelError(
            f"{name} takes {image['num_channels']} images at once; one series is one image here"
        )
    channels = int(pred["num_channels"]) if "num_channels" in pred else None
    definition = {int(key): str(value) for key, value in (pred.get("channel_def") or {}).items()}
    reduce = plan.reduce or ("threshold" if plan.activation == "sigmoid" else "argmax")
    if reduce == "threshold":  # channel 0 is a structure, not the background
        labels = {n + 1: f"channel {n}" for n in range(channels or (1, 0)[bool(definition)])}
        labels |= {key + 1: value for key, value in definition.items()}
    else:
        labels = {n: f"label {n}" for n in range(1, channels or (2, 1)[bool(definition)])}
        labels |= {key: value for key, value in definition.items() if key}
    modality = {"ct": ("CT",), "mr": ("MR",), "mri": ("MR",)}
    return Recipe(
        name=_name(name),
        version=_name(str(metadata.get("version", "1"))),
        source="MONAI bundle",
        description=str(metadata.get("description", ""))[:500],
        licence=str(metadata.get("license", metadata.get("copyright", "")))[:100],
        modality=modality.get(str(image.get("modality", "")).lower(), ()),
        labels=labels,
        axes="xyz",
        steps=tuple(plan.steps),
        window=_window(config),
        activation=plan.activation,  # type: ignore[arg-type]
        reduce=reduce,  # type: ignore[arg-type]
        channels=channels,
        largest=plan.largest,
        back=plan.back,  # type: ignore[arg-type]
    )


def _name(text: str) -> str:
    """A text as the name of a model: lower case, ``[a-z0-9._-]``."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:64] or "network"


def _window(config: _Config) -> Window:
    inferer = config.get("inferer")
    if inferer is None:
        return Window()
    kind = (
        str(inferer.get("_target_", "")).rpartition(".")[2] if isinstance(inferer, Mapping) else ""
    )
    if kind == "SimpleInferer":
        return Window()
    if kind not in ("SlidingWindowInferer", "SlidingWindowInfererAdapt"):
        raise ModelError(
            f"{config.file}: inferer is {kind or inferer!r}, expected a sliding window"
        )
    named = {k: v for k, v in inferer.items() if k not in ("_target_", "device")}
    unread = [k for k in named if k not in HARMLESS]
    given = _Options({k: config.literal(named[k], f"inferer.{k}") for k in unread})
    size: Triple | None = _triple(given["roi_size"])
    if size is not None and min(size) < 1:
        if max(size) > 0:
            raise ModelError(
                f"{config.file}: inferer.roi_size {list(size)} is the whole image along some axes",
                hint="write the voxels of each axis, or -1 for all of them",
            )
        size = None
    blend: Any = {"gaussian": "floored"}.get(given.get("mode", "constant"), "constant")
    beyond: Any = given.get("padding_mode", "constant")
    if beyond not in ("constant", "replicate"):
        raise ModelError(f"{config.file}: inferer.padding_mode {beyond!r} is not supported")
    window = Window(
        size=size,
        overlap=given.get("overlap", 0.25),
        blend=blend,
        beyond=beyond,
        beyond_value=float(given.get("cval", 0.0)),
    )
    _check_unread(given, f"{config.file}: inferer ({kind})")
    return window


def _texts(value: Any, depth: int = 0) -> Iterator[str]:
    """All texts of a config."""
    if isinstance(value, str):
        yield value
    elif depth < DEPTH and isinstance(value, Mapping | list):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(one, depth + 1)


def _check_weights(config: _Config) -> None:
    """The weights that the config names are those that are read.

    Raises:
        ModelError: other ones, which would give other labels.
    """
    for text in _texts(config.root):
        for named in WEIGHTS.findall(text):
            if not READ_WEIGHTS.fullmatch(named):
                raise ModelError(
                    f"{config.file} names the weights {named[:80]!r}, and only models/model.* of "
                    "the bundle's own folder are read",
                    hint="put them there under that name, and change the config to it",
                )


def _network(folder: Path, config: _Config) -> nn.Module:
    _check_weights(config)
    models = folder / "models"
    for name in ("model.ts", "model_autocast.ts"):
        if (models / name).is_file():
            return read_script(models / name)
    found = [models / n for n in ("model.safetensors", "model.pt") if (models / n).is_file()]
    if not found:
        raise ModelError(
            f"{folder.name}/models has neither model.ts nor model.safetensors nor model.pt",
            hint="bundles of the model zoo fetch it: python -m monai.bundle download",
        )
    definition = config.get("network_def")
    definition = definition if definition is not None else config.get("network")
    if not isinstance(definition, Mapping):
        raise ModelError(f"{config.file} has no network_def for {found[0].name}")
    name = str(definition.get("_target_", "")).rpartition(".")[2]
    if name not in NETWORKS:
        raise ModelError(
            f"{config.file}: the network {definition.get('_target_')!r} is not one of MONAI's",
            hint="export the bundle as TorchScript: python -m monai.bundle ckpt_export",
        )
    options = {
        key: config.literal(value, f"network_def.{key}")
        for key, value in definition.items()
        if key not in ("_target_", "_disabled_")
    }
    try:
        from monai.networks import nets
    except ImportError:
        raise ModelError(
            f"{found[0].name} needs the package monai, which has the network {name}",
            hint="pip install monai, or export the bundle as TorchScript",
        ) from None
    try:
        network = cast(nn.Module, getattr(nets, name)(**options))
    except (TypeError, ValueError, AssertionError) as error:
        what = str(error).partition("\n")[0][:120]
        raise ModelError(f"{config.file}: MONAI cannot make {name}: {what}") from error
    fill(network, tensors_of(read_state(found[0]), "state_dict", "model", "net"), found[0])
    return network.eval()
