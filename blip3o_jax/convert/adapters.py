"""Reads and writes LoRA adapters in the formats of PEFT and diffusers.

adapter_config.json, adapter_model.safetensors   PEFT: decoder and connectors (other parts are read as well)
pytorch_lora_weights.safetensors                 diffusers: diffusion transformer

A directory contains one of them or both. The headers of written files identify the base weights and the adapter, and
name all of its files.

Source: `LoraConfig` of PEFT 0.21, `SanaLoraLoaderMixin` of diffusers 0.42.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import jax
import numpy as np

from blip3o_jax import files
from blip3o_jax.config import BACKBONES, Blip3oConfig
from blip3o_jax.config.schema import Range, convert_value
from blip3o_jax.convert import engine, hub, safetensors_io
from blip3o_jax.convert.fields import Fields
from blip3o_jax.convert.identity import digest, value_sum
from blip3o_jax.convert.sources import TensorSource, in_memory
from blip3o_jax.convert.staging import staged_directory
from blip3o_jax.convert.tables import DIT_PREFIX, PARTS
from blip3o_jax.convert.weight_files import without_wrappers
from blip3o_jax.errors import UserError, require
from blip3o_jax.lora import Adapter, Site, merge
from blip3o_jax.models.blip3o import abstract_params
from blip3o_jax.types import Params

Path = str | pathlib.Path
Weighted = Sequence[tuple[str, float]]
ADAPTED = ("decoder", "connector", "vae_connector", "siglip_connector", "dit")  # parts that can be adapted
MATRICES = ("linear", "pointwise")  # transforms of kernels that can be adapted
CONFIG, PEFT, DIFFUSERS = "adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"
PICKLED = ("adapter_model.bin", "pytorch_lora_weights.bin")
WRAPPED, TRANSFORMER = "base_model.model.", "transformer."  # prefixes of layer names in PEFT and diffusers
TENSOR = re.compile(r"(?P<layer>.+)\.lora_((?P<side>[AB])(\.\w+)?\.weight|magnitude_vector(\.\w+)?(\.weight)?)")
LEAVES = {"A": "lora_a", "B": "lora_b", None: "lora_magnitude"}
MORE_THAN_LORA = (
    "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication", "use_qalora", "use_bdlora",
    "alora_invocation_tokens", "target_parameters", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
"""Unsupported settings of PEFT: they change a model other than by low-rank products."""
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Unsupported initialisations of PEFT: they change the base weights."""
BASE_KEY, DIFFUSERS_KEY = "blip3o_base", "lora_adapter_metadata"  # in the headers of weight files
OWN_KEY, FILES_KEY = "blip3o_adapter", "blip3o_files"  # likewise: identity of the adapter, and names of all its files
REPEAT, NESTED = re.compile(r"(?<!\\)[*+{]"), re.compile(r"(?<!\\)\)[*+{]")  # in patterns; of a group
MOST_REPEATS = 3
DEFAULT_RANK = 8  # default of rank and alpha in PEFT


@dataclasses.dataclass(frozen=True)
class StoredAdapter:
    """An adapter read from disk."""

    adapter: Adapter
    name: str  # path or hub address
    identity: str  # twelve hex digits, a hash of its files
    base: str | None  # identity of the base weights; None: not recorded
    settings: Mapping[str, Mapping[str, Any]]  # file name -> the settings stored with the tensors, unchanged


Loaded = Sequence[tuple[StoredAdapter, float]]


@functools.lru_cache(maxsize=4)
def linear_layers(config: Blip3oConfig) -> Mapping[str, engine.Leaf]:
    """Returns path -> kernel of all layers that can be adapted; a diffusion backbone from another package has none."""
    parts = [part for part in ADAPTED if part != "dit" or config.dit.name in BACKBONES]
    abstract = {part: tree for part, tree in abstract_params(config).items() if part in parts}
    leaves = engine.expand(abstract, PARTS)
    return {leaf.path.removesuffix("/kernel"): leaf for leaf in leaves if leaf.rule.transform in MATRICES}


def load_adapter(path: Path, config: Blip3oConfig, identity: str | None = None) -> StoredAdapter:
    """Reads an adapter in either format.

    Args:
      path: directory, or `hf://org/name`.
      identity: identity of the model's weights, which must be the base; None: not compared.

    Raises:
      UserError: no adapter, not all of its files, files of two adapters, another base, unknown layers, wrong shapes, or
        settings of other methods than LoRA, rsLoRA and DoRA.
    """
    directory = hub.local_path(path, (CONFIG, PEFT, DIFFUSERS))
    present = [name for name in (PEFT, DIFFUSERS) if (directory / name).is_file()]
    others = [name for name in (*PICKLED, CONFIG, "config.json") if (directory / name).exists()]
    got, expected = ", ".join(others) or "no such file", f"{CONFIG} with {PEFT}, or {DIFFUSERS}"
    do = "save it as safetensors" if {*others} & {*PICKLED} else "correct the path"
    do = f"give {directory / 'adapter'}" if (directory / "adapter" / CONFIG).exists() else do  # of a run
    require(present, f"adapter {path}", got, expected, do)
    opened = {name: safetensors_io.open_with_metadata(directory / name) for name in present}
    lost = {name for _, metadata in opened.values() for name in metadata.get(FILES_KEY, "").split()} - {*present}
    expected, do = f"{', '.join(sorted(lost))} beside it", "copy the whole directory"
    require(not lost, f"adapter {path}", f"{', '.join(present)} alone", expected, do)
    several = len({metadata.get(OWN_KEY) for _, metadata in opened.values()} - {None}) > 1
    require(not several, f"adapter {path}", "files of two adapters", "of one, as they were saved together", do)
    bases = {metadata.get(BASE_KEY) for _, metadata in opened.values()} - {None}
    what, got = f"adapter {path}: trained on weights {', '.join(sorted(bases))}", f"a checkpoint of weights {identity}"
    good = identity is None or bases <= {identity}
    require(good, what, got, "the adapter's own base", "choose that checkpoint")
    settings = {name: _settings(directory, name, metadata) for name, (_, metadata) in opened.items()}
    whole = Adapter({}, {})
    for name, (source, _) in opened.items():
        part = _read(f"adapter {directory / name}", source, settings[name], config)
        twice = ", ".join(sorted(part.sites.keys() & whole.sites.keys()))
        require(not twice, f"adapter {path}", f"{twice} in both files", "each once", "delete one file")
        whole = Adapter(whole.sites | part.sites, whole.leaves | part.leaves)
    digest = hashlib.sha256()
    for name in opened:
        digest.update(files.read_bytes(directory / name, "adapter"))
        digest.update(json.dumps(settings[name], sort_keys=True).encode())
    return StoredAdapter(whole, str(path), digest.hexdigest()[:12], next(iter(bases), None), settings)


def weighted(adapters: Path | Sequence[Path] | Mapping[Path, float], scales: Sequence[float] = ()) -> Weighted:
    """Pairs the paths of adapters with their scales.

    Args:
      adapters: one path, several, or path -> scale.
      scales: none (1), one for all adapters, or one for each.

    Raises:
      UserError: a wrong number of scales, a scale out of [-100, 100], or a repeated path.
    """
    if isinstance(adapters, Mapping):
        adapters, scales = list(adapters), list(adapters.values())
    paths = [str(path) for path in ([adapters] if isinstance(adapters, (str, pathlib.Path)) else adapters)]
    require(paths or not scales, "adapter_scale", ", ".join(map(str, scales)), "none without an adapter", "name one")
    values = list(scales) or [1.0]
    values = values * len(paths) if len(values) == 1 else values
    expected = f"one for all, or one for each of {len(paths)}"
    require(len(values) == len(paths), "adapter_scale", f"{len(scales)} of them", expected)
    places = [path if path.startswith(hub.SCHEME) else os.path.realpath(os.path.expanduser(path)) for path in paths]
    for path, place, value in zip(paths, places, values, strict=True):
        convert_value(Annotated[float, Range(-100, 100)], value, f"adapter_scale of {path}")
        require(places.count(place) == 1, "adapter", f"{path} twice", "each adapter once", "add up its scales")
    return tuple(zip(paths, map(float, values)))


def load_adapters(adapters: Weighted, config: Blip3oConfig, identity: str) -> Loaded:
    """Reads the adapters of `weighted`; other arguments as for `load_adapter`."""
    return tuple((load_adapter(path, config, identity), scale) for path, scale in adapters)


def identity_with(identity: str, adapters: Loaded) -> str:
    """Returns the identity of weights with adapters."""
    return identity + "".join(f"+{stored.identity}*{scale:g}" for stored, scale in adapters)


def with_adapters(params: Params, adapters: Loaded) -> Params:
    """Returns the parameters with the adapters merged, one after the other."""
    return merge(params, [(stored.adapter, scale) for stored, scale in adapters])


def save_adapter(
    directory: pathlib.Path,
    adapter: Adapter,
    config: Blip3oConfig,
    base: str | None = None,
    base_name: str | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    replace: bool = False,
) -> None:
    """Writes an adapter: layers of the diffusion transformer in the format of diffusers, others in that of PEFT.

    Args:
      directory: new directory, written atomically.
      adapter: the adapter, on the host, in the dtypes to write.
      base: identity of the base weights.
      base_name: path or name of the base weights, for PEFT.
      settings: `StoredAdapter.settings` of an adapter that was read, to write them unchanged.

    Raises:
      UserError: the directory exists or cannot be written.
    """
    parts: dict[str, dict[str, Any]] = {}  # file -> sites
    for path, site in sorted(adapter.sites.items(), key=lambda item: item[0].startswith("dit/")):
        parts.setdefault(DIFFUSERS if path.startswith("dit/") else PEFT, {})[path] = site
    own_id = digest({path: value_sum(np.asarray(leaf)) for path, leaf in adapter.leaves.items()})
    with staged_directory(directory, replace) as staging:
        for name, sites in (parts if jax.process_index() == 0 else {}).items():
            prefix = TRANSFORMER if name == DIFFUSERS else WRAPPED
            tensors, layers = {}, {}
            for path, site in sites.items():
                for layer, own, arrays in _layers_of(path, site, adapter, config):
                    layers[layer] = own
                    tensors |= {f"{prefix}{layer}.{key}": value for key, value in arrays.items()}
            said = (settings or {}).get(name) or _described(layers, next(iter(sites.values())), base_name)
            header = {FILES_KEY: " ".join(parts), OWN_KEY: own_id} | ({BASE_KEY: base} if base else {})
            if name == PEFT:
                files.write_whole(staging / CONFIG, json.dumps(said, indent=2, sort_keys=True) + "\n")
            else:
                header[DIFFUSERS_KEY] = json.dumps({f"{TRANSFORMER}{key}": said[key] for key in said}, sort_keys=True)
            stem = name.removesuffix(".safetensors")
            safetensors_io.write_weights(staging, in_memory(tensors), stem, 2**62, header)


def _settings(directory: pathlib.Path, name: str, metadata: Mapping[str, str]) -> Fields:
    """Reads the settings of an adapter; empty for a diffusers file without settings."""
    where = f"adapter {directory / (CONFIG if name == PEFT else name)}"
    if name == PEFT:
        values = files.read_json(directory / CONFIG, "adapter")
    else:
        text = metadata.get(DIFFUSERS_KEY)
        values = {} if text is None else files.parse_json(text, f"{directory / name}: {DIFFUSERS_KEY}")
        values = {key.removeprefix(TRANSFORMER): value for key, value in values.items()}
    beyond = {key: "null" for key in MORE_THAN_LORA if values.get(key)}
    for key, expected in ({"peft_type": "LORA", "bias": "none"} | beyond).items():
        got = values.get(key, expected)
        require(got == expected, f"{where}: {key}", got, expected, "merge it with PEFT (merge_and_unload)")
    start, expected = str(values.get("init_lora_weights", True)).lower(), "a start that leaves the base as it is"
    do = "save it with PEFT's path_initial_model_for_weight_conversion"
    require(not start.startswith(CHANGE_THE_BASE), f"{where}: init_lora_weights", start, expected, do)
    return Fields(pathlib.Path(where), values)


def _read(where: str, source: TensorSource, settings: Fields, config: Blip3oConfig) -> Adapter:
    """Reads the layers of one file."""
    known = _by_module(config)
    found: dict[str, dict[str, str]] = collections.defaultdict(dict)  # layer's name in the file -> side -> tensor
    unknown = []
    for key in source:
        match = TENSOR.fullmatch(key)
        layer = match and without_wrappers(match["layer"]).removeprefix(WRAPPED).removeprefix(TRANSFORMER)
        if layer not in known:
            unknown.append(key)
            continue
        side = LEAVES[match["side"]]
        require(side not in found[layer], f"{where}: {layer}", "two adapters", "one", "keep one of them")
        found[layer][side] = key
    got, expected = engine.listed(unknown) or "no tensor", "lora_A and lora_B of linear layers of this model"
    do = "choose an adapter of this model, or merge it with the library that made it"
    require(found and not unknown, f"{where}: unknown targets", got, expected, do)
    has_magnitudes = any("lora_magnitude" in keys for keys in found.values())
    dora = settings.get("use_dora", not settings and has_magnitudes)
    sides = ("lora_a", "lora_b", *["lora_magnitude"] * dora)
    stacks: dict[str, dict[int, _Layer]] = collections.defaultdict(dict)
    for name, keys in found.items():
        require(keys.keys() == {*sides}, f"{where}: {name}", ", ".join(sorted(keys)), ", ".join(sides))
        leaf, index = known[name]
        stack = stacks[leaf.path.removesuffix("/kernel")]
        require(index not in stack, f"{where}: {name}", "two adapters of one layer", "one", "keep one of them")
        stack[index] = _layer(where, name, keys, source, settings, leaf)
    sites, leaves = {}, {}
    for path, own in stacks.items():
        sites[path], arrays = _stacked(own, linear_layers(config)[path], settings)
        leaves |= {f"{path}/{name}": array for name, array in arrays.items()}
    return Adapter(sites, leaves)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """An adapted layer, with arrays in the native layout."""

    arrays: dict[str, np.ndarray]
    rank: int
    alpha: float


def _layer(
    where: str, name: str, keys: Mapping[str, str], source: TensorSource, settings: Fields, leaf: engine.Leaf
) -> _Layer:
    rank, (rows, columns) = (*source[keys["lora_a"]].shape, 0)[0], leaf.shape[-2:]
    expected = {"lora_a": (rank, rows), "lora_b": (columns, rank), "lora_magnitude": (columns,)}
    arrays = {side: _tensor(where, key, source, expected[side]) for side, key in keys.items()}
    default_rank = default_alpha = rank  # without settings the scale is 1
    if settings:
        default_rank, default_alpha = settings.get("r", DEFAULT_RANK), settings.get("lora_alpha")
        default_alpha = DEFAULT_RANK if default_alpha is None else default_alpha
    said = _setting(settings, "rank_pattern", name, default_rank)
    require(said == rank, f"{where}: rank of {name}", rank, f"{said}, as its settings say", "use one adapter's files")
    alpha = _setting(settings, "alpha_pattern", name, default_alpha)
    good = isinstance(alpha, (int, float)) and not isinstance(alpha, bool) and np.isfinite(alpha)
    require(good, f"{where}: alpha of {name}", repr(alpha), "a number")
    return _Layer({side: x.T if x.ndim == 2 else x for side, x in arrays.items()}, rank, float(alpha))


def _tensor(where: str, key: str, source: TensorSource, shape: tuple[int, ...]) -> np.ndarray:
    """Reads a tensor, without the kernel dimensions of a 1 x 1 convolution."""
    tensor = source[key]
    floating = tensor.dtype.kind not in "biu" and tensor.dtype.itemsize in (2, 4)
    sizes, expected_sizes = ([size for size in each if size != 1] for each in (tensor.shape, shape))
    good, got = 0 not in shape and floating and sizes == expected_sizes, f"{list(tensor.shape)} of {tensor.dtype}"
    expected, do = f"{list(shape)} of floats, as the model's layer is", "choose an adapter of this model"
    expected = "a rank of 1 or more" if 0 in shape else expected
    require(good, f"{where}: {key}", got, expected, do)
    array = tensor.read().reshape(shape)
    count = engine.count_nonfinite(array)
    require(count == 0, f"{where}: {key}", f"{count} NaN or infinite values", "finite ones", "train it again")
    return array


def _setting(settings: Fields, pattern: str, name: str, default: Any) -> Any:
    """Returns the setting of a layer: that of the first pattern that matches the end of its name, as in PEFT.

    Raises:
      UserError: a pattern that is invalid, or that might take very long: with more than MOST_REPEATS, or nested ones.
    """
    for key, value in settings.get(pattern, {}).items():
        bounded = len(REPEAT.findall(key)) <= MOST_REPEATS and not NESTED.search(key)
        expected = f"names, or patterns with at most {MOST_REPEATS} repeats, none of a group"
        require(bounded, f"{settings.path}: {pattern}", repr(key)[:200], expected, "write it more simply")
        try:
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        except re.error as error:
            what, expected = f"{settings.path}: {pattern}", f"a pattern ({error})"
            raise UserError(what, got=key, expected=expected, do="fix it") from error
    return default


def _stacked(own: Mapping[int, _Layer], leaf: engine.Leaf, settings: Fields) -> tuple[Site, dict[str, np.ndarray]]:
    """Stacks the layers of a kernel; arrays of layers without an adapter are zero."""
    depth = len(leaf.keys)
    site = Site(
        tuple(own[i].rank if i in own else 0 for i in range(depth)),
        tuple(own[i].alpha if i in own else 0.0 for i in range(depth)),
        leaf.stacked,
        settings.get("use_rslora", False),
        "lora_magnitude" in next(iter(own.values())).arrays,
    )
    rows, columns = leaf.shape[-2:]
    shapes = {"lora_a": (rows, site.rank), "lora_b": (site.rank, columns), "lora_magnitude": (columns,)}
    arrays = {}
    for side in next(iter(own.values())).arrays:
        dtype = jax.numpy.result_type(*(layer.arrays[side].dtype for layer in own.values()))  # knows bfloat16
        stack = np.zeros((depth, *shapes[side]), dtype)
        for i, layer in own.items():
            array = layer.arrays[side]
            stack[(i, *map(slice, array.shape))] = array
        arrays[side] = stack if leaf.stacked else stack[0]
    return site, arrays


def _layers_of(
    path: str, site: Site, adapter: Adapter, config: Blip3oConfig
) -> Iterator[tuple[str, tuple[int, float], dict[str, np.ndarray]]]:
    """Yields the name in the file, (rank, alpha), and the tensors of every adapted layer of a site."""
    leaf = linear_layers(config)[path]
    kernel = (1, 1) if leaf.rule.transform == "pointwise" else ()
    for i, key in enumerate(leaf.keys):
        if not (rank := site.ranks[i]):
            continue
        names = ("lora_a", "lora_b", *["lora_magnitude"] * site.dora)
        arrays = {name: np.asarray(adapter.leaves[f"{path}/{name}"]) for name in names}
        arrays = {name: x[i] if leaf.stacked else x for name, x in arrays.items()}
        a, b = arrays["lora_a"][:, :rank].T, arrays["lora_b"][:rank].T
        made = {"lora_A.weight": a.reshape(*a.shape, *kernel), "lora_B.weight": b.reshape(*b.shape, *kernel)}
        if site.dora:
            magnitude = arrays["lora_magnitude"]
            made["lora_magnitude_vector"] = magnitude.reshape(1, -1, *kernel) if kernel else magnitude
        yield key.removesuffix(".weight").removeprefix(DIT_PREFIX), (rank, site.alphas[i]), made


def _described(layers: Mapping[str, tuple[int, float]], site: Site, base_name: str | None) -> dict[str, Any]:
    """Returns the settings of PEFT for layers with the given (rank, alpha)."""
    ranks, alphas = ({name: own[i] for name, own in layers.items()} for i in (0, 1))
    rank, alpha = (collections.Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {name: own for name, own in alphas.items() if own != alpha},
        "target_modules": list(layers),
        "use_rslora": site.rslora,
        "use_dora": site.dora,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }


@functools.lru_cache(maxsize=4)
def _by_module(config: Blip3oConfig) -> Mapping[str, tuple[engine.Leaf, int]]:
    """Returns name of a layer, with or without the prefix of its part -> its kernel, and its index in the stack."""
    layers = {}
    for leaf in linear_layers(config).values():
        for i, key in enumerate(leaf.keys):
            name = key.removesuffix(".weight")
            layers |= dict.fromkeys((name, name.removeprefix("model."), name.removeprefix(DIT_PREFIX)), (leaf, i))
    return layers
