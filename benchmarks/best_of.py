"""The best of several candidates, the less promising half dropped after a look, against painting all of them.

    python benchmarks/best_of.py --prompts 120 --ways plain8 look4 look8
    python benchmarks/best_of.py --prompts 20
    python benchmarks/best_of.py --prompts 0 --looks 40

Prompts are those of the demo world's harder tasks. Rewards are `geneval`, and `text` for signs. Shares are of chosen
images that are strictly right: nothing but what was asked for, and every letter. That judge looks through the reward's
detector and reader, the only ones that the demo world has, but `geneval` pays for parts and ignores extras.
Ways take turns, prompt by prompt, in one process, and share their candidates: image i of all is the same one.
"""

import argparse
import time

import jax.numpy as jnp
import numpy as np

from blip3o_jax import Pipeline
from blip3o_jax.data import images
from blip3o_jax.demo import embedded, suite
from blip3o_jax.generate import best_of, paint, prompts, stages
from blip3o_jax.generate.prompts import Prompt
from blip3o_jax.generate.settings import check_requests, make_settings
from blip3o_jax.pipeline import with_judge

WAYS = {"single": (1, False), "plain4": (4, False), "plain8": (8, False), "look4": (4, True), "look8": (8, True)}
"""Candidates, and whether half of them are dropped after a look."""
BASE = "plain8"
TASKS = ("two_object", "counting", "position", "color_attr", "text")
MOST = 8  # candidates
LOOKS = ((0.25, 4), (0.5, 2), (0.5, 4), (0.75, 2), (0.75, 4), (1, 2), (1, 4), (1, 8))
"""Part of the tokens that are decoded, and steps of the rendering."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default=embedded.CHECKPOINT)
    parser.add_argument("--prompts", type=int, default=150, help="that candidates are chosen for")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help=f"{BASE} among them")
    parser.add_argument("--looks", type=int, default=0, help="prompts for which looks of all kinds are compared")
    parser.add_argument("--num_inference_steps", type=int, default=30)
    args = parser.parse_args()
    best_of.STRIDE = 1  # candidates are the images of a prompt, so that all ways choose among the same
    pipeline = Pipeline.from_pretrained(args.checkpoint)
    if args.looks:
        looks(pipeline, cases(args.looks), args.num_inference_steps)
    if args.prompts:
        choices(pipeline, cases(args.prompts), args.ways, args.num_inference_steps)


def cases(count: int) -> list[suite.Case]:
    """Prompts of all tasks in turn."""
    each = -(-count // len(TASKS))
    found = suite.build(TASKS, each)
    of_tasks = [[case for case in found if case.tag == task][:each] for task in TASKS]
    return [case for turn in zip(*of_tasks, strict=True) for case in turn][:count]


def prompt_of(case: suite.Case) -> tuple[Prompt, str]:
    """With the name of its reward."""
    if case.tag == "text":
        return Prompt("t2i", case.prompt, seed=case.index), "text"
    return Prompt("t2i", case.prompt, seed=case.index, metadata=case.truth.metadata), "geneval"


def choices(pipeline: Pipeline, chosen: list[suite.Case], ways: list[str], steps: int) -> None:
    """Shares and times of every way."""
    right = {way: [] for way in ways}
    times = {way: [] for way in ways}
    for number, case in enumerate([*chosen[:2], *chosen]):
        prompt, reward = prompt_of(case)

        def run(each: int, look: bool, prompt=prompt, reward=reward):
            best_of.PAYS = 3 * best_of.STEPS if look else 10**6
            clock, cpu = time.perf_counter(), time.process_time()
            settings = {"best_of": each, "reward": reward, "num_inference_steps": steps}
            output = pipeline.answer([prompt], **settings)
            return output, (time.perf_counter() - clock, time.process_time() - cpu)

        turn = {way: run(*WAYS[way]) for way in ways}
        if number < 2:  # compiled
            continue
        for way, (output, taken) in turn.items():
            right[way].append(suite.score(case, np.asarray(output.images[0]))["hit"])
            times[way].append(taken)
        if len(right[BASE]) % 20 == 0 or number == len(chosen) + 1:
            report(right, times, steps)


def report(right: dict[str, list[bool]], times: dict[str, list], steps: int) -> None:
    found, taken = ({way: np.array(values, float) for way, values in table.items()} for table in (right, times))
    count = len(found[BASE])
    print(f"\n{count} prompts, {steps} steps; ratios are medians over prompts")
    print(f"| way | right | less {BASE} | s | CPU s | clock / {BASE} | CPU / {BASE} |")
    print("|---|---|---|---|---|---|---|")
    for way, hits in found.items():
        difference = hits - found[BASE]
        error, own = (x.std(ddof=1) / count**0.5 for x in (difference, hits))
        clock, cpu = np.median(taken[way] / taken[BASE], axis=0)
        seconds, cpu_seconds = np.median(taken[way], axis=0)
        share = f"{100 * hits.mean():.1f} +- {100 * own:.1f} % | {100 * difference.mean():+.1f} +- {100 * error:.1f}"
        print(f"| {way} | {share} | {seconds:.2f} | {cpu_seconds:.2f} | {clock:.2f} | {cpu:.2f} |", flush=True)


def looks(pipeline: Pipeline, chosen: list[suite.Case], steps: int) -> None:
    """How far rewards of a cheap rendering are those of the image, within the candidates of a prompt."""
    found = {look: [] for look in (*LOOKS, (1, steps))}
    for case in chosen:
        for look, scores in looks_of(pipeline, case, steps).items():
            found[look].append(scores)
    final = np.array(found[1, steps])
    print(f"{len(chosen)} prompts, {MOST} candidates, final images of {steps} steps")
    print("| tokens | steps | correlation with the final reward | chosen of 4 right | of 8 |\n|---|---|---|---|---|")
    for (part, few), values in found.items():
        reward = np.array(values)[..., 1]
        own, last = (x - x.mean(axis=1, keepdims=True) for x in (reward, final[..., 1]))
        correlation = (own * last).sum() / np.sqrt((own**2).sum() * (last**2).sum())
        shares = [halved(reward[:, :count], final[:, :count]) for count in (4, 8)]
        cells = " | ".join(f"{100 * share:.1f} %" for share in shares)
        print(f"| {part:.0%} | {few} | {correlation:.2f} | {cells} |", flush=True)


def halved(reward: np.ndarray, final: np.ndarray) -> float:
    """Share of prompts whose best image among the half that looked better is right."""
    left = np.sort(np.argsort(-reward, axis=1, kind="stable")[:, : reward.shape[1] // 2], axis=1)
    hit, worth = (np.take_along_axis(final[..., kind], left, axis=1) for kind in (0, 1))
    return hit[np.arange(len(hit)), worth.argmax(axis=1)].mean()


def looks_of(pipeline: Pipeline, case: suite.Case, steps: int) -> dict[tuple[float, int], list[tuple[float, float]]]:
    """Whether right, and the reward, of every candidate, by look."""
    prompt, reward = prompt_of(case)
    settings = make_settings(reward=reward)
    checked = with_judge(check_requests(pipeline.config, pipeline.tokenizer, [prompt], settings))
    engine, total = pipeline.engine(settings, checked.size), pipeline.config.num_image_tokens
    rows = engine.read(prompts.prepare(pipeline.config, checked.prompts, *checked.size))
    keys = stages.image_keys([case.index], range(MOST))
    window = engine.decoding.size(2 * MOST, total, engine.run.platform)
    inputs = rows, keys, np.int32(stages.TOKEN_STREAM), settings.sampling, window
    decoding, result, done = engine.stage("prefill", stages.prefill, *inputs), {}, 0
    for part, few in (*LOOKS, (1, steps)):
        stop = int(part * total)
        if stop > done:
            decoding = engine.stage("tokens", stages.advance_tokens, decoding, settings.sampling, np.int32(stop))
            done = stop
        known = jnp.where(jnp.arange(1 + total)[:, None] <= stop, decoding.hidden, 0)  # the rest conditions nothing
        latents = engine.paint(known, keys, paint.Denoising(few), settings.guidance_scale, rows.reference)
        seen = images.to_uint8(np.asarray(engine.pixels(latents)))
        rewards, _ = checked.judge([prompt.judged(image) for image in seen])
        result[part, few] = [
            (float(suite.score(case, image)["hit"]), worth) for image, worth in zip(seen, rewards, strict=True)
        ]
    return result


if __name__ == "__main__":
    main()
