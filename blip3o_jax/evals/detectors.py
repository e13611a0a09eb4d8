"""Detectors by name, and the check that prompts are within their vocabulary."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from blip3o_jax.config import registry
from blip3o_jax.detection import Detector, Thresholds, Vocabulary
from blip3o_jax.errors import UserError
from blip3o_jax.evals.geneval import MAX_OBJECTS, OFFICIAL_THRESHOLDS

DETECTORS = {
    "verifier": "blip3o_jax.demo.judges:Verifier",
    "mask2former": "blip3o_jax.evals.mask2former:Mask2Former",
}
"""Name -> class of `detection.Detector`."""
EXTRAS = {"mask2former": "pip install 'blip3o_jax[detector]'"}
"""Name -> what brings the libraries that it needs."""


def open_detector(name: str, model: str | None = None, clip: str | None = None) -> Detector:
    """Makes a detector by name; its networks are not read yet.

    Args:
      name: a key of DETECTORS, or `package.module:attribute`.
      model, clip: names or directories of its networks; None for the usual ones.

    Raises:
      UserError: an unknown name, networks that it does not take, or a detector that does not say what it knows.
    """
    networks = {key: value for key, value in (("model", model), ("clip", clip)) if value is not None}
    detector = registry.make(DETECTORS, name, "detector", networks)
    if not isinstance(getattr(detector, "vocabulary", None), Vocabulary):
        raise UserError(
            f"detector {name}", got="no vocabulary", expected="a blip3o_jax.detection.Vocabulary", do="declare it"
        )
    return detector


def load(detector: Detector) -> str:
    """Prepares a detector; returns a line that describes it."""
    prepare = getattr(detector, "load", None)
    return prepare() if prepare else f"detector: {type(detector).__name__}"


def thresholds_of(detector: Detector) -> Thresholds:
    """The detector's own thresholds, or the benchmark's if it declares none."""
    return getattr(detector, "thresholds", OFFICIAL_THRESHOLDS)


def check_known(wanted: Iterable[Mapping[str, Any]], detector: Detector, name: str) -> None:
    """Refuses prompts that a detector cannot judge.

    Args:
      wanted: metadata in GenEval's schema; see `geneval.check_metadata`.

    Raises:
      UserError: a class, colour or count that it does not know, with the prompt and the detector that does.
    """
    wanted = list(wanted)
    refused = [(entry, word) for entry in wanted if (word := unknown_word(entry, detector.vocabulary))]
    if refused:
        entry, word = refused[0]
        raise UserError(
            f"prompt {entry['prompt']!r}",
            got=f"{word}, which the detector {name} does not know ({len(refused)} of {len(wanted)} prompts)",
            expected=_known(word, detector.vocabulary),
            do=_another(entry, name),
        )


def unknown_word(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> str | None:
    """The first class, colour or count of a prompt that is not in a vocabulary, None where all are."""
    for clause in (*metadata["include"], *metadata.get("exclude", ())):
        label, color = clause["class"], clause.get("color")
        if label not in vocabulary.classes:
            return f"class {label!r}"
        if color is not None and color not in vocabulary.colors:
            return f"color {color!r}"
    for clause in metadata["include"]:
        if clause["count"] > min(vocabulary.classes[clause["class"]], MAX_OBJECTS):
            return f"count {clause['count']} of {clause['class']!r}"
    return None


def _known(word: str, vocabulary: Vocabulary) -> str:
    kind, name = word.split()[0], word.partition("'")[2].rstrip("'")
    if kind == "count":
        return f"at most {min(vocabulary.classes[name], MAX_OBJECTS)} of a kind"
    known = sorted(vocabulary.classes if kind == "class" else vocabulary.colors)
    near = [other for other in known if name in other.split()] or difflib.get_close_matches(name, known, 1)
    more = f" and {len(known) - 12} more" if len(known) > 12 else ""
    return f"{near[0]}" if near else f"one of {', '.join(known[:12])}{more}" if known else f"no {kind}"


def _another(metadata: Mapping[str, Any], name: str) -> str:
    """Advice: another built-in detector that knows a prompt's words, or one's own."""
    for other in DETECTORS:
        if other != name and unknown_word(metadata, open_detector(other).vocabulary) is None:
            extra = f", {EXTRAS[other]}" if other in EXTRAS else ""
            return f"use --detector {other} (of a reward: options {{'detector': '{other}'}}){extra}"
    return "leave the prompt out, or name a detector of your own as package.module:attribute"
