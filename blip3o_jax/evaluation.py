"""Generates the images of GenEval's prompts; scoring is in `evals/`."""

import os
import pathlib
import sys
from typing import Any

import numpy as np
import tqdm

from blip3o_jax.evals import folder
from blip3o_jax.files import writable
from blip3o_jax.generate.prompts import Prompt
from blip3o_jax.pipeline import Pipeline, Settings, origin


def generate_geneval(
    pipeline: Pipeline, prompts_file: str | os.PathLike, out: str | os.PathLike, **settings: Any
) -> int:
    """Generates the images of a list of GenEval prompts, in the benchmark's folder layout; returns how many prompts.

    Complete folders are skipped, so an interrupted run resumes.

    Args:
      prompts_file: `evaluation_metadata.jsonl` of the user's copy of GenEval.
      **settings: fields of `Settings`; the benchmark uses 4 images per prompt.

    Raises:
      UserError: the list does not follow the schema, or the folder cannot be written or contains images of other
        prompts, another model or other settings.
    """
    wanted = folder.read_prompts(prompts_file)
    todo = [index for index, metadata in enumerate(wanted) if not folder.holds(out, index, metadata)]
    with writable(pathlib.Path(out)):
        folder.claim(out, {"prompts": len(wanted), **origin(pipeline, Settings(**settings))})
    if len(todo) < len(wanted):
        print(f"{len(wanted) - len(todo)} of {len(wanted)} prompts are in {out} already")
    if not todo:
        return 0
    each = Settings(**settings).num_images_per_prompt
    requests = [Prompt("t2i", wanted[index]["prompt"]) for index in todo]
    made = (np.asarray(image) for part in pipeline.stream(requests, **settings) for image in part.images)
    for index in tqdm.tqdm(todo, "prompts", leave=False, disable=not sys.stderr.isatty()):
        folder.write_entry(out, index, wanted[index], [next(made) for _ in range(each)])
    return len(todo)
