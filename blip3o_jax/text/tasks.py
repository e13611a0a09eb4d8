"""What each task says to the decoder: prompt templates as data, and the segments of one conversation.

A conversation is ChatML: system, user, assistant. The user's turn may hold reference images, the assistant's turn is
the target image.

Source: BLIP3o-NEXT data set code (text-to-image and editing branches).
Differs from the reference: 1. reconstruction is the editing task with a fixed instruction; 2. `<image>` inside a user's
text is text; 3. any number of references is kept (reference: the first four).
"""

import dataclasses

from blip3o_jax.errors import UserError

SYSTEM_MESSAGE = "You are a helpful assistant."
KEEP_INSTRUCTION = "Keep the image unchanged."
"""The instruction of the reconstruction task where none is given."""


@dataclasses.dataclass(frozen=True)
class Text:
    """Text to be tokenised on its own: segments meet at special tokens only."""

    text: str
    loss: bool  # said by the assistant: a target where only its turn is trained on


@dataclasses.dataclass(frozen=True)
class Image:
    """The codes of one image: 0 the target (with its tags and scale token), 1 + r reference r."""

    index: int


Segment = Text | Image


@dataclasses.dataclass(frozen=True)
class Task:
    """The user's message: `{text}` is the caption or instruction, `{images}` the place of all references."""

    message: str
    message_many: str | None = None  # with more than one reference; None: the task takes no references
    default_text: str = ""

    @property
    def takes_references(self) -> bool:
        return self.message_many is not None


_EDIT = Task(
    message="Please edit this image according to the following instruction: {text}.\n{images}",
    message_many="Please edit these images according to the following instruction: {text}.\n{images}",
)

TASKS: dict[str, Task] = {
    "t2i": Task(message="Please generate image based on the following caption: {text}"),
    "edit": _EDIT,
    "reconstruct": dataclasses.replace(_EDIT, default_text=KEEP_INSTRUCTION),
}


def segments(task: str, text: str, num_refs: int = 0) -> list[Segment]:
    """Lays one conversation out.

    Args:
      task: a key of `TASKS`.
      text: caption or instruction, inserted as it is; the editing template sets a "." behind it in any case.
      num_refs: reference images in the user's turn.

    Raises:
      UserError: an unknown task, a text that is none, or references where the task takes none or lacks them.
    """
    if task not in TASKS:
        raise UserError("task", got=f"{task!r}", expected=f"one of {', '.join(sorted(TASKS))}", do="choose one of them")
    if not isinstance(text, str):
        raise UserError("prompt", got=f"{text!r}", expected="text", do="write it as a string")
    entry = TASKS[task]
    if entry.takes_references != (num_refs > 0):
        expected = "at least 1" if entry.takes_references else "none"
        advice = "give an image" if entry.takes_references else "leave the images out or choose task edit"
        raise UserError("reference images", got=f"{num_refs} for task {task}", expected=expected, do=advice)
    message = entry.message_many if num_refs > 1 else entry.message
    before, _, after = message.partition("{images}")
    text = text or entry.default_text
    opening = _turn("system", SYSTEM_MESSAGE) + "<|im_start|>user\n" + before.replace("{text}", text)
    middle = after + "<|im_end|>\n<|im_start|>assistant\n"
    closing = [Image(0), Text("<|im_end|>", loss=True), Text("\n", loss=False)]
    if num_refs == 0:
        return [Text(opening + middle, loss=False), *closing]
    refs = [Image(1 + r) for r in range(num_refs)]
    span = [Text(opening + "<|vision_start|>", loss=False), *refs, Text("<|vision_end|>" + middle, loss=False)]
    return span + closing


def _turn(role: str, content: str) -> str:
    """One finished ChatML message."""
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"
