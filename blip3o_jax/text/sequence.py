"""The sequence builder: converts a task and a text to token arrays, for both training and sampling.

B batch, T positions, N codes of one image. The target is laid out as `<im_start>` scale-token slot*N `<im_end>`,
references as bare slots within one `<|vision_start|>` .. `<|vision_end|>`.

Source: BLIP3o-NEXT data set code and `prepare_inputs_labels_for_multimodal`.
Differs from the reference:
1. A sequence that is too long raises; the reference cuts off its end, which is the target image.
2. The ids of tags and scale token come from the checkpoint's configuration, not from the text.
3. Slots are identified by position, so `<|image_pad|>` and the pad token in a user's text are text.
"""

import dataclasses
from collections.abc import Sequence as AbstractSequence

import numpy as np

from blip3o_jax.config import TokenIds
from blip3o_jax.errors import UserError, require
from blip3o_jax.text import tasks
from blip3o_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Sequence:
    """The token arrays of one conversation, as in `types.Batch` without the batch axis."""

    tokens: np.ndarray  # i32[T], image slots hold the pad id
    loss_mask: np.ndarray  # bool[T], True for targets of the loss
    image_slot: np.ndarray  # i32[T], -1 for text, else image * N + code; image 0 is the target, 1 + r reference r
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

    As in the reference, strings such as `<|im_end|>` or `<I7>` in the text are parsed as special tokens.

    Args:
      task: see `tasks.find`.
      num_image_tokens: N, codes of every image at this pool scale.
      pool_scale: 1 to `token_ids.num_scales`, encoded by the scale token.
      open_ended: stop after the scale token, as a prompt for sampling; equals the start of the training sequence.
      loss_on: "all", as in the reference: every token except reference slots; "assistant": from `<im_start>` to the
        `<|im_end|>` of the assistant's turn.

    Raises:
      UserError: a scale out of range, a tokenizer that contradicts `token_ids`, or an error of the task.
    """
    scales = token_ids.num_scales
    require(1 <= pool_scale <= scales, "pool_scale", pool_scale, f"1 to {scales}", "choose one of them")
    check_tokenizer(tokenizer, token_ids)
    tokens, slots, targets = [], [], []

    def add(ids: list[int], is_target: bool = True, image: int | None = None) -> None:
        tokens.extend(ids)
        slots.extend([-1] * len(ids) if image is None else range(image * len(ids), (image + 1) * len(ids)))
        targets.extend([is_target] * len(ids))

    for segment in tasks.find(task)(text, num_refs):
        if isinstance(segment, tasks.Text):
            add(tokenizer.encode(segment.text), segment.loss or loss_on == "all")
        elif segment.index > 0:
            add([token_ids.pad] * num_image_tokens, False, segment.index)
        else:
            add([token_ids.image_start_tag])
            window_start = len(tokens)
            add([token_ids.scale_start + pool_scale - 1])
            if open_ended:
                break
            add([token_ids.pad] * num_image_tokens, image=0)
            add([token_ids.image_end_tag])
    return Sequence(np.array(tokens, np.int32), np.array(targets), np.array(slots, np.int32), window_start)


def stack(
    sequences: AbstractSequence[Sequence], length: int, pad_id: int, side: str = "right"
) -> dict[str, np.ndarray]:
    """Pads B sequences to one length.

    Args:
      length: T, positions of the result.
      side: side of the padding: "right" (training) or "left" (sampling).

    Returns:
      `tokens` i32[B T], `length` i32[B] (without padding), `loss_mask` bool[B T], `image_slot` i32[B T] (padding: -1),
      `window_start` i32[B] (including left padding).

    Raises:
      UserError: a sequence is longer than `length`.
    """
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
    """Raises UserError if the tokenizer has an image token with another id than the configuration."""
    for token, index in (
        ("<im_start>", token_ids.image_start_tag),
        ("<im_end>", token_ids.image_end_tag),
        ("<S0>", token_ids.scale_start),
        ("<I0>", token_ids.image_start),
    ):
        got = tokenizer.token_to_id(token)
        expected, do = f"{index}, as in config.json", "use the tokenizer files of the same checkpoint"
        require(got in (None, index), "tokenizer", f"id {got} for {token}", expected, do)
