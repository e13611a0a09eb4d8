"""Requests to the server, answered by a `Pipeline`.

Few programs are compiled: image sizes, step counts and batch sizes come from short lists, and clients cannot choose
what else would compile a program of its own (temperature, truncation, sampler).
"""

import dataclasses
import logging
import random
import re
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import numpy as np
from PIL import Image

from blip3o_jax import compilation
from blip3o_jax.app.batching import Dropped, Job
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.config.model import Guidance
from blip3o_jax.config.schema import Count, Range, Seed, Size
from blip3o_jax.data.images import png_bytes, to_uint8
from blip3o_jax.errors import require, told
from blip3o_jax.generate import engine, stages
from blip3o_jax.generate.prompts import BUCKET, Prompt
from blip3o_jax.generate.settings import Settings, check_requests
from blip3o_jax.outputs import metadata
from blip3o_jax.pipeline import ADVICE, Pipeline, with_judge
from blip3o_jax.rl.judge import Judge, RewardConfig
from blip3o_jax.version import __version__

MAX_IMAGES = 10  # of one request, as OpenAI's
MAX_REFERENCES = 4  # of one request: each number of them is a program of its own
MAX_CHARACTERS = 32_000  # of a prompt, before it is tokenised
PREVIEW_SHARE = 0.1  # of the time, at most, that goes into previews
MAP_PIXELS = 192  # side of a map of tokens
LANES = 2  # batches side by side
LOG = logging.getLogger("blip3o_jax.app")


@dataclasses.dataclass(frozen=True)
class Ask:
    """A client's request, in the names of OpenAI's API and of sample.py."""

    prompt: str
    n: Annotated[int, Range(1, MAX_IMAGES)] = 1
    size: str = "auto"  # auto | WIDTHxHEIGHT
    seed: Seed | None = None  # default: drawn
    negative_prompt: str | None = None
    num_inference_steps: Count | None = None  # default: the server's
    guidance_scale: Guidance | None = None  # default: the checkpoint's
    token_guidance_scale: Guidance | None = None
    best_of: Count = 1  # candidates of each image, of which the server's reward chooses


@dataclasses.dataclass(frozen=True)
class Choices:
    """Values that clients may choose from, the default first."""

    sizes: tuple[tuple[Size, Size], ...]  # (width, height) in pixels
    steps: tuple[Count, ...]  # denoising steps
    batches: tuple[int, ...]  # batch sizes in images, ascending


@dataclasses.dataclass(frozen=True)
class Made:
    """An image with its tokens and metadata."""

    image: Image.Image
    tokens: np.ndarray  # i32[N], vocabulary ids
    record: dict[str, Any]  # as sample.py writes it

    @property
    def png(self) -> bytes:
        """Encode the image as sample.py writes it."""
        return png_bytes(self.image, metadata(self.record))


@dataclasses.dataclass(frozen=True)
class Seen:
    """Progress of an image."""

    stage: str
    done: int
    total: int
    image: Image.Image | None  # of the latents so far, or a map of the tokens so far


class Service:
    """Turn requests into jobs, and run them.

    Args:
      origin: arguments of sample.py that name the model, for the metadata of images.
      reward: reward for `best_of`, as in sample.py; None: `best_of` is not available.

    Raises:
      UserError: an unknown reward, or one that needs metadata, which requests do not have.
    """

    def __init__(self, pipeline: Pipeline, origin: dict[str, Any], choices: Choices, reward: str | None = None):
        self.pipeline, self.origin, self.choices, self.reward = pipeline, origin, choices, reward
        self.candidates = 1 if reward is None else choices.batches[-1]
        if reward is not None:
            got, do = f"{reward}, which needs metadata", "choose another reward"
            needs = Judge([RewardConfig(reward)], "--reward").needs_metadata
            require(not needs, "--reward", got, "one that scores requests, which have no metadata", do)
        self.batches = choices.batches  # batch sizes that are compiled
        self._colours: np.ndarray | None = None
        self._warm: list[Job] = []

    def jobs(self, ask: Ask, references: Sequence[Image.Image] = (), watched: bool = False) -> list[Job]:
        """Build one job per image; raise UserError for a request that this model or server does not accept."""
        config, tokenizer = self.pipeline.config, self.pipeline.tokenizer
        for name in ("prompt", "negative_prompt"):
            text = getattr(ask, name) or ""
            got, most = f"{len(text):,} characters", f"at most {MAX_CHARACTERS:,}"
            require(len(text) <= MAX_CHARACTERS, name, got, most, "shorten it")
            lone = re.search("[\ud800-\udfff]", text)
            require(lone is None, name, f"half a character ({lone and lone[0]!r})", "Unicode text", "correct it")
        count = len(references)
        require(count <= MAX_REFERENCES, "image", f"{count} of them", f"at most {MAX_REFERENCES}", "leave some out")
        sizes = {f"{width}x{height}": (width, height) for width, height in self.choices.sizes}
        sizes["auto"] = self.choices.sizes[0]
        require(ask.size in sizes, "size", repr(ask.size)[:100], " | ".join(sizes), "choose one")
        width, height = sizes[ask.size]
        steps = self.choices.steps[0] if ask.num_inference_steps is None else ask.num_inference_steps
        offered = " | ".join(map(str, self.choices.steps))
        require(steps in self.choices.steps, "num_inference_steps", steps, offered, "choose one")
        most, several = self.candidates, ask.best_of > 1
        expected = f"1 to {most} on this server" if self.reward else "1 on this server, which has no --reward"
        require(ask.best_of <= most, "best_of", ask.best_of, expected, "lower it")
        same = ("best_of", "negative_prompt", "guidance_scale", "token_guidance_scale")
        own = {"reward": self.reward if several else None, "num_inference_steps": steps}
        settings = Settings(height=height, width=width, **own, **{name: getattr(ask, name) for name in same})
        seed = random.SystemRandom().randrange(2**32) if ask.seed is None else ask.seed
        task = "edit" if references else "t2i"
        prompts = [Prompt(task, ask.prompt, tuple(references), seed=seed, first=index) for index in range(ask.n)]
        checked = with_judge(check_requests(config, tokenizer, prompts, settings))
        rows = [row for row in (checked.prompts[0].row, checked.prompts[0].unguided) if row is not None]
        alike = dataclasses.replace(checked.settings, token_guidance_scale=None)
        kind = alike, count, len(rows), -(-max(map(len, rows)) // BUCKET)
        return [  # candidates fill a batch, so that every job is of a kind of its own
            Job(object() if several else kind, dataclasses.replace(checked, prompts=(request,)), watched=watched)
            for request in checked.prompts
        ]

    @property
    def lanes(self) -> int:
        """Number of batches that may run in parallel; 1 on several devices, whose programs must start in one order."""
        return LANES if self.pipeline.mesh is None else 1

    def fits(self, waiting: int, idle: int) -> int:
        """Return how many of the `waiting` jobs form the next batch.

        On a CPU, where the time per image hardly depends on the batch size, idle lanes share the jobs without padding.
        """
        share = -(-waiting // idle) if jax.default_backend() == "cpu" else waiting
        exact = [size for size in self.batches if size <= share]
        return exact[-1] if exact and jax.default_backend() == "cpu" else min(waiting, self.batches[-1])

    def run(self, jobs: Sequence[Job]) -> list[Made]:
        """Make the images of jobs of one kind."""
        settings = jobs[0].what.settings
        size = len(jobs)
        if settings.best_of == 1:
            size = next(size for size in self.choices.batches if size >= len(jobs))
        prompts = [job.what.prompts[0] for job in jobs]
        prompts += prompts[-1:] * (size - len(jobs))
        settings = dataclasses.replace(settings, batch_size=size * settings.best_of)
        checked = dataclasses.replace(jobs[0].what, settings=settings, prompts=tuple(prompts))
        [output] = _Watched(self.pipeline).stream(checked, _Watch(self, jobs))
        made = zip(jobs, output.images, output.token_ids)
        return [Made(image, ids, self._record(job, output.facts(row))) for row, (job, image, ids) in enumerate(made)]

    def warm_up(self) -> None:
        """Compile what requests with default settings need, images and edits, in the smallest batch."""
        self.batches = self.choices.batches[:1]
        [job] = self.jobs(Ask("a", seed=0), watched=True)
        [made] = self.run([job])
        self._warm = [job, *self.jobs(Ask("a", seed=0), (made.image,), watched=True)]
        self.run(self._warm[1:])

    def grow(self, rest: Callable[[], None] = lambda: None) -> None:
        """Compile the same for larger batches, which are used once they are ready. Returns early after `stop`.

        `rest` is called before every compilation, to wait for running requests.
        """
        for size in self.choices.batches[len(self.batches) :]:
            try:
                for job in self._warm:
                    rest()
                    self.run([job] * size)
            except Dropped:
                return
            except Exception as error:
                LOG.warning("batches of %d images are not used: %s", size, told(error))
                return
            self.batches += (size,)

    def stop(self) -> None:
        """End `grow` after the program that is being compiled."""
        for job in self._warm:
            job.drop()

    def token_map(self, tokens: np.ndarray) -> Image.Image:
        """Draw the first n tokens, vocabulary ids i32[n], as a grid; the others are white.

        Colours are principal components of the codebook, so that similar codes look similar.
        """
        if self._colours is None:
            codebook = np.asarray(self.pipeline.engine(Settings(), (1, 1)).codebook(), np.float32)
            centred = codebook - codebook.mean(0)
            axes = np.linalg.eigh(centred.T @ centred)[1][:, -3:]
            spread = centred @ axes
            spread /= 2 * spread.std(0) + 1e-9  # two standard deviations reach the ends
            self._colours = ((spread.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
        side = int(self.pipeline.config.num_image_tokens**0.5)
        colours = np.full((side * side, 3), 255, np.uint8)
        tokens = tokens[: side * side]
        colours[: len(tokens)] = self._colours[tokens - self.pipeline.config.tokens.image_start]
        grid = Image.fromarray(colours.reshape(side, side, 3))
        scale = max(1, MAP_PIXELS // side)
        return grid.resize((side * scale, side * scale), Image.Resampling.NEAREST)

    def _record(self, job: Job, facts: dict[str, Any]) -> dict[str, Any]:
        """Build a line of samples.jsonl; references were uploaded, so repeating an edit needs them again."""
        asked = job.what.prompts[0].prompt
        settings = dataclasses.asdict(job.what.settings)
        settings |= {"seed": asked.seed, "num_images_per_prompt": asked.first + 1}
        facts |= {"checkpoint_id": self.pipeline.name, "dtype": self.pipeline.dtype}
        facts |= {"version": __version__, "index": asked.first}
        return {"prompt": asked.text, "task": asked.task, "image": [], **settings, **self.origin, **facts}


class _Watch:
    """Progress callback that updates `Job.seen`, and aborts a batch whose jobs were all dropped."""

    def __init__(self, service: Service, jobs: Sequence[Job]):
        self.state: Any = None  # of the running loop
        self._service, self._jobs, self._next = service, jobs, 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if all(job.dropped for job in self._jobs):
            raise Dropped
        watched = [(row, job) for row, job in enumerate(self._jobs) if job.watched and not job.dropped]
        start = time.monotonic()
        shows = watched and (start >= self._next or done == total)
        for row, job in watched:
            image = self._image(stage, row) if shows else job.seen.image
            job.seen = Seen(stage, done, total, image)
        if shows:
            self._next = time.monotonic() + (time.monotonic() - start) / PREVIEW_SHARE

    def _image(self, stage: str, row: int) -> Image.Image | None:
        if self._service.pipeline.mesh is not None:
            return None  # rows are sharded over devices
        if stage == "tokens":
            known = np.broadcast_to(self.state.step, len(self.state.tokens))[row]
            return self._service.token_map(np.asarray(self.state.tokens[row])[:known])
        pipeline = self._service.pipeline
        with pipeline.scope():
            inputs = pipeline.config, pipeline.params, self.state.x[row : row + 1]
            pixels = compilation.run(stages.decode_latent, *inputs)  # as the engine does: one executable serves both
        return Image.fromarray(to_uint8(pixels[0]))


class _Runner(engine.Runner):
    """Runner that passes the states of loops to the progress callback."""

    def __call__(self, stage: str, *inputs: Any, **options: Any) -> Any:
        self.progress.state = super().__call__(stage, *inputs, **options)
        return self.progress.state


class _Watched(Pipeline):
    """Pipeline whose progress callback has the states of loops."""

    def __init__(self, pipeline: Pipeline):
        self.__dict__ = pipeline.__dict__

    def engine(self, settings: Settings, size: tuple[int, int], progress: _Watch) -> engine.Engine:
        return dataclasses.replace(super().engine(settings, size), run=_Runner(self.mesh, progress, ADVICE))


def choices_of(config: Blip3oConfig, sizes: Sequence[str], steps: Sequence[int], largest: int) -> Choices:
    """Build the choices of a server, with batches of up to `largest` images, rounded down to a power of two.

    `sizes` are WIDTHxHEIGHT; if there are none, the model's square and 3:2 in both orientations.

    Raises:
      UserError: a malformed size, or one that the autoencoder's factor does not divide.
    """
    side, factor = config.image_size, config.autoencoder.spatial_factor
    wide = -(-side * 3 // 2 // factor) * factor
    pairs = [_pair(size, factor) for size in sizes] or [(side, side), (wide, side), (side, wide)]
    batches = tuple(2**power for power in range(largest.bit_length()))
    return Choices(tuple(dict.fromkeys(pairs)), tuple(dict.fromkeys(steps)), batches)


def _pair(size: str, factor: int) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", size)
    pair = tuple(map(int, match.groups())) if match else (0, 0)
    good = match is not None and not any(length % factor or length > 2**15 for length in pair)
    require(good, "size", repr(size)[:100], f"WIDTHxHEIGHT, multiples of {factor} pixels", "correct it")
    return pair
