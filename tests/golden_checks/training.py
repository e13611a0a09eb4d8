"""One training pass of the reference: ids, cross-entropy, flow-matching loss, what entered the DiT, gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax import treepath
from blip3o_jax.convert import engine
from blip3o_jax.convert.tables import PARTS
from blip3o_jax.diffusion import flow
from blip3o_jax.models import blip3o
from blip3o_jax.objectives import joint
from blip3o_jax.types import Batch
from golden_checks import Sample, nchw
from golden_checks.inference import row_of, with_placeholders

SPLICED = -200  # where the reference's ids take up the scale token and the ids of the target


def training_pass(sample: Sample) -> dict[str, np.ndarray]:
    """`t2i_*` or `edit_*`."""
    recording, config = sample.recording, sample.config
    prefix = "edit" if "edit_u" in recording else "t2i"
    batch = _batch(sample)
    draw = joint.FlowDraw(recording[f"{prefix}_u"], sample.image(f"{prefix}_noise"), np.zeros(1, bool))

    def loss(params):
        codes, features = joint.encode_codes(config, params, batch)
        latent, ref_latent, has_ref = joint.encode_latents(config, params, batch)
        hidden, ids = joint.read(config, params, batch, codes, features)
        ce, _ = joint.token_loss(config, params, batch, hidden, ids, chunk=7)
        states = blip3o.condition_window(config, hidden, batch.window_start, "tail")
        error = joint.flow_errors(config, params, states, latent, ref_latent, has_ref, draw)
        losses = jnp.stack([ce.sum / ce.weight, error.mean()])
        noisy, sigma, _ = flow.noisy_example(config.schedule, latent, draw.noise, draw.u)
        seen = {
            "logits": blip3o.apply(config, params, "decoder", "logits", hidden),
            "loss_total": losses.sum(),
            "loss_ce_diff": losses,
            "dit_in_x": jnp.concatenate([noisy, ref_latent], axis=2) if config.edit.vae_noise else noisy,
            "dit_in_t": sigma * config.schedule.num_train_timesteps,
            "dit_in_cond": blip3o.make_condition(config, params, states, ref_latent, has_ref),
        }
        return losses.sum(), seen

    gradients, seen = jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(sample.params))
    gradients = treepath.flatten(gradients)
    leaves = engine.expand(blip3o.abstract_params(config), PARTS)
    exported = engine.export_tensors(leaves, gradients.__getitem__, {})
    seen |= {"ids": _ids(sample), "dit_in_x": nchw(seen["dit_in_x"])}
    results = {f"{prefix}_{name}": value for name, value in seen.items()}
    recorded = [name for name in recording if name.startswith(f"{prefix}_grad:")]
    return results | {name: exported[name.split(":", 1)[1]].read() for name in recorded}


def _batch(sample: Sample) -> Batch:
    row, edits = row_of(sample, open_ended=False), "edit_ref_image" in sample.recording
    return Batch(
        tokens=row.tokens[None],
        length=np.array([len(row)]),
        loss_mask=row.loss_mask[None],
        image_slot=row.image_slot[None],
        window_start=np.array([row.window_start]),
        ref_mask=np.ones((1, int(edits)), bool),
        target_pixels=sample.image("train_target"),
        target_tokenizer_pixels=sample.image("train_tok_image"),
        ref_tokenizer_pixels=sample.image("edit_ref_tok_image")[:, None] if edits else None,
        ref_pixels=sample.image("edit_ref_image") if edits else None,
    )


def _ids(sample: Sample) -> np.ndarray:
    row = row_of(sample, open_ended=False)
    start, end = row.window_start, row.window_start + 1 + sample.config.num_image_tokens
    ids = with_placeholders(sample, row)[0]
    return np.concatenate([ids[:start], [SPLICED], ids[end:]])[None]
