"""Types that layers hand to each other. Shapes: B batch, T positions, R reference images, N codes of one image
(729 released), P side of the tokenizer's input, Y X pixels of the image, y x latent cells, C latent channels.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import flax.struct
import jax
import numpy as np

Array = jax.Array | np.ndarray
Params = Mapping[str, Any]
Metrics = Mapping[str, tuple[jax.Array, jax.Array]]
"""Name -> (weighted sum f32[], weight f32[]): averages are formed once, after all sums."""


@flax.struct.dataclass
class Batch:
    """One training batch of text-to-image, editing and reconstruction samples, in any mixture.

    Images come either as pixels, to be encoded inside the step, or as precomputed codes and latents; the unused
    fields are None. Text-to-image rows have `ref_mask` all false and zeros where references would stand.
    """

    tokens: Array  # i32[B T], ids; positions of an image hold the pad id until its codes are put there
    length: Array  # i32[B], positions in use; the rest is right padding
    loss_mask: Array  # bool[B T], position is a target of the cross-entropy
    image_slot: Array  # i32[B T], -1 text, else (image * N + code) with image 0 the target, 1 + r reference r
    window_start: Array  # i32[B], position of the scale token: 1 + N states from here condition the DiT
    ref_mask: Array  # bool[B R]
    target_pixels: Array | None = None  # f32[B Y X 3] in [-1, 1]
    target_tokenizer_pixels: Array | None = None  # f32[B P P 3] in [-1, 1]
    ref_tokenizer_pixels: Array | None = None  # f32[B R P P 3] in [-1, 1]
    ref_pixels: Array | None = None  # f32[B Y X 3] in [-1, 1], the first reference
    target_codes: Array | None = None  # i32[B N]
    ref_codes: Array | None = None  # i32[B R N]
    target_latent: Array | None = None  # f32[B y x C], scaled
    ref_latent: Array | None = None  # f32[B y x C], scaled, of the first reference


@flax.struct.dataclass
class Completions:
    """Sampled image tokens of prompts, which are padded on the left and end in the scale token.

    The samples of one prompt follow each other.
    """

    tokens: Array  # i32[B T], the prompt; positions of an image hold the pad id
    valid: Array  # bool[B T], False for padding
    image_slot: Array  # i32[B T], as in Batch
    completion: Array  # i32[B N], sampled vocabulary ids
    ref_codes: Array | None = None  # i32[B R N], of reference images
    ref_features: Array | None = None  # f32[B R N F], likewise, where the model takes them
    unguided: dict[str, Array] | None = None  # tokens, valid, image_slot of the prompt without its text, for guidance
    token_guidance_scale: Array | None = None  # f32[B], likewise
    prompt_rows: int = flax.struct.field(pytree_node=False, default=1)  # of one prompt in a row, in a micro-batch


@flax.struct.dataclass(kw_only=True)
class TokenRollout(Completions):
    """Completions and what they were worth: one update of reinforcement learning on the token half."""

    mask: Array  # bool[B N], tokens that are learned from
    old_log_probs: Array  # f32[B N], of the policy that the update starts from
    advantage: Array  # f32[B]
    kl_scale: Array  # f32[B], multiplies the weight of the divergence from the reference
    facts: dict[str, Array]  # name -> f32[B], what is known of every row, to be averaged and recorded
    ref_log_probs: Array | None = None  # f32[B N], of the frozen reference decoder


@flax.struct.dataclass
class FlowRollout:
    """Stochastic denoising and what it was worth: one update of reinforcement learning on the diffusion half."""

    states: Array  # dtype[B M D], of the image span, which condition the DiT
    latents: Array  # f32[B 1+S y x C], before the first and after each of the S steps that are learned from
    old_log_probs: Array  # f32[B S], of those steps, means over elements
    mask: Array  # bool[B], rows that are learned from
    advantage: Array  # f32[B]
    kl_scale: Array  # f32[B], as in TokenRollout
    facts: dict[str, Array]  # likewise
    ref_latent: Array | None = None  # f32[B y x C], scaled, of the first reference
    has_ref: Array | None = None  # bool[B]


@flax.struct.dataclass
class MatchingRollout:
    """Finished images and what they were worth: one update of the diffusion half on the forward process."""

    states: Array  # dtype[B M D], of the image span, which condition the DiT
    latent: Array  # f32[B y x C], of the images
    noise: Array  # f32[B K y x C], that they are noised with again
    level: Array  # f32[B K] in [0, 1), how far
    old_velocity: Array  # f32[B K y x C], of the policy that sampled, at those points
    mask: Array  # bool[B], rows that are learned from
    advantage: Array  # f32[B]
    kl_scale: Array  # f32[B], as in TokenRollout
    facts: dict[str, Array]  # likewise
    ref_velocity: Array | None = None  # f32[B K y x C], of the frozen reference
    ref_latent: Array | None = None  # f32[B y x C], scaled, of the first reference image
    has_ref: Array | None = None  # bool[B]


class BatchSource(Protocol):
    """Where a training step's batches come from: a data set, or rollouts of the current parameters."""

    def next(self, params: Params, key: jax.Array) -> Any:
        """The next batch. `params` may be used during the call only: the step that follows donates them.

        Where it raises, the position is still the one before.
        """

    def state(self) -> Any:
        """JSON-serialisable position, for exact resumption; in a dictionary, `arrays` may be a flat one of arrays."""

    def restore(self, state: Any) -> None:
        """Continues at a position that `state` returned."""

    def close(self) -> None:
        """Ends what runs in the background; the loop calls it once, at the end."""


@dataclasses.dataclass(frozen=True)
class RewardInput:
    """A sampled image with all that is known of it. Arrays are to be read only."""

    prompt: str
    image: np.ndarray | None  # uint8[Y X 3]; None where a prompt is checked before anything is sampled
    references: tuple[np.ndarray, ...] = ()  # uint8[Y X 3], as they were given: sizes may differ from the image's
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what the data say of the prompt
    task: str = "t2i"  # t2i | edit | reconstruct
    seed: int | None = None  # in [0, 2**32), another one for every sample


class Reward(Protocol):
    """What images are worth: a function, or a class that is made once, of the options of the configuration.

    A reward may have `check(inputs)`, which raises UserError for prompts that it cannot judge. It is called before
    anything is sampled, with inputs whose image is None. Options of a function are handed to both as keywords.
    """

    def __call__(self, inputs: Sequence[RewardInput]) -> Sequence[float]:
        """N samples, their images of one size -> N finite numbers."""
