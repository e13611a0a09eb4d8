"""The whole model as pure functions of (config, params, inputs).

`params` is a dictionary of subtrees: `decoder, image_tokenizer, autoencoder, dit, connector`, and, depending on
`config.edit`, `vae_connector` and `siglip_connector`.

B batch, T positions, I images of a row (target first, then references), N codes of an image, M = 1 + N hidden states
that condition the DiT, D decoder width, E condition width, y x latent cells, C latent channels.

Source: BLIP3o-NEXT `blip3oMetaModel`, `blip3oQwenForCausalLM`, `blip3oQwenForInferenceLM` (both branches).
Differs from the reference:
1. The DiT is conditioned on the states of the scale token and of every code, in training and in sampling
   (`window="span"`); the reference trains on the last M positions of the padded row (`window="tail"`).
2. Training and sampling share one null condition, `null_condition`: connector(0) for the states and zeros for the
   latents. The reference's editing branch samples with it but trains on zeros.
3. Image codes are placed in a fixed-length row by one gather, without a loop over the batch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax import compilation, treepath
from blip3o_jax.config import BACKBONES, Blip3oConfig, registry
from blip3o_jax.errors import require, type_of
from blip3o_jax.models.connector import Connector
from blip3o_jax.models.dc_ae import DCAE
from blip3o_jax.models.decoder import Decoder, DecodeWeights
from blip3o_jax.models.protocols import Denoiser, EncodedCondition
from blip3o_jax.models.ta_tok import TATok
from blip3o_jax.nn import parameters
from blip3o_jax.nn.kernels import one_device
from blip3o_jax.nn.window import read_window
from blip3o_jax.sharding import gather, map_rows
from blip3o_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Part:
    """A module of the model with its subtree of the parameters.

    Attributes:
      build: configuration -> module.
      example_inputs: configuration -> arguments of `method` for initialisation.
      method: name of a method that uses every parameter.
      present: configuration -> whether the model has this part.
    """

    build: Callable[[Blip3oConfig], nn.Module]
    example_inputs: Callable[[Blip3oConfig], tuple[jax.Array, ...]]
    method: str = "__call__"
    present: Callable[[Blip3oConfig], bool] = lambda config: True


def backbone(config: Blip3oConfig) -> type[Denoiser]:
    """Returns the class of the diffusion backbone."""
    return registry.resolve(BACKBONES, config.dit.name, "backbone")


def _connector(section: str, present: Callable[[Blip3oConfig], bool] = Part.present) -> Part:
    def inputs(config):
        return (jnp.zeros((1, getattr(config, section).in_width)),)

    return Part(lambda config: Connector(getattr(config, section)), inputs, present=present)


def _noisy(config: Blip3oConfig) -> tuple[jax.Array, ...]:
    latent, condition = jnp.zeros((1, 2, 2, config.dit.in_channels)), jnp.zeros((1, 2, config.dit.caption_channels))
    return latent, jnp.zeros(1), condition


PARTS: dict[str, Part] = {
    "decoder": Part(lambda c: Decoder(c.decoder), lambda c: (jnp.zeros((1, 2), jnp.int32),), "init_all"),
    "image_tokenizer": Part(lambda c: TATok(c.image_tokenizer), lambda c: (_image(c.image_tokenizer.image_size),)),
    "autoencoder": Part(lambda c: DCAE(c.autoencoder), lambda c: (_image(c.autoencoder.spatial_factor),), "init_all"),
    "dit": Part(lambda c: backbone(c)(c.dit), _noisy, "denoise"),
    "connector": _connector("connector"),
    "vae_connector": _connector("vae_connector", lambda c: c.edit.vae_condition),
    "siglip_connector": _connector("siglip_connector", lambda c: c.edit.siglip_features),
}
"""Name of a subtree -> its part; the order determines the initialisation keys."""


def modules(config: Blip3oConfig) -> dict[str, nn.Module]:
    """Returns the modules of a model by name of their parameter subtree."""
    return {name: part.build(config) for name, part in PARTS.items() if part.present(config)}


def initializers(config: Blip3oConfig) -> dict[str, Callable[[jax.Array], Any]]:
    """Returns part name -> function that initialises its boxed parameters from a key."""

    def maker(part: Part, module: nn.Module):
        return lambda key: module.init(key, *part.example_inputs(config), method=part.method)["params"]

    return {name: maker(PARTS[name], module) for name, module in modules(config).items()}


@functools.partial(jax.jit, static_argnums=0)
def init(config: Blip3oConfig, key: jax.Array) -> Params:
    """Initialises the parameters, as plain arrays."""
    return nn.meta.unbox(_init_boxed(config, key))


@functools.lru_cache(maxsize=8)
def abstract_params(config: Blip3oConfig) -> Params:
    """Returns shapes, dtypes and logical axis names of the parameters. The result is cached: do not modify it."""

    def traced():
        with parameters.shapes_alone():
            return jax.eval_shape(lambda: _init_boxed(config, jax.random.key(0)))

    def described():
        leaves = treepath.flatten(traced())
        return {path: [leaf.names, leaf.value.shape, leaf.value.dtype.name] for path, leaf in leaves.items()}

    if config.dit.name not in BACKBONES:  # its parameters may lack axis names
        return traced()
    found = compilation.recalled(f"shapes of {config!r}", described)
    return treepath.unflatten(
        {
            path: nn.LogicallyPartitioned(jax.ShapeDtypeStruct(tuple(shape), dtype), tuple(names))
            for path, (names, shape, dtype) in found.items()
        }
    )


def abstract_plain(config: Blip3oConfig) -> Params:
    """Returns shapes and dtypes of the parameters, without axis names."""
    return jax.tree.map(
        nn.meta.unbox, abstract_params(config), is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)
    )


def _image(side: int) -> jax.Array:
    return jnp.zeros((1, side, side, 3))


def _init_boxed(config, key):
    parts = initializers(config)
    return {name: make(jax.random.fold_in(key, i)) for i, (name, make) in enumerate(parts.items())}


def apply(config: Blip3oConfig, params: Params, part: str, method: str, *inputs: Any, **options: Any) -> Any:
    """Calls a method of one part of the model with its parameters."""
    return PARTS[part].build(config).apply({"params": params[part]}, *inputs, method=method, **options)


def embed_sequence(
    config: Blip3oConfig,
    params: Params,
    tokens: jax.Array,
    image_slot: jax.Array,
    codes: jax.Array,
    features: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Embeds rows of text and images.

    Args:
      config, params: the model.
      tokens: i32[B T].
      image_slot: i32[B T], -1 for text, else image * N + code.
      codes: i32[B I N], image 0 the target, then references.
      features: [B R N F], SigLIP features that replace the embeddings of the references' codes
        (`config.edit.siglip_features`); None otherwise.

    Returns:
      Embeddings dtype[B T D], and ids i32[B T] that include the image tokens.
    """
    flat = codes.reshape(codes.shape[0], -1)
    placed = jnp.take_along_axis(flat, image_slot, axis=1, mode="clip") + config.tokens.image_start
    ids = jnp.where(image_slot >= 0, placed, tokens)
    x = apply(config, params, "decoder", "embed_tokens", ids)
    if features is not None:
        projected = apply(config, params, "siglip_connector", "__call__", features)
        projected = projected.reshape(projected.shape[0], -1, projected.shape[-1])
        index = (image_slot - codes.shape[2])[..., None]  # references follow the target
        x = jnp.where(index >= 0, jnp.take_along_axis(projected, index, axis=1, mode="clip"), x)
    return x, ids


def decode_weights(config: Blip3oConfig, params: Params, start: int = 0, size: int | None = None) -> DecodeWeights:
    """Returns `Decoder.decode_weights`, which devices of a mesh share along the axis `tensor` only.

    A pass of the decoding loop reads all weights for a few tokens: it would spend its time on gathering them.
    """
    weights = apply(config, params, "decoder", "decode_weights", start, size)
    stacks = treepath.flatten(abstract_params(config)["decoder"]["layers"])
    names = {path: leaf.names[1:] for path, leaf in stacks.items()}
    layers = tuple(_gathered(layer, names) for layer in weights.layers)
    return weights.replace(layers=layers, head=gather(weights.head, "vocab", "embed"))


def with_whole(config: Blip3oConfig, params: Params, part: str) -> Params:
    """Returns the parameters with those of one part whole along `fsdp`.

    For programs that run the part in a loop: the devices of a mesh would gather its weights in every iteration.
    """
    if one_device():
        return params
    leaves = treepath.flatten(abstract_params(config)[part])
    names = {path: leaf.names for path, leaf in leaves.items() if isinstance(leaf, nn.LogicallyPartitioned)}
    return {**params, part: _gathered(params[part], names)}


def _gathered(tree: Params, names: dict[str, tuple[str | None, ...]]) -> Params:
    """Returns the tree with every leaf whole along `fsdp`; `names` are the logical axes by path."""
    return treepath.map_with_path(lambda path, leaf: gather(leaf, *names.get(path, (None,) * leaf.ndim)), tree)


def _in_turns(
    function: Callable[[Params, Any], Any], config: Blip3oConfig, params: Params, part: str, rows: Any, at_a_time: int
) -> Any:
    """Applies `function(params, rows)` of one part to `at_a_time` rows per device at a time (0: all)."""
    if not at_a_time:
        return function(params, rows)
    return map_rows(functools.partial(function, with_whole(config, params, part)), rows, at_a_time)


def encode_tokens(
    config: Blip3oConfig,
    params: Params,
    pixels: jax.Array,
    codebook: jax.Array | None = None,
    keys: jax.Array | None = None,
    at_a_time: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Encodes tokenizer pixels f32[... P P 3] in [-1, 1] to codes i32[... N] and features f32[... N F].

    Args:
      config, params: the model.
      pixels: the images.
      codebook: f32[Q E], result of `TATok.codebook`, to avoid recomputing it.
      keys: key[...], to sample codes at the tokenizer's temperature; None: the nearest codes.
      at_a_time: rows of the leading dimension per device at a time, to save memory; 0: all.
    """
    if at_a_time and codebook is None:
        codebook = apply(config, params, "image_tokenizer", "codebook")

    def encode(params, rows):
        return _encode_tokens(config, params, *rows, codebook)

    return _in_turns(encode, config, params, "image_tokenizer", (pixels, keys), at_a_time)


def _encode_tokens(config, params, pixels, keys, codebook):
    flat = pixels.reshape(-1, *pixels.shape[-3:])
    keys = None if keys is None else keys.reshape(-1)
    output = apply(config, params, "image_tokenizer", "encode", flat, config.pool_scale, codebook, keys)
    lead = pixels.shape[:-3]
    return output.indices.reshape(*lead, -1), output.features.reshape(*lead, *output.features.shape[1:])


def encode_latent(config: Blip3oConfig, params: Params, pixels: jax.Array, at_a_time: int = 0) -> jax.Array:
    """Encodes pixels f32[B Y X 3] in [-1, 1] to scaled latents f32[B y x C].

    `at_a_time` images per device are encoded at a time, to save memory; 0: all.
    """

    def encode(params, pixels):
        return apply(config, params, "autoencoder", "encode_scaled", pixels)

    return _in_turns(encode, config, params, "autoencoder", pixels, at_a_time)


def decode_latent(config: Blip3oConfig, params: Params, latent: jax.Array, at_a_time: int = 0) -> jax.Array:
    """Decodes scaled latents f32[B y x C] to pixels f32[B Y X 3], nominally in [-1, 1] but not clipped.

    `at_a_time` images per device are decoded at a time, to save memory; 0: all.
    """

    def decode(params, latent):
        return apply(config, params, "autoencoder", "decode_scaled", latent)

    return _in_turns(decode, config, params, "autoencoder", latent, at_a_time)


def velocity(
    config: Blip3oConfig,
    params: Params,
    x: jax.Array,
    sigma: jax.Array,
    conditions: tuple[EncodedCondition, ...] | jax.Array,
    ref_latent: jax.Array | None = None,
    until: jax.Array | None = None,
) -> jax.Array:
    """Predicts the velocity (noise - data) f32[B y x C] with the diffusion backbone.

    Args:
      config, params: the model.
      x: f32[B y x C], noisy latents, one group of rows per condition.
      sigma: f32[] or f32[B], 1 = noise, 0 = data.
      conditions: see `Denoiser.__call__`; or one condition dtype[B M E] for all rows, which each block encodes itself,
        so that the backward pass stores no keys and values.
      ref_latent: f32[b y x C], one row per row of a group; with `config.edit.vae_noise` it is appended to the noisy
        latent along the width.
      until: f32[] or f32[B], at most sigma: with `config.dit.mean_flow`, predict the mean velocity from sigma to there.
        Other models ignore it.
    """
    width, count = x.shape[2], config.schedule.num_train_timesteps
    if config.edit.vae_noise:
        beside = jnp.tile(ref_latent, (len(x) // len(ref_latent), 1, 1, 1))
        x = jnp.concatenate([x, beside], axis=2)
    t, step = jnp.broadcast_to(sigma * count, x.shape[:1]), ()
    if config.dit.mean_flow and until is not None:
        step = (jnp.broadcast_to((sigma - until) * count, x.shape[:1]),)
    method = "__call__" if isinstance(conditions, tuple) else "denoise"
    made = apply(config, params, "dit", method, x, t, conditions, *step)
    good = isinstance(made, jax.Array) and made.shape == x.shape and jnp.issubdtype(made.dtype, jnp.floating)
    require(good, f"backbone {config.dit.name}: {method}", type_of(made), f"{type_of(x)}, as its input", "correct it")
    return made[:, :, :width]


def condition_window(
    config: Blip3oConfig, hidden: jax.Array, window_start: jax.Array, window: str = "span"
) -> jax.Array:
    """Returns the M hidden states of a row that condition the DiT.

    Args:
      config: the model.
      hidden: [B T D].
      window_start: i32[B], position of the scale token.
      window: "span", from the scale token on; or "tail", the last M positions of the row (the reference's training).
    """
    size = 1 + config.num_image_tokens
    if window == "tail":
        return hidden[:, -size:]
    return read_window(hidden, window_start, size)


def make_condition(
    config: Blip3oConfig,
    params: Params,
    states: jax.Array,
    ref_latent: jax.Array | None = None,
    has_ref: jax.Array | None = None,
) -> jax.Array:
    """Returns the DiT's condition dtype[B M E], followed by y*x reference tokens with `config.edit.vae_condition`.

    Args:
      config, params: the model.
      states: [B M D], hidden states of the image span.
      ref_latent: f32[B y x C], scaled; required with `config.edit.vae_condition`.
      has_ref: bool[B]; the reference tokens of rows without a reference are zeros. None: every row has one.
    """
    tokens = apply(config, params, "connector", "__call__", states)
    if not config.edit.vae_condition:
        return tokens
    flat = ref_latent.reshape(ref_latent.shape[0], -1, ref_latent.shape[-1])
    reference = apply(config, params, "vae_connector", "__call__", flat)
    if has_ref is not None:
        reference = jnp.where(has_ref[:, None, None], reference, 0)
    return jnp.concatenate([tokens, reference], axis=1)


def null_condition(config: Blip3oConfig, params: Params, reference_tokens: int = 0) -> tuple[jax.Array, jax.Array]:
    """Returns the null condition: connector(0) for the states, zeros for reference tokens.

    All its vectors of a kind are equal, so it is returned as one vector of each kind with its multiplicity.

    Args:
      config, params: the model.
      reference_tokens: number of reference tokens, 0 if the model does not condition on them.

    Returns:
      Vectors dtype[1 or 2, E], and multiplicities i32[1 or 2].
    """
    zero = jnp.zeros((1, config.decoder.width), config.decoder.dtype)
    vectors = apply(config, params, "connector", "__call__", zero)
    counts = [1 + config.num_image_tokens]
    if reference_tokens:
        vectors = jnp.concatenate([vectors, jnp.zeros_like(vectors)])
        counts.append(reference_tokens)
    return vectors, jnp.array(counts, jnp.int32)


def drop_condition(config: Blip3oConfig, params: Params, condition: jax.Array, drop: jax.Array) -> jax.Array:
    """Replaces rows of `condition[B M' E]` by the null condition where `drop` (bool[B]) is True."""
    own = 1 + config.num_image_tokens
    vectors, counts = null_condition(config, params, condition.shape[1] - own)
    null = jnp.repeat(vectors, counts, axis=0, total_repeat_length=condition.shape[1])
    return jnp.where(drop[:, None, None], null, condition)
