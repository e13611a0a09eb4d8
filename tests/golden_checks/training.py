"""One training pass of the reference: cross-entropy, flow-matching loss, what entered the DiT, gradients.

The recordings come from an autoencoder, tokenizer layers and a last DiT layer whose weights had not been rounded to
bfloat16 as the stored ones are (see diffusion.py and autoencoder.py). Therefore latents are taken from the recorded
DiT input where it holds them, and the last DiT layer is recovered from the recorded outputs; what still depends on
other unrounded weights is compared at the accuracy of that rounding (`ROUNDING`).
"""

import pathlib
from collections.abc import Mapping

import jax
import numpy as np

from blip3o_jax import treepath
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.convert import engine
from blip3o_jax.convert.tables import PARTS
from blip3o_jax.models import blip3o
from blip3o_jax.objectives import joint
from blip3o_jax.text import sequence
from blip3o_jax.text.tokenizer import Tokenizer
from blip3o_jax.types import Batch, Params
from golden_checks import diffusion
from golden_checks.inference import task_and_text

LOSS, NETWORK = 1e-5, 1e-4  # relative; of the largest value
ROUNDING = 5e-3  # of the largest value, where unrounded weights enter
DECODER_GRADIENT = 1e-4  # of the largest entry
DIFFUSION_GRADIENT = 5e-2  # likewise: these pass through DiT layers that are known to their rounding only


def _nhwc(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, -3, -1)


def _batch(recording: Mapping[str, np.ndarray], config: Blip3oConfig, folder: pathlib.Path) -> Batch:
    """The recorded sample; latents are those that entered the DiT."""
    task, text = task_and_text(folder)
    references = int(task == "edit")
    row = sequence.build(
        task, text, Tokenizer.from_directory(folder / "checkpoint"), config.tokens, config.num_image_tokens, references
    )
    prefix = "edit" if references else "t2i"
    x = _nhwc(recording[f"{prefix}_dit_in_x"])
    width = config.latent_size
    sigma = recording[f"{prefix}_dit_in_t"].reshape(-1, 1, 1, 1) / config.schedule.num_train_timesteps
    noise = _nhwc(recording[f"{prefix}_noise"])
    return Batch(
        tokens=row.tokens[None],
        length=np.array([len(row)]),
        loss_mask=row.loss_mask[None],
        image_slot=row.image_slot[None],
        window_start=np.array([row.window_start]),
        ref_mask=np.ones((1, references), bool),
        target_tokenizer_pixels=_nhwc(recording["train_tok_image"]),
        ref_tokenizer_pixels=_nhwc(recording["edit_ref_tok_image"])[:, None] if references else None,
        ref_pixels=_nhwc(recording["edit_ref_image"]) if references else None,
        target_latent=(x[:, :, :width] - sigma * noise) / (1 - sigma),
        ref_latent=x[:, :, width:] if config.edit.vae_noise else None,
    )


def check_training_pass(
    recording: Mapping[str, np.ndarray], params: Params, config: Blip3oConfig, folder: pathlib.Path
) -> None:
    """`t2i_*` or `edit_*`: logits, condition, both losses and the gradients of their sum."""
    prefix = "edit" if "edit_u" in recording else "t2i"
    dit = dict(params["dit"], proj_out=diffusion.recorded_last_layer(recording, params, config))
    params = dict(params, dit=dit)
    run = jax.jit(_losses, static_argnums=0)
    batch = _batch(recording, config, folder)
    draw = joint.FlowDraw(recording[f"{prefix}_u"], _nhwc(recording[f"{prefix}_noise"]), np.zeros(1, bool))
    recorded = recording[f"{prefix}_dit_in_cond"]
    ce, flow, logits, condition = run(config, params, batch, draw, recorded)
    unrounded = config.edit.siglip_features
    _close(logits, recording[f"{prefix}_logits"], ROUNDING if unrounded else NETWORK)
    _close(condition, recorded, ROUNDING if unrounded or config.edit.vae_condition else NETWORK)
    expected_ce, expected_flow = recording[f"{prefix}_loss_ce_diff"]
    assert abs(ce / expected_ce - 1) <= (1e-3 if unrounded else LOSS)
    assert abs(flow / expected_flow - 1) <= LOSS
    total = recording[f"{prefix}_loss_total"]
    assert abs((ce + flow) / total - 1) <= (1e-3 if unrounded else LOSS)
    _check_gradients(recording, params, config, batch, draw, prefix)


def _losses(config, params, batch, draw, recorded_condition=None):
    """Both losses, the logits and the condition; the flow-matching loss is under the recorded condition, if given."""
    codes, features = joint.encode_codes(config, params, batch)
    latent, ref_latent, has_ref = joint.encode_latents(config, params, batch)
    hidden, ids = joint.read(config, params, batch, codes, features)
    ce, _ = joint.token_loss(config, params, batch, hidden, ids, chunk=7)
    states = blip3o.condition_window(config, hidden, batch.window_start, "tail")
    condition = blip3o.make_condition(config, params, states, ref_latent, has_ref)
    if recorded_condition is None:
        error = joint.flow_errors(config, params, states, latent, ref_latent, has_ref, draw)
    else:
        error = joint.velocity_errors(config, params, recorded_condition, latent, ref_latent, draw)
    logits = blip3o.apply(config, params, "decoder", "logits", hidden)
    return ce.sum / ce.weight, error.mean(), logits, condition


def _check_gradients(recording, params, config, batch, draw, prefix) -> None:
    def total(params):
        ce, flow, *_ = _losses(config, params, batch, draw)
        return ce + flow

    gradients = treepath.flatten(jax.device_get(jax.jit(jax.grad(total))(params)))
    leaves = engine.expand(blip3o.abstract_params(config), PARTS)
    _, produce = engine.export_tensors(leaves, gradients.__getitem__, {})
    names = [name for name in recording if name.startswith(f"{prefix}_grad:")]
    assert names
    for name in names:
        key = name.split(":", 1)[1]
        diffusion_side = "sana" in key or "connector" in key or config.edit.siglip_features
        tolerance = DIFFUSION_GRADIENT if diffusion_side else DECODER_GRADIENT
        _close(produce(key), recording[name], tolerance, name)


def _close(got: np.ndarray, expected: np.ndarray, tolerance: float, name: str = "") -> None:
    assert got.shape == expected.shape, name
    error = np.abs(np.asarray(got) - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"{name} {error}"
