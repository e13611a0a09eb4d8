"""TA-Tok (`TextAlignedTokenizer` state dict) to `models/ta_tok.py`."""

from blip3o_jax.convert.rules import Rule, Unused, layer

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
    return (
        *layer(f"{source}embeddings.patch_embedding", f"{target}/patch_embedding", patch_transform),
        Rule(f"{source}embeddings.position_embedding.weight", f"{target}/position_embedding/table", "identity"),
        *(
            rule
            for names, transform in ((linears, "linear"), (norms, "identity"))
            for theirs, ours in names.items()
            for rule in layer(
                f"{source}encoder.layers.{{i}}.{theirs}", f"{target}/layers/{ours}", transform, True, surplus
            )
        ),
    )


RULES: tuple[Rule, ...] = (
    *_vit("encoder.", "encoder", "conv", LAST_LAYER),
    *_vit("decoder.vision_model.", "decoder", "linear", None),
    *layer("decoder.vision_model.post_layernorm", "decoder/final_norm", "identity"),
    *layer("encode_task_layer.0", "encode_task"),
    *layer("decode_task_layer.0", "decode_task_in"),
    *layer("decode_task_layer.2", "decode_task_out"),
    *layer("bottleneck.in_linear", "bottleneck_in"),
    *layer("bottleneck.out_linear", "bottleneck_out"),
    Rule("bottleneck.regularizer.embedding.weight", "quantizer/embedding/table", "identity"),
    *layer("bottleneck.regularizer.embedding_proj", "quantizer/projection"),
)

UNUSED: tuple[Unused, ...] = (
    Unused(r"scale_layer\.(shift|scale)", "constants: pixels are normalised before the tokenizer"),
    Unused(r"encoder\.post_layernorm\.(weight|bias)", LAST_LAYER),
    Unused(r"(encoder|decoder\.vision_model)\.head\..*", "attention-pooling head: nothing reads it"),
)
