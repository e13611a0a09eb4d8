"""Says which half of the model limits: scores under decoded image tokens and under the right ones.

    python benchmarks/halves.py --count 70

Prompts and scores are those of `python -m blip3o_jax.evals demo`. The right tokens are those of an image that the demo
world draws for the prompt. What is wrong under them is wrong because of the tokenizer or the diffusion half, and the
rest because of the decoder. Of edits, it also says how many of the codes that the edit leaves alone the decoder
copies: of patches that are equal, pixel for pixel, before and after.
"""

import argparse
import collections
import sys
from collections.abc import Sequence

import numpy as np
from PIL import Image

from blip3o_jax import Pipeline
from blip3o_jax.demo import embedded, suite
from blip3o_jax.demo.world.render import render
from blip3o_jax.evals.statistics import wilson
from blip3o_jax.generate.prompts import Prompt

TASKS = (*suite.COMPOSITION_TASKS, "text", "edit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default=embedded.CHECKPOINT)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument(
        "--count", type=int, default=70, help="prompts of each composition task; signs and edits have twice as many"
    )
    parser.add_argument("--num_inference_steps", type=int, nargs="+", default=[30, 4])
    parser.add_argument("--batch_size", type=int, default=35)
    args = parser.parse_args()
    pipeline = Pipeline.from_pretrained(args.checkpoint)
    cases = suite.build(tuple(args.tasks), args.count)
    print("| task | steps | decoded tokens | right tokens | images |\n|---|---|---|---|---|", flush=True)
    for steps in args.num_inference_steps:
        settings = {"num_inference_steps": steps, "batch_size": args.batch_size}
        for task in ("t2i", "edit"):
            own = [case for case in cases if (case.tag == "edit") == (task == "edit")]
            if own:
                report(own, steps, *(made(pipeline, task, own, given, settings) for given in (False, True)))


Made = tuple[list[np.ndarray], np.ndarray]


def made(pipeline: Pipeline, task: str, cases: Sequence[suite.Case], given: bool, settings: dict) -> Made:
    """Images uint8[S S 3] of all cases and their tokens i32[B N], decoded or given."""
    side = pipeline.config.image_size
    asked = [
        Prompt(
            task,
            case.prompt,
            () if case.given is None else (drawn(case.given, side),),
            target=drawn(ideal(case), side) if given else None,
            seed=case.index,
        )
        for case in cases
    ]
    parts = list((pipeline.render if given else pipeline.stream)(asked, **settings))
    images = [np.asarray(image) for part in parts for image in part.images]
    return images, np.concatenate([part.token_ids for part in parts])


def ideal(case: suite.Case):
    """A scene that fulfils the prompt."""
    return case.truth.target if case.tag == "edit" else case.truth.scene


def drawn(scene, side: int) -> Image.Image:
    return Image.fromarray(render(scene, side))


def report(cases: Sequence[suite.Case], steps: int, decoded: Made, right: Made) -> None:
    """Prints a row for every task or kind of edit, and how codes are copied."""
    hits = collections.defaultdict(list)
    for case, *images in zip(cases, decoded[0], right[0], strict=True):
        both = [suite.score(case, image)["hit"] for image in images]
        hits[case.tag].append(both)
        if case.tag == "edit":
            hits[f"edit, {case.truth.kind}"].append(both)
    for name, both in hits.items():
        columns = np.array(both).T
        print(f"| {name} | {steps} | {shown(columns[0])} | {shown(columns[1])} | {len(both)} |", flush=True)
    if cases[0].tag == "edit":
        same = np.stack([unchanged(case, round(decoded[1].shape[1] ** 0.5)) for case in cases])
        copied = decoded[1] == right[1]
        whole = np.array([row[kept].all() for row, kept in zip(copied, same, strict=True)])
        print(f"codes that an edit leaves alone: {copied[same].mean():.1%} copied; all of them in {whole.mean():.1%}")


def unchanged(case: suite.Case, cells: int) -> np.ndarray:
    """bool[N]: patches that are equal before and after the edit."""
    before, after = (render(scene, 8 * cells).astype(int) for scene in (case.given, ideal(case)))
    return (before == after).reshape(cells, 8, cells, 8, 3).all(axis=(1, 3, 4)).ravel()


def shown(hits: np.ndarray) -> str:
    low, high = wilson(int(hits.sum()), len(hits))
    return f"{hits.mean():.1%} ({100 * low:.0f} to {100 * high:.0f})"


if __name__ == "__main__":
    sys.exit(main())
