"""Fine-tuning of the embedded model, measured: `python scripts/rl_demo.py --workdir runs/rl`.

For recipes of configs/grpo.py that train the demo model, and for the supervised one `pairs` of configs/demo.py: scores
before, a run per seed, scores after each (on held-out prompts, `python -m blip3o_jax.evals demo`; where the diffusion
half learns, rendered as in learning), and those of the averaged weights (`python -m blip3o_jax.convert average`). The
same command resumes; a WORKDIR belongs to one embedded model and one set of arguments. Output: WORKDIR/RECIPE-SEED for
every run, WORKDIR/RECIPE-mean, WORKDIR/RECIPE.png with the curves of all seeds, and WORKDIR/RECIPE.md with the scores
before and after. Arguments after `--` are passed to every train.py; with `--config.adapter.rank=16` the runs train
adapters, and no weights are averaged.
"""

import argparse
import json
import pathlib
import statistics
import types

from train_demo import finished, run

from blip3o_jax.command_line import Parser, of
from blip3o_jax.config.schema import Count, Seed
from blip3o_jax.curves import read_records
from blip3o_jax.demo.world.prompts import COMPOSITION_TASKS
from blip3o_jax.errors import reported, require
from configs import demo, grpo

TASKS = {
    "demo": COMPOSITION_TASKS,
    "text_demo": ("text",),
    "edit_demo": ("edit",),
    "all_demo": (*COMPOSITION_TASKS, "text", "edit"),
    "pruned_demo": (*COMPOSITION_TASKS, "text"),
    "grpo_nft_demo": (*COMPOSITION_TASKS, "text"),
    "pairs": COMPOSITION_TASKS,
}
"""Recipe -> tasks that it is judged by."""
START_GIVEN = ("pruned_demo", "grpo_nft_demo")  # recipes that need --init_from
HELD_OUT = "held_out/"


def main() -> None:
    """Runs what is left of the recipes, then compares."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    ready = [recipe for recipe in TASKS if recipe not in START_GIVEN]
    parser.add_argument("--recipes", nargs="+", choices=TASKS, default=ready, help=f"default: {' '.join(ready)}")
    parser.add_argument("--init_from", help="checkpoint to start from; default: that of the recipe")
    parser.add_argument("--seeds", nargs="+", type=of(Seed), default=[0, 1, 2])
    parser.add_argument(
        "--count", type=of(Count), default=70, help="prompts per composition task; others scale with it"
    )
    parser.add_argument("further", nargs="*", help="arguments of train.py, behind --")
    args = parser.parse_args()
    with reported(args.debug):
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Trains and evaluates what is left of the recipes."""
    workdir, start = args.workdir.absolute(), args.init_from
    for recipe in args.recipes:
        lacking = recipe in START_GIVEN and start is None
        require(not lacking, "--init_from", f"none for {recipe}", "a checkpoint", "give one")
        before = evaluate(workdir / f"{recipe}-before", recipe, args.count, None, start)
        runs = [workdir / f"{recipe}-{seed}" for seed in args.seeds]
        for directory, seed in zip(runs, args.seeds, strict=True):
            train(directory, recipe, seed, [*([] if start is None else [f"--config.init_from={start}"]), *args.further])
        after = [evaluate(path / "evaluation", recipe, args.count, path, start) for path in runs]
        averaged = len(runs) > 1 and all((path / "model").is_dir() for path in runs)
        mean = evaluate_mean(workdir / f"{recipe}-mean", runs, recipe, args.count) if averaged else None
        draw(runs, workdir / f"{recipe}.png")
        times = ", ".join(f"{minutes(path):.0f}" for path in runs)
        report = f"{table(before, after, mean)}\nMinutes of training: {times}\n"
        (workdir / f"{recipe}.md").write_text(report, encoding="utf-8")
        print(f"{recipe}\n\n{report}")


def train(directory: pathlib.Path, recipe: str, seed: int, further: list[str]) -> None:
    """One run of a recipe, or what is left of it."""
    if finished(directory, config_file(recipe).get_config(recipe).loop.num_steps):
        return
    config = f"--config={config_file(recipe).__file__}:{recipe}"
    seeds = (f"--config.loop.seed={seed}", f"--config.data.seed={seed}")
    run("train.py", config, f"--workdir={directory}", *seeds, *further)


def config_file(recipe: str) -> types.ModuleType:
    """The module of a recipe: configs/demo.py for supervised ones, configs/grpo.py for the others."""
    return demo if recipe in demo.FURTHER_STAGES else grpo


def evaluate(
    directory: pathlib.Path, recipe: str, count: int, run_dir: pathlib.Path | None, start: str | None = None
) -> dict[str, float]:
    """Figures of a run's model or adapter, or of what it starts from, by name; guided as in learning.

    `start` is what it starts from; None: the checkpoint of the recipe.
    """
    if not (directory / "scores.json").is_file():
        flags = ["--output_dir", directory, "--tasks", ",".join(TASKS[recipe]), "--count", count, "--batch_size", 35]
        config = config_file(recipe).get_config(recipe)
        scale = config.settings.get("token_guidance_scale")
        flags += [] if scale is None else ["--token_guidance_scale", scale]
        if config.objective not in ("grpo", "joint"):  # the diffusion half learns
            render = config.rl.render
            flags += ["--num_inference_steps", render.num_inference_steps, "--guidance_scale", render.guidance_scale]
        if run_dir is not None and (run_dir / "model").is_dir():
            flags += ["--checkpoint", run_dir / "model"]
        else:
            flags += ["--checkpoint", start or config.init_from]
            flags += [] if run_dir is None else ["--adapter", run_dir / "adapter"]
        run("-m", "blip3o_jax.evals", "demo", *map(str, flags))
    scores = json.loads((directory / "scores.json").read_text(encoding="utf-8"))
    return {name: figure["value"] for name, figure in scores["figures"].items()}


def evaluate_mean(directory: pathlib.Path, runs: list[pathlib.Path], recipe: str, count: int) -> dict[str, float]:
    """Figures of the model whose weights are the mean of those of all runs."""
    if not (directory / "model").is_dir():
        models = [str(path / "model") for path in runs]
        run("-m", "blip3o_jax.convert", "average", *models, str(directory / "model"))
    return evaluate(directory / "evaluation", recipe, count, directory)


def draw(runs: list[pathlib.Path], target: pathlib.Path) -> None:
    """The losses and rewards of all seeds over each other, in training and on held-out prompts."""
    names = set().union(*read_records(runs[0]))
    held_out = sorted(name for name in names if name.startswith(HELD_OUT) and name.count("/") < 2)
    wanted = [*(name for name in ("loss_ce", "kl", "entropy") if name in names), *held_out, *({"reward"} & names)]
    run("-m", "blip3o_jax.curves", *map(str, runs), "--output", str(target), "--metrics", ",".join(wanted))


def table(before: dict[str, float], after: list[dict[str, float]], mean: dict[str, float] | None) -> str:
    """Figures before, after each run, their mean change, and those of the mean of the runs' weights, as Markdown."""
    heads = ["figure", "before", *(f"run {i}" for i in range(len(after))), "mean change"]
    rows = []
    for name, start in before.items():
        ends = [figures[name] for figures in after]
        rows.append([name, *(f"{value:.3f}" for value in (start, *ends)), f"{statistics.mean(ends) - start:+.3f}"])
        rows[-1] += [] if mean is None else [f"{mean[name]:.3f}"]
    heads += [] if mean is None else ["mean of the weights"]
    lines = [" | ".join(cells) for cells in (heads, ["---"] * len(heads), *rows)]
    return "".join(f"| {line} |\n" for line in lines)


def minutes(directory: pathlib.Path) -> float:
    """Time that the steps of a run took, rollouts included, but for steps that nothing was measured of."""
    records, last, total = read_records(directory), 0, 0.0
    for record in records:
        total += (record["seconds_per_step"] or 0) * (record["step"] - last)
        last = record["step"]
    return total / 60


if __name__ == "__main__":
    main()
