"""Detectors by name, and the check of prompts against their vocabulary."""

import difflib
import functools
from collections.abc import Iterable, Mapping, Sequence
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


@functools.lru_cache(maxsize=2)
def open_detector(name: str, model: str | None = None, clip: str | None = None) -> Detector:
    """Returns a detector, a key of DETECTORS or `package.module:attribute`, without loading its networks.

    `model` and `clip` are names or directories of its networks; None for the defaults. The result is cached, as is that
    of `load`.

    Raises:
      UserError: an unknown name, networks that the detector does not have, or a detector without a vocabulary.
    """
    networks = {key: value for key, value in (("model", model), ("clip", clip)) if value is not None}
    detector = registry.make(DETECTORS, name, "detector", networks)
    declared = isinstance(getattr(detector, "vocabulary", None), Vocabulary)
    require(declared, f"detector {name}", "no vocabulary", "a blip3o_jax.detection.Vocabulary", "declare it")
    return detector


@functools.lru_cache(maxsize=2)
def load(detector: Detector) -> str:
    """Loads the networks of a detector; returns a line that describes it."""
    prepare = getattr(detector, "load", None)
    return prepare() if prepare else f"detector: {type(detector).__name__}"


def thresholds_of(detector: Detector) -> Thresholds:
    """Returns the thresholds of a detector, by default those of the benchmark; raises UserError for another type."""
    found = getattr(detector, "thresholds", OFFICIAL_THRESHOLDS)
    what, expected = f"thresholds of {type(detector).__name__}", "blip3o_jax.detection.Thresholds"
    require(isinstance(found, Thresholds), what, repr(found), expected, "declare them")
    return found


def check_known(wanted: Iterable[Mapping[str, Any]], detector: Detector, name: str) -> None:
    """Checks that a detector, named for messages, knows the classes, colours and counts in GenEval metadata of prompts.

    Raises:
      UserError: the detector does not know a class, colour or count; the message suggests a detector that does.
    """
    wanted = list(wanted)
    refused = [(entry, *found) for entry in wanted if (found := _unknown(entry, detector.vocabulary))]
    for entry, word, expected in refused:
        do = "leave the prompt out, or name a detector of your own as package.module:attribute"
        for other in DETECTORS:
            if other != name and _unknown(entry, open_detector(other).vocabulary) is None:
                extra = f", {EXTRAS[other]}" if other in EXTRAS else ""
                do = f"use --detector {other} (of a reward: options {{'detector': '{other}'}}){extra}"
                break
        got = f"{word}, which the detector {name} does not know ({len(refused)} of {len(wanted)} prompts)"
        raise UserError(f"prompt {entry['prompt']!r}", got=got, expected=expected, do=do)


def _unknown(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> tuple[str, str] | None:
    """Returns the first class, colour or count of a prompt that is not in a vocabulary, and what is; else None."""
    for clause in (*metadata["include"], *metadata.get("exclude", ())):
        for kind, known in (("class", vocabulary.classes), ("color", vocabulary.colors)):
            if kind in clause and clause[kind] not in known:
                return f"{kind} {clause[kind]!r}", _nearest(clause[kind], sorted(known)) or f"no {kind}"
    for clause in metadata["include"]:
        most = min(vocabulary.classes[clause["class"]], MAX_OBJECTS)
        if clause["count"] > most:
            return f"count {clause['count']} of {clause['class']!r}", f"at most {most} of a kind"
    return None


def _nearest(name: str, known: Sequence[str]) -> str:
    """Returns the name that is most like another one; if none is, all names; "" if there are none."""
    near = [other for other in known if name in other.split()] or difflib.get_close_matches(name, known, 1)
    more = f" and {len(known) - 12} more" if len(known) > 12 else ""
    return near[0] if near else f"one of {', '.join(known[:12])}{more}" if known else ""
