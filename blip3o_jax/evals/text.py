"""Scores of rendered text: the reward that BLIP3o-NEXT trains with, exact match, and similarity.

Source: the reference's text reward, which looks for the first quoted string of the prompt in all that an OCR engine
recognised, ignoring case and spaces.
Differs from the reference: inch marks are no quotations and typographic quotation marks are (rule "quotation"); its own
rule, whatever stands between the first two `"`, is "reference".
"""

import dataclasses
import unicodedata

from blip3o_jax.config import registry
from blip3o_jax.errors import require

CLOSING = {
    "“": "”“", "„": "“”", "‟": "”", "”": "”", "«": "»", "»": "«", "‹": "›", "›": "‹",
    "「": "」", "『": "』", "〝": "〞〟", "＂": "＂",
}  # fmt: skip
"""Opening quotation mark -> what closes it."""


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: least insertions, deletions and substitutions that turn one string into the other."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def quotation(prompt: str) -> str:
    """The first text in quotation marks, straight `"` or typographic ones; "" without any.

    A `"` or `”` behind a number is an inch mark. Single marks `‘ ’` quote where no others do; apostrophes do not.
    """
    for marks in (CLOSING | {'"': '"'}, {"‘": "’", "‚": "‘’"}):
        start = 0
        while start < len(prompt):
            opened = prompt[start] in marks and _opens(prompt, start)
            end = _end(prompt, start, marks[prompt[start]]) if opened else None
            if end is not None and prompt[start + 1 : end].strip():
                return prompt[start + 1 : end]
            start = (start if end is None else end) + 1
    return ""


def between_first_quotes(prompt: str) -> str:
    """The reference's rule: what is between the first two `"`, up to the end if there is one only, else ""."""
    parts = prompt.split('"')
    return parts[1] if len(parts) >= 2 else ""


RULES = {"quotation": quotation, "reference": between_first_quotes}
"""Name -> function of a prompt: the text that it wants to see, "" for none."""


def _opens(prompt: str, at: int) -> bool:
    """Whether the mark at a place can open a quotation."""
    before, after = prompt[at - 1 : at], prompt[at + 1 : at + 2]
    if prompt[at] in "”’" and (before.isalnum() or not after.isalnum()):
        return False  # it closes, but for languages that open with it, too
    behind_number = before.isnumeric() or (not after.strip() and prompt[:at].rstrip()[-1:].isnumeric())
    return not behind_number and not (before.isalpha() and not after.strip())


def _end(prompt: str, start: int, closing: str) -> int | None:
    """Where a quotation ends."""
    ends = [at for at in range(start + 1, len(prompt)) if prompt[at] in closing and _closes(prompt, at)]
    for end, later in zip(ends, [*ends[1:], None]):
        # an inch mark inside, where the next mark can only close what was opened here
        inch = prompt[end] in '"”' and prompt[end - 1].isnumeric() and later is not None
        if not (inch and prompt[later - 1].isalpha() and not prompt[later + 1 : later + 2].isalnum()):
            return end
    return None


def _closes(prompt: str, at: int) -> bool:
    after = prompt[at + 1 : at + 2]
    if prompt[at] == "’":
        return not after.isalnum()  # an apostrophe otherwise
    return prompt[at] != '"' or after != '"'


def normalize(text: str) -> str:
    """Lower case without spaces, as texts are compared."""
    return unicodedata.normalize("NFC", "".join(text.split())).lower()


def ocr_reward(prompt: str, recognised: str, rule: str = "quotation") -> float:
    """Grades an image of text.

    Args:
      prompt: quotes the text; 0 is returned where it does not.
      recognised: all that was read in the image.
      rule: a key of RULES, or `package.module:attribute`.

    Returns:
      1 - distance / length in [0, 1]: 1 where the text occurs anywhere, else by edit distance, at most the length.
    """
    wanted, seen = normalize(registry.resolve(RULES, rule, "rule of quotations")(prompt)), normalize(recognised)
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
    require(wanted, "text to render", "none", "letters", "put the text in double quotes in the prompt")
    return TextScore(wanted == seen, 1 - edit_distance(wanted, seen) / max(len(wanted), len(seen)))
