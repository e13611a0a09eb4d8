"""Scores of rendered text: BLIP3o-NEXT's text reward, exact match and similarity.

Source: the text reward of the reference, which searches the recognised text for the first quoted string of the prompt,
ignoring case and spaces.
Differs from the reference: the default rule "quotation" also knows typographic quotation marks, and inch marks; the
reference's rule, the text between the first two `"`, is "reference".
"""

import dataclasses
import unicodedata

from blip3o_jax.config import registry
from blip3o_jax.errors import require

CLOSING = {
    "“": "”“", "„": "“”", "‟": "”", "”": "”", "«": "»", "»": "«", "‹": "›", "›": "‹",
    "「": "」", "『": "』", "〝": "〞〟", "＂": "＂",
}  # fmt: skip
"""Opening quotation mark -> closing marks."""


def edit_distance(a: str, b: str) -> int:
    """Returns the Levenshtein distance of two strings."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def quotation(prompt: str) -> str:
    """Returns the first text in quotation marks, straight or typographic; "" if there is none.

    `"` or `”` after a number is an inch mark. Single marks `‘ ’` count only if there are no double ones; apostrophes do
    not.
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
    """Returns the text between the first two `"`, or after a single one; "" if there is none. The reference's rule."""
    parts = prompt.split('"')
    return parts[1] if len(parts) >= 2 else ""


RULES = {"quotation": quotation, "reference": between_first_quotes}
"""Name -> function that returns the quoted text of a prompt, "" if there is none."""


def _opens(prompt: str, at: int) -> bool:
    """Returns whether the mark at a position can open a quotation."""
    before, after = prompt[at - 1 : at], prompt[at + 1 : at + 2]
    if prompt[at] in "”’" and (before.isalnum() or not after.isalnum()):
        return False  # a closing mark, except in languages that also open with it
    behind_number = before.isnumeric() or (not after.strip() and prompt[:at].rstrip()[-1:].isnumeric())
    return not behind_number and not (before.isalpha() and not after.strip())


def _end(prompt: str, start: int, closing: str) -> int | None:
    """Returns the position of the closing mark; None if there is none."""
    ends = [at for at in range(start + 1, len(prompt)) if prompt[at] in closing and _closes(prompt, at)]
    for end, later in zip(ends, [*ends[1:], None]):
        # skip an inch mark inside the quotation: the next mark can only be a closing one
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
    """Returns a text in lower case without spaces, for comparison; raises UserError for another type."""
    do = "let the reader return '' where there is none"
    require(isinstance(text, str), "text that was read", repr(text)[:100], "a string", do)
    return unicodedata.normalize("NFC", "".join(text.split())).lower()


def ocr_reward(prompt: str, recognised: str, rule: str = "quotation") -> float:
    """Computes the text reward in [0, 1]: 1 if the recognised text contains the quoted one, else 1 - distance / length.

    Without a quotation in the prompt it is 0. `rule` is a key of RULES, or `package.module:attribute`.
    """
    wanted, seen = normalize(registry.resolve(RULES, rule, "rule of quotations")(prompt)), normalize(recognised)
    if not wanted:
        return 0.0
    distance = 0 if wanted in seen else min(edit_distance(seen, wanted), len(wanted))
    return 1 - distance / len(wanted)


@dataclasses.dataclass(frozen=True)
class TextScore:
    """Scores of one rendered text; case and spaces are ignored."""

    exact: bool
    similarity: float  # 1 - edit distance / length of the longer text


def text_score(wanted: str, recognised: str) -> TextScore:
    """Compares the requested text with all text read from the image; raises UserError if the requested one is empty."""
    wanted, seen = normalize(wanted), normalize(recognised)
    require(wanted, "text to render", "none", "letters", "put the text in double quotes in the prompt")
    return TextScore(wanted == seen, 1 - edit_distance(wanted, seen) / max(len(wanted), len(seen)))
