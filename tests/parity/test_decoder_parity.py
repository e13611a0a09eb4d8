"""The decoder against transformers' Qwen3 on random weights, and the truncation of logits against its warpers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.config import DecoderConfig
from blip3o_jax.convert import engine
from blip3o_jax.convert.rules import TRANSFORMS
from blip3o_jax.convert.tables import PARTS
from blip3o_jax.generate.ar import TokenSampling, truncate
from blip3o_jax.models.decoder import Decoder
from blip3o_jax.treepath import unflatten

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = DecoderConfig(128, 48, 3, 80, 6, 2, 16, max_length=256, tie_embeddings=False)
TRUE_WIDTH = DecoderConfig(64, 2048, 1, 6144, 16, 8, 128, max_length=256)  # one layer of Qwen3-1.7B


def reference(config: DecoderConfig):
    """transformers' model with random norms too, and the same weights as our parameters."""
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            num_hidden_layers=config.depth,
            intermediate_size=config.mlp_dim,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            max_position_embeddings=config.max_length,
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="eager",
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
    tensors = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    abstract = jax.eval_shape(
        lambda: Decoder(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), method="init_all")["params"]
    )
    leaves = engine.expand({"decoder": abstract}, {"decoder": PARTS["decoder"]})

    def value(leaf):
        forward = TRANSFORMS[leaf.rule.transform].forward
        parts = [forward(tensors[key]) for key in leaf.keys]
        return jnp.asarray(np.stack(parts) if leaf.stacked else parts[0])

    return model, unflatten({leaf.path: value(leaf) for leaf in leaves})["decoder"]


@pytest.mark.parametrize("config", [SMALL, TRUE_WIDTH], ids=["small", "true width"])
def test_states_and_logits_equal_transformers_with_and_without_padding(config):
    model, params = reference(config)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 24)).astype(np.int32)
    valid = np.arange(24) >= np.array([[0], [7]])
    positions = np.maximum(np.cumsum(valid, axis=1) - 1, 0)
    with torch.no_grad():
        expected = model(
            input_ids=torch.tensor(ids, dtype=torch.long),
            attention_mask=torch.tensor(valid, dtype=torch.long),
            position_ids=torch.tensor(positions, dtype=torch.long),
            output_hidden_states=True,
        )

    @jax.jit
    def run(params):
        decoder = Decoder(config)
        x = decoder.apply({"params": params}, ids, method="embed_tokens")
        hidden = decoder.apply({"params": params}, x, positions, valid)
        return hidden, decoder.apply({"params": params}, hidden, method="logits")

    for got, wanted in zip(run(params), (expected.hidden_states[-1], expected.logits), strict=True):
        wanted = wanted.numpy()
        distance = np.abs(np.asarray(got) - wanted)[valid]
        assert distance.max() <= 1e-5 * np.abs(wanted[valid]).max()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 50, 0.9), (0.7, 0, 0.8), (1.3, 20, 1.0), (1.0, 1, 0.5), (1.0, 300, 0.95)]
)
def test_truncation_equals_the_warpers_of_transformers(temperature, top_k, top_p):
    logits = (np.random.default_rng(1).normal(size=(16, 200)) * 3).astype(np.float32)
    warped = torch.tensor(logits)
    warpers = [transformers.TemperatureLogitsWarper(temperature)]
    warpers += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    for warper in warpers:
        warped = warper(None, warped)
    got = np.asarray(truncate(jnp.asarray(logits), TokenSampling(temperature, top_k, top_p)))
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(warped.numpy()))
    kept = np.isfinite(got)
    np.testing.assert_allclose(got[kept], warped.numpy()[kept], rtol=1e-6)
