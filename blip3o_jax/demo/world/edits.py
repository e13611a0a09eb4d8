"""Edits of the demo world: an instruction, the scenes before and after, and a check of images.

An edit depends on (seed, index) only. Sources show one to three different objects, or a sign. Instructions identify
objects uniquely in the source. Pairs, meanings and wordings are held out from training, as for prompts.
"""

import dataclasses
import re

import numpy as np

from blip3o_jax.demo.world import prompts, scenes
from blip3o_jax.demo.world.captions import pick, with_article
from blip3o_jax.demo.world.prompts import held_out_pair
from blip3o_jax.demo.world.reader import read_text
from blip3o_jax.demo.world.scenes import GAP, MARGIN, SHAPES, UNITS, Object, Scene
from blip3o_jax.demo.world.verifier import SIGN, THRESHOLD, detect, matched
from blip3o_jax.detection import Detection, relative_position

KINDS = {"recolor": 0.22, "add": 0.18, "remove": 0.14, "replace": 0.16, "move": 0.14, "text": 0.1, "keep": 0.06}
"""Kind -> fraction of the training samples."""
KEEP = "Keep the image unchanged."
TOLERANCE = 5  # largest distance in units of an object from its expected position

_WORDS = {
    "recolor": ("change the {ref} to {color}", "make the {ref} {color}", "paint the {ref} {color}",
                "recolor the {ref} {color}", "turn the {ref} {color}", "change the color of the {ref} to {color}",
                "the {ref} should be {color}", "color the {ref} {color}", "give the {ref} {a_color} color"),
    "add": ("add {new}", "add {new} to the picture", "put {new} into the image", "draw {new} as well", "insert {new}",
            "place {new} in the picture", "also show {new}", "there should be {new} too"),
    "add at": ("add {new} {where} the {ref}", "put {new} {where} the {ref}", "draw {new} {where} the {ref}",
               "place {new} {where} the {ref}", "insert {new} {where} the {ref}"),
    "remove": ("remove the {ref}", "delete the {ref}", "erase the {ref}", "take away the {ref}",
               "get rid of the {ref}", "the {ref} should disappear", "take the {ref} out of the picture"),
    "replace": ("replace the {ref} with {new}", "change the {ref} into {new}", "turn the {ref} into {new}",
                "swap the {ref} for {new}", "put {new} where the {ref} is", "substitute {new} for the {ref}"),
    "move": ("move the {ref} {where}", "put the {ref} {where}", "shift the {ref} {where}",
             "the {ref} should go {where}", "push the {ref} {where}"),
    "text": ('change the text to "{text}"', 'make the sign say "{text}"', 'replace "{old}" with "{text}"',
             'the sign should read "{text}"', 'write "{text}" on the sign instead', 'change "{old}" to "{text}"',
             'rewrite the sign to say "{text}"', 'let the sign say "{text}"'),
    "keep": (KEEP, KEEP, KEEP, KEEP, KEEP, "keep the picture as it is", "do not change anything", "change nothing",
             "leave the image unchanged", "keep everything the same"),
}  # fmt: skip
_SIDES = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_PLACES = {
    (-1, 0): ("to the left edge", "all the way to the left", "to the left side"),
    (1, 0): ("to the right edge", "all the way to the right", "to the right side"),
    (0, -1): ("to the top edge", "all the way up", "to the top"),
    (0, 1): ("to the bottom edge", "all the way down", "to the bottom"),
    (-1, -1): ("to the top left corner", "to the upper left corner"),
    (1, -1): ("to the top right corner", "to the upper right corner"),
    (-1, 1): ("to the bottom left corner", "to the lower left corner"),
    (1, 1): ("to the bottom right corner", "to the lower right corner"),
    None: ("to the middle", "to the center", "to the middle of the picture"),
}
"""Direction of a move (None: to the middle) -> wordings."""


@dataclasses.dataclass(frozen=True)
class Edit:
    """An instruction with the scenes before and after."""

    kind: str
    instruction: str
    source: Scene
    target: Scene
    held_out: tuple[str, ...]  # of prompts.REASONS; empty for training
    free: int | None = None  # index of an object in the target whose position is free
    relation: tuple[str, int] | None = None  # required position of that object relative to another one in the target


def _seen_kind(rng: np.random.Generator) -> tuple[str, str]:
    while True:
        shape, color = pick(rng, SHAPES), pick(rng, prompts.COLOR_NAMES)
        if not held_out_pair(shape, color):
            return shape, color


def _source(rng: np.random.Generator, least: int) -> Scene:
    """Draws a scene with `least` to three different objects."""
    count, kinds = int(rng.integers(least, 4)), []
    while len(kinds) < count:
        kind = _seen_kind(rng)
        if kind not in kinds:
            kinds.append(kind)
    return Scene(scenes.scatter(rng, kinds), background=scenes.sample_background(rng))


def _reference(rng: np.random.Generator, item: Object, objects: tuple[Object, ...]) -> str:
    """Draws words that identify one object among `objects`."""
    choices = [f"{item.color} {item.shape}"] * 3
    if sum(o.shape == item.shape for o in objects) == 1:
        choices.append(item.shape)
    if sum(o.color == item.color for o in objects) == 1:
        choices.append(f"{item.color} {pick(rng, ('object', 'shape', 'one'))}")
    return pick(rng, choices)


def _with(scene: Scene, old: Object, *new: Object) -> Scene:
    """Returns the scene with an object replaced, or removed if there is no new one."""
    index = scene.objects.index(old)
    return dataclasses.replace(scene, objects=scene.objects[:index] + new + scene.objects[index + 1 :])


def _recolor(rng: np.random.Generator):
    source = _source(rng, 1)
    item = pick(rng, source.objects)
    color = pick(rng, [c for c in prompts.COLOR_NAMES if c != item.color])
    target = _with(source, item, dataclasses.replace(item, color=color))
    words = {"ref": _reference(rng, item, source.objects), "color": color, "a_color": with_article(color)}
    return source, target, words, {}


def _replace(rng: np.random.Generator):
    source = _source(rng, 1)
    item = pick(rng, source.objects)
    shape = pick(rng, [s for s in SHAPES if s != item.shape])
    color = pick(rng, prompts.COLOR_NAMES)
    target = _with(source, item, dataclasses.replace(item, shape=shape, color=color))
    return source, target, {"ref": _reference(rng, item, source.objects), "new": with_article(f"{color} {shape}")}, {}


def _remove(rng: np.random.Generator):
    source = _source(rng, 2)
    item = pick(rng, source.objects)
    return source, _with(source, item), {"ref": _reference(rng, item, source.objects)}, {}


def _add(rng: np.random.Generator):
    source = _source(rng, 1)
    kind = pick(rng, SHAPES), pick(rng, prompts.COLOR_NAMES)
    if kind in [(o.shape, o.color) for o in source.objects]:
        return None
    radius, relation = pick(rng, scenes.RADII), None
    spot = scenes.place(rng, radius, source.objects)
    if spot is None:
        return None
    new, words = Object(*kind, *spot, radius), {"new": with_article(" ".join(kind[::-1]))}
    if rng.random() < 0.5:
        other = int(rng.integers(len(source.objects)))
        sides = relative_position(new.box, source.objects[other].box)
        if len(sides) != 1:
            return None
        relation = sides.pop(), other
        words["ref"] = _reference(rng, source.objects[other], source.objects)
        words["where"] = pick(rng, _SIDES[relation[0]])
    target = dataclasses.replace(source, objects=source.objects + (new,))
    return source, target, words, {"free": len(source.objects), "relation": relation}


def _move(rng: np.random.Generator):
    source = _source(rng, 1)
    item, direction = pick(rng, source.objects), pick(rng, tuple(_PLACES))
    x, y = (UNITS // 2, UNITS // 2) if direction is None else _pushed(item, direction)
    others = _with(source, item).objects
    blocked = any(max(abs(x - o.x), abs(y - o.y)) < item.radius + o.radius + GAP for o in others)
    if blocked or max(abs(x - item.x), abs(y - item.y)) < 2 * TOLERANCE:
        return None
    target = _with(source, item, dataclasses.replace(item, x=x, y=y))
    words = {"ref": _reference(rng, item, source.objects), "where": pick(rng, _PLACES[direction])}
    return source, target, words | {"direction": direction}, {}


def _pushed(item: Object, direction: tuple[int, int]) -> tuple[int, int]:
    """Returns the position of an object moved to the margin."""
    low, high = MARGIN + item.radius, UNITS - MARGIN - item.radius
    return tuple({-1: low, 0: now, 1: high}[step] for step, now in zip(direction, (item.x, item.y)))


def _text(rng: np.random.Generator):
    old, text = prompts.sample_text(rng), prompts.sample_text(rng)
    if rng.random() < 0.5 and len(text) != len(old):
        text = (text * len(old))[: len(old)]
    if text == old:
        return None
    sign = scenes.place_sign(rng, old, pick(rng, prompts.COLOR_NAMES))
    source = Scene(sign=sign, background=scenes.sample_background(rng))
    x, y = scenes.nearest_spot(text, sign.x, sign.y)
    target = dataclasses.replace(source, sign=dataclasses.replace(sign, text=text, x=x, y=y))
    return source, target, {"old": old, "text": text}, {}


def _keep(rng: np.random.Generator):
    if rng.random() < 0.3:
        sign = scenes.place_sign(rng, prompts.sample_text(rng), pick(rng, prompts.COLOR_NAMES))
        source = Scene(sign=sign, background=scenes.sample_background(rng))
    else:
        source = _source(rng, 1)
    return source, source, {}, {}


_MAKERS = {
    "recolor": _recolor,
    "add": _add,
    "remove": _remove,
    "replace": _replace,
    "move": _move,
    "text": _text,
    "keep": _keep,
}
"""Kind -> function that draws (source, target, words of the instruction, other fields of Edit), or None on failure."""


def _draw(rng: np.random.Generator, kind: str) -> Edit:
    made = None
    while made is None:
        made = _MAKERS[kind](rng)
    source, target, words, fields = made
    pattern = pick(rng, _WORDS["add at" if kind == "add" and fields["relation"] else kind])
    instruction = pattern.format(**words)
    if kind != "keep" and rng.random() < 0.25:
        instruction = instruction[0].upper() + instruction[1:]
    meaning = "" if kind == "keep" else _meaning(kind, source, target, words.get("direction"))
    text = "" if instruction == KEEP else instruction
    held_out = prompts.why_held_out(prompts.held_out_scene(target), meaning, text)
    return Edit(kind, instruction, source, target, held_out, **fields)


def _meaning(kind: str, source: Scene, target: Scene, direction: tuple[int, int] | None) -> str:
    """Returns a string that is equal for equivalent instructions."""
    if target.sign is not None:
        return f"sign becomes {target.sign.text}"
    before = [f"{o.color} {o.shape}" for o in source.objects if o not in target.objects]
    after = [f"{o.color} {o.shape}" for o in target.objects if o not in source.objects]
    return f"{kind} {before} {after} {direction}"


def sample(index: int, seed: int = 0, kinds: dict[str, float] | None = None, split: str = "train") -> Edit:
    """Draws the edit with number `index`, from 0, of a data set; deterministic on every machine.

    `kinds` are relative frequencies, default: KINDS; `split` is one of prompts.SPLITS.

    Raises:
      UserError: an unknown kind or split, or a split without edits of the kind.
    """
    kinds = KINDS if kinds is None else kinds
    prompts.check_names(kinds, KINDS, split)
    return prompts.drawn_in_split(np.random.default_rng((seed, index, 2)), kinds, split, _draw)


def fulfilled(edit: Edit, image: np.ndarray, found: list[Detection] | None = None) -> bool:
    """Returns whether an image uint8[Y X 3] shows the scene after an edit; `found`: its detections, if known."""
    found = detect(image) if found is None else found
    if any(detection.score < THRESHOLD for detection in found):
        return False
    if edit.target.sign is not None:
        sign = edit.target.sign
        return [(d.label, d.color) for d in found] == [(SIGN, sign.color)] and read_text(image) == sign.text
    shown = _shown(edit, image, found)
    if len(found) != len(shown) or None in shown:
        return False
    if edit.relation is None:
        return True
    side, other = edit.relation
    return side in relative_position(shown[edit.free].box, shown[other].box)


def asked_for(edit: Edit, image: np.ndarray, found: list[Detection]) -> list[Detection]:
    """Returns the detections of objects that the edit adds or changes; arguments as in `fulfilled`."""
    shown = _shown(edit, image, found)
    wanted = zip(edit.target.objects, shown, strict=True)
    return [seen for item, seen in wanted if seen is not None and item not in edit.source.objects]


def _shown(edit: Edit, image: np.ndarray, found: list[Detection]) -> list[Detection | None]:
    return matched(edit.target.objects, found, min(image.shape[:2]) / UNITS, TOLERANCE, free=edit.free)


def words() -> frozenset[str]:
    """Returns the words of instructions, in lower case, without those shared with captions."""
    tables = (*_WORDS.values(), *_SIDES.values(), *_PLACES.values())
    text = " ".join(part for table in tables for part in table)
    return frozenset(re.findall("[a-z]+", re.sub("{.*?}", "", text.lower()))) | {"object"}
