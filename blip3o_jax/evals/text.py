"""Scores of rendered text: the reward that BLIP3o-NEXT trains with, exact match, and similarity.

Source: the reference's text reward, which looks for the first quoted string of the prompt in all that an OCR engine
recognised, ignoring case and spaces.
"""

import dataclasses
from collections.abc import Sequence

from blip3o_jax.errors import UserError


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: least insertions, deletions and substitutions that turn one string into the other."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def quoted_text(prompt: str) -> str:
    """The text between the first two double quotes of a prompt, up to its end if there is one quote only, else ""."""
    parts = prompt.split('"')
    return parts[1] if len(parts) >= 2 else ""


def normalize(text: str) -> str:
    """Lower case without spaces, as texts are compared."""
    return text.replace(" ", "").lower()


def ocr_reward(prompt: str, recognised: str) -> float:
    """Grades a picture of text.

    Args:
      prompt: contains the text in double quotes; 0 is returned where it does not, or the quotes are empty.
      recognised: all that was read in the picture.

    Returns:
      1 - distance / length in [0, 1]: 1 where the text occurs anywhere, else by edit distance, at most the length.
    """
    wanted, seen = normalize(quoted_text(prompt)), normalize(recognised)
    if not wanted:
        return 0.0
    distance = 0 if wanted in seen else min(edit_distance(seen, wanted), len(wanted))
    return 1 - distance / len(wanted)


@dataclasses.dataclass(frozen=True)
class TextScore:
    """How well one text was rendered."""

    exact: bool  # nothing missing, nothing added; case and spaces ignored
    similarity: float  # 1 - edit distance / length of the longer text


def text_score(wanted: str, recognised: str) -> TextScore:
    """Compares the text that was asked for with all that was read.

    Raises:
      UserError: nothing was asked for.
    """
    wanted, seen = normalize(wanted), normalize(recognised)
    if not wanted:
        raise UserError(
            "text to render", got="none", expected="letters", do="put the text in double quotes in the prompt"
        )
    return TextScore(wanted == seen, 1 - edit_distance(wanted, seen) / max(len(wanted), len(seen)))


def prompts_without_text(prompts: Sequence[str]) -> list[int]:
    """Indices of prompts that the text reward cannot grade."""
    return [index for index, prompt in enumerate(prompts) if not normalize(quoted_text(prompt))]
