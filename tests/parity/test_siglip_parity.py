"""The image tokenizer against one composed of transformers' SigLIP modules, with random weights everywhere."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.config import TATokConfig, ViTConfig
from blip3o_jax.convert.engine import load, plan
from blip3o_jax.convert.sources import in_memory
from blip3o_jax.convert.tables import LAST_LAYER, PARTS
from blip3o_jax.models.siglip import PositionEmbedding, SiglipVision
from blip3o_jax.models.ta_tok import TATok

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = TATokConfig(
    encoder=ViTConfig(3, 48, 3, 80, 4, patch_size=7, num_positions=25, final_norm=False),
    decoder=ViTConfig(24, 48, 2, 64, 3, patch_size=1, num_positions=16, final_norm=True),
    image_size=38,
    bottleneck_dim=24,
    codebook_size=64,
)
WIDE = ViTConfig(3, 1152, 1, 4304, 16, patch_size=14, num_positions=729, final_norm=False)


def randomise(model: "torch.nn.Module", seed: int) -> "torch.nn.Module":
    """Draws every parameter anew, norms and biases included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 1:
                value.copy_(0.3 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            else:
                value.copy_(noise * value[0].numel() ** -0.5)
    return model.eval()


def tower(config: ViTConfig, image_size: int, surplus: int) -> "torch.nn.Module":
    """SigLIP with `surplus` layers more than we run."""
    settings = transformers.SiglipVisionConfig(
        hidden_size=config.width,
        intermediate_size=config.mlp_dim,
        num_hidden_layers=config.depth + surplus,
        num_attention_heads=config.num_heads,
        patch_size=config.patch_size,
        image_size=image_size,
    )
    return randomise(transformers.SiglipVisionModel(settings), 0)


def feature_decoder(config: ViTConfig) -> "torch.nn.Module":
    settings = transformers.Siglip2VisionConfig(
        hidden_size=config.width,
        intermediate_size=config.mlp_dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        num_channels=config.in_channels,
        num_patches=config.num_positions,
        patch_size=1,
    )
    return randomise(transformers.Siglip2VisionModel(settings), 1)


class Reference(torch.nn.Module):
    """TA-Tok from the specification: tower, pooling, task layer, SimVQ, feature decoder."""

    def __init__(self, config: TATokConfig):
        super().__init__()
        linear, width, inner = torch.nn.Linear, config.encoder.width, config.bottleneck_dim
        self.encoder = tower(config.encoder, config.image_size, surplus=1)
        self.decoder = feature_decoder(config.decoder)
        self.own = randomise(
            torch.nn.ModuleDict(
                {
                    "task": linear(width, width),
                    "in": linear(width, inner),
                    "out": linear(inner, inner),
                    "table": torch.nn.Embedding(config.codebook_size, inner),
                    "project": linear(inner, inner),
                    "first": linear(width, width),
                    "second": linear(width, width),
                }
            ),
            2,
        )

    def codebook(self):
        return torch.nn.functional.normalize(self.own["project"](self.own["table"].weight), dim=-1)

    def encode(self, pixels, pool_scale):
        states = self.encoder(pixels, output_hidden_states=True).hidden_states[-2]
        side = math.isqrt(states.shape[1])
        grid = states.transpose(1, 2).reshape(len(states), -1, side, side)
        pooled = torch.nn.functional.avg_pool2d(grid, pool_scale).flatten(2).transpose(1, 2)
        features = torch.tanh(self.own["task"](pooled))
        z = torch.nn.functional.normalize(self.own["in"](features), dim=-1)
        return features, (z @ self.codebook().T).argmax(-1)

    def decode(self, indices):
        batch, length = indices.shape
        side = math.isqrt(length)
        x = self.own["out"](self.codebook()[indices])
        shapes = torch.tensor([[side, side]] * batch)
        x = self.decoder(x, torch.ones(batch, length), shapes).last_hidden_state
        return self.own["second"](torch.tanh(self.own["first"](x)))

    def tensors(self) -> dict[str, np.ndarray]:
        """The state dict under the names of a released checkpoint."""
        names = {
            "task": "encode_task_layer.0",
            "in": "bottleneck.in_linear",
            "out": "bottleneck.out_linear",
            "table": "bottleneck.regularizer.embedding",
            "project": "bottleneck.regularizer.embedding_proj",
            "first": "decode_task_layer.0",
            "second": "decode_task_layer.2",
        }
        found = {f"scale_layer.{name}": torch.ones(1, 3, 1, 1) for name in ("shift", "scale")}
        for prefix, module in (("encoder.", self.encoder), ("decoder.vision_model.", self.decoder)):
            found |= {prefix + key.removeprefix("vision_model."): value for key, value in module.state_dict().items()}
        for name, key in names.items():
            found |= {f"{key}.{leaf}": value for leaf, value in self.own[name].state_dict().items()}
        return {PARTS["image_tokenizer"].prefix + key: value.detach().numpy() for key, value in found.items()}


@pytest.fixture(scope="module")
def reference():
    return Reference(SMALL)


@pytest.fixture(scope="module")
def params(reference):
    pixels = jnp.zeros((1, SMALL.image_size, SMALL.image_size, 3))
    abstract = jax.eval_shape(lambda: TATok(SMALL).init(jax.random.key(0), pixels)["params"])
    source = in_memory(reference.tensors())
    parts = {"image_tokenizer": PARTS["image_tokenizer"]}
    proof = plan({"image_tokenizer": abstract}, source, parts)
    assert {LAST_LAYER} < set(proof.unused.values())
    return load(proof, source)["image_tokenizer"]


def close(got, expected, tolerance: float = 2e-5) -> None:
    expected = expected.detach().numpy()
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("pool_scale", [1, 2, 3])
def test_codes_and_features_are_those_of_transformers_modules(reference, params, pool_scale):
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 38, 38, 3)).astype(np.float32)
    features, indices = reference.encode(torch.tensor(pixels.transpose(0, 3, 1, 2)), pool_scale)
    run = jax.jit(lambda p, x: TATok(SMALL).apply({"params": p}, x, pool_scale, method="encode"))
    output = run(params, pixels)
    close(output.features, features)
    np.testing.assert_array_equal(output.indices, indices.numpy())
    close(output.codes, reference.codebook()[indices])
    decode = jax.jit(lambda p, i: TATok(SMALL).apply({"params": p}, i, method="decode_from_indices"))
    close(decode(params, output.indices), reference.decode(indices))


@pytest.mark.parametrize("rows, columns", [(27, 27), (16, 16), (9, 9), (5, 21), (40, 3)])
def test_positions_are_resized_as_torch_does(rows, columns):
    config = ViTConfig(1, 8, 1, 8, 1, patch_size=1, num_positions=256, final_norm=False)
    table = np.random.default_rng(0).normal(size=(256, 8)).astype(np.float32)
    grid = torch.tensor(table).T.reshape(1, 8, 16, 16)
    expected = torch.nn.functional.interpolate(
        grid, (rows, columns), mode="bilinear", align_corners=False, antialias=True
    )
    got = PositionEmbedding(config).apply({"params": {"table": table}}, rows, columns)
    np.testing.assert_allclose(got, expected[0].permute(1, 2, 0).numpy(), atol=1e-5)


def test_one_layer_at_true_width_is_that_of_transformers():
    model = tower(WIDE, 384, surplus=1)
    part = PARTS["image_tokenizer"]
    names = {f"{part.prefix}encoder.{key.removeprefix('vision_model.')}": key for key in model.state_dict()}
    source = in_memory({name: model.state_dict()[key].detach().numpy() for name, key in names.items()})
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 384, 384, 3)).astype(np.float32)
    abstract = jax.eval_shape(lambda: SiglipVision(WIDE).init(jax.random.key(0), pixels)["params"])
    proof = plan({"image_tokenizer": {"encoder": abstract}}, source, {"image_tokenizer": part})
    weights = load(proof, source)["image_tokenizer"]["encoder"]
    with torch.no_grad():
        nchw = torch.tensor(pixels.transpose(0, 3, 1, 2))
        expected = model(nchw, output_hidden_states=True).hidden_states[-2]
    got = jax.jit(SiglipVision(WIDE).apply)({"params": weights}, pixels)
    assert got.shape == (1, 729, 1152)
    close(got, expected)
