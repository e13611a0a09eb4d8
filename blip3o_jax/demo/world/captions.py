"""Captions of the demo world: requests and their wordings.

Templates use GenEval's wording ("a photo of three blue squares"). Paraphrases vary the frame around the noun phrase,
names of shapes, numbers, relations, order, case and the final stop. Descriptions mention everything in an image, as
captions of recaptioned data sets do.
"""

import collections
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from blip3o_jax.demo.world.scenes import COLORS, OPPOSITE, UNITS, Object, Scene

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}

_NAMES = {
    "circle": ("circle", "disc", "round dot", "circle"),
    "square": ("square", "square", "square block", "square shape"),
    "triangle": ("triangle", "triangle", "triangle shape", "triangle"),
    "star": ("star", "star", "five-pointed star", "star shape"),
    "cross": ("cross", "cross", "plus sign", "cross shape"),
    "ring": ("ring", "ring", "hoop", "donut"),
}
_FRAMES = (
    "a picture of {}", "an image of {}", "{}", "{}", "a drawing of {}", "an illustration of {}", "draw {}", "show {}",
    "show me {}", "please draw {}", "paint {}", "make a picture of {}", "generate an image of {}", "create {}",
    "{} on a plain background", "{} on a light background", "a simple picture of {}", "a clean drawing of {}",
    "a small picture that shows {}", "a picture with {}", "an image with {}", "a photo with {}", "a photograph of {}",
    "you can see {} in the picture", "{} and nothing else", "I want to see {}", "a flat illustration of {}",
    "a minimal picture: {}", "can you draw {}?", "{}, simple and clean",
)  # fmt: skip
_COUNTS = ("{n} {things}", "{n} {things}", "exactly {n} {things}", "a group of {n} {things}", "a set of {n} {things}")
_PAIRS = (
    "{a} and {b}", "{b} and {a}", "{a} with {b}", "{b} with {a}", "{a} together with {b}", "both {a} and {b}",
    "{a} plus {b}", "two shapes, {a} and {b}", "{a}, and also {b}", "{a} next to {b}",
)  # fmt: skip
_RELATIONS = {
    "left of": ("{a} to the left of {b}", "{a} on the left of {b}", "{a} left of {b}", "{a} on the left side of {b}",
                "{b} with {a} on its left", "{b} with {a} to its left", "{a} on the left and {b} on the right"),
    "right of": ("{a} to the right of {b}", "{a} on the right of {b}", "{a} right of {b}",
                 "{a} on the right side of {b}", "{b} with {a} on its right", "{b} with {a} to its right",
                 "{a} on the right and {b} on the left"),
    "above": ("{a} above {b}", "{a} over {b}", "{a} higher than {b}", "{b} with {a} above it", "{b} with {a} over it",
              "{a} at the top and {b} at the bottom", "{a} up above {b}"),
    "below": ("{a} below {b}", "{a} under {b}", "{a} beneath {b}", "{a} lower than {b}", "{b} with {a} below it",
              "{b} with {a} under it", "{a} at the bottom and {b} at the top", "{a} underneath {b}"),
}  # fmt: skip
_SIGNS = (
    'a photo of a sign that says "{t}"', 'a sign reading "{t}"', 'a sign with the text "{t}"',
    'a sign with "{t}" on it', 'the word "{t}" on a sign', 'a sign saying "{t}"', 'draw a sign that says "{t}"',
    'a white board that says "{t}"',
    'a picture of a sign that reads "{t}"', 'write "{t}" on a sign', 'a signboard with the letters "{t}"',
    'a sign, on which is written "{t}"', 'an image of a sign with the letters "{t}"', 'show a sign that says "{t}"',
    'a small sign displaying "{t}"', 'a board with the text "{t}"', '"{t}" written on a sign',
    'make a sign that reads "{t}"',
)  # fmt: skip

_PLACES = (
    ("top left", "top", "top right"), ("left", "middle", "right"), ("bottom left", "bottom", "bottom right"),
)  # fmt: skip
_EDGES = (0.4 * UNITS, 0.6 * UNITS)  # range of centres that count as the middle


@dataclasses.dataclass(frozen=True)
class Clause:
    """A group of equal objects requested by a prompt."""

    shape: str
    color: str | None = None  # None: any
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Request:
    """The content of a prompt, independent of its wording."""

    task: str  # a key of prompts.TASKS
    clauses: tuple[Clause, ...] = ()
    relation: str | None = None  # of the first clause to the second
    text: str | None = None

    @property
    def meaning(self) -> str:
        """A string that is equal for equivalent requests."""
        if self.text is not None:
            return f"sign {self.text}"
        clauses, relation = self.clauses, self.relation
        if relation in ("right of", "below"):
            clauses, relation = clauses[::-1], OPPOSITE[relation]
        parts = [f"{c.count} {c.color or 'any'} {c.shape}" for c in clauses]
        return f" {relation} ".join(parts) if relation else " and ".join(sorted(parts))


def metadata(request: Request, prompt: str) -> dict:
    """Returns metadata in GenEval's schema, with `exclude` for counting and `text` for signs."""
    if request.text is not None:
        return {"tag": request.task, "include": [], "text": request.text, "prompt": prompt}
    include = []
    for clause in request.clauses[::-1] if request.relation else request.clauses:
        entry = {"class": clause.shape, "count": clause.count}
        if clause.color is not None:
            entry["color"] = clause.color
        include.append(entry)
    if request.relation:
        include[1]["position"] = [request.relation, 0]
    result = {"tag": request.task, "include": include}
    if request.task == "counting":
        clause = request.clauses[0]
        result["exclude"] = [{"class": clause.shape, "count": clause.count + 1}]
    return {**result, "prompt": prompt}


def with_article(phrase: str) -> str:
    """Prepends "a" or "an" to a phrase."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def plural(noun: str) -> str:
    """Returns the plural of a shape's name."""
    return noun + ("es" if noun.endswith("s") else "s")


def _phrase(clause: Clause) -> str:
    name = f"{clause.color} {clause.shape}" if clause.color else clause.shape
    return with_article(name) if clause.count == 1 else f"{NUMBERS[clause.count]} {plural(name)}"


def template(request: Request) -> str:
    """Returns GenEval's wording of a request."""
    if request.text is not None:
        return f'a sign that says "{request.text}"'
    phrases = [_phrase(clause) for clause in request.clauses]
    return "a photo of " + (f" {request.relation} " if request.relation else " and ").join(phrases)


def pick(rng: np.random.Generator, choices: Sequence[Any]) -> Any:
    """Draws one of the choices."""
    return choices[int(rng.integers(len(choices)))]


def _free_phrase(rng: np.random.Generator, clause: Clause) -> str:
    name = pick(rng, _NAMES[clause.shape])
    if clause.count > 1:
        name = plural(f"{clause.color} {name}" if clause.color else name)
        number = str(clause.count) if rng.random() < 0.3 else NUMBERS[clause.count]
        return pick(rng, _COUNTS).format(n=number, things=name)
    if clause.color is None:
        return f"one {name}" if rng.random() < 0.1 else with_article(name)
    if rng.random() < 0.12:
        return with_article(pick(rng, ("{1} that is {0}", "{1} in {0}", "{0} coloured {1}", "{0}-colored {1}")).format(
            clause.color, name))  # fmt: skip
    return with_article(f"{clause.color} {name}")


def paraphrase(request: Request, rng: np.random.Generator) -> str:
    """Draws a paraphrase of a request."""
    if request.text is not None:
        sentence = pick(rng, _SIGNS).format(t=request.text)
    else:
        phrases = [_free_phrase(rng, clause) for clause in request.clauses]
        if len(phrases) == 1:
            subject = phrases[0]
        else:
            shapes = _RELATIONS[request.relation] if request.relation else _PAIRS
            subject = pick(rng, shapes).format(a=phrases[0], b=phrases[1])
        sentence = pick(rng, _FRAMES).format(subject)
    return _written(rng, sentence)


def _written(rng: np.random.Generator, sentence: str) -> str:
    """Randomly capitalises a sentence and adds a final stop."""
    if rng.random() < 0.25:
        sentence = sentence[0].upper() + sentence[1:]
    if rng.random() < 0.15 and sentence[-1] not in '?".':
        sentence += "."
    return sentence


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """Draws a description of all objects of a scene and their positions, or of its sign."""
    if scene.sign is not None:
        sentence = pick(rng, _SIGNS).format(t=scene.sign.text)
        return _written(rng, sentence.replace("a sign", with_article(f"{scene.sign.color} sign"), 1))
    kinds = collections.Counter((item.shape, item.color) for item in scene.objects)
    phrases = []
    for (shape, color), count in kinds.items():
        phrase = _free_phrase(rng, Clause(shape, color, count))
        if count == 1:
            phrase += _place(next(item for item in scene.objects if (item.shape, item.color) == (shape, color)))
        phrases.append(phrase)
    order = rng.permutation(len(phrases))
    joined = pick(rng, (", ", " and ", ", and ")).join(phrases[i] for i in order)
    return _written(rng, pick(rng, _FRAMES).format(joined))


def _place(item: Object) -> str:
    column, row = (sum(at > edge for edge in _EDGES) for at in (item.x, item.y))
    place = _PLACES[row][column]
    return f" in the {place}" if place == "middle" else f" at the {place}"


def words() -> frozenset[str]:
    """Returns all words of captions, in lower case."""
    names = [name for forms in _NAMES.values() for name in forms]
    relations = [form for forms in _RELATIONS.values() for form in forms]
    places = [place for row in _PLACES for place in row]
    tables = (names, map(plural, names), COLORS, NUMBERS.values(), _FRAMES, _COUNTS, _PAIRS, relations, _SIGNS, places)
    text = " ".join(part for table in tables for part in table)
    found = re.findall("[a-z]+", re.sub("{.}", "", text.lower()))
    return frozenset((*found, "an", "photo", "that", "coloured", "colored"))


def subjects() -> frozenset[str]:
    """Returns the words that name objects and signs, in lower case."""
    names = [name.split()[-1] for forms in _NAMES.values() for name in forms if name.split()[-1] != "shape"]
    return frozenset((*names, *map(plural, names), "sign", "signboard", "board", "plus"))
