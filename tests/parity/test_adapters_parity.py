"""Adapters against PEFT on transformers' Qwen3 and diffusers' SANA applying them, and their files there and back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.config.presets import preset
from blip3o_jax.convert import adapters, engine, safetensors_io
from blip3o_jax.convert.sources import in_memory
from blip3o_jax.convert.tables import PARTS
from blip3o_jax.lora import merge
from blip3o_jax.models.blip3o import abstract_params
from blip3o_jax.models.decoder import Decoder
from blip3o_jax.models.sana import Sana
from support.torch_params import tree_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

MODEL = preset("tiny")
QWEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SANA = ["to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point", "proj_out", "linear_1"]
KINDS = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rank pattern": {"r": 4, "rank_pattern": {"0.self_attn.q_proj": 2, "attn1.to_q": 6, "down_proj": 5}},
    "alpha pattern": {"r": 4, "lora_alpha": 8, "alpha_pattern": {r"layers.1.*proj": 3, "attn2.to_k": 1.5}},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True},
    "some layers": {"r": 4, "lora_alpha": 2, "layers_to_transform": [1]},
}


def qwen():
    c = MODEL.decoder
    torch.manual_seed(0)
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=c.vocab_size,
            hidden_size=c.width,
            num_hidden_layers=c.depth,
            intermediate_size=c.mlp_dim,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            rms_norm_eps=c.norm_eps,
            rope_theta=c.rope_theta,
            tie_word_embeddings=c.tie_embeddings,
            attn_implementation="eager",
        )  # fmt: skip
    ).eval()


def transformer():
    c = MODEL.dit
    torch.manual_seed(0)
    return diffusers.SanaTransformer2DModel(
        in_channels=c.in_channels, out_channels=c.out_channels, num_attention_heads=c.num_heads,
        attention_head_dim=c.head_dim, num_layers=c.depth, num_cross_attention_heads=c.num_cross_heads,
        cross_attention_head_dim=c.cross_head_dim, cross_attention_dim=c.width, caption_channels=c.caption_channels,
        qk_norm="rms_norm_across_heads",
    ).eval()  # fmt: skip


def randomised(model) -> None:
    """Makes the adapter of a wrapped model do something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
            elif "magnitude" in name:
                value.mul_(1 + 0.3 * torch.randn(value.shape, generator=generator))


def tensors_of(model) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}


def decoder_params(tensors):
    abstract = {"decoder": abstract_params(MODEL)["decoder"]}
    leaves = engine.expand(abstract, {"decoder": PARTS["decoder"]})
    return {"decoder": engine.load(engine.Plan(leaves, {}, {}), in_memory(tensors))["decoder"]}


def assert_close(got, expected):
    assert np.abs(np.asarray(got) - expected).max() <= 1e-5 * np.abs(expected).max()


def by_layers(params: dict, adapter) -> dict:
    """The parameters with the leaves of an adapter beside their kernels, as they are in training."""
    leaves = {path: jnp.asarray(leaf) for path, leaf in adapter.leaves.items()}
    leaves |= {f"{path}/lora_scale": jnp.asarray(site.scale) for path, site in adapter.sites.items()}
    from blip3o_jax.treepath import merge as join
    from blip3o_jax.treepath import unflatten

    return join(params, unflatten(leaves))


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_under_an_adapter_equals_peft(kind, tmp_path):
    base = qwen()
    params = decoder_params(tensors_of(base))
    wrapped = peft.get_peft_model(base, peft.LoraConfig(target_modules=QWEN, **KINDS[kind]))
    randomised(wrapped)
    wrapped.save_pretrained(tmp_path / "theirs")
    stored = adapters.load_adapter(tmp_path / "theirs", MODEL)
    ids = np.random.default_rng(0).integers(0, MODEL.decoder.vocab_size, (2, 12)).astype(np.int32)
    with torch.no_grad():
        expected = wrapped(torch.from_numpy(ids).long()).logits.numpy()

    def logits(params):
        tree = {"params": params["decoder"]}
        return Decoder(MODEL.decoder).apply(tree, ids, method="init_all")

    assert_close(logits(merge(params, [(stored.adapter, 1.0)])), expected)
    if kind != "some layers":  # training adapts every layer of a stack
        assert_close(logits(by_layers(params, stored.adapter)), expected)
    adapters.save_adapter(tmp_path / "ours", stored.adapter, MODEL, settings=stored.settings)
    same_files(tmp_path / "theirs", tmp_path / "ours", adapters.PEFT)
    assert (tmp_path / "ours" / adapters.CONFIG).read_text().split() == (
        tmp_path / "theirs" / adapters.CONFIG
    ).read_text().split()
    adapters.save_adapter(tmp_path / "described", stored.adapter, MODEL)  # by us alone, read by PEFT
    again = peft.PeftModel.from_pretrained(qwen(), tmp_path / "described")
    with torch.no_grad():
        assert_close(again(torch.from_numpy(ids).long()).logits.numpy(), expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "some layers"])
def test_a_transformer_under_an_adapter_equals_diffusers(kind, tmp_path):
    base = transformer()
    params = {"dit": jax.tree.map(jnp.asarray, tree_of(tensors_of(base), PARTS["dit"].rules))}
    base.add_adapter(peft.LoraConfig(target_modules=SANA, **KINDS[kind]), "default")
    randomised(base)
    layers = peft.get_peft_model_state_dict(base, adapter_name="default")
    config = base.peft_config["default"].to_dict()
    for name in ("target_modules",):
        config[name] = sorted(config[name])
    diffusers.SanaPipeline.save_lora_weights(
        tmp_path / "theirs", transformer_lora_layers=layers, transformer_lora_adapter_metadata=config
    )
    stored = adapters.load_adapter(tmp_path / "theirs", MODEL)
    generator = np.random.default_rng(0)
    x = generator.normal(size=(2, 4, 4, MODEL.dit.in_channels)).astype(np.float32)
    condition = generator.normal(size=(2, 7, MODEL.dit.caption_channels)).astype(np.float32)
    t = np.array([900.0, 30.0], np.float32)

    def theirs(model):
        with torch.no_grad():
            latent = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
            return model(latent, torch.from_numpy(condition), torch.from_numpy(t)).sample.numpy().transpose(0, 2, 3, 1)

    def ours(params):
        return Sana(MODEL.dit).apply({"params": params["dit"]}, x, t, condition, method="denoise")

    expected = theirs(base)
    assert_close(ours(merge(params, [(stored.adapter, 1.0)])), expected)
    assert_close(ours(by_layers(params, stored.adapter)), expected)
    adapters.save_adapter(tmp_path / "ours", stored.adapter, MODEL, settings=stored.settings)
    same_files(tmp_path / "theirs", tmp_path / "ours", adapters.DIFFUSERS)
    adapters.save_adapter(tmp_path / "described", stored.adapter, MODEL)
    for folder in ("ours", "described"):
        state, metadata = diffusers.SanaPipeline.lora_state_dict(tmp_path / folder, return_lora_metadata=True)
        again = transformer()
        diffusers.SanaPipeline.load_lora_into_transformer(state, again, metadata=metadata)
        assert_close(theirs(again), expected)


def test_a_diffusers_file_without_settings_is_scaled_by_one(tmp_path):
    base = transformer()
    base.add_adapter(peft.LoraConfig(r=3, lora_alpha=3, target_modules=SANA), "default")
    randomised(base)
    layers = peft.get_peft_model_state_dict(base, adapter_name="default")
    diffusers.SanaPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    stored = adapters.load_adapter(tmp_path, MODEL)
    assert all(np.all(site.scale == 1) for site in stored.adapter.sites.values())


def same_files(first, second, name):
    one, other = (safetensors_io.open_file(folder / name) for folder in (first, second))
    assert set(one) == set(other)
    for key, tensor in one.items():
        np.testing.assert_array_equal(tensor.read(), other[key].read())
        assert tensor.dtype == other[key].dtype


def test_weights_of_several_types_are_kept(tmp_path):
    base = qwen()
    wrapped = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], r=2)).to(torch.bfloat16)
    randomised(wrapped)
    wrapped.save_pretrained(tmp_path / "theirs")
    stored = adapters.load_adapter(tmp_path / "theirs", dataclasses.replace(MODEL))
    adapters.save_adapter(tmp_path / "ours", stored.adapter, MODEL, settings=stored.settings)
    same_files(tmp_path / "theirs", tmp_path / "ours", adapters.PEFT)
