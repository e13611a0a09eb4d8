"""Finds the weight files of a directory, and removes the wrapper prefixes of training tools from tensor names.

Supported are NAME.safetensors, its shards with NAME.safetensors.index.json, variants (NAME.bf16.safetensors,
NAME.safetensors.index.fp16.json) and torch.save files (pytorch_model.bin, its index, variants), in this order.
"""

import pathlib
from collections.abc import Callable, Mapping

from blip3o_jax import files
from blip3o_jax.config.schema import convert_value
from blip3o_jax.convert import safetensors_io, torch_pickle
from blip3o_jax.convert.sources import TensorSource, combined
from blip3o_jax.errors import UserError, require, type_of

# Name parts inserted by data parallelism, compilation and activation checkpointing
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
OUTER = {"base_model", "model"}  # prefixes of names: PEFT's wrapper, an attribute of another class
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors",
            "pytorch_lora_weights.bin")  # fmt: skip
OTHER_WEIGHTS = (".bin", ".pth", ".pt", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".safetensors", ".index.json")


def open_weights(directory: pathlib.Path, name: str = "model") -> TensorSource:
    """Opens the weight files of a directory.

    Args:
      name: file name without suffix; torch.save files for "model" are named pytorch_model.

    Raises:
      UserError: no weights, or those of an adapter; files are missing, damaged, ambiguous or of different checkpoints.
    """
    check_no_adapter(directory)
    pickled = "pytorch_model" if name == "model" else name
    for stem, suffix, read in ((name, ".safetensors", safetensors_io.open_file), (pickled, ".bin", _open_pickle)):
        found = _candidates(directory, stem, suffix)
        plain = [path for path in found if path.name in (f"{stem}{suffix}", f"{stem}{suffix}.index.json")]
        chosen = plain or found
        what = f"{directory}: both {' and '.join(sorted(path.name for path in chosen))}"
        require(len(chosen) < 2, what, None, "one of them", "delete what is left over from another checkpoint")
        if chosen:
            return read(chosen[0]) if chosen[0].suffix != ".json" else _indexed(chosen[0], read)
        shards = list(directory.glob(f"{stem}*-of-*{suffix}"))
        what = f"{directory}: {len(shards)} shards without {stem}{suffix}.index.json"
        require(not shards, what, None, "the index", "fetch it as well")
    present = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    others = [file for file in present if file.endswith(OTHER_WEIGHTS)]
    what, got = f"{directory}: no {name}.safetensors and no {name}.safetensors.index.json", ", ".join(others[:4])
    do = "convert what is there, or correct the path" if others else "fetch the checkpoint again"
    expected = "the weights in one of the forms that docs/parity.md lists"
    raise UserError(what, got=got or "no weights", expected=expected, do=do)


def has_weights(directory: pathlib.Path) -> bool:
    """Returns whether a directory contains weight files of any kind, including unsupported ones."""
    return directory.is_dir() and any(path.name.endswith(OTHER_WEIGHTS) for path in directory.iterdir())


def check_no_adapter(directory: pathlib.Path) -> None:
    """Raises UserError if a directory contains a LoRA adapter of PEFT or diffusers instead of a model."""
    adapter = [file for file in ADAPTERS if (directory / file).exists()]
    if adapter:
        config = directory / ADAPTERS[0]
        base = files.read_json(config, "adapter").get("base_model_name_or_path") if config.exists() else None
        what, beside = f"{directory}: an adapter ({', '.join(adapter)})", base or "its model"
        do = f"give it as --adapter beside {beside}, or merge it (python -m blip3o_jax.convert merge)"
        raise UserError(what, expected="the weights of a complete model", do=do)


def unwrapped(source: TensorSource, anchor: str, where: object) -> TensorSource:
    """Renames tensors to the names of the model itself, without the wrappers of training tools.

    Args:
      anchor: a tensor name that every such model has.
      where: name of the source, for messages.

    Raises:
      UserError: it contains tensors of an adapter or two tensors with one name, or lacks `anchor`.
    """
    adapters = [key for key in source if ".lora_" in key or key.startswith("lora_") or ".base_layer." in key]
    what = f"{where}: {len(adapters)} tensors of an adapter, such as {', '.join(adapters[:1])}"
    require(not adapters, what, None, "a complete model", "merge it into its model first (PEFT: merge_and_unload)")
    inner = {key: without_wrappers(key) for key in source}
    ends = [name.removesuffix(anchor) for name in inner.values() if f".{name}".endswith(f".{anchor}")]
    heads = [head for head in ends if set(head.split(".")) <= {*OUTER, ""}]
    got = f"it under {ends[0]}{anchor}" if ends else f"its names are such as {next(iter(source), 'nothing')}"
    require(heads, f"{where}: no tensor {anchor}", got, "the names of the model itself", "rename them")
    head = max(heads, key=len)
    names: dict[str, str] = {}
    for key, name in inner.items():
        first = names.setdefault(name.removeprefix(head), key)
        require(first == key, f"{where}: {name}", f"{first} and {key}", "one tensor of this name", "delete one of them")
    return {name: source[key] for name, key in names.items()}


def without_wrappers(name: str) -> str:
    """Removes the parts of a name that training tools insert."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _candidates(directory: pathlib.Path, stem: str, suffix: str) -> list[pathlib.Path]:
    """Returns indices and weight files, including variants such as fp16, without the files that an index lists."""
    whole = [directory / f"{stem}{suffix}", *sorted(directory.glob(f"{stem}.*{suffix}"))]
    whole = [path for path in whole if "-of-" not in path.name]
    index = [directory / f"{stem}{suffix}.index.json", *sorted(directory.glob(f"{stem}{suffix}.index.*.json"))]
    index = [path for path in dict.fromkeys(index) if path.exists()]
    listed = {file for path in index for file in _weight_map(path).values()}
    return index + [path for path in whole if path.exists() and path.name not in listed]


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    names = convert_value(dict, files.read_json(index, "index").get("weight_map"), f"{index}.weight_map")
    for key, file in names.items():
        files.inside(index.parent, file, f"{index}: the file of {key}")
        plain = pathlib.PurePath(file).name == file and "\\" not in file
        require(plain, f"{index}: the file of {key}", repr(file), f"the name of a file in {index.parent}", "correct it")
    require(bool(names), f"{index}.weight_map", "no tensor", "tensor -> file", "fetch it again")
    return names


def _indexed(index: pathlib.Path, read: Callable[[pathlib.Path], TensorSource]) -> TensorSource:
    weight_map, directory = _weight_map(index), index.parent
    names = sorted(set(weight_map.values()))
    missing = [file for file in names if not (directory / file).is_file()]
    what = f"{directory}: {len(missing)} of {len(names)} weight files are missing ({', '.join(missing[:3])})"
    require(not missing, what, None, f"all that {index.name} lists", "fetch the checkpoint again")
    opened = {file: read(directory / file) for file in names}
    expected, do = f"the tensor that {index.name} lists", "the files are of different checkpoints; fetch them again"
    for key, file in weight_map.items():
        require(key in opened[file], f"{directory / file}: no tensor {key}", None, expected, do)
    return combined([("", file) for file in opened.values()])


def _open_pickle(path: pathlib.Path) -> TensorSource:
    state = torch_pickle.read_pickle(path)
    for name in ("state_dict", "model", "module"):
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    require(isinstance(state, Mapping), path, type_of(state), "a state dict", "save one")
    return torch_pickle.open_state_dict(path, dict(state))
