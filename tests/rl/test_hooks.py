"""What a person sees: sheets of groups, scores by kind of prompt."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from blip3o_jax.data.config import DataConfig, SourceConfig
from blip3o_jax.errors import UserError
from blip3o_jax.generate.prompts import Prompt
from blip3o_jax.rl import hooks
from blip3o_jax.rl.build import is_reward
from blip3o_jax.rl.config import HeldOutConfig
from blip3o_jax.rl.hooks import _means, check_drop, group_sheet, held_out_hook
from blip3o_jax.rl.judge import RewardConfig
from blip3o_jax.rl.prompt_stream import PromptStream


def sampler_of(images):
    """In place of a sampler: takes every prompt, and makes images by a function."""
    return types.SimpleNamespace(images=images, check=lambda prompt: None)


def test_a_sheet_shows_the_groups_that_differ_most_best_first():
    tasks = [Prompt("t2i", f"prompt {number}") for number in range(8)]
    rewards = np.zeros(32, np.float32)
    rewards[5 * 4 + 2], rewards[5 * 4 + 1] = 1.0, -1.0  # only group 5 differs
    pictures = np.full((32, 16, 16, 3), 128, np.uint8)
    pictures[22], pictures[21] = (255, 0, 0), (0, 0, 255)
    sheet = group_sheet(tasks, pictures, rewards, 4)
    row = sheet[: len(sheet) // 6]
    columns = [row[:100, 8 + 200 * number + 90] for number in range(4)]
    assert (columns[0] == (255, 0, 0)).all(axis=-1).any() and (columns[3] == (0, 0, 255)).all(axis=-1).any()


def test_references_stand_before_the_samples():
    reference = Image.fromarray(np.full((16, 16, 3), (0, 255, 0), np.uint8))
    tasks = [Prompt("edit", "do it", (reference,))]
    sheet = group_sheet(tasks, np.zeros((2, 200, 200, 3), np.uint8), np.array([0.0, 1.0]), 2)
    assert (sheet[:100, :200] == (0, 255, 0)).all(axis=-1).any() and sheet.shape[1] == 3 * 200 + 8


def test_scores_are_told_over_all_and_by_kind():
    kinds = ({"tag": "a", "kind": "c"}, {"tag": "b"}, {"kind": "a"}, {})
    tasks = [Prompt("t2i", "x", metadata=metadata) for metadata in kinds]
    tasks += [Prompt("t2i", "x", metadata={"tag": "c"})]
    got = dict(_means("r", tasks, np.array([1.0, 0.0, 0.0, 0.0, np.nan])))  # the last is not scored
    assert got == {"held_out/r": 0.25, "held_out/r/a": 0.5, "held_out/r/b": 0.0}
    assert [name for name in ["reward", *got, "reward/x", "loss"] if is_reward(name)] == ["reward", "held_out/r"]


@pytest.mark.parametrize("use_ema", [False, True])
def test_what_is_judged_is_what_will_be_exported(use_ema, tmp_path):
    """A sampler that paints the shade its one parameter tells."""

    def images(params, prompts, keys):
        del prompts
        return np.stack([np.full((8, 8, 3), (params["shade"], 0, 0), np.uint8)] * len(keys))

    sampler = sampler_of(images)
    data = DataConfig(sources=(SourceConfig(kind="world", path="held_out"),), batch_size=2)
    config = HeldOutConfig(data, (RewardConfig("redness"),), count=3, use_ema=use_ema)
    state = types.SimpleNamespace(params={"shade": jnp.float32(0)}, ema={"shade": jnp.float32(255)})
    hook = held_out_hook(config, sampler, {}, 0, str(tmp_path))
    assert hook.run(1, state, None)["held_out/redness"] == pytest.approx(float(use_ema))


def test_held_out_prompts_are_the_first_of_their_list_each_with_a_key_of_its_own(tmp_path, monkeypatch):
    calls, judged = [], []

    def images(params, prompts, keys):
        calls.append(([prompt.text for prompt in prompts], jax.random.key_data(keys).tolist()))
        return np.zeros((len(keys), 8, 8, 3), np.uint8)

    def judge(judge, prompts, images, keys):
        judged.append((len(prompts), len(images), jax.random.key_data(keys).tolist()))
        return None, {}

    monkeypatch.setattr(hooks, "judged", judge)
    lines = [f"prompt {number}" for number in range(9)]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    data = DataConfig(sources=(SourceConfig(kind="prompts", path=str(tmp_path / "prompts.txt")),), batch_size=2)
    config = HeldOutConfig(data, (RewardConfig("redness"),), count=5)
    hook = held_out_hook(config, sampler_of(images), {}, 0, str(tmp_path))
    for step in (1, 2):
        hook.run(step, types.SimpleNamespace(params={}, ema=None), None)
    texts = [text for part, _ in calls[:3] for text in part]
    keys = [key for _, part in calls[:3] for key in part]
    assert texts == [*lines[:5], lines[4]] and len(keys) == 6  # every batch has two rows
    assert judged[0] == (5, 5, keys[:5]) and len({tuple(key) for key in keys}) == 6
    assert calls[3:] == calls[:3] and judged[1] == judged[0]


def test_broken_held_out_prompts_are_left_out_and_named(tmp_path, capsys):
    path = tmp_path / "edits.jsonl"
    lines = [{"prompt": "edit", "image": "gone.png"}, *({"prompt": f"prompt {number}"} for number in range(3))]
    path.write_text("\n".join(map(json.dumps, lines)))
    stream = PromptStream(DataConfig((SourceConfig("prompts", str(path)),), 2, shuffle=False))
    with pytest.raises(UserError, match="data.sources: got 1 broken - expected a readable prompt"):
        stream.draw_readable(1)
    stream.restore(stream.state() | {"next": 0})
    assert [prompt.text for prompt in stream.draw_readable(4)] == ["prompt 0", "prompt 1", "prompt 2"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"data: {path}: broken and left out: {path}:1: image: got {tmp_path / 'gone.png'}: No such")


def test_held_out_prompts_that_a_reward_cannot_judge_are_refused_when_the_hook_is_made(tmp_path):
    data = DataConfig(
        sources=(SourceConfig(kind="world", path="held_out", options={"shares": {"colors": 1}}),), batch_size=2
    )
    with pytest.raises(UserError, match="text reward"):
        held_out_hook(HeldOutConfig(data, (RewardConfig("text"),), count=3), sampler_of(None), {}, 0, str(tmp_path))


def test_a_held_out_score_that_falls_stops_the_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    check_drop(path, "held_out/r", 0.1, 0.05)  # nothing to compare with yet
    path.write_text('{"step": 1, "loss": 0}\n{"step": 2, "held_out/r": 0.5}\n{"step": 3, "held_out/r": 0.48}\n{"st')
    check_drop(path, "held_out/r", 0.46, 0.05)
    with pytest.raises(UserError, match="held_out/r: got 0.44 after 0.5"):
        check_drop(path, "held_out/r", 0.44, 0.05)
