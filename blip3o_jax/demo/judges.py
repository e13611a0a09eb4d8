"""The demo world's detector and text reader, as entries of the tables in `evals`."""

from blip3o_jax.demo.world.font import LETTERS
from blip3o_jax.demo.world.reader import read_text
from blip3o_jax.demo.world.scenes import COLORS, NARROW_LETTERS, SHAPES, UNITS
from blip3o_jax.demo.world.selftest import self_test
from blip3o_jax.demo.world.verifier import SIGN, detect
from blip3o_jax.detection import Thresholds, Vocabulary
from blip3o_jax.errors import require
from blip3o_jax.evals.geneval import MAX_OBJECTS


class Verifier:
    """Detects coloured shapes and signs; the confidence is the match with a template. See `detection.Detector`."""

    vocabulary = Vocabulary({**dict.fromkeys(SHAPES, MAX_OBJECTS), SIGN: 1}, tuple(COLORS))
    thresholds = Thresholds(counting=0.3, others=0.3)

    def __init__(self, model: str | None = None, clip: str | None = None):
        require(not (model or clip), "--model, --clip", "one for the verifier", "none", "use --detector mask2former")

    def load(self) -> str:
        """Runs the self-test; raises UserError if it fails."""
        proof = self_test()
        proof.require()
        return str(proof)

    __call__ = staticmethod(detect)


class SignReader:
    """Reads one line of capital letters; see `detection.Reader`."""

    alphabet = LETTERS
    longest = UNITS // NARROW_LETTERS.pitch

    __call__ = staticmethod(read_text)
