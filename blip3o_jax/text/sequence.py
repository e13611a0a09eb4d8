"""The sequence builder: a task and a text become token arrays, the same for training and for sampling.

Shapes: B batch, T positions, N codes of one image.
An image is laid out as the caller's `num_image_tokens` slots; the target as
`<im_start>` scale-token slot*N `<im_end>`, references as bare slots within one `<|vision_start|>` .. `<|vision_end|>`.

Source: BLIP3o-NEXT data set code and `prepare_inputs_labels_for_multimodal`.
Differs from the reference: 1. what is too long raises, instead of losing the end of the sequence, which is the target
image; 2. the ids of tags and scale token come from the checkpoint's configuration, not from the text; 3. slots are
known by position, so a `<|image_pad|>` typed by a user is text, and so is the pad token.
"""

import dataclasses
from collections.abc import Sequence as AbstractSequence

import numpy as np

from blip3o_jax.config import TokenIds
from blip3o_jax.errors import UserError, require
from blip3o_jax.text import tasks
from blip3o_jax.text.tokenizer import Tokenizer

LOSS_ON = ("all", "assistant")
SIDES = ("right", "left")


@dataclasses.dataclass(frozen=True)
class Sequence:
    """One conversation; the fields are those of `types.Batch` without the batch axis."""

    tokens: np.ndarray  # i32[T], image slots hold the pad id
    loss_mask: np.ndarray  # bool[T], position is a target
    image_slot: np.ndarray  # i32[T], -1 text, else image * N + code; image 0 the target, 1 + r reference r
    window_start: int  # position of the scale token

    def __len__(self) -> int:
        return len(self.tokens)


def build(
    task: str | tasks.Task,
    text: str,
    tokenizer: Tokenizer,
    token_ids: TokenIds,
    num_image_tokens: int,
    num_refs: int = 0,
    pool_scale: int = 1,
    open_ended: bool = False,
    loss_on: str = "all",
) -> Sequence:
    """Builds the sequence of one sample.

    The text is tokenised as the reference does: strings such as `<|im_end|>` or `<I7>` inside it are parsed as those
    tokens, not spelled out.

    Args:
      task: see `tasks.find`.
      num_image_tokens: N, codes of every image at this pool scale.
      pool_scale: 1 to `token_ids.num_scales`, which the scale token announces.
      open_ended: stop behind the scale token: the prompt of sampling, equal to the start of the training sequence.
      loss_on: "all", as the reference: every token but the slots of references (nothing precedes position 0, which is
        the loss' business); "assistant": from `<im_start>` to the `<|im_end|>` of the assistant's turn.

    Raises:
      UserError: an unknown option, a scale that does not exist, a tokenizer that contradicts `token_ids`, and what the
        task raises.
    """
    require(loss_on in LOSS_ON, "loss_on", f"{loss_on!r}", " or ".join(LOSS_ON), "choose one of them")
    if not 1 <= pool_scale <= token_ids.num_scales:
        raise UserError("pool_scale", got=pool_scale, expected=f"1 to {token_ids.num_scales}", do="choose one of them")
    check_tokenizer(tokenizer, token_ids)
    slots = np.arange(num_image_tokens, dtype=np.int32)
    parts = _Parts(token_ids.pad)
    for segment in tasks.find(task)(text, num_refs):
        if isinstance(segment, tasks.Text):
            parts.add_text(tokenizer.encode(segment.text), segment.loss or loss_on == "all")
        elif segment.index > 0:
            parts.add_slots(segment.index * num_image_tokens + slots, loss=False)
        else:
            parts.add_text([token_ids.image_start_tag], loss=True)
            window_start = parts.length
            parts.add_text([token_ids.scale_start + pool_scale - 1], loss=True)
            if open_ended:
                break
            parts.add_slots(slots, loss=True)
            parts.add_text([token_ids.image_end_tag], loss=True)
    return Sequence(*parts.joined(), window_start=window_start)


def stack(
    sequences: AbstractSequence[Sequence], length: int, pad_id: int, side: str = "right"
) -> dict[str, np.ndarray]:
    """Pads sequences to one length.

    Args:
      sequences: B of them.
      length: T, positions of the result.
      pad_id: fills the rest of `tokens`.
      side: where the padding goes: "right" (training) or "left" (sampling).

    Returns:
      `tokens` i32[B T], `length` i32[B] positions in use, `loss_mask` bool[B T], `image_slot` i32[B T] (-1 in the
      padding), `window_start` i32[B], which counts left padding.

    Raises:
      UserError: a sequence is longer than `length`: an image is never cut.
    """
    require(side in SIDES, "padding side", f"{side!r}", " or ".join(SIDES), "choose one of them")
    batch = len(sequences)
    arrays = {
        "tokens": np.full((batch, length), pad_id, np.int32),
        "loss_mask": np.zeros((batch, length), bool),
        "image_slot": np.full((batch, length), -1, np.int32),
        "length": np.array([len(sequence) for sequence in sequences], np.int32),
        "window_start": np.zeros(batch, np.int32),
    }
    for row, sequence in enumerate(sequences):
        used = len(sequence)
        if used > length:
            raise UserError(
                f"sequence {row}",
                got=f"{used} tokens, {int((sequence.image_slot >= 0).sum())} of them of images",
                expected=f"at most {length}",
                do="raise the sequence length, shorten the text or give fewer references",
            )
        start = length - used if side == "left" else 0
        for name in ("tokens", "loss_mask", "image_slot"):
            arrays[name][row, start : start + used] = getattr(sequence, name)
        arrays["window_start"][row] = start + sequence.window_start
    return arrays


def check_tokenizer(tokenizer: Tokenizer, token_ids: TokenIds) -> None:
    """Raises UserError where the tokenizer knows an image token under another id than the configuration."""
    expected = {
        "<im_start>": token_ids.image_start_tag,
        "<im_end>": token_ids.image_end_tag,
        "<S0>": token_ids.scale_start,
        "<I0>": token_ids.image_start,
    }
    for token, index in expected.items():
        got = tokenizer.token_to_id(token)
        if got not in (None, index):
            raise UserError(
                "tokenizer",
                got=f"id {got} for {token}",
                expected=f"{index}, as in config.json",
                do="use the tokenizer files of this very checkpoint",
            )


class _Parts:
    """Pieces of a sequence, until they are joined."""

    def __init__(self, pad_id: int):
        self.length = 0
        self._pad_id = pad_id
        self._pieces = []

    def add_text(self, ids: list[int], loss: bool) -> None:
        self._add(np.array(ids, np.int32), np.full(len(ids), -1, np.int32), loss)

    def add_slots(self, slots: np.ndarray, loss: bool) -> None:
        self._add(np.full(len(slots), self._pad_id, np.int32), slots, loss)

    def _add(self, tokens: np.ndarray, slots: np.ndarray, loss: bool) -> None:
        self._pieces.append((tokens, np.full(len(tokens), loss), slots))
        self.length += len(tokens)

    def joined(self) -> list[np.ndarray]:
        """tokens, loss_mask, image_slot."""
        return [np.concatenate(column) for column in zip(*self._pieces)]
