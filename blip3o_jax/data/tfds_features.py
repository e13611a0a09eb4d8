"""Reads and writes TFDS data sets without TensorFlow. Imported on demand, since importing TFDS is slow."""

import contextlib
import dataclasses
import glob
import io
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.example import BrokenItem, Example, as_text, breaking, choose_text
from blip3o_jax.errors import UserError, require
from blip3o_jax.text import tasks

IMAGE_NAMES = (
    *("target_img", "target_image", "edited_image", "output_image", "target", "edited", "output"),
    *("image", "img"),
)
REFERENCE_NAMES = (
    *("references", "source_img", "source_image", "input_image", "input_images", "original_image"),
    *("reference", "source", "input", "original", "image"),
)
TEXT_NAMES = ("text", "caption", "captions/text", "captions", "prompt", "instruction")
INSTRUCTION_NAMES = ("instruction", "edit_prompt", "edit_instruction", "edit", *TEXT_NAMES)
NOT_CAPTIONS = (
    *("id", "img_id", "image_id", "turn_index", "name", "task", "metadata", "url", "original_image_url"),
    *("filename", "file_name", "image/filename"),
)
_SPLIT = re.compile(r"^(.*?)(?::([A-Za-z_]\w*(?:\[[^\]]*\])?))?$", re.DOTALL)
_LEVELS = ("", "*", "*/*", "*/*/*")  # of name, config and version; not a whole file system below a wrong name


@dataclasses.dataclass(frozen=True)
class TfdsOptions:
    """Options of the kind `tfds`. Keys are paths into the features, such as `captions/text`."""

    image: str = ""  # target; default: the only image feature, or by name
    text: str = ""  # caption or name of a class label; default: the only text feature, or by name
    references: str = ""  # image or sequence of images; default: by name
    data_dir: str = ""  # directory of prepared data sets; default: that of TFDS


class Encoded(tfds.decode.SkipDecoding):
    """Leaves images encoded, also in sequences, so that broken ones are detected by `load_image`."""

    def decode_batch_example_np(self, serialized_example):
        return serialized_example


class ImageText(tfds.core.GeneratorBasedBuilder):
    """Images with captions or instructions, and the images that these refer to."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # else TFDS looks for download checksums beside this file

    def __init__(self, *, examples=(), **kwargs):
        """`examples` are the (key, features) pairs to write; for other arguments see TFDS."""
        self._examples = examples
        super().__init__(**kwargs)

    def _info(self):
        image = tfds.features.Image(shape=(None, None, 3))
        features = {name: tfds.features.Text() for name in ("text", "task", "name", "metadata")}
        features |= {"image": image, "references": tfds.features.Sequence(image)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": iter(self._examples)}

    def _generate_examples(self):
        yield from self._examples


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Paths of the features to read; "" for none."""

    image: str
    text: str
    references: str
    texts: tuple[str, ...] = ()  # all possible captions
    labels: tuple[str, ...] = ()  # names of the classes, if the text is a class label


class Tfds:
    """A split of a TFDS data set in ArrayRecord files."""

    def __init__(self, source: SourceConfig):
        options = source.read_options(TfdsOptions)
        self._task, self._path, self._asked = source.task, source.path, options.text
        builder, split = open_builder(source.path, options.data_dir)
        self._chosen = choose(builder.info.features, options, source)
        self._data = open_split(builder, split, self._chosen, source.path)
        self._named = isinstance(dict(builder.info.features).get("name"), tfds.features.Text)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Example:
        name = f"{os.path.basename(self._path)}:{index}"
        with breaking(name, ValueError, RuntimeError, OSError):
            row = self._data[index]
        name = as_text(row["name"], name) if self._named and row["name"] else name
        chosen = self._chosen
        fields = {key: _first(_lookup(row, key)) for key in chosen.texts}
        if chosen.labels and fields.get(chosen.text) is not None:
            label = int(fields[chosen.text])
            fields[chosen.text] = None if label < 0 else chosen.labels[label]  # -1: no label
        text, origin = choose_text(fields, (chosen.text,) if chosen.text else (), self._asked, name)
        images = _encoded(_lookup(row, chosen.image), chosen.image, name)
        if not images:
            raise BrokenItem(name, f"{chosen.image} is empty")
        references = ()
        if chosen.references:
            references = _encoded(_lookup(row, chosen.references), chosen.references, name)
        return Example(self._task, text, images[0], references, name, origin=origin)


def _encoded(value: Any, key: str, name: str) -> tuple[bytes, ...]:
    """Returns the encoded images of an image feature or a sequence of images."""
    values = (value,) if isinstance(value, bytes) else tuple(value if value is not None else ())
    if not all(isinstance(each, bytes) for each in values):
        raise BrokenItem(name, f"{key} holds no encoded image")
    return values


def _lookup(row: Mapping[str, Any], path: str) -> Any:
    for key in path.split("/"):
        row = row[key]
    return row


def _first(value: Any) -> Any:
    """Returns the first value of a sequence, such as the captions of one image, and other values unchanged."""
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim):
        return value[0] if len(value) else None
    return value


def open_builder(path: str, data_dir: str) -> tuple[tfds.core.DatasetBuilder, str]:
    """Returns the builder and the split of a prepared data set, without downloads or the code of the data set.

    `path` is `NAME[/config][:version][:split]` below `data_dir` (default: that of TFDS), or `DIRECTORY[:split]`.

    Raises:
      UserError: there is no such prepared data set, or it has no such split.
    """
    name, split = _SPLIT.match(path.removeprefix("tfds:")).groups()
    split = split or "train"
    prepared = os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    directory = name if os.path.isdir(name) else os.path.join(prepared, name.replace(":", "/"))
    try:
        builder = tfds.builder_from_directory(_version_dir(directory, path))
        splits = list(builder.info.splits)
    except UserError:
        raise
    except Exception as error:  # TFDS raises many types
        what = f"tfds {path}: {_first_line(error)}"
        raise UserError(what, expected="a prepared data set", do="check its name or directory") from None
    expected = f"one of {', '.join(splits) or 'none (not prepared)'}"
    do = f"prepare it with `tfds build {name} --file_format=array_record`, or choose another split"
    require(re.split(r"[\[+]", split)[0] in splits, f"tfds {path}: split {split}", None, expected, do)
    return builder, split


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _version_dir(directory: str, path: str) -> str:
    """Returns the directory of dataset_info.json: this one, or the latest version of the only data set below it."""
    below = (os.path.join(glob.escape(directory), level, "dataset_info.json") for level in _LEVELS)
    found = [file for pattern in below for file in glob.glob(pattern)]
    versions = sorted(
        (os.path.dirname(file) for file in found),
        key=lambda version: [int(number) for number in re.findall(r"\d+", os.path.basename(version))],
    )
    one = len({os.path.dirname(version) for version in versions}) == 1
    what = f"tfds {path}: {len(versions)} data sets in {directory}"
    do = "prepare it with `tfds build --file_format=array_record`, or name the config"
    require(one, what, None, "a prepared one, or one config of it", do)
    return versions[-1]


def open_split(builder: tfds.core.DatasetBuilder, split: str, chosen: Chosen, path: str) -> Any:
    """Opens a split for random access, with encoded images."""
    decoders: dict = {}
    for feature in filter(None, (chosen.image, chosen.references)):
        *parents, leaf = feature.split("/")
        level = decoders
        for parent in parents:
            level = level.setdefault(parent, {})
        level[leaf] = Encoded()
    try:
        data = builder.as_data_source(split, decoders=decoders)
        empty = not len(data) or data[0] is None  # opens the files
    except Exception as error:  # files of a format without random access, or missing ones
        what, do = f"tfds {path}: {_first_line(error)}", "prepare it with --file_format=array_record"
        raise UserError(what, expected="ArrayRecord files", do=do) from None
    require(not empty, f"tfds {path}", "no items", "at least one", "choose another split")
    return data


def choose(features: tfds.features.FeaturesDict, options: TfdsOptions, source: SourceConfig) -> Chosen:
    """Chooses the features of the image, its text and its references: those of the options, or by type and name.

    Raises:
      UserError: a feature does not exist, or several are possible.
    """
    leaves = dict(_leaves(features, ""))
    images = [key for key, leaf in leaves.items() if isinstance(getattr(leaf, "feature", leaf), tfds.features.Image)]
    texts = [
        key for key, leaf in leaves.items() if isinstance(leaf, tfds.features.Text) and key not in NOT_CAPTIONS
    ] or [key for key, leaf in leaves.items() if isinstance(leaf, tfds.features.ClassLabel)]
    for role in ("image", "text", "references"):
        asked, known = getattr(options, role), sorted(leaves if role == "text" else images)
        what, expected = f"tfds {source.path}: {role} feature {asked!r}", f"one of {', '.join(known) or 'none'}"
        require(not asked or asked in known, what, None, expected, f"fix options.{role}")
    edits = tasks.find(source.task).needs_references
    targets = [key for key in images if isinstance(leaves[key], tfds.features.Image) and key != options.references]
    image = options.image or _pick("image", targets, IMAGE_NAMES, source.path)
    references = ""
    if edits:
        named = next((name for name in REFERENCE_NAMES if name in images and name != image), "")
        references = options.references or named
        what = f"tfds {source.path}: no references among the images {', '.join(images)}"
        require(references, what, None, "an image or a sequence of images to edit", "give options.references")
    text = options.text
    if texts and not text:
        text = _pick("text", texts, INSTRUCTION_NAMES if edits else TEXT_NAMES, source.path)
    labels = tuple(leaves[text].names) if isinstance(leaves.get(text), tfds.features.ClassLabel) else ()
    return Chosen(image, text, references, tuple(dict.fromkeys((*filter(None, [text]), *texts))), labels)


def _leaves(feature: Any, path: str):
    """Yields the path and the feature of every leaf. Sequences are leaves if of images, else their elements are."""
    if isinstance(feature, tfds.features.FeaturesDict):
        for key, child in feature.items():
            yield from _leaves(child, f"{path}/{key}" if path else key)
    elif isinstance(feature, tfds.features.Sequence) and not isinstance(feature.feature, tfds.features.Image):
        yield from _leaves(feature.feature, path)
    else:
        yield path, feature


def _pick(role: str, candidates: list[str], preferred: tuple[str, ...], path: str) -> str:
    found = [name for name in preferred if name in candidates][:1] or candidates
    what = f"tfds {path}: {role} features {', '.join(candidates) or 'none'}"
    require(len(found) == 1, what, None, "one to take", f"name it in options.{role}")
    return found[0]


def write(examples, directory: str) -> str:
    """Writes (key, features) pairs as ArrayRecord files for `tfds.builder_from_directory`.

    Returns:
      The directory of the data set, below `directory`.
    """
    with contextlib.ExitStack() as stack:
        if not os.isatty(2):
            tfds.disable_progress_bar()
            stack.callback(tfds.enable_progress_bar)
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))  # TFDS reports a download
        builder = ImageText(examples=examples, data_dir=directory, file_format="array_record")
        builder.download_and_prepare()
    return str(builder.data_dir)
