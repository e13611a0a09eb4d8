"""Detectors by name, and the check of prompts against their vocabulary."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from blip3o_jax.config import registry
from blip3o_jax.detection import Detector, Thresholds, Vocabulary
from blip3o_jax.errors import UserError, require
from blip3o_jax.evals.geneval import MAX_OBJECTS, OFFICIAL_THRESHOLDS

DETECTORS = {
    "verifier": "blip3o_jax.demo.judges:Verifier",
    "mask2former": "blip3o_jax.evals.mask2former:Mask2Former",
}
"""Name -> `detection.Detector`, as `module:class`."""
EXTRAS = {"mask2former": "pip install 'blip3o_jax[detector]'"}
"""Name -> command that installs its dependencies."""


def open_detector(name: str, model: str | None = None, clip: str | None = None) -> Detector:
    """Creates a detector by name, without loading its networks.

    Args:
      name: a key of DETECTORS, or `package.module:attribute`.
      model, clip: names or directories of its networks; None for the defaults.

    Raises:
      UserError: an unknown name, networks that the detector does not have, or a detector without a vocabulary.
    """
    networks = {key: value for key, value in (("model", model), ("clip", clip)) if value is not None}
    detector = registry.make(DETECTORS, name, "detector", networks)
    declared = isinstance(getattr(detector, "vocabulary", None), Vocabulary)
    require(declared, f"detector {name}", "no vocabulary", "a blip3o_jax.detection.Vocabulary", "declare it")
    return detector


def load(detector: Detector) -> str:
    """Loads the networks of a detector; returns a line that describes it."""
    prepare = getattr(detector, "load", None)
    return prepare() if prepare else f"detector: {type(detector).__name__}"


def thresholds_of(detector: Detector) -> Thresholds:
    """Returns the thresholds of a detector; by default those of the benchmark."""
    return getattr(detector, "thresholds", OFFICIAL_THRESHOLDS)


def check_known(wanted: Iterable[Mapping[str, Any]], detector: Detector, name: str) -> None:
    """Checks that a detector knows the classes, colours and counts of prompts.

    Args:
      wanted: metadata of the prompts in GenEval's schema; see `geneval.check_metadata`.
      detector: the detector.
      name: its name, for messages.

    Raises:
      UserError: the detector does not know a class, colour or count; the message suggests a detector that does.
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
    """Returns the first class, colour or count of a prompt that is not in a vocabulary; None if there is none."""
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
    """Returns advice: a built-in detector that knows the prompt's words, or a custom one."""
    for other in DETECTORS:
        if other != name and unknown_word(metadata, open_detector(other).vocabulary) is None:
            extra = f", {EXTRAS[other]}" if other in EXTRAS else ""
            return f"use --detector {other} (of a reward: options {{'detector': '{other}'}}){extra}"
    return "leave the prompt out, or name a detector of your own as package.module:attribute"
