"""The pipeline: generates images from prompts, running batches of requests through the engine.

P prompts, B = P * samples images, N image tokens.
"""

import dataclasses
import functools
import pathlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.config.schema import with_dtype
from blip3o_jax.convert import adapters as adapter_files
from blip3o_jax.convert import checkpoint
from blip3o_jax.data import images
from blip3o_jax.errors import UserError, require
from blip3o_jax.generate import best_of, paint, prompts, stages
from blip3o_jax.generate.engine import Engine, ImageTokens, Progress, Runner, scope
from blip3o_jax.generate.prompts import Prompt, Request
from blip3o_jax.generate.references import references_of
from blip3o_jax.generate.settings import Requests, Settings, check_requests, completed, make_settings, unsuitable
from blip3o_jax.models import blip3o
from blip3o_jax.nn import int8
from blip3o_jax.rl.judge import Judge, RewardConfig, judged
from blip3o_jax.sharding import fetch
from blip3o_jax.text.tokenizer import Tokenizer
from blip3o_jax.types import Params

ADVICE = "try dtype float32, or guidance scales and a temperature closer to the defaults"
WITHOUT_EFFECT = ("batch_size", "token_decoding", "token_window")  # settings that images do not depend on
TOGETHER = 64  # prompts whose references are in memory at once when a reward checks them
SMALL = 1_000_000_000  # parameters below which float32 is the default on CPU

Adapters = adapter_files.Path | Sequence[adapter_files.Path] | Mapping[adapter_files.Path, float]


@dataclasses.dataclass
class PipelineOutput:
    """The result of a pipeline call; the images of a prompt are adjacent."""

    images: list[Image.Image]
    token_ids: np.ndarray  # i32[B N], vocabulary ids
    log_probs: np.ndarray  # f32[B N]
    token_passes: np.ndarray  # i32[B], decoder passes used
    timings: dict[str, float]  # seconds per stage
    chosen: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # per image that a reward chose, see `facts`

    def facts(self, index: int) -> dict[str, Any]:
        """Returns what is recorded of an image.

        This is `token_passes` and, if a reward chose the image, the `candidate` number, its `candidate_reward`, the
        `candidate_rewards` of all candidates, and how many were `dropped` after previews.
        """
        return {"token_passes": int(self.token_passes[index]), **(self.chosen[index] if self.chosen else {})}

    def of(self, rows: Sequence[int]) -> "PipelineOutput":
        """Returns a subset of the images."""
        rows = list(rows)
        arrays = (x[rows] for x in (self.token_ids, self.log_probs, self.token_passes))
        chosen = [self.chosen[row] for row in rows] if self.chosen else []
        return PipelineOutput([self.images[row] for row in rows], *arrays, self.timings, chosen)


class Pipeline:
    """A model ready to generate images.

    Attributes:
      config, params, tokenizer: the model; without a mesh, parameters in the layout of `generate.paint.laid_out`.
      mesh: devices that it is laid out on; None for a single device.
      name: identifier recorded with images.
      dtype: dtype of the weights: float32 | bfloat16 | int8.
    """

    def __init__(
        self,
        config: Blip3oConfig,
        params: Params,
        tokenizer: Tokenizer,
        mesh: Mesh | None = None,
        name: str = "",
        dtype: str | None = None,
    ):
        if mesh is None:
            params = paint.laid_out(config, params, jax.devices()[0])
        self.config, self.params, self.tokenizer, self.mesh, self.name = config, params, tokenizer, mesh, name
        self.dtype = dtype or config.decoder.dtype
        self._kept: dict[str, jax.Array] = {}

    @classmethod
    def from_pretrained(
        cls,
        path: str | pathlib.Path,
        dtype: str = "auto",
        mesh: Mesh | None = None,
        adapters: Adapters = (),
        **sources: Any,
    ) -> "Pipeline":
        """Loads a checkpoint.

        Args:
          path: directory in the native or the released layout, or `hf://org/name`.
          dtype: float32 | bfloat16 | auto (float32 for small models on CPU, else bfloat16) | int8 (linear layers of
            decoder, connectors and diffusion transformer in int8 with a scale per output channel; computes as auto).
          mesh: devices to lay it out on (`sharding.make_mesh`); slices are read directly to their devices.
          adapters: adapters to merge in order: directories in PEFT's or diffusers' format, or `hf://org/name`; a
            mapping gives each a scale.
          **sources: `image_tokenizer=`, `diffusion=`: sources of parts that the checkpoint lacks; `backbone=`:
            `package.module:attribute` of a backbone from outside the package.

        Raises:
          UserError: the checkpoint is missing, broken or incomplete, or an adapter belongs to another model.
        """
        opened, loaded = open_model(path, adapters, **sources)
        return cls.from_checkpoint(opened, dtype, mesh, adapters=loaded)

    @classmethod
    def from_checkpoint(
        cls,
        opened: checkpoint.Checkpoint,
        dtype: str = "auto",
        mesh: Mesh | None = None,
        tokenizer: Tokenizer | None = None,
        adapters: adapter_files.Loaded = (),
    ) -> "Pipeline":
        """Loads what `open_model` returned, and the tokenizer unless given; otherwise as `from_pretrained`."""
        wide = _resolve_dtype(dtype, opened.config)
        params = adapter_files.with_adapters(opened.load_params(mesh=mesh, param_dtype=wide), adapters)
        if dtype == "int8":
            params = int8.quantize(params, adapter_files.linear_layers(opened.config))
        config = with_dtype(opened.config, dtype=wide, param_dtype=wide)
        tokenizer = tokenizer or Tokenizer.from_directory(opened.tokenizer_dir)
        name = adapter_files.identity_with(opened.identity, adapters)
        return cls(config, params, tokenizer, mesh, name, "int8" if dtype == "int8" else wide)

    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Any = None,
        task: str | None = None,
        progress: Progress | None = None,
        **settings: Any,
    ) -> PipelineOutput:
        """Generates images.

        Args:
          prompt: one or several captions, or editing instructions with `image`.
          image: reference images shared by all prompts: an image, a list of images, or an array [N H W C]; or a list of
            lists, one per prompt. An image is a path, a PIL image or an array, see `generate.references.image_of`.
          task: a key of `text.tasks.TASKS` or `package.module:attribute`; default: edit with an image, else t2i.
          progress: called with the progress of every stage.
          **settings: fields of `Settings`.

        Raises:
          UserError: invalid arguments, or arguments that do not fit the model.
        """
        prompt = prompt.tolist() if isinstance(prompt, np.ndarray) else prompt
        if not isinstance(prompt, (str, list, tuple)):
            raise UserError("prompt", got=repr(prompt), expected="text, or a list of texts", do="write it as a string")
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        requests = [
            Prompt(("edit" if own else "t2i") if task is None else task, text, own)
            for text, own in zip(texts, references_of(image, len(texts)))
        ]
        return self.answer(requests, progress, **settings)

    def answer(
        self, requests: Sequence[Prompt] | Requests, progress: Progress | None = None, **settings: Any
    ) -> PipelineOutput:
        """Generates images for prompts that may differ in task and references; otherwise as a call."""
        parts = list(self.stream(requests, progress, **settings))
        timings: dict[str, float] = {}
        for part in parts:
            for stage, seconds in part.timings.items():
                timings[stage] = timings.get(stage, 0.0) + seconds
        return PipelineOutput(
            [image for part in parts for image in part.images],
            np.concatenate([part.token_ids for part in parts]),
            np.concatenate([part.log_probs for part in parts]),
            np.concatenate([part.token_passes for part in parts]),
            timings,
            [facts for part in parts for facts in part.chosen],
        )

    def stream(
        self, requests: Sequence[Prompt] | Requests, progress: Progress | None = None, **settings: Any
    ) -> Iterator[PipelineOutput]:
        """Does the same as `answer`, yielding one batch at a time.

        `requests` are prompts, or the result of `check_requests`, which includes settings.
        """
        checked = self._checked(requests, settings)
        given = any(request.prompt.target is not None for request in checked.prompts)
        require(not given, "prompt", "a target", "none: its tokens are decoded", "call Pipeline.render")
        own = checked.settings
        together = max(1, own.batch_size // own.best_of)
        for batch, samples, keep in _batches(checked.prompts, own.num_images_per_prompt, together):
            engine = self.engine(own, checked.size, progress)
            yield self._images(engine, checked, prompts.loaded(batch), samples, keep)

    def render(
        self, requests: Sequence[Prompt] | Requests, progress: Progress | None = None, **settings: Any
    ) -> Iterator[PipelineOutput]:
        """Does the same as `stream` with the codes of each request's `target`, one image each."""
        checked = self._checked(requests, settings)
        given = all(request.prompt.target is not None for request in checked.prompts)
        require(given, "prompt", "no target", "an image whose codes to render", "call Pipeline.answer")
        require(checked.settings.reward is None, "reward", checked.settings.reward, "none: no token is drawn")
        for batch, _, keep in _batches(checked.prompts, 1, checked.settings.batch_size):
            engine = self.engine(checked.settings, checked.size, progress)
            yield self._rendered(engine, checked, prompts.loaded(batch), keep)

    def engine(self, settings: Settings, size: tuple[int, int], progress: Progress | None = None) -> Engine:
        """Returns the inference engine for images of `size` (height and width in pixels)."""
        run = Runner(self.mesh, progress or (lambda *_: None), ADVICE)
        return Engine(self.config, self.params, run, size, settings.tiling, settings.decoding, self._kept)

    def scope(self):
        """Sets the mesh and the precision for programs of the model."""
        return scope(self.mesh, self.config.decoder.dtype)

    def _checked(self, requests: Sequence[Prompt] | Requests, settings: dict[str, Any]) -> Requests:
        if not isinstance(requests, Requests):
            requests = check_requests(self.config, self.tokenizer, requests, make_settings(**settings))
            if line := unsuitable(self.config, requests):
                warnings.warn(line, stacklevel=4)
        else:
            expected = "those of the checked requests alone"
            require(not settings, "settings", ", ".join(settings), expected, "leave them out")
        return with_judge(requests)

    def _images(
        self, engine: Engine, checked: Requests, batch: Sequence[Request], samples: range, keep: int
    ) -> PipelineOutput:
        """Generates a batch, `samples` of each prompt, and returns its first `keep` images."""
        settings, count = checked.settings, checked.settings.best_of
        keys = _keys(settings, batch, best_of.numbers(samples, count))
        rows = engine.read(prompts.prepare(self.config, batch, *checked.size))
        made, negative = engine.decode(rows, keys, settings.sampling), None
        judge = functools.partial(_judged, checked.judge, batch, keys)
        guidance = settings.guidance_scale, rows.reference
        left, rewards = best_of.promising(engine, made.hidden, keys, settings.denoising, *guidance, judge, count)
        if len(left) < len(keys):
            made, keys = best_of.keep(engine, (made, keys), left)
        if checked.negative is not None:
            other = engine.read(prompts.prepare(self.config, [checked.negative] * len(batch), *checked.size))
            negative = engine.decode(other, keys, settings.sampling, stream=stages.NEGATIVE_STREAM).hidden
        output = _painted(engine, settings, made, keys, rows, negative)
        if checked.judge is not None:
            output = _chosen(output, judge, left, rewards, count)
        return output.of(range(keep))

    def _rendered(self, engine: Engine, checked: Requests, batch: Sequence[Request], keep: int) -> PipelineOutput:
        """Renders a batch from the codes of its targets, and returns its first `keep` images."""
        arrays = prompts.prepare(self.config, batch, *checked.size, guided=False)
        rows, keys = engine.read(arrays), _keys(checked.settings, batch, range(1))
        return _painted(engine, checked.settings, engine.read_targets(rows, arrays), keys, rows).of(range(keep))


def open_model(
    path: str | pathlib.Path, adapters: Adapters = (), **sources: Any
) -> tuple[checkpoint.Checkpoint, adapter_files.Loaded]:
    """Opens a checkpoint and adapters of it, without reading weights; arguments and errors as `from_pretrained`."""
    opened = checkpoint.open_checkpoint(path, **sources)
    checkpoint.check_backbone(opened, sources.get("backbone"))
    return opened, adapter_files.load_adapters(adapter_files.weighted(adapters), opened.config, opened.identity)


def origin(pipeline: Pipeline, settings: Settings) -> dict[str, Any]:
    """Returns what images depend on besides prompts: settings, checkpoint and dtype, as JSON values."""
    made = dataclasses.asdict(completed(pipeline.config, settings))
    made = {name: value for name, value in made.items() if name not in WITHOUT_EFFECT}
    return made | {"checkpoint_id": pipeline.name, "dtype": pipeline.dtype}


def with_judge(checked: Requests) -> Requests:
    """Adds the reward that selects among candidates, if the settings name one.

    Raises:
      UserError: the reward does not exist, or cannot score one of the prompts.
    """
    if checked.settings.reward is None or checked.judge is not None:
        return checked
    judge = Judge([RewardConfig(checked.settings.reward)])
    for first in range(0, len(checked.prompts), TOGETHER):
        part = prompts.loaded(checked.prompts[first : first + TOGETHER])
        judge.check([request.prompt.judged() for request in part])
    return dataclasses.replace(checked, judge=judge)


def _judged(
    judge: Judge, batch: Sequence[Request], keys: jax.Array, pixels: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """Scores images uint8[b Y X 3] of rows i32[b] of a batch: f32[b]."""
    each = len(keys) // len(batch)
    return judged(judge, [batch[row // each].prompt for row in rows], pixels, keys[rows])[0]


def _chosen(
    output: PipelineOutput, judge: best_of.Judge, rows: np.ndarray, rewards: np.ndarray, count: int
) -> PipelineOutput:
    """Selects the best image of every `count` candidates.

    Args:
      output: images of the remaining rows.
      rows: i32[b], the remaining rows.
      rewards: f32[B], preview rewards of all candidates, recorded for dropped ones.
    """
    own, each = judge(np.stack(output.images), rows), int((rows < count).sum())
    rewards = rewards.copy()
    rewards[rows] = own
    taken, groups = best_of.best(own, each), rewards.reshape(-1, count).tolist()
    output = output.of(taken)
    output.chosen = [
        {
            "candidate": int(row % count),
            "candidate_reward": group[row % count],
            "candidate_rewards": group,
            "dropped": count - each,
        }
        for row, group in zip(rows[taken], groups, strict=True)
    ]
    return output


def _painted(
    engine: Engine, settings: Settings, made: ImageTokens, keys: jax.Array, rows: prompts.PromptRows, negative=None
) -> PipelineOutput:
    """Denoises and decodes images from hidden states; `negative` are those of the negative prompt, if any."""
    guided = settings.guidance_scale, rows.reference, negative
    latents = engine.paint(made.hidden, keys, settings.denoising, *guided)
    pixels = images.to_uint8(fetch(engine.pixels(latents)))
    facts = (fetch(x) for x in (made.tokens, made.log_probs, made.passes))
    return PipelineOutput([Image.fromarray(image) for image in pixels], *facts, engine.run.seconds)


def _keys(settings: Settings, batch: Sequence[Request], samples: Sequence[int]) -> jax.Array:
    """Returns one random key per image."""
    seeds = [settings.seed if request.prompt.seed is None else request.prompt.seed for request in batch]
    return stages.image_keys(seeds, samples, [request.prompt.first for request in batch])


def _batches(requests: Sequence[Request], samples: int, size: int) -> Iterator[tuple]:
    """Yields batches (prompts, samples of each, images to keep) of one shape and at most `size` images."""
    if samples > size:
        for request in requests:
            for first in range(0, samples, size):
                yield [request], range(first, first + size), min(size, samples - first)
        return
    together = min(size // samples, len(requests))
    for first in range(0, len(requests), together):
        batch = list(requests[first : first + together])
        keep = len(batch) * samples
        yield batch + batch[-1:] * (together - len(batch)), range(samples), keep


def _resolve_dtype(dtype: str, config: Blip3oConfig) -> str:
    """Returns the dtype of computation."""
    if dtype in ("auto", "int8"):
        size = sum(leaf.size for leaf in jax.tree.leaves(blip3o.abstract_params(config)))
        small = jax.default_backend() == "cpu" and size < SMALL
        return "float32" if small else "bfloat16"
    known, expected = dtype in ("float32", "bfloat16"), "float32, bfloat16, int8 or auto"
    require(known, "dtype", f"{dtype!r}", expected, "choose one of them")
    return dtype
