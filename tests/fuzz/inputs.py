"""What is fuzzed: name -> function of (rng, folder) that reads one mutated input as the project does.

A reader returns what it accepted, or raises UserError, or ends a command line with exit code 2 and one line. Anything
else is a fault. Accepted configurations are looked at once more: no value may lie outside its field's range.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import shutil
import struct
import tempfile
import typing
import zipfile
import zlib

import numpy as np

from blip3o_jax import experiment
from blip3o_jax.cli import app, configuration, convert, data, evals, plan, rows, sample, train
from blip3o_jax.config import schema
from blip3o_jax.convert import checkpoint, torch_pickle, weight_files
from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.example import BrokenItem
from blip3o_jax.data.images import load_image
from blip3o_jax.data.prompt_file import read_prompts
from blip3o_jax.data.sources import open_source
from blip3o_jax.errors import UserError
from blip3o_jax.text.tokenizer import Tokenizer
from fuzz import mutate
from support import data_makers

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
kept = []  # temporary folders of this process
EMBEDDED = pathlib.Path(experiment.__file__).parents[1] / "assets" / "demo"


def released(rng, folder):
    """A checkpoint in the released layout with one changed JSON file."""
    source = GOLDEN / rng.choice(["t2i", "edit_both"]) / "checkpoint"
    _copied(rng, source, folder)
    opened = checkpoint.open_checkpoint(folder)
    _check_ranges(opened.config)
    Tokenizer.from_directory(opened.tokenizer_dir)


def embedded(rng, folder):
    """The embedded model with one changed JSON file."""
    _copied(rng, EMBEDDED, folder)
    opened = checkpoint.open_checkpoint(folder)
    _check_ranges(opened.config)
    Tokenizer.from_directory(opened.tokenizer_dir)


def native(rng, folder):
    """A checkpoint in our layout with one changed JSON file."""
    _copied(rng, _imported(), folder)
    _check_ranges(checkpoint.open_checkpoint(folder).config)


@functools.cache
def _imported():
    kept.append(tempfile.TemporaryDirectory())
    folder = pathlib.Path(kept[0].name) / "native"
    checkpoint.import_checkpoint(checkpoint.open_checkpoint(GOLDEN / "t2i" / "checkpoint"), folder)
    return folder


def _copied(rng, source, folder):
    """Links to the files of a checkpoint, one JSON file of which is changed."""
    files = sorted(path for path in source.rglob("*") if path.is_file())
    chosen = rng.choice([path for path in files if path.suffix == ".json" and path.name != "tokenizer.json"])
    for path in files:
        place = folder / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path == chosen:
            place.write_text(mutate.json_text(rng, json.loads(path.read_text())), encoding="utf-8")
        else:
            os.link(path, place) if os.stat(path).st_dev == os.stat(folder).st_dev else shutil.copy(path, place)


def safetensors(rng, folder):
    """A safetensors file with a changed header, or changed bytes."""
    arrays = {"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 3), np.float16), "c": np.zeros((), np.int32)}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, array in arrays.items():
        kind = {"float32": "F32", "float16": "F16", "int32": "I32"}[array.dtype.name]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    body = b"".join(array.tobytes() for array in arrays.values())
    what = rng.choice(["header", "header", "bytes", "index"])
    text = (mutate.json_text(rng, header) if what == "header" else json.dumps(header)).encode()
    content = struct.pack("<Q", len(text)) + text + body
    (folder / "model.safetensors").write_bytes(mutate.content(rng, content) if what == "bytes" else content)
    if what == "index":
        index = {"metadata": {}, "weight_map": {name: "model.safetensors" for name in arrays}}
        (folder / "model.safetensors.index.json").write_text(mutate.json_text(rng, index))
    _read_all(weight_files.open_weights(folder))


def pickled(rng, folder):
    """A file of torch.save with changed opcodes (its checksums made anew), or with changed bytes."""

    def name(module, attribute):
        return f"c{module}\n{attribute}\n".encode()

    storage = b"(X\x07\0\0\0storage" + name("torch", "FloatStorage") + b"X\x01\0\0\x000X\x03\0\0\0cpuK\x06tQ"
    tensor = name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + b"K\0K\x02K\x03\x86K\x03K\x01\x86\x89"
    tensor += name("collections", "OrderedDict") + b")RtR"
    code = b"\x80\x02}q\0(X\x01\0\0\0w" + tensor + b"X\x04\0\0\0args}X\x01\0\0\0kK\x05su."
    inner = rng.random() < 0.7
    changed = code if rng.random() < 0.1 else mutate.content(rng, code)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("x/data.pkl", changed if inner else code)
        archive.writestr("x/byteorder", "little")
        archive.writestr("x/data/0", np.arange(6, dtype=np.float32).tobytes())
        archive.writestr("x/version", "3\n")
    path = folder / "weights.pth"
    path.write_bytes(packed.getvalue() if inner else mutate.content(rng, packed.getvalue()))
    found = torch_pickle.read_pickle(path)
    if isinstance(found, dict):
        tensors = {key: item for key, item in found.items() if isinstance(item, torch_pickle.Tensor)}
        _read_all(torch_pickle.open_state_dict(path, tensors))


def _read_all(source):
    for tensor in (source or {}).values():
        tensor.read()


def prompts(rng, folder):
    """A file of prompts, as the command line reads it."""
    records = [{"prompt": "a red star", "seed": 3, "height": 64, "task": "t2i"}, {"prompt": "a sign", "top_p": 0.5}]
    name, content = rng.choice([
        ("p.txt", "a red star\n\n# two\na sign\n"),
        ("p.csv", 'prompt,seed,guidance_scale\n"a red, star",1,2.5\na sign,2,1\n'),
        ("p.tsv", "Prompt\tCategory\na red star\tColors\na sign\tText\n"),
        ("p.json", json.dumps(records)),
    ])  # fmt: skip
    if rng.random() < 0.5:
        lines = [mutate.json_text(rng, record) for record in records]
        name, content = "p.jsonl", "\n".join(lines)
    elif name == "p.json":
        content = mutate.json_text(rng, records)
    else:
        content = mutate.text(rng, content)
    path = folder / name
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    read_prompts(path)
    for row in rows.read_rows(sample.parser().parse_args(["--prompts_file", str(path)])):
        _check_ranges(row.settings)


def data_rows(rng, folder):
    """A data set with changed rows or a changed archive; broken items are counted, never a fault."""
    kind = rng.choice(["jsonl", "webdataset", "folder"])
    if kind == "jsonl":
        (folder / "0.png").write_bytes(data_makers.picture(0))
        row = {"image": "0.png", "caption": "a picture", "input_images": ["0.png"], "instruction": "change it"}
        (folder / "rows.jsonl").write_text("\n".join(mutate.json_text(rng, row) for _ in range(3)))
        path = folder / "rows.jsonl"
    else:
        members = [(f"{n}.{ending}", item) for n in range(3)
                   for ending, item in (("png", data_makers.picture(n)), ("json", b'{"caption": "a"}'))]  # fmt: skip
        members = [(mutate.text(rng, name).replace("\0", "") if rng.random() < 0.2 else name,
                    mutate.content(rng, item) if rng.random() < 0.4 else item) for name, item in members]  # fmt: skip
        path = folder
        if kind == "webdataset":
            shard = data_makers.write_tar(folder / "0.tar", [(name.strip("/") or "x", item) for name, item in members])
            if rng.random() < 0.4:
                shard.write_bytes(mutate.content(rng, shard.read_bytes()))
        else:
            for name, item in members:
                (folder / (name.replace("/", "_")[:100].strip(".") or "x")).write_bytes(item)
    options = {"text_key": "caption"} if rng.random() < 0.2 else {}
    source = open_source(SourceConfig(kind, str(path), rng.choice(["t2i", "edit"]), options=options))
    for index in range(len(source)):
        with contextlib.suppress(BrokenItem):
            example = source[index]
            if example.target is not None:
                with contextlib.suppress(UserError):
                    load_image(example.target)


def images(rng, folder):
    """An encoded image with changed bytes."""
    del folder
    kind = rng.choice(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
    load_image(mutate.content(rng, data_makers.picture(rng.randrange(4096), (40, 30), kind)))


def training(rng, folder):
    """A configuration of train.py."""
    del folder
    stage = rng.choice(["tiny:pretrain", "tiny:edit", "tiny:vae", "tiny:tokenizer", "grpo:tiny", "blip3o_next_3b:sft"])
    settings = json.loads(json.dumps(configuration.read(stage)))
    _check_ranges(experiment.from_settings(mutate.tree(rng, settings)))


COMMANDS = {
    sample: ["--prompt", "a star", "--seed", "1", "--height", "64", "--num_inference_steps", "2", "--top_p", "0.9"],
    train: ["--config", "tiny:pretrain", "--workdir", "x", "--config.loop.num_steps=3", "--config.mesh.data=2"],
    plan: ["--config", "tiny:pretrain", "--num_devices", "2", "--mesh=data:2", "--device_memory", "80GB"],
    convert: ["random", "tiny", "x", "--seed", "1"],
    data: ["check", "tiny:pretrain", "--image_size", "64"],
    app: ["--port", "7861", "--size", "64x64", "--num_inference_steps", "4", "--max_batch=4", "--host", "127.0.0.1"],
    evals: ["demo", "--count", "2", "--output_dir", "x", "--tasks", "text"],
}


def command_lines(rng, folder):
    """The words of a command, as far as they are read before anything is done."""
    del folder
    command = rng.choice(list(COMMANDS))
    arguments = mutate.words(rng, COMMANDS[command])
    others, changes = configuration.split(arguments)
    args = command.parser().parse_args(others)
    if changes and getattr(args, "config", None):
        configuration.read(args.config, changes)
    if command is sample:
        for row in rows.read_rows(args):
            _check_ranges(row.settings)


def _check_ranges(config):
    """Fails where a field's value is none that its own rules accept."""
    if not dataclasses.is_dataclass(config):
        return
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            _check_ranges(value)
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for each in value:
                _check_ranges(each)
        else:
            try:
                schema.convert_value(hints[field.name], value, field.name)
            except UserError as error:
                raise AssertionError(f"accepted: {error}") from error


INPUTS = {
    function.__name__: function
    for function in (
        released,
        embedded,
        native,
        safetensors,
        pickled,
        prompts,
        data_rows,
        images,
        training,
        command_lines,
    )
}


def digest(text):
    """A number that differs between names, the same in every process."""
    return zlib.crc32(text.encode())
