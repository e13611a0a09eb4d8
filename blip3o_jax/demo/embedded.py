"""The embedded model, the default of sample.py and of the evaluation.

It is trained on the demo world (`blip3o_jax.demo.world`) with `configs/demo.py`.
"""

import pathlib
import re
from collections.abc import Sequence

from blip3o_jax.demo.world import captions, edits

CHECKPOINT = pathlib.Path(__file__).parents[1] / "assets" / "demo"


def advice(prompts: Sequence[str]) -> str | None:
    """Returns a hint if the embedded model cannot render one of the prompts, else None.

    Such a prompt has unknown words and names no subject of the demo world. Quoted text is ignored.
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
