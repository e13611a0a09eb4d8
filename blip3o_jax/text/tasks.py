"""Tasks: prompt templates, and the segments of a conversation.

A conversation is ChatML: system, user, assistant. The user's turn may contain reference images; the assistant's turn is
the target image. A task from another package is named `package.module:attribute`; examples/task.py is an example.

Source: BLIP3o-NEXT data set code (text-to-image and editing branches).
Differs from the reference:
1. Reconstruction is the editing task with a fixed instruction.
2. `<image>` in a user's text is text.
3. All references are kept (reference: the first four).
"""

import dataclasses
import functools

from blip3o_jax.config import registry
from blip3o_jax.errors import require

SYSTEM_MESSAGE = "You are a helpful assistant."
KEEP_INSTRUCTION = "Keep the image unchanged."
"""Default instruction of the reconstruction task."""


@dataclasses.dataclass(frozen=True)
class Text:
    """Text that is tokenised on its own: segments meet at special tokens only."""

    text: str
    loss: bool  # part of the assistant's turn: a target of the loss in either mode


@dataclasses.dataclass(frozen=True)
class Image:
    """The codes of one image: 0 is the target (with tags and scale token), 1 + r reference r."""

    index: int


Segment = Text | Image


@dataclasses.dataclass(frozen=True)
class Task:
    """A template of the user's turn; calling it returns the segments of a conversation.

    In the message `{text}` stands for the caption or instruction and `{images}` for all references.
    """

    message: str
    message_many: str | None = None  # for more than one reference; default: `message`
    default_text: str = ""  # used if no text is given; "": a text is required
    target_is_reference: bool = False  # the target image is its own reference, so data provides no other

    @property
    def has_references(self) -> bool:
        """Whether the user's turn contains reference images."""
        return "{images}" in self.message

    @property
    def needs_references(self) -> bool:
        """Whether data must provide reference images."""
        return self.has_references and not self.target_is_reference

    @property
    def needs_text(self) -> bool:
        """Whether a caption or instruction is required."""
        return not self.default_text

    def __call__(self, text: str, num_refs: int = 0) -> list[Segment]:
        """Returns the segments of one conversation.

        Args:
          text: caption or instruction, inserted verbatim; the editing template always appends a ".".

        Raises:
          UserError: `text` is not a string, or references are missing or not supported.
        """
        require(isinstance(text, str), "prompt", repr(text), "text", "write it as a string")
        expected, do = "none", "leave the images out or choose task edit"
        if self.has_references:
            expected, do = "at least 1", "give an image"
        good, got = self.has_references == (num_refs > 0), f"{num_refs} for task {name_of(self)}"
        require(good, "reference images", got, expected, do)
        message = self.message_many if num_refs > 1 and self.message_many else self.message
        before, _, after = message.partition("{images}")
        text = text or self.default_text
        system = f"<|im_start|>system\n{SYSTEM_MESSAGE}<|im_end|>\n"
        opening = system + "<|im_start|>user\n" + before.replace("{text}", text)
        middle = after.replace("{text}", text) + "<|im_end|>\n<|im_start|>assistant\n"
        closing = [Image(0), Text("<|im_end|>", loss=True), Text("\n", loss=False)]
        if num_refs == 0:
            return [Text(opening + middle, loss=False), *closing]
        refs = [Image(1 + r) for r in range(num_refs)]
        span = [Text(opening + "<|vision_start|>", loss=False), *refs, Text("<|vision_end|>" + middle, loss=False)]
        return span + closing


_EDIT = Task(
    message="Please edit this image according to the following instruction: {text}.\n{images}",
    message_many="Please edit these images according to the following instruction: {text}.\n{images}",
)

TASKS: dict[str, Task] = {
    "t2i": Task(message="Please generate image based on the following caption: {text}"),
    "edit": _EDIT,
    "reconstruct": dataclasses.replace(_EDIT, default_text=KEEP_INSTRUCTION, target_is_reference=True),
}


def find(task: str | Task) -> Task:
    """Returns the task of a name, a key of `TASKS` or `package.module:attribute`; a Task is returned unchanged.

    Raises:
      UserError: an unknown name.
    """
    require(isinstance(task, (str, Task)), "task", repr(task), "a name", "write it as a string")
    return task if isinstance(task, Task) else _resolved(task)


@functools.cache
def _resolved(name: str) -> Task:
    return registry.resolve(TASKS, name, "task", Task)


def name_of(task: str | Task) -> str:
    """Returns the name of a task for messages."""
    return task if isinstance(task, str) else next((name for name, own in TASKS.items() if own == task), "at hand")
