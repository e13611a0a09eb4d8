"""The detectors that can judge a folder of pictures: a table from name to what opens one.

A detector is any function of `detection.Detector`; its confidence decides what counts, so thresholds belong to it.
"""

from typing import NamedTuple

from blip3o_jax.detection import Detector
from blip3o_jax.errors import UserError
from blip3o_jax.evals import mask2former
from blip3o_jax.evals.geneval import OFFICIAL_THRESHOLDS, VERIFIER_THRESHOLDS, Thresholds
from blip3o_jax.world import verifier
from blip3o_jax.world.selftest import self_test


class Judge(NamedTuple):
    """A detector that is ready, and what to know about it."""

    detector: Detector
    thresholds: Thresholds
    note: str  # what vouches for it, printed above the scores


def _open_verifier(model: str | None, clip: str | None) -> Judge:
    if model or clip:
        raise UserError("--model, --clip", got="one for the verifier", expected="none", do="use --detector mask2former")
    proof = self_test()
    proof.require()
    return Judge(verifier.detect, VERIFIER_THRESHOLDS, str(proof))


def _open_mask2former(model: str | None, clip: str | None) -> Judge:
    names = f"{model or mask2former.NETWORK}, colours by {clip or mask2former.CLIP}"
    return Judge(mask2former.from_pretrained(model, clip), OFFICIAL_THRESHOLDS, f"detector: {names}")


DETECTORS = {"verifier": _open_verifier, "mask2former": _open_mask2former}
"""Name -> function of (model, clip), names or directories of networks, or None for the usual ones."""


def open_detector(name: str, model: str | None = None, clip: str | None = None) -> Judge:
    """Opens a detector by name.

    Raises:
      UserError: an unknown name, a network that is missing, or a verifier that fails its self-test.
    """
    if name not in DETECTORS:
        raise UserError("detector", got=f"{name!r}", expected=f"one of {', '.join(DETECTORS)}", do="correct the name")
    return DETECTORS[name](model, clip)
