"""The other side of benchmarks/train_step.py: the same step with transformers and diffusers under PyTorch.

As the reference trains: encoders without gradients, Qwen3 over the row, logits of every position in float32, the
connector and SANA on the states of the picture, mean squared error of the velocity, clipping, AdamW (fused kernels).
bfloat16 is autocast over float32 parameters, as what trains is float32 on our side too.
"""

import numpy as np
import reference
import torch
from measure import Row
from torch.nn import functional as F
from train_workload import BETAS, CLIP_NORM, EPS, LEARNING_RATE, TrainWorkload
from workload import Workload

IGNORED = -100


def make(workload: TrainWorkload, threads: int):
    """Rows, the device's kind, and a function that says the peak of the device's memory (None: it has none)."""
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = Training(workload, device).rows()
    if device == "cpu":
        return rows, "cpu", None
    return rows, torch.cuda.get_device_name(), torch.cuda.max_memory_allocated


class Training:
    """The modules of `reference.Reference`, some of them trained."""

    def __init__(self, workload: TrainWorkload, device: str):
        self.workload, self.config, self.device = workload, workload.config, device
        modules = reference.Reference(Workload(workload.checkpoint, workload.geometry, "float32", 0, 1, 1), device)
        self.modules, self.lm, self.sana = modules, modules.lm, modules.sana
        self.vae, self.connector = modules.vae, modules.connector
        for module in (self.sana, self.vae, modules.tower):
            module.requires_grad_(False)
        for module in (self.sana.caption_projection, self.sana.caption_norm):
            module.requires_grad_(True)
        self.start = [parameter.detach().clone() for parameter in self.parameters()]
        self.row, self.optimizer = None, None
        self.given = self._inputs()

    def parameters(self) -> list[torch.nn.Parameter]:
        """What trains."""
        modules = (self.lm, self.connector, self.sana)
        return [leaf for module in modules for leaf in module.parameters() if leaf.requires_grad]

    def rows(self) -> dict[str, Row]:
        """Name -> row."""
        value = lambda loss: loss  # noqa: E731
        return {
            name: Row(self.advance, lambda name=name: self.prepared(name), value)
            for name in ("joint step", "joint step, precomputed")
        }

    def prepared(self, row: str) -> bool:
        """Whether codes and latents are precomputed; starts afresh when another row is asked for."""
        if self.row != row:
            with torch.no_grad():
                for parameter, value in zip(self.parameters(), self.start, strict=True):
                    parameter.copy_(value)
            self.optimizer = torch.optim.AdamW(
                self.parameters(), LEARNING_RATE, BETAS, EPS, weight_decay=0.0, fused=True
            )
            self.row = row
        return row == "joint step, precomputed"

    def advance(self, precomputed: bool) -> np.ndarray:
        """One update; the loss before it."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.workload.dtype == "bfloat16"):
            loss = self.loss(precomputed)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return loss.detach().float().cpu().numpy()

    def loss(self, precomputed: bool) -> torch.Tensor:
        given = self.given
        codes, latent = given["codes"], given["latent"]
        if not precomputed:
            with torch.no_grad():
                codes = self.encode_tokens(given["tokenizer_pixels"])
                latent = self.vae.encode(given["pixels"]).latent * self.config.autoencoder.scaling_factor
        picked = torch.gather(codes, 1, given["slot"].clamp(min=0)) + self.config.tokens.image_start
        ids = torch.where(given["slot"] >= 0, picked, given["tokens"])
        hidden = self.lm.model(ids, attention_mask=given["valid"]).last_hidden_state
        logits = self.lm.lm_head(hidden).float()
        labels = torch.where(given["learned"], ids, IGNORED)
        ce = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        window = given["window"][:, :, None].expand(-1, -1, hidden.shape[-1])
        condition = self.connector(torch.gather(hidden, 1, window))
        sigma = given["sigma"].view(-1, 1, 1, 1)
        noisy = (1 - sigma) * latent + sigma * given["noise"]
        velocity = self.sana(noisy, condition, given["timestep"]).sample
        return ce + F.mse_loss(velocity.float(), given["noise"] - latent)

    def encode_tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """Codes i64[B N]: the tower without its unread last layer, and the codebook computed once."""
        modules, x = self.modules, self.modules.tower.embeddings(pixels)
        for layer in modules.tower.encoder.layers[:-1]:
            x = layer(x, None)
        features = torch.tanh(modules.linear(x, "encode_task_layer.0"))
        z = F.normalize(modules.linear(features, "bottleneck.in_linear"), dim=-1)
        return (z @ modules.codebook.T).argmax(dim=-1)

    def _inputs(self) -> dict[str, torch.Tensor]:
        """The batch as tensors on the device."""
        batch, draws, place = self.workload.batch, self.workload.draws, self.modules
        whole = lambda array: torch.as_tensor(np.asarray(array).astype(np.int64)).to(self.device)  # noqa: E731
        steps, states = self.config.schedule.num_train_timesteps, 1 + self.config.num_image_tokens
        timesteps, sigmas = place.scheduler.timesteps, place.scheduler.sigmas
        index = torch.as_tensor(np.floor(draws["u"] * steps).astype(np.int64))
        positions = np.arange(self.workload.length)[None]
        return {
            "tokens": whole(batch.tokens),
            "slot": whole(batch.image_slot),
            "valid": whole(positions < batch.length[:, None]),
            "learned": torch.as_tensor(batch.loss_mask).to(self.device),
            "window": whole(batch.window_start[:, None] + np.arange(states)[None]),
            "sigma": sigmas[index].to(self.device),
            "timestep": timesteps[index].to(self.device),
            "codes": whole(draws["codes"]),
            "latent": place.image(draws["latent"]),
            "noise": place.image(draws["noise"]),
            "tokenizer_pixels": place.image(batch.target_tokenizer_pixels),
            "pixels": place.image(batch.target_pixels),
        }
