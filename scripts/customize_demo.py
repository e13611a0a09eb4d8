"""The tutorial docs/customize.md: its images, and the figures and grid of what an adapter has learnt of them.

npm pack emoji-datasource-google@16.0.0
python scripts/customize_demo.py folder emoji-datasource-google-16.0.0.tgz FOLDER
python scripts/customize_demo.py prompts PROMPTS.txt
python sample.py --prompts_file PROMPTS.txt --output_dir PRIOR
python train.py --config=configs/customize.py --workdir=RUN --config.data.path=FOLDER \
  --config.data.prior.path=PRIOR/samples.jsonl
python scripts/customize_demo.py report FOLDER RUN/adapter GRID.png

The images are Google's Noto emoji (Apache License 2.0): the faces, 64 x 64, with their Unicode names as captions. The
prompts are captions of the demo world's training images; the embedded model's samples of them are what it is to keep.
"""

import argparse
import json
import pathlib
import tarfile

import jax
import numpy as np

from blip3o_jax.data import images
from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.sources import open_source
from blip3o_jax.demo import embedded
from blip3o_jax.errors import reported, require
from blip3o_jax.models import blip3o
from blip3o_jax.pipeline import Pipeline

FACES = "face-"  # how the subcategories of faces begin
SHOWN = 8  # columns of the grid
CELLS = 8  # a side of the layout that is compared
PROMPTS = 300
Images = list[np.ndarray]


def main() -> None:
    """Dispatches."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = flags.add_subparsers(required=True)
    folder = commands.add_parser("folder")
    folder.add_argument("package", help="emoji-datasource-google, as npm packs it")
    folder.add_argument("folder", type=pathlib.Path, help="a new directory")
    folder.set_defaults(run=lambda args: make_folder(args.package, args.folder))
    prompts = commands.add_parser("prompts")
    prompts.add_argument("file", type=pathlib.Path, help="text file to write, one prompt per line")
    prompts.set_defaults(run=lambda args: write_prompts(args.file))
    show = commands.add_parser("report")
    show.add_argument("folder", help="of the images")
    show.add_argument("adapter", help="of the run")
    show.add_argument("grid", help="PNG file: held-out images, the model without and with the adapter")
    show.set_defaults(run=lambda args: report(args.folder, args.adapter, args.grid))
    args = flags.parse_args()
    with reported():
        args.run(args)


def make_folder(package: str, folder: pathlib.Path) -> None:
    """Writes every face as NAME.png with its caption beside it."""
    folder.mkdir(parents=True)
    with tarfile.open(package) as tar:
        listed = json.load(tar.extractfile("package/emoji.json"))
        faces = [face for face in listed if face["subcategory"].startswith(FACES) and face["has_img_google"]]
        for face in faces:
            content = tar.extractfile(f"package/img/google/64/{face['image']}").read()
            (folder / f"{face['short_name']}.png").write_bytes(content)
            (folder / f"{face['short_name']}.txt").write_text(f"an emoji: {face['name'].lower()}\n")
    print(f"{len(faces)} images with captions: {folder}")


def write_prompts(file: pathlib.Path) -> None:
    """Writes captions of the demo world."""
    world = open_source(SourceConfig("world", "train"))
    file.write_text("".join(f"{world[index].text}\n" for index in range(PROMPTS)), encoding="utf-8")


def report(folder: str, adapter: str, grid: str) -> None:
    """Prints figures of the held-out captions and draws a grid."""
    parts = {part: open_source(SourceConfig("folder", folder, part=part)) for part in ("train", "held_out")}
    pipelines = {
        "embedded model": Pipeline.from_pretrained(embedded.CHECKPOINT),
        "with the adapter": Pipeline.from_pretrained(embedded.CHECKPOINT, adapters=adapter),
    }
    side = pipelines["embedded model"].config.image_size
    training, held_out = ([_image(example, side) for example in _all(parts[part])] for part in parts)
    captions = [example.text for example in _all(parts["held_out"])]
    require(bool(captions), "held-out captions", "none", "at least one", "add images")
    made: dict[str, Images] = {"held-out images": held_out, "autoencoder": _decoded(pipelines, held_out)}
    for name, pipeline in pipelines.items():
        made[name] = [np.asarray(image) for image in pipeline(captions).images]
    print(f"{len(training)} images of training, {len(captions)} held out")
    print(f"{'':<18}{'PSNR':>7}{'colour':>8}{'layout':>8}{'nearest':>9}")
    for name, own in made.items():
        print(f"{name:<18}" + "".join(_figures(own, held_out, training)))
    rows = [image for name in made if name != "autoencoder" for image in made[name][:SHOWN]]
    images.save_png(images.grid(rows, min(SHOWN, len(captions))), grid)
    print(grid)


def _all(source):
    return [source[index] for index in range(len(source))]


def _image(example, side: int) -> np.ndarray:
    return images.to_uint8(images.target_pixels(images.load_image(example.target), side, side))


def _decoded(pipelines: dict[str, Pipeline], held_out: Images) -> Images:
    """What the autoencoder makes of images: the best that can be reached."""
    pipeline = next(iter(pipelines.values()))
    pixels = np.stack(held_out).astype(np.float32) / 127.5 - 1
    latents = jax.jit(blip3o.encode_latent, static_argnums=0)(pipeline.config, pipeline.params, pixels)
    return list(images.to_uint8(jax.jit(blip3o.decode_latent, static_argnums=0)(
        pipeline.config, pipeline.params, latents)))  # fmt: skip


def _figures(made: Images, wanted: Images, training: Images) -> list[str]:
    """PSNR in dB to the images of the captions, distance of mean colours and correlation of layouts with them, and the
    root mean square distance to the nearest image of training; of 255."""
    psnr = np.mean([_psnr(one, other) for one, other in zip(made, wanted)])
    colour = np.mean([np.abs(one.mean((0, 1)) - other.mean((0, 1))).mean() for one, other in zip(made, wanted)])
    layout = np.mean([np.corrcoef(_layout(one), _layout(other))[0, 1] for one, other in zip(made, wanted)])
    nearest = np.mean([min(_distance(one, other) for other in training) for one in made])
    return [f"{psnr:>7.1f}", f"{colour:>8.1f}", f"{layout:>8.2f}", f"{nearest:>9.1f}"]


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.sqrt(np.square(one.astype(float) - other).mean()))


def _psnr(one: np.ndarray, other: np.ndarray) -> float:
    distance = _distance(one, other)
    return float(20 * np.log10(255 / distance)) if distance else np.inf


def _layout(image: np.ndarray) -> np.ndarray:
    """Mean brightness of the cells, CELLS a side."""
    side = image.shape[0] // CELLS
    return image.mean(-1).reshape(CELLS, side, CELLS, side).mean((1, 3)).ravel()


if __name__ == "__main__":
    main()
