"""Plots training curves: `python -m blip3o_jax.curves RUN [RUN ...] --output FILE [--metrics loss,psnr]`.

A RUN is a workdir of train.py or its metrics.jsonl. All runs share one panel per metric.
"""

import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from blip3o_jax.command_line import Parser
from blip3o_jax.errors import reported, require
from blip3o_jax.files import output_file, parse_json, read_text

UNITS_OF_WORK = (
    "step",
    "lr",
    "images_per_s",
    "tokens_per_s",
    "seconds_per_step",
    "tflops_per_device",
    "mfu",
    "data_wait",
)
"""Record entries about progress and speed, which are not plotted."""


def read_records(path: str | os.PathLike) -> list[dict]:
    """Reads the complete lines of a metrics.jsonl; returns no records if there is no file."""
    path = pathlib.Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.is_file():
        return []
    lines = read_text(path, "records").splitlines(keepends=True)
    return [parse_json(line, str(path)) for line in lines if line.endswith("\n")]


def curve(records: Sequence[Mapping], name: str) -> list[tuple[int, float]]:
    """Returns (step, value) of one entry wherever it is a finite number."""
    points = [(record["step"], record.get(name)) for record in records]
    return [(step, float(y)) for step, y in points if isinstance(y, (int, float)) and math.isfinite(y)]


def draw(runs: Mapping[str, Sequence[Mapping]], names: Sequence[str]) -> np.ndarray:
    """Plots one panel per name with one line per run: uint8[Y X 3].

    Args:
      runs: label -> records, each with its `step`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # optional dependency
    from matplotlib.figure import Figure

    columns = min(len(names), 3)
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(grid, names, strict=False):
        for label, records in runs.items():
            points = curve(records, name)
            if points:
                axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2, marker="." if len(points) < 3 else "")
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.3)
    if len(runs) > 1:
        figure.axes[0].legend(fontsize=8)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def learnt(records: Sequence[Mapping]) -> list[str]:
    """Returns the names of record entries that can be plotted."""
    return sorted({name for record in records for name in record} - set(UNITS_OF_WORK))


def main(arguments: list[str] | None = None) -> None:
    """Parses, plots and writes the image."""
    parser = Parser(prog="python -m blip3o_jax.curves", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="workdir of train.py, or a metrics.jsonl")
    parser.add_argument("--output", required=True, help="PNG file")
    parser.add_argument("--metrics", help="comma-separated metrics; default: all losses and scores")
    args = parser.parse_args(arguments)
    with reported(args.debug):
        from blip3o_jax.data.images import save_png

        output_file(args.output, "--output", (".png",))
        runs = {run: read_records(run) for run in args.runs}
        for run, records in runs.items():
            require(records, f"{run}: no records", None, "a workdir with metrics.jsonl", "check the path")
        known = learnt([record for records in runs.values() for record in records])
        names = args.metrics.split(",") if args.metrics else known
        for name in names:
            require(name in known, "--metrics", f"{name!r}", f"some of {', '.join(known)}", "correct it")
        save_png(draw(runs, names), args.output)
        print(args.output)


if __name__ == "__main__":
    main()
