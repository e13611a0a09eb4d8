"""Decoder: transformers `Qwen3ForCausalLM`, as BLIP3o-NEXT stores it, to `models/decoder.py`.

The output head has a leaf of its own only where it is not tied to the embedding; a tied head that is stored all the
same is an alias, which the loader recognises.
"""

from blip3o_jax.convert.rules import Rule, Unused, layer

LINEAR = {
    "self_attn.q_proj": "attention/query",
    "self_attn.k_proj": "attention/key",
    "self_attn.v_proj": "attention/value",
    "self_attn.o_proj": "attention/out",
    "mlp.gate_proj": "mlp/gate",
    "mlp.up_proj": "mlp/up",
    "mlp.down_proj": "mlp/down",
}
NORMS = {
    "input_layernorm": "attention_norm",
    "self_attn.q_norm": "attention/query_norm",
    "self_attn.k_norm": "attention/key_norm",
    "post_attention_layernorm": "mlp_norm",
}

RULES: tuple[Rule, ...] = (
    Rule("model.embed_tokens.weight", "embed/table", "identity"),
    *(
        rule
        for names, transform in ((LINEAR, "linear"), (NORMS, "identity"))
        for theirs, ours in names.items()
        for rule in layer(f"model.layers.{{i}}.{theirs}", f"layers/{ours}", transform, bias=False)
    ),
    *layer("model.norm", "final_norm", "identity", bias=False),
    Rule("lm_head.weight", "lm_head/table", "identity"),
)

FREQUENCIES = "rotary frequencies are computed from the configuration"
UNUSED: tuple[Unused, ...] = (
    Unused(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", FREQUENCIES),
    Unused(r"model\.und_image_vae_as_noise_connector\..*", "the reference makes this connector and never calls it"),
)
