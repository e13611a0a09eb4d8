"""The evaluation suite of the demo world: prompts, scores of images, and summary figures.

All prompts are held out from training (see `world.prompts`). A row describes one image. Its `hit` is strict: exactly
the requested objects, the exact text, the edit carried out with nothing else changed, or the same scene.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from blip3o_jax.data.images import psnr, ssim
from blip3o_jax.demo.editing import enlarged, score_edit
from blip3o_jax.demo.judges import Verifier
from blip3o_jax.demo.world import captions, edits, prompts
from blip3o_jax.demo.world.edits import TOLERANCE, Edit
from blip3o_jax.demo.world.prompts import COMPOSITION_TASKS, Sample, in_split
from blip3o_jax.demo.world.reader import read_text
from blip3o_jax.demo.world.render import render
from blip3o_jax.demo.world.scenes import UNITS, Scene
from blip3o_jax.demo.world.selftest import describes
from blip3o_jax.demo.world.verifier import detect, matched
from blip3o_jax.errors import require
from blip3o_jax.evals import geneval
from blip3o_jax.evals.editing import PSNR_CEILING
from blip3o_jax.evals.readers import Reader
from blip3o_jax.evals.report import judge_image
from blip3o_jax.evals.statistics import bootstrap_mean, wilson
from blip3o_jax.evals.text import ocr_reward, text_score

TASKS = {**dict.fromkeys(COMPOSITION_TASKS, 1), "text": 2, "edit": 2, "reconstruct": 1}
"""Task -> number of cases per prompt of a composition task."""
VERSIONS = {"autoencoder": "autoencoder round trip", "tokens": "tokens alone", "model": "whole model"}
"""Way of reconstruction -> name in the table."""
SHORT = 3  # letters of a short text
ENOUGH = 10  # images of a task required in each wording to compare wordings


@dataclasses.dataclass(frozen=True)
class Case:
    """One prompt of the suite."""

    tag: str  # a key of TASKS
    index: int  # within its task
    prompt: str
    truth: Sample | Edit

    @property
    def name(self) -> str:
        """Unique name, valid as a file name."""
        return f"{self.tag}-{self.index:04d}"

    @property
    def given(self) -> Scene | None:
        """The scene of the reference image; None for a prompt without one."""
        if isinstance(self.truth, Edit):
            return self.truth.source
        return self.truth.scene if self.tag == "reconstruct" else None


def check_tasks(tasks: Iterable[str], where: str = "tasks") -> None:
    """Raises UserError, named `where`, for an unknown task, or if there are no tasks."""
    unknown = [task or "an empty name" for task in tasks if task not in TASKS]
    good = bool(tasks) and not unknown
    require(good, where, ", ".join(unknown) or "none", f"some of {', '.join(TASKS)}", "correct it")


def build(tasks: Sequence[str], count: int, seed: int = 1, wording: str = "mixed") -> list[Case]:
    """Draws the cases of the tasks, keys of TASKS: `count` for a composition task, and TASKS times as many for others.

    `wording` is that of captions, one of `world.prompts.WORDINGS`.

    Raises:
      UserError: an unknown task or wording, or no cases.
    """
    check_tasks(tasks)
    require(count >= 1, "count", count, "1 or more", "raise it")
    cases = []
    for task in tasks:
        wanted = count * TASKS[task]
        if task == "edit":
            kinds = itertools.cycle(edits.KINDS)
            truths = [edits.sample(i, seed, {kind: 1.0}, "held_out") for i, kind in zip(range(wanted), kinds)]
            texts = [edit.instruction for edit in truths]
        elif task == "reconstruct":
            truths = [prompts.sample(i, seed, split="held_out") for i in range(wanted)]
            texts = [""] * wanted
        else:
            truths = prompts.held_out_prompts(task, wanted, seed, wording)
            texts = [sample.caption for sample in truths]
        cases += [Case(task, i, *pair) for i, pair in enumerate(zip(texts, truths, strict=True))]
    return cases


def score(case: Case, image: np.ndarray, version: str = "model", read: Reader = read_text) -> dict[str, Any]:
    """Scores one image uint8[S S 3] of a model, enlarged if it is too small to show shapes.

    `version` is a key of VERSIONS, for reconstructions; `read` reads the text of signs.

    Returns:
      A row with `name`, `tag`, `prompt`, `held_out`, `hit`, and entries that depend on the task.
    """
    image = enlarged(image)
    row = {"name": case.name, "tag": case.tag, "prompt": case.prompt, "held_out": list(case.truth.held_out)}
    if case.tag == "text":
        return row | _text_row(case, read(image))
    if case.tag == "reconstruct":
        return row | _reconstruction_row(case, image, version)
    return row | (_edit_row if case.tag == "edit" else _composition_row)(case, image)


def _composition_row(case: Case, image: np.ndarray) -> dict[str, Any]:
    row = judge_image(case.name, case.truth.metadata, image, detect, Verifier.thresholds)
    kept = {key: row[key] for key in ("correct", "strict", "reward", "reason")}
    kept |= {"metadata": case.truth.metadata, "details": row["detections"]}
    if row["correct"] and not row["strict"]:
        kept["reason"] = "not exactly as requested"
    return {"hit": row["strict"], "wording": _wording(case), **kept}


def _text_row(case: Case, read: str) -> dict[str, Any]:
    wanted = case.truth.request.text
    result, reward = text_score(wanted, read), ocr_reward(case.prompt, read)
    reason = "" if result.exact else f"expected {wanted}, read {read or 'nothing'}"
    row = {"hit": result.exact, "wording": _wording(case), "text": wanted, "read": read, "reason": reason}
    return row | {"reward": reward, **dataclasses.asdict(result)}


def _edit_row(case: Case, image: np.ndarray) -> dict[str, Any]:
    result = dataclasses.asdict(score_edit(case.truth, image))
    result |= {key: None for key in ("psnr", "ssim") if math.isnan(result[key])}  # which JSON does not have
    return {"hit": result["fulfilled"], "reason": "" if result["fulfilled"] else "not carried out", **result}


def _reconstruction_row(case: Case, image: np.ndarray, version: str) -> dict[str, Any]:
    scene, size = case.truth.scene, len(image)
    original, found = render(scene, size), detect(image)
    verified = describes(found, read_text(image), scene, size)
    things = [scene.sign] if scene.sign else scene.objects
    placed = matched(things, found, size / UNITS, TOLERANCE, any_shape=True)
    return {
        "hit": verified,
        "version": version,
        "reason": "" if verified else f"{VERSIONS[version]} shows another scene",
        "layout": len(things) == len(found) and None not in placed,
        "psnr": min(psnr(original, image), PSNR_CEILING),
        "ssim": ssim(original, image),
    }


def _wording(case: Case) -> str:
    return "template" if case.prompt == captions.template(case.truth.request) else "paraphrase"


@dataclasses.dataclass(frozen=True)
class Figure:
    """A row of the table: a fraction or a mean with its 95 % confidence interval."""

    name: str
    score: geneval.Score  # `value` of a fraction is in [0, 1]
    unit: str = "%"  # in the table

    def cells(self) -> tuple[str, str, str, str]:
        """Returns the cells of the row: name, value, interval, images."""
        scale, digits = {"%": (100, 1), "dB": (1, 1), "": (1, 3)}[self.unit]
        numbers = self.score.value, self.score.low, self.score.high
        value, low, high = (f"{number * scale:.{digits}f}" for number in numbers)
        return self.name, f"{value} {self.unit}".strip(), f"{low} to {high}", str(self.score.count)


def share(name: str, hits: Sequence[bool], prompts: Sequence[str] | None = None) -> list[Figure]:
    """Returns a fraction with its Wilson interval; nothing if there are no images.

    `prompts` are those of the images, of which the interval counts each once; None: they differ.
    """
    if not hits:
        return []
    value, trials = sum(hits) / len(hits), len(hits if prompts is None else set(prompts))
    return [Figure(name, geneval.Score(value, *wilson(value * trials, trials), len(hits)))]


def mean(name: str, values: Sequence[float | None], unit: str) -> list[Figure]:
    """Returns the mean of the known values with a bootstrap interval; nothing if there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return []
    interval = bootstrap_mean({name: [[value] for value in known]})
    return [Figure(name, geneval.Score(float(np.mean(known)), *interval, len(known)), unit)]


def figures(rows: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Summarises rows by task."""

    def of(*tags):
        return [row for row in rows if row["tag"] in tags]

    result = _composition(of(*COMPOSITION_TASKS))
    text = of("text")
    for name, is_short in ((f"1-{SHORT}", True), (f"{SHORT + 1}-5", False)):
        part = [row["exact"] for row in text if (len(row["text"]) <= SHORT) == is_short]
        result += share(f"text, {name} letters: exact", part)
    result += mean("text: 1 - edit distance", [row["similarity"] for row in text], "")
    result += mean("text: OCR reward", [row["reward"] for row in text], "")
    changed = of("edit")
    result += share("editing: instruction fulfilled", [row["fulfilled"] for row in changed])
    result += share("editing: fulfilled, outside of new_pairs", [row["fulfilled"] for row in _only_judged(changed)])
    for kind in edits.KINDS:
        result += share(f"editing, {kind}: fulfilled", [row["fulfilled"] for row in changed if row["kind"] == kind])
    result += mean("editing: untouched region, PSNR", [row["psnr"] for row in changed], "dB")
    result += mean("editing: untouched region, SSIM", [row["ssim"] for row in changed], "")
    for version, name in VERSIONS.items():
        part = [row for row in of("reconstruct") if row["version"] == version]
        result += share(f"{name}: verified", [row["hit"] for row in part])
        result += share(f"{name}: colours and layout", [row["layout"] for row in part])
        result += mean(f"{name}: PSNR", [row["psnr"] for row in part], "dB")
        result += mean(f"{name}: SSIM", [row["ssim"] for row in part], "")
    return result


def _composition(rows: Sequence[Mapping[str, Any]]) -> list[Figure]:
    if not rows:
        return []
    strict, official = _scores(rows, "strict"), _scores(rows, "correct")
    result = [Figure(f"{task}: strict", score) for task, score in strict.items() if task != "overall"]
    result.append(Figure("composition: strict, mean of the tasks", strict["overall"]))
    result.append(Figure("composition: official GenEval rule", official["overall"]))
    if judged := _only_judged(rows):
        result.append(Figure("composition: strict, outside of new_pairs", _scores(judged, "strict")["overall"]))
    result += _by_wording(rows)
    pairs = [row for row in rows if "pair" in row["held_out"]]
    hits, prompted = [row["strict"] for row in pairs], [row["prompt"] for row in pairs]
    return result + share("composition: strict, unseen colour-shape pairs", hits, prompted)


def _only_judged(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the rows outside the split `new_pairs`, which reinforcement learning may use."""
    return [row for row in rows if not in_split("new_pairs", tuple(row["held_out"]))]


def _by_wording(rows: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Compares templates and paraphrases over the tasks with enough images of both."""
    parts = {name: [row for row in rows if row["wording"] == name] for name in ("template", "paraphrase")}
    counts = [collections.Counter(row["tag"] for row in part) for part in parts.values()]
    tasks = [task for task in counts[0] if min(count[task] for count in counts) >= ENOUGH]
    if not tasks:
        return []
    same = {name: [row for row in part if row["tag"] in tasks] for name, part in parts.items()}
    return [
        Figure(f"composition: strict, {name} (tasks with both)", _scores(part, "strict")["overall"])
        for name, part in same.items()
    ]


def _scores(rows: Sequence[Mapping[str, Any]], rule: str) -> dict[str, geneval.Score]:
    return geneval.summarize((row["tag"], row["prompt"], row[rule]) for row in rows)


def markdown(lines: Sequence[Figure]) -> str:
    """Formats figures as a Markdown table."""
    cells = [("figure", "value", "95 % interval", "images"), *(line.cells() for line in lines)]
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    rows = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return "\n".join([rows[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *rows[1:]])
