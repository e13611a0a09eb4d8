"""TA-Tok (`TextAlignedTokenizer` state dict) to `models/ta_tok.py`."""

from blip3o_jax.convert.rules import Rule, Unused

LAST_LAYER = "the tokenizer reads the hidden state before the tower's last layer"


def _vit(source: str, target: str, patch_transform: str, surplus: str | None) -> tuple[Rule, ...]:
    """Rules of one transformer: a stack of layers between its embeddings and its norm."""
    linears = {
        "self_attn.q_proj": "attention/query",
        "self_attn.k_proj": "attention/key",
        "self_attn.v_proj": "attention/value",
        "self_attn.out_proj": "attention/out",
        "mlp.fc1": "mlp/in",
        "mlp.fc2": "mlp/out",
    }
    norms = {"layer_norm1": "norm1", "layer_norm2": "norm2"}
    rules = [
        Rule(f"{source}embeddings.patch_embedding.weight", f"{target}/patch_embedding/kernel", patch_transform),
        Rule(f"{source}embeddings.patch_embedding.bias", f"{target}/patch_embedding/bias", "identity"),
        Rule(f"{source}embeddings.position_embedding.weight", f"{target}/position_embedding/table", "identity"),
    ]
    for names, leaf, transform in ((linears, "kernel", "linear"), (norms, "scale", "identity")):
        for theirs, ours in names.items():
            layer, stack = f"{source}encoder.layers.{{i}}.{theirs}", f"{target}/layers/{ours}"
            rules.append(Rule(f"{layer}.weight", f"{stack}/{leaf}", transform, surplus))
            rules.append(Rule(f"{layer}.bias", f"{stack}/bias", "identity", surplus))
    return tuple(rules)


def _linear(source: str, target: str) -> tuple[Rule, Rule]:
    return Rule(f"{source}.weight", f"{target}/kernel", "linear"), Rule(f"{source}.bias", f"{target}/bias", "identity")


RULES: tuple[Rule, ...] = (
    *_vit("encoder.", "encoder", "conv", LAST_LAYER),
    *_vit("decoder.vision_model.", "decoder", "linear", None),
    Rule("decoder.vision_model.post_layernorm.weight", "decoder/final_norm/scale", "identity"),
    Rule("decoder.vision_model.post_layernorm.bias", "decoder/final_norm/bias", "identity"),
    *_linear("encode_task_layer.0", "encode_task"),
    *_linear("decode_task_layer.0", "decode_task_in"),
    *_linear("decode_task_layer.2", "decode_task_out"),
    *_linear("bottleneck.in_linear", "bottleneck_in"),
    *_linear("bottleneck.out_linear", "bottleneck_out"),
    Rule("bottleneck.regularizer.embedding.weight", "quantizer/embedding/table", "identity"),
    *_linear("bottleneck.regularizer.embedding_proj", "quantizer/projection"),
)

UNUSED: tuple[Unused, ...] = (
    Unused(r"scale_layer\.(shift|scale)", "constants: pixels are normalised before the tokenizer"),
    Unused(r"encoder\.post_layernorm\.(weight|bias)", LAST_LAYER),
    Unused(r"(encoder|decoder\.vision_model)\.head\..*", "attention-pooling head: nothing reads it"),
)
