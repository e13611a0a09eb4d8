"""Decoding several image tokens in a pass against decoding them one by one: passes, seconds, and what differs.

    python benchmarks/decoding.py --prompts 420 --windows 8
    python benchmarks/decoding.py --prompts 0 --windows 4 8 12 16 --batch_sizes 1 --repeats 30

Prompts are those of the composition tasks of `python -m blip3o_jax.evals demo`, under sample.py's default settings.
Acceptance says nothing but of a trained model, so its distribution's entropy is printed beside it. Both ways take turns
in one process: ratios are medians over turns, of the clock and of this process' CPU time, of the token loop alone.
"""

import argparse
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax import Pipeline
from blip3o_jax.demo import embedded, suite
from blip3o_jax.generate import prompts, stages
from blip3o_jax.generate.engine import Engine, Runner
from blip3o_jax.generate.prompts import Prompt, PromptRows
from blip3o_jax.generate.settings import check_requests, make_settings
from blip3o_jax.generate.window import Decoding
from blip3o_jax.rl.samplers import completions

TOGETHER = 30  # prompts that are decoded at a time where seconds do not matter


@dataclasses.dataclass(frozen=True)
class Batch:
    """Prompts on the device."""

    engine: Engine
    rows: PromptRows
    keys: jax.Array


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default=embedded.CHECKPOINT)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompts", type=int, default=420, help="of acceptance, up to 420; 0: none")
    parser.add_argument("--windows", type=int, nargs="+", default=[8], help="0: what `auto` takes")
    parser.add_argument("--batch_sizes", type=int, nargs="*", default=[1, 8], help="of the times")
    parser.add_argument("--repeats", type=int, default=10, help="turns, each with other prompts")
    parser.add_argument("--temperature", type=float, default=1.0)
    args = parser.parse_args()
    pipeline = Pipeline.from_pretrained(args.checkpoint, args.dtype)
    settings = make_settings(temperature=args.temperature)
    texts = [case.prompt for case in suite.build(suite.COMPOSITION_TASKS, 70)]
    if args.prompts:
        chosen = [texts[i] for i in np.linspace(0, len(texts), args.prompts, endpoint=False).astype(int)]
        acceptance(pipeline, settings, chosen, args.windows)
    for size in args.batch_sizes:
        rng = np.random.default_rng(0)
        groups = [[texts[i] for i in rng.choice(len(texts), size, replace=False)] for _ in range(args.repeats)]
        seconds([batch_of(pipeline, settings, group) for group in groups], settings, args.windows)


def batch_of(pipeline: Pipeline, settings, texts: list[str]) -> Batch:
    """Reads prompts, as the pipeline does."""
    checked = check_requests(pipeline.config, pipeline.tokenizer, [Prompt("t2i", text) for text in texts], settings)
    engine = Engine(pipeline.config, pipeline.params, Runner(), checked.size)
    rows = engine.read(prompts.prepare(pipeline.config, checked.prompts, *checked.size))
    keys = stages.image_keys([settings.seed] * len(texts), range(1))
    return Batch(engine, rows, keys)


def decode(batch: Batch, sampling, window: int):
    """The tokens, and the seconds of clock and CPU that their loop took."""
    total = batch.engine.config.num_image_tokens
    inputs = batch.rows, batch.keys, jnp.int32(stages.TOKEN_STREAM), sampling, window
    state = batch.engine.stage("prefill", stages.prefill, *inputs)
    clock, cpu = time.perf_counter(), time.process_time()
    state = batch.engine.stage("tokens", stages.advance_tokens, state, sampling, jnp.int32(total))
    return state, (time.perf_counter() - clock, time.process_time() - cpu)


def window_of(batch: Batch, asked: int, temperature: float) -> int:
    rows = len(batch.keys) * (1 if batch.rows.token_guidance_scale is None else 2)
    own = Decoding() if asked == 0 else Decoding("parallel", asked) if asked > 1 else Decoding("sequential")
    return own.size(rows, batch.engine.config.num_image_tokens, batch.engine.run.platform, temperature)


def acceptance(pipeline: Pipeline, settings, texts: list[str], windows: list[int]) -> None:
    """Passes, and how far the results are from decoding one by one."""
    sampling, entropy, expected = settings.sampling, [], []
    parts = [batch_of(pipeline, settings, texts[i : i + TOGETHER]) for i in range(0, len(texts), TOGETHER)]
    for batch in parts:
        state, _ = decode(batch, sampling, 1)
        expected.append(state)
        rollout = completions(batch.rows, state, 1, False, 1)
        entropy.append(batch.engine.stage("score", stages.completion_log_probs, rollout, sampling, 64)[1])
    nats, total = np.concatenate(entropy).mean(), pipeline.config.num_image_tokens
    print(f"{len(texts)} prompts, {total} tokens each, {pipeline.config.decoder.dtype}, {nats:.2f} nats a token")
    print("| window | mean passes | most | images that differ | log-probs off by 1e-5, 1e-4 | hidden states off by |")
    print("|---|---|---|---|---|---|")
    for window in windows:
        found = [decode(batch, sampling, window_of(batch, window, sampling.temperature))[0] for batch in parts]
        passes = np.concatenate([state.passes for state in found])
        tokens, log_probs, hidden = (
            np.concatenate([np.abs(getattr(a, name) - getattr(b, name)) for a, b in zip(found, expected, strict=True)])
            for name in ("tokens", "log_probs", "hidden")
        )
        same = ~tokens.any(axis=1)  # behind the first other token, everything is another
        off, most = log_probs[same], hidden[same].astype(np.float32).max()
        counts = f"{(off > 1e-5).sum()}, {(off > 1e-4).sum()} of {off.size}"
        row = f"| {window} | {passes.mean():.1f} | {passes.max()} | {(~same).sum()} | {counts} | {most:.0e} |"
        print(row, flush=True)


def seconds(batches: list[Batch], settings, windows: list[int]) -> None:
    """Times of the token loop, as parts of those of decoding one by one."""
    ways = [window_of(batches[0], way, settings.temperature) for way in (1, *windows)]
    for way in ways:
        decode(batches[0], settings.sampling, way)  # compiles
    runs = [[decode(batch, settings.sampling, way) for way in ways] for batch in batches]
    times = np.array([[taken for _, taken in turn] for turn in runs])
    passes = np.array([[state.passes.max() for state, _ in turn] for turn in runs]).mean(axis=0)
    print(f"batch size {len(batches[0].keys)}, {len(batches)} turns")
    print("| window | passes of the batch | ms | of the clock | of CPU |\n|---|---|---|---|---|")
    ratios = np.median(times / times[:, :1], axis=0)
    for way, count, taken, (clock, cpu) in zip(ways, passes, np.median(times[..., 0], axis=0), ratios, strict=True):
        print(f"| {way} | {count:.1f} | {1e3 * taken:.0f} | {clock:.2f} | {cpu:.2f} |")


if __name__ == "__main__":
    main()
