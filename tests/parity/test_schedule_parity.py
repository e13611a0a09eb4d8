"""The learning-rate schedule and AdamW against PyTorch and transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
optimization = pytest.importorskip("transformers.optimization")

from blip3o_jax.train.optimizer import OptimizerConfig, make_optimizer  # noqa: E402


def test_updates_follow_torch_adamw_under_the_cosine_with_a_floor():
    """Thirty updates with warm-up, decay and clipping; float32 on both sides."""
    rng = np.random.default_rng(0)
    start = rng.normal(size=(5, 3)).astype(np.float32)
    grads = rng.normal(size=(30, 5, 3)).astype(np.float32)
    weight = torch.nn.Parameter(torch.tensor(start))
    adamw = torch.optim.AdamW([weight], lr=5e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    cosine = optimization.get_cosine_with_min_lr_schedule_with_warmup(adamw, 5, 30, min_lr=1e-3)
    settings = OptimizerConfig(5e-3, min_learning_rate=1e-3, warmup_steps=5, weight_decay=0.1, clip_norm=1.0)
    params = {"kernel": jnp.array(start)}
    optimizer = make_optimizer(settings, params, 30)
    state = optimizer.tx.init(params)
    for step in range(30):
        np.testing.assert_allclose(optimizer.schedule(step), cosine.get_last_lr()[0], rtol=1e-5)
        weight.grad = torch.tensor(grads[step])
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        adamw.step()
        cosine.step()
        updates, state = optimizer.tx.update({"kernel": jnp.array(grads[step])}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    np.testing.assert_allclose(params["kernel"], weight.detach().numpy(), rtol=1e-5, atol=1e-6)
