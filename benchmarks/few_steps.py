"""Scores of a few denoising steps: samplers and numbers of steps, with the embedded model and with distilled ones.

    python benchmarks/few_steps.py --count 70
    python benchmarks/few_steps.py --distilled runs/steps/model --samplers euler --count 70

Prompts, seeds and scores are those of `python -m blip3o_jax.evals demo` under sample.py's default settings. The image
tokens are decoded once, by the first checkpoint: a distilled one shares all with it but the diffusion transformer. The
last column is the distance from the images that the first checkpoint makes with euler in 30 steps.
"""

import argparse
import collections
import dataclasses
import sys

import jax
import numpy as np
from PIL import Image

from blip3o_jax import Pipeline
from blip3o_jax.data import images
from blip3o_jax.demo import embedded, suite
from blip3o_jax.demo.world.render import render
from blip3o_jax.evals import readers
from blip3o_jax.evals.statistics import wilson
from blip3o_jax.generate import prompts, stages
from blip3o_jax.generate.paint import Denoising
from blip3o_jax.generate.prompts import Prompt, Reference
from blip3o_jax.generate.settings import check_requests, completed, make_settings
from blip3o_jax.sharding import fetch

EXACT = Denoising(30, "euler")
GROUPS = {"composition": suite.COMPOSITION_TASKS, "text": ("text",), "edit": ("edit",)}


@dataclasses.dataclass(frozen=True)
class Batch:
    """Cases whose image tokens are decoded."""

    cases: list[suite.Case]
    hidden: jax.Array
    keys: jax.Array
    reference: Reference | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default=embedded.CHECKPOINT)
    parser.add_argument("--distilled", nargs="*", default=[], help="checkpoints that objective mean_flow made of it")
    parser.add_argument("--samplers", nargs="+", default=["euler", "heun", "dpmpp_2m"], help="of the first checkpoint")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 30])
    parser.add_argument(
        "--count", type=int, default=20, help="prompts of each composition task; signs and edits have twice as many"
    )
    parser.add_argument("--batch_size", type=int, default=20)
    args = parser.parse_args()
    first = Pipeline.from_pretrained(args.checkpoint)
    cases = suite.build(tuple(task for tasks in GROUPS.values() for task in tasks), args.count)
    batches = decoded(first, cases, args.batch_size)
    exact = painted(first, batches, EXACT)
    print("| checkpoint | sampler | steps | composition | text | edits | mean | from 30 steps |\n" + "|---" * 8 + "|")
    for sampler in args.samplers:
        for steps in args.steps:
            settings = Denoising(steps, sampler)
            report("undistilled", settings, exact if settings == EXACT else painted(first, batches, settings), exact)
    for path in args.distilled:
        distilled = Pipeline.from_pretrained(path)
        for steps in args.steps:
            settings = Denoising(steps, "euler")
            report(path, settings, painted(distilled, batches, settings), exact)


def decoded(pipeline: Pipeline, cases: list[suite.Case], size: int) -> list[Batch]:
    """Decodes the tokens of all cases, edits apart from captions."""
    found = []
    for task in ("t2i", "edit"):
        own = [case for case in cases if (case.tag == "edit") == (task == "edit")]
        found += [batch_of(pipeline, task, own[i : i + size]) for i in range(0, len(own), size)]
    return found


def batch_of(pipeline: Pipeline, task: str, cases: list[suite.Case]) -> Batch:
    side = pipeline.config.image_size
    given = [() if case.given is None else (Image.fromarray(render(case.given, side)),) for case in cases]
    asked = [Prompt(task, case.prompt, own, seed=case.index) for case, own in zip(cases, given, strict=True)]
    checked = check_requests(pipeline.config, pipeline.tokenizer, asked, make_settings())
    engine = pipeline.engine(checked.settings, checked.size)
    loaded = prompts.loaded(checked.prompts)
    rows = engine.read(prompts.prepare(pipeline.config, loaded, *checked.size))
    keys = stages.image_keys([case.index for case in cases], range(1))
    made = engine.decode(rows, keys, checked.settings.sampling)
    return Batch(cases, made.hidden, keys, rows.reference)


def painted(pipeline: Pipeline, batches: list[Batch], how: Denoising) -> list[tuple[suite.Case, np.ndarray]]:
    """The images of all cases."""
    settings, made = completed(pipeline.config, make_settings()), []
    engine = pipeline.engine(settings, (pipeline.config.image_size,) * 2)
    for batch in batches:
        latents = engine.paint(batch.hidden, batch.keys, how, settings.guidance_scale, batch.reference)
        made += zip(batch.cases, images.to_uint8(fetch(engine.pixels(latents))), strict=True)
    return made


def report(name: str, how: Denoising, made: list, exact: list) -> None:
    """Prints a row of the table."""
    read, hits = readers.open_reader("world"), collections.defaultdict(list)
    for case, image in made:
        hits[case.tag].append(suite.score(case, image, "model", read)["hit"])
    shares = {group: np.mean([np.mean(hits[task]) for task in tasks]) for group, tasks in GROUPS.items()}
    distance = np.mean([min(images.psnr(a, b), 99) for (_, a), (_, b) in zip(made, exact, strict=True)])
    columns = [f"{100 * share:.1f} %" for share in (*shares.values(), np.mean(list(shares.values())))]
    same = "-" if made is exact else f"{distance:.1f} dB"
    print(f"| {name} | {how.sampler} | {how.num_inference_steps} | {' | '.join(columns)} | {same} |", flush=True)
    low, high = wilson(sum(map(sum, hits.values())), sum(map(len, hits.values())))
    print(f"  all images: {100 * low:.1f} to {100 * high:.1f} %", file=sys.stderr)


if __name__ == "__main__":
    main()
