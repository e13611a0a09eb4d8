"""Types that all layers share.

B batch, T positions, R reference images, N codes of one image (729 released), P side of the tokenizer's input, Y X
pixels of the image, y x latent cells, C latent channels.
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
"""Name -> (weighted sum f32[], weight f32[]), see `masked`."""


@flax.struct.dataclass
class Batch:
    """A training batch of text-to-image, editing and reconstruction samples, in any mixture.

    Images are given either as pixels, to be encoded in the training step, or as precomputed codes and latents; unused
    fields are None. Text-to-image rows have `ref_mask` all false and zeros in place of references.
    """

    tokens: Array  # i32[B T], ids; image positions hold the pad id
    length: Array  # i32[B], positions without right padding
    loss_mask: Array  # bool[B T], True for targets of the cross-entropy
    image_slot: Array  # i32[B T], -1 for text, else image * N + code; image 0 is the target, 1 + r reference r
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


@flax.struct.dataclass(kw_only=True)
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
    base: Array | None = None  # dtype[B N D], states that predict the tokens without the prompt's text; with guidance
    token_guidance_scale: Array | None = None  # f32[B], likewise
    prompt_rows: int = flax.struct.field(pytree_node=False, default=1)  # of one prompt in a row, in a micro-batch


@flax.struct.dataclass(kw_only=True)
class TokenRollout(Completions):
    """Completions and what they were worth: one update of reinforcement learning on the token half."""

    mask: Array  # bool[B], rows that contribute to the loss
    old_log_probs: Array  # f32[B N], of the policy that drew the tokens
    advantage: Array  # f32[B]
    kl_scale: Array  # f32[B], multiplies the weight of the divergence from the reference
    ref_log_probs: Array | None = None  # f32[B N], of the frozen reference decoder
    # rows that a mean over all samples of a micro-batch divides by: more than B where those without effect are left out
    mean_rows: int | None = flax.struct.field(pytree_node=False, default=None)  # None: B


@flax.struct.dataclass(kw_only=True)
class FlowRollout:
    """Stochastic denoising paths with their advantages: one reinforcement-learning update of the diffusion model."""

    states: Array  # dtype[B M D], hidden states of the image span, which condition the DiT
    latents: Array  # f32[B 1+S y x C], before the first and after each of the S steps of the update
    old_log_probs: Array  # f32[B S], log-probabilities of these steps, averaged over elements
    mask: Array  # bool[B], rows that contribute to the loss
    advantage: Array  # f32[B]
    kl_scale: Array  # f32[B], as in TokenRollout
    ref_latent: Array | None = None  # f32[B y x C], scaled, of the first reference
    has_ref: Array | None = None  # bool[B]


@flax.struct.dataclass(kw_only=True)
class MatchingRollout:
    """Generated images with their advantages: one reinforcement-learning update on the forward process."""

    states: Array  # dtype[B M D], hidden states of the image span, which condition the DiT
    latent: Array  # f32[B y x C], latents of the images
    noise: Array  # f32[B K y x C], noise added to them
    level: Array  # f32[B K] in [0, 1), selects the noise levels
    old_velocity: Array  # f32[B K y x C], velocities of the sampling policy at the noised latents
    mask: Array  # bool[B], rows that contribute to the loss
    advantage: Array  # f32[B]
    kl_scale: Array  # f32[B], as in TokenRollout
    ref_velocity: Array | None = None  # f32[B K y x C], of the frozen reference
    ref_latent: Array | None = None  # f32[B y x C], scaled, of the first reference image
    has_ref: Array | None = None  # bool[B]


@flax.struct.dataclass(kw_only=True)
class GrpoNftRollout(TokenRollout, MatchingRollout):
    """Tokens and the images rendered from them, with common advantages: one update of both halves."""


class BatchSource(Protocol):
    """The source of training batches: a data set, or rollouts of the current parameters."""

    def next(self, params: Params, key: jax.Array) -> Any:
        """Returns the next batch; if it raises, the position does not change.

        `params` must not be used after the call, because the training step donates them.
        """

    def state(self) -> Any:
        """Returns the position for exact resumption, as JSON values; a dictionary may have flat `arrays`, too."""

    def restore(self, state: Any) -> None:
        """Continues from a position returned by `state`."""

    def close(self) -> None:
        """Stops background work; called once by the loop."""


@dataclasses.dataclass(frozen=True)
class RewardInput:
    """A sampled image with its prompt and metadata. Arrays are read-only."""

    prompt: str
    image: np.ndarray | None  # uint8[Y X 3]; None when a prompt is checked before sampling
    references: tuple[np.ndarray, ...] = ()  # uint8[Y X 3], in their original sizes
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # metadata of the prompt in the data
    task: str = "t2i"  # t2i | edit | reconstruct
    seed: int | None = None  # in [0, 2**32), different for every sample


class Reward(Protocol):
    """A reward: a function with options as keyword arguments, or a class that is instantiated once with the options.

    An optional `check(inputs)` raises UserError for prompts that the reward cannot score. It is called before sampling,
    with inputs whose image is None; for a function it gets the same options. An optional attribute `needs_metadata`, if
    true, says that it scores no prompt without metadata; a server, whose requests have none, refuses such a reward.
    """

    def __call__(self, inputs: Sequence[RewardInput]) -> Sequence[float]:
        """Scores N samples, whose images have one size, with N finite numbers."""
