"""The embedded model, which sample.py and the evaluation use by default.

It was trained on the demo world (`blip3o_jax.demo.world`) by `configs/demo.py`.
"""

import pathlib
import re
from collections.abc import Sequence

from blip3o_jax.demo.world import captions, edits

CHECKPOINT = pathlib.Path(__file__).parents[1] / "assets" / "demo"


def advice(prompts: Sequence[str]) -> str | None:
    """A hint for prompts that the embedded model cannot render; None where there are none.

    Such a prompt names nothing that images of the demo world show, and has words that the world lacks. Quoted text is
    ignored: a sign may say anything.
    """
    known, subjects = captions.words() | edits.words(), captions.subjects()
    for prompt in prompts:
        words = re.findall(r"[^\W\d_]+", re.sub('"[^"]*"', "", prompt.lower()))
        unknown = [word for word in words if word not in known]
        if unknown and not subjects.intersection(words):
            return (
                f"the embedded model knows coloured shapes and short signs only, not {', '.join(unknown[:3])}: "
                "for other images pass a released model, --checkpoint DIR or hf://org/name"
            )
    return None
