"""Decoder: transformers `Qwen3ForCausalLM`, as BLIP3o-NEXT stores it, to `models/decoder.py`.

The output head has a leaf of its own only where it is not tied to the embedding; a tied head that is stored all the
same is an alias, which the loader recognises.
"""

from blip3o_jax.convert.rules import Rule, Unused

LAYER = "model.layers.{i}."

RULES: tuple[Rule, ...] = (
    Rule("model.embed_tokens.weight", "embed/table", "identity"),
    Rule(LAYER + "input_layernorm.weight", "layers/attention_norm/scale", "identity"),
    Rule(LAYER + "self_attn.q_proj.weight", "layers/attention/query/kernel", "linear"),
    Rule(LAYER + "self_attn.k_proj.weight", "layers/attention/key/kernel", "linear"),
    Rule(LAYER + "self_attn.v_proj.weight", "layers/attention/value/kernel", "linear"),
    Rule(LAYER + "self_attn.o_proj.weight", "layers/attention/out/kernel", "linear"),
    Rule(LAYER + "self_attn.q_norm.weight", "layers/attention/query_norm/scale", "identity"),
    Rule(LAYER + "self_attn.k_norm.weight", "layers/attention/key_norm/scale", "identity"),
    Rule(LAYER + "post_attention_layernorm.weight", "layers/mlp_norm/scale", "identity"),
    Rule(LAYER + "mlp.gate_proj.weight", "layers/mlp/gate/kernel", "linear"),
    Rule(LAYER + "mlp.up_proj.weight", "layers/mlp/up/kernel", "linear"),
    Rule(LAYER + "mlp.down_proj.weight", "layers/mlp/down/kernel", "linear"),
    Rule("model.norm.weight", "final_norm/scale", "identity"),
    Rule("lm_head.weight", "lm_head/table", "identity"),
)

UNUSED: tuple[Unused, ...] = (
    Unused(r"model\.rotary_emb\.inv_freq", "rotary frequencies are computed from the configuration"),
    Unused(
        r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "rotary frequencies are computed from the configuration"
    ),
)
