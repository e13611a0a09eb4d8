"""The model inside the package: what sample.py and the evaluation use where no checkpoint is named.

It was trained on the demo world (`blip3o_jax.demo.world`) by `configs/demo.py` and knows nothing else.
"""

import pathlib
import re
from collections.abc import Sequence

from blip3o_jax.demo.world import captions, edits

CHECKPOINT = pathlib.Path(__file__).parents[1] / "assets" / "demo"


def advice(prompts: Sequence[str]) -> str | None:
    """A line for somebody who asks the embedded model for what it cannot know; None where nobody does.

    A prompt is beyond it if it names nothing that pictures of the world show, and has words that the world lacks.
    What stands in quotation marks is not looked at: a sign may say anything.
    """
    known, subjects = captions.words() | edits.words(), captions.subjects()
    for prompt in prompts:
        words = re.findall(r"[^\W\d_]+", re.sub('"[^"]*"', "", prompt.lower()))
        unknown = [word for word in words if word not in known]
        if unknown and not subjects.intersection(words):
            return (
                f"the embedded model knows coloured shapes and short signs only, not {', '.join(unknown[:3])}: "
                "for other pictures pass a released model, --checkpoint DIR or hf://org/name"
            )
    return None
