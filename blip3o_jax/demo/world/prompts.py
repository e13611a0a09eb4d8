"""Samples of the demo world: a prompt, its metadata in GenEval's schema and a matching scene.

A sample depends on (seed, index) only. Held out from training are:
1. colour-shape pairs: shape i in colour (3 i + 6) mod 8 (numbers as in `scenes`), that is pink circle, orange square,
   blue triangle, brown star, yellow cross and purple ring;
2. meanings: requests whose `meaning` is in the held-out fold, in all wordings;
3. wordings: captions in the held-out fold, compared by letters, digits and spaces in lower case.

Reinforcement learning needs no images, so it can train on unseen pairs: the split `new_pairs` has the prompts held out
by the first rule only, except for about half of their meanings, which remain for evaluation: those where the first byte
of SHA-256("judged 3: " + meaning) is odd. Of the numbers from 0, 3 is the first that splits the tasks evenly.

A text is in the fold if the first byte of SHA-256("fold 286: " + text) is 0 mod 8. Fold 286, of 0 to 399, includes at
least one meaning of every task, such as a single triangle, two circles, or a star and a cross.
"""

import collections
import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

import numpy as np

from blip3o_jax.demo.world import captions, scenes
from blip3o_jax.demo.world.captions import Clause, Request
from blip3o_jax.demo.world.font import LETTERS
from blip3o_jax.demo.world.scenes import COLORS, SHAPES, Scene
from blip3o_jax.detection import relative_position
from blip3o_jax.errors import UserError, require

T = TypeVar("T")

COLOR_NAMES = tuple(COLORS)
WORDINGS = ("template", "paraphrase", "mixed", "description")
SPLITS = ("train", "held_out", "new_pairs", "any")
TASKS = {
    "single_object": 0.08,
    "two_object": 0.14,
    "counting": 0.18,
    "colors": 0.10,
    "position": 0.20,
    "color_attr": 0.18,
    "text": 0.12,
}
"""Task -> fraction of the training samples."""
LENGTHS = (0.2, 0.25, 0.3, 0.15, 0.1)
"""Fractions of the signs with one to five letters."""
COMPOSITION_TASKS = tuple(task for task in TASKS if task != "text")

REASONS = ("pair", "judged", "meaning", "wording")
"""Reasons to hold a prompt out; `judged` occurs only with `pair`."""

_FOLD, _FOLDS, _JUDGED = "fold 286: ", 8, "judged 3: "
TRIES = 1000  # draws after which a split is considered empty for a task


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt with a matching scene."""

    request: Request
    caption: str
    scene: Scene
    held_out: tuple[str, ...]  # of REASONS; empty for training

    @property
    def metadata(self) -> dict:
        """Metadata of the prompt in GenEval's schema."""
        return captions.metadata(self.request, self.caption)


def held_out_pair(shape: str, color: str) -> bool:
    """Returns whether a colour-shape pair is held out from training."""
    return COLOR_NAMES.index(color) == (3 * SHAPES.index(shape) + 6) % len(COLOR_NAMES)


def in_fold(text: str) -> bool:
    """Returns whether a text is in the held-out fold."""
    return _digest(_FOLD + text) % _FOLDS == 0


def _digest(text: str) -> int:
    return hashlib.sha256(text.encode()).digest()[0]


def held_out_text(caption: str) -> bool:
    """Returns whether the wording of a caption or instruction is held out from training."""
    return in_fold(re.sub(r"[^a-z0-9 ]", "", caption.lower()))


def held_out_scene(scene: Scene) -> bool:
    """Returns whether a scene shows a held-out pair."""
    return any(held_out_pair(item.shape, item.color) for item in scene.objects)


def held_out_reasons(request: Request, caption: str) -> tuple[str, ...]:
    """Returns the reasons to hold a prompt out; empty for training prompts."""
    pair = any(held_out_pair(clause.shape, clause.color) for clause in request.clauses if clause.color is not None)
    return why_held_out(pair, request.meaning, caption)


def why_held_out(pair: bool, meaning: str, text: str) -> tuple[str, ...]:
    """Returns the reasons, of REASONS, to hold a prompt or instruction out.

    `pair`: whether it names or produces a held-out pair; an empty meaning or wording is not held out.
    """
    found = (pair, pair and _digest(_JUDGED + meaning) % 2, meaning and in_fold(meaning), held_out_text(text))
    return tuple(reason for reason, holds in zip(REASONS, found, strict=True) if holds)


def in_split(split: str, held_out: tuple[str, ...]) -> bool:
    """Returns whether a prompt with given reasons belongs to a split."""
    return {"train": not held_out, "held_out": bool(held_out), "new_pairs": held_out == ("pair",), "any": True}[split]


def _color(rng: np.random.Generator) -> str:
    return captions.pick(rng, COLOR_NAMES)


def sample_text(rng: np.random.Generator, lengths: Sequence[float] = LENGTHS) -> str:
    """Draws a text; `lengths` are the relative frequencies of one to five letters."""
    length = int(rng.choice(len(lengths), p=np.array(lengths) / sum(lengths))) + 1
    return "".join(LETTERS[i] for i in rng.integers(len(LETTERS), size=length))


def sample_request(rng: np.random.Generator, task: str, lengths: Sequence[float] = LENGTHS) -> Request:
    """Draws the request of a prompt of a task; `lengths` as for `sample_text`."""
    if task == "text":
        return Request(task, text=sample_text(rng, lengths))
    first, second = (SHAPES[i] for i in rng.permutation(len(SHAPES))[:2])
    if task == "single_object":
        return Request(task, (Clause(first),))
    if task == "colors":
        return Request(task, (Clause(first, _color(rng)),))
    if task == "counting":
        color = _color(rng) if rng.random() < 0.5 else None
        return Request(task, (Clause(first, color, int(rng.integers(2, 5))),))
    if task == "two_object":
        return Request(task, (Clause(first), Clause(second)))
    colored = task == "color_attr" or rng.random() < 0.6
    clauses = tuple(Clause(shape, _color(rng) if colored else None) for shape in (first, second))
    relation = captions.pick(rng, tuple(scenes.RELATIONS)) if task == "position" else None
    return Request(task, clauses, relation)


def compose(rng: np.random.Generator, request: Request) -> Scene:
    """Draws a scene that matches a request; unspecified colours form pairs that are not held out."""
    background = scenes.sample_background(rng)
    if request.text is not None:
        return Scene(sign=scenes.place_sign(rng, request.text, _color(rng)), background=background)
    kinds = []
    for clause in request.clauses:
        color = clause.color
        while color is None or (clause.color is None and held_out_pair(clause.shape, color)):
            color = _color(rng)
        kinds += [(clause.shape, color)] * clause.count
    if request.relation is not None:
        return Scene(scenes.arrange(rng, *kinds, request.relation), background=background)
    return Scene(scenes.scatter(rng, kinds), background=background)


def check_names(
    kinds: Collection[str], known: Collection[str], split: str = "train", wording: str = WORDINGS[0]
) -> None:
    """Raises UserError for an unknown split, wording, task or kind of edits, or if there are none of these."""
    good = kinds and all(kind in known for kind in kinds)
    require(bool(good), "tasks or kinds of edits", list(kinds), f"some of {list(known)}", "correct the names")
    require(split in SPLITS, "split of the demo world", f"{split!r}", f"one of {SPLITS}", "correct the name")
    require(wording in WORDINGS, "wording of prompts", f"{wording!r}", f"one of {WORDINGS}", "correct the name")


def drawn_in_split(rng: np.random.Generator, shares: Mapping[str, float], split: str, draw: Callable[..., T]) -> T:
    """Draws a kind by its share, and then `draw(rng, kind)` until the result belongs to a split.

    Raises:
      UserError: none of TRIES results does.
    """
    values = np.array(list(shares.values()), float)
    kind = tuple(shares)[int(rng.choice(len(values), p=values / values.sum()))]
    for _ in range(TRIES):
        drawn = draw(rng, kind)
        if in_split(split, drawn.held_out):
            return drawn
    got = f"none of split {split!r} in {TRIES} tries"
    raise UserError(f"demo world: {kind}", got=got, expected="some", do="use another split or kind")


def _draw(
    rng: np.random.Generator, task: str, wording: str, lengths: Sequence[float] = LENGTHS, templates: float = 0.4
) -> Sample:
    """Draws a sample; `templates` is their fraction in mixed wordings."""
    request = sample_request(rng, task, lengths)
    if wording == "description":
        scene = compose(rng, request)
        caption, covered = captions.describe(scene, rng), _covered(request, scene)
        reasons = dict.fromkeys(reason for each in covered for reason in held_out_reasons(each, caption))
        return Sample(covered[0], caption, scene, tuple(reasons))
    templated = rng.random() < {"template": 1.0, "paraphrase": 0.0, "mixed": templates}[wording]
    caption = captions.template(request) if templated else captions.paraphrase(request, rng)
    return Sample(request, caption, compose(rng, request), held_out_reasons(request, caption))


def _covered(request: Request, scene: Scene) -> list[Request]:
    """Returns the requests that a description covers: with all colours, and with the relations of two objects."""
    if request.text is not None:
        return [request]
    colors = {item.shape: item.color for item in scene.objects}
    clauses = tuple(dataclasses.replace(clause, color=colors[clause.shape]) for clause in request.clauses)
    covered = [dataclasses.replace(request, clauses=clauses)]
    if len(clauses) == 2:
        first, second = (item.box for item in scene.objects)
        covered += [Request("position", clauses, name) for name in sorted(relative_position(first, second))]
    return covered


def sample(
    index: int,
    seed: int = 0,
    tasks: dict[str, float] | None = None,
    split: str = "train",
    wording: str = "mixed",
    lengths: Sequence[float] = LENGTHS,
) -> Sample:
    """Draws the sample with number `index`, from 0, of a data set; deterministic on every machine.

    Args:
      tasks: task -> relative frequency; default: TASKS.
      split: "train", "held_out" (for any reason), "new_pairs" (see above) or "any".
      wording: "template" (GenEval's wording), "paraphrase", "mixed" (both), or "description" (of everything in the
        scene).
      lengths: relative frequencies of signs with one to five letters.

    Raises:
      UserError: an unknown task, split or wording.
    """
    tasks = TASKS if tasks is None else tasks
    check_names(tasks, TASKS, split, wording)
    draw = functools.partial(_draw, wording=wording, lengths=lengths)
    return drawn_in_split(np.random.default_rng((seed, index)), tasks, split, draw)


def held_out_prompts(task: str, count: int, seed: int = 1, wording: str = "mixed") -> list[Sample]:
    """Draws held-out prompts of a task, deterministically, and without repetition as long as there are enough.

    Held-out pairs and meanings come first, with at most an eighth of the list for any one meaning. Tasks with too few
    of them, such as `single_object`, are filled up with prompts whose wording, as in `sample`, alone is held out.

    Raises:
      UserError: an unknown task or wording.
    """
    check_names([task], TASKS, "held_out", wording)
    ranked: tuple[list[Sample], ...] = ([], [], [])
    captions_seen: set[str] = set()
    meanings = collections.Counter()
    for index in range(20 * count + 400):
        rng = np.random.default_rng((seed, index, 1))
        drawn = _draw(rng, task, wording, templates=0.5)
        if drawn.held_out and drawn.caption not in captions_seen:
            captions_seen.add(drawn.caption)
            meanings[drawn.request.meaning] += 1
            repeated = meanings[drawn.request.meaning] > max(count // 8, 1)
            ranked[2 if repeated else int(drawn.held_out == ("wording",))].append(drawn)
        if len(ranked[0]) == count:
            break
    unique = sum(ranked, [])
    return [unique[i % len(unique)] for i in range(count)]
