"""The other side of rl_step.py: GRPO on image tokens with transformers and diffusers, in one process.

Source: BLIP3o-NEXT's trainer: `generate` over the whole vocabulary, a second forward pass for the states that condition
the diffusion half, the loss with log-probabilities of the whole vocabulary, a frozen copy of the decoder.
Prompts of one batch are equal, so there is no padding.
"""

import copy
import time

import numpy as np
import torch
from measure import Row
from reference import Reference
from torch.nn import functional as F
from workload import GUIDANCE_SCALE, Workload

BETA, CLIP = 1e-3, 0.2


def make(job: dict, threads: int):
    """The row `step`, the device's kind, and None."""
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    workload = Workload(job["checkpoint"], job["geometry"], job["dtype"], 0, job["steps"], job["steps"])
    return {"step": Row(Loop(workload, device, job).step, value=lambda split: split)}, device, None


class Loop(Reference):
    """The policy, its reference and its optimizer."""

    def __init__(self, workload: Workload, device: str, job: dict):
        super().__init__(workload, device)
        self.job = job
        self.frozen = copy.deepcopy(self.lm).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.lm.parameters(), lr=1e-6, weight_decay=0.0)

    def step(self, _) -> np.ndarray:
        """One step; returns the seconds of its stages, in the order of rl_step.STAGES."""
        clock = Clock(self.device)
        with torch.no_grad():
            ids, states = self.sample()
            clock.lap("decode")
            reference = self.log_probs(self.frozen, ids)
            clock.lap("log_probs")
            pictures = self.render(states)
            clock.lap("render")
            advantages = self.judge(pictures)
            clock.lap("reward")
        log_probs = self.log_probs(self.lm, ids)
        ratio, weight = torch.exp(log_probs - log_probs.detach()), advantages[:, None]
        policy = -torch.minimum(ratio * weight, ratio.clamp(1 - CLIP, 1 + CLIP) * weight)
        away = reference - log_probs
        (policy + BETA * (away.exp() - away - 1)).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.lm.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        clock.lap("update")
        return np.array(list(clock.seconds.values()))

    def sample(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows i64[B T+N] and the states [B 1+N D] of their image spans."""
        prompts = self.prompt.expand(self.job["prompts"], -1)
        count = self.config.num_image_tokens
        ids = self.lm.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=count, num_return_sequences=self.job["group"], eos_token_id=None,
        )  # fmt: skip
        return ids, self.lm.model(ids, use_cache=False).last_hidden_state[:, -1 - count :]

    def render(self, states: torch.Tensor) -> torch.Tensor:
        """Pictures u8[B 3 Y X]."""
        latents = torch.randn(len(states), *self.noise.shape[1:], device=self.device, dtype=self.dtype)
        steps = self.job["steps"]
        self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=self.device)
        both = torch.cat([torch.zeros_like(states), states])
        for t in self.scheduler.timesteps:
            out = self.sana(torch.cat([latents, latents]), self.connector(both), t.expand(len(both))).sample
            null, conditioned = out.chunk(2)
            velocity = null + GUIDANCE_SCALE * (conditioned - null)
            latents = self.scheduler.step(velocity, t, latents).prev_sample
        pixels = self.vae.decode(latents / self.config.autoencoder.scaling_factor).sample
        return ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)

    def judge(self, pictures: torch.Tensor) -> torch.Tensor:
        """Advantages f32[B]."""
        red, green, blue = (pictures.float() / 255).mean(dim=(2, 3)).unbind(dim=1)
        groups = (red - (green + blue) / 2).reshape(-1, self.job["group"])
        return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()

    def log_probs(self, model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        """f32[B N] of the sampled tokens."""
        count = self.config.num_image_tokens
        states = model.model(ids[:, :-1], use_cache=False).last_hidden_state[:, -count:]
        scores = model.lm_head(states).float()
        return -F.cross_entropy(scores.transpose(1, 2), ids[:, -count:], reduction="none")


class Clock:
    """Laps."""

    def __init__(self, device: str):
        self.seconds: dict[str, float] = {}
        self._device, self._begin = device, time.perf_counter()

    def lap(self, stage: str) -> None:
        """Notes the time since the last lap."""
        if self._device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[stage], self._begin = now - self._begin, now
