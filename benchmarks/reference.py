"""The other side of the comparison: transformers and diffusers under PyTorch, on the same weights.

Every row exists as the reference runs it. Rows whose name ends in `+` are the same with our savings, as far as they
are not a matter of the framework: states from the decoding loop in place of a second forward pass, the image rows of
the head only, connector once in place of at every step, the codebook once, no layer whose output nobody reads.
The caption projection and the keys and values of the condition stay within diffusers' model and are recomputed.

Source: BLIP3o-NEXT `generate_images`. Batches of one, so no padding and no attention mask.
"""

import json
import pathlib

import numpy as np
import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
from measure import Row
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel
from workload import GUIDANCE_SCALE, TOP_K, TOP_P, Workload

from blip3o_jax.text.sequence import Sequence

TOWER = "model.vision_tower.vision_tower."
UNREAD = ("head.", "post_layernorm.")  # of the tower: run by the reference, absent from a random checkpoint


def make(workload: Workload, threads: int):
    """Rows, the device's kind, and a function that says the peak of the device's memory (None: it has none)."""
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = Reference(workload, device).rows()
    if device == "cpu":
        return rows, "cpu", None
    return rows, torch.cuda.get_device_name(), torch.cuda.max_memory_allocated


class Reference:
    """The modules, loaded from a checkpoint in the released layout."""

    def __init__(self, workload: Workload, device: str):
        self.workload, self.config, self.device = workload, workload.config, device
        self.dtype = getattr(torch, workload.dtype)
        self.weights = read(workload.checkpoint)
        folder = workload.checkpoint / "diffusion"
        main = json.loads((workload.checkpoint / "config.json").read_text())
        vision = json.loads((workload.checkpoint / "siglip_config.json").read_text())["vision_config"]
        keys = [key for key in self.weights if key.startswith(("model.embed", "model.layers", "model.norm"))]
        decoder = Qwen3Config(
            **{key: value for key, value in main.items() if key not in ("architectures", "model_type")}
        )
        self.lm = self.load(Qwen3ForCausalLM(decoder), {key: self.weights[key] for key in keys}, ("lm_head",))
        self.tower = self.load(SiglipVisionModel(SiglipVisionConfig(**vision)), self.part(TOWER + "encoder."), UNREAD)
        transformer = built(SanaTransformer2DModel, folder / "transformer")
        self.sana = self.load(transformer, self.part("model.sana."))
        self.vae = self.load(built(AutoencoderDC, folder / "vae"), self.part("model.sana_vae."))
        self.scheduler = built(FlowMatchEulerDiscreteScheduler, folder / "scheduler")
        self.connector = self.load(connector(self.config.connector), self.part("model.diffusion_connector."))
        self.tokenizer = {key: self.place(value) for key, value in self.part(TOWER).items() if "coder." not in key}
        del self.weights
        self.codebook = self.effective_codebook()
        inputs = workload.inputs
        self.prompt, self.edit_prompt = self.ids(inputs.prompt), self.ids(inputs.edit_prompt)
        self.states, self.noise = self.place(inputs.states), self.image(inputs.noise)
        self.tokenizer_pixels, self.pixels = self.image(inputs.tokenizer_pixels), self.image(inputs.pixels)

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.weights.items() if key.startswith(prefix)}

    def load(self, module: nn.Module, weights: dict[str, torch.Tensor], absent: tuple[str, ...] = ()) -> nn.Module:
        """The module on its device with these weights; only parameters named `absent` may lack one."""
        result = module.load_state_dict(weights, strict=False)
        lacking = [key for key in result.missing_keys if not key.startswith(absent)] if absent else result.missing_keys
        assert not lacking and not result.unexpected_keys, (lacking[:3], result.unexpected_keys[:3])
        return module.to(self.device, self.dtype).eval()

    def place(self, array) -> torch.Tensor:
        return torch.as_tensor(array).to(self.device, self.dtype)

    def image(self, array: np.ndarray) -> torch.Tensor:
        return self.place(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))

    def ids(self, prompt: Sequence) -> torch.Tensor:
        """i64[1 T] of a prompt, codes in place."""
        codes = self.workload.inputs.codes.reshape(-1)[np.maximum(prompt.image_slot, 0)]
        ids = np.where(prompt.image_slot >= 0, codes + self.config.tokens.image_start, prompt.tokens)
        return torch.as_tensor(ids[None].astype(np.int64)).to(self.device)

    def rows(self) -> dict[str, Row]:
        """Name -> row."""
        image = lambda x: x.float().cpu().permute(0, 2, 3, 1).numpy()  # noqa: E731
        states = lambda x: x.float().cpu().numpy()  # noqa: E731
        tokens, steps, scaling = self.workload.tokens, self.workload.steps, self.config.autoencoder.scaling_factor
        return {
            "tokenizer encode": self.row(self.encode_tokens, states),
            "tokenizer encode+": self.row(self.encode_tokens_lean, states),
            "prefill": self.row(lambda: self.prefill(self.prompt), states),
            "prefill, 1 reference": self.row(lambda: self.prefill(self.edit_prompt), states),
            "decode": self.row(lambda: self.generate(tokens)),
            "decode+": self.row(lambda: self.generate_lean(tokens)),
            "DiT": self.row(lambda: self.denoise(self.states, self.noise, 30, steps), image),
            "DiT+": self.row(lambda: self.denoise(self.states, self.noise, 30, steps, lean=True), image),
            "autoencoder encode": self.row(lambda: self.vae.encode(self.pixels).latent * scaling, image),
            "autoencoder decode": self.row(lambda: self.vae.decode(self.noise / scaling).sample, image),
            "whole picture": self.row(self.picture),
            "whole picture+": self.row(self.picture_lean),
        }

    def row(self, run, value=None) -> Row:
        @torch.inference_mode()
        def call(_):
            result = run()
            if self.device == "cuda":
                torch.cuda.synchronize()
            return result

        return Row(call, value=value)

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.tokenizer[f"{name}.weight"], self.tokenizer[f"{name}.bias"])

    def effective_codebook(self) -> torch.Tensor:
        table = self.tokenizer["bottleneck.regularizer.embedding.weight"]
        return F.normalize(self.linear(table, "bottleneck.regularizer.embedding_proj"), dim=-1)

    def encode_tokens(self) -> torch.Tensor:
        """Features of a picture; its codes are found on the way. The feature decoder is left out."""
        tower = self.tower(self.tokenizer_pixels, output_hidden_states=True).hidden_states[-2]
        features = torch.tanh(self.linear(tower, "encode_task_layer.0"))
        z = F.normalize(self.linear(features, "bottleneck.in_linear"), dim=-1)
        torch.softmax(z @ self.effective_codebook().T / 0.03, dim=-1).argmax(dim=-1)
        return features

    def encode_tokens_lean(self) -> torch.Tensor:
        x = self.tower.embeddings(self.tokenizer_pixels)
        for layer in self.tower.encoder.layers[:-1]:
            x = layer(x, None)
        features = torch.tanh(self.linear(x, "encode_task_layer.0"))
        (F.normalize(self.linear(features, "bottleneck.in_linear"), dim=-1) @ self.codebook.T).argmax(dim=-1)
        return features

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """Last state of a prompt; its logits are computed, as decoding needs them."""
        last = self.lm.model(ids, use_cache=True).last_hidden_state[:, -1]
        self.lm.lm_head(last)
        return last

    def generate(self, tokens: int) -> torch.Tensor:
        """Ids i64[1 T+tokens], sampled from the whole vocabulary; no id ends the row."""
        settings = {"do_sample": True, "top_k": TOP_K, "top_p": TOP_P, "max_new_tokens": tokens, "eos_token_id": None}
        return self.lm.generate(self.prompt, attention_mask=torch.ones_like(self.prompt), **settings)

    def generate_lean(self, tokens: int) -> torch.Tensor:
        """States [1 1+tokens D] of the prompt's last position and of every token, sampled from the image ids."""
        first = self.config.tokens.image_start
        rows = self.lm.lm_head.weight[first : first + self.config.tokens.num_image_tokens]
        output, states = self.lm.model(self.prompt, use_cache=True), []
        for _ in range(tokens):
            states.append(output.last_hidden_state[:, -1:])
            token = sample(F.linear(states[-1][:, 0], rows).float())
            output = self.lm.model(token + first, past_key_values=output.past_key_values, use_cache=True)
        return torch.cat([*states, output.last_hidden_state], dim=1)

    def denoise(self, states: torch.Tensor, latents: torch.Tensor, steps: int, stop: int, lean: bool = False):
        """Latents after `stop` of `steps` Euler steps."""
        self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=self.device)
        both = torch.cat([torch.zeros_like(states), states])
        condition = self.connector(both) if lean else None
        for t in self.scheduler.timesteps[:stop]:
            condition = condition if lean else self.connector(both)
            out = self.sana(torch.cat([latents, latents]), condition, t.expand(2)).sample
            null, conditioned = out.chunk(2)
            latents = self.scheduler.step(null + GUIDANCE_SCALE * (conditioned - null), t, latents).prev_sample
        return latents

    def picture(self) -> np.ndarray:
        """As the reference: generate, a second forward pass over everything, the loop, the decoder."""
        ids = self.generate(self.config.num_image_tokens)
        states = self.lm.model(ids, use_cache=False).last_hidden_state[:, self.prompt.shape[1] - 1 :]
        return self.finish(states)

    def picture_lean(self) -> np.ndarray:
        return self.finish(self.generate_lean(self.config.num_image_tokens), lean=True)

    def finish(self, states: torch.Tensor, lean: bool = False) -> np.ndarray:
        steps = self.workload.picture_steps
        noise = torch.randn(self.noise.shape, device=self.device, dtype=self.dtype)
        latents = self.denoise(states, noise, steps, steps, lean)
        pixels = self.vae.decode(latents / self.config.autoencoder.scaling_factor).sample
        return ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def read(directory: pathlib.Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint."""
    weights = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            weights |= {key: file.get_tensor(key) for key in file.keys()}
    return weights


def built(kind: type, directory: pathlib.Path):
    """A diffusers class by its configuration."""
    return kind.from_config(kind.load_config(directory))


def connector(config) -> nn.Sequential:
    """The diffusion connector."""
    hidden, out = nn.Linear(config.in_width, config.width), nn.Linear(config.width, config.width)
    return nn.Sequential(hidden, nn.GELU(approximate="tanh"), out, nn.RMSNorm(config.width, eps=1e-5))


def sample(logits: torch.Tensor) -> torch.Tensor:
    """i64[1 1], a row drawn by top-k, then top-p, from logits f32[1 V]."""
    top, rows = torch.topk(logits, min(TOP_K, logits.shape[-1]))
    weights = torch.softmax(top, dim=-1)
    weights = weights.masked_fill(weights.cumsum(-1) - weights >= TOP_P, 0)
    return rows.gather(1, torch.multinomial(weights, 1))
