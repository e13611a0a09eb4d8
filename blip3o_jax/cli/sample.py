"""Generates and edits images. Flags are named as in diffusers.

A row of --prompts_file may set any flag by name and overrides the command line, except for --checkpoint, --adapter,
--dtype, --image_tokenizer and --diffusion, which override the file. samples.jsonl and any image of an earlier run are
prompt files too: they reproduce the same images.
"""

import argparse

from blip3o_jax.cli.flags import add_model, add_sampling
from blip3o_jax.command_line import Parser
from blip3o_jax.compilation import keep_programs
from blip3o_jax.errors import reported


def parser() -> Parser:
    flags = Parser(description=__doc__)
    add = flags.add_argument
    add("--prompt", action="append", help="caption, or editing instruction with --image; repeatable")
    add("--prompts_file", help=".txt (one per line), .jsonl, .json, .csv or .tsv with a column `prompt`; samples.jsonl "
        "or a PNG of an earlier run; or a directory of .txt files with one prompt each")  # fmt: skip
    add("--image", action="append", help="reference image; repeatable")
    add("--task", help="t2i, edit, reconstruct or package.module:attribute; default: edit with an image, else t2i")
    add("--negative_prompt", help="prompt to guide away from, instead of the null condition")
    add_model(flags, dtype=None)
    add("--height", type=int, help="height in pixels, a multiple of the autoencoder's factor; default: the model's")
    add("--width", type=int, help="width in pixels, a multiple of the autoencoder's factor; default: the model's")
    add_sampling(flags)
    add("--num_images_per_prompt", type=int, default=1, help="images per prompt; default: 1")
    add("--best_of", type=int, default=1, help="candidates per image, from which --reward selects one; default: 1")
    add("--reward", help="reward that selects with --best_of, or is only recorded: text, text_exact, geneval, edit, "
        "another of docs/reinforcement.md, or package.module:attribute")  # fmt: skip
    add("--image_ids_only", action=argparse.BooleanOptionalAction, default=True,
        help="sample from image tokens only (default), or from the whole vocabulary as the reference")  # fmt: skip
    add("--token_window", type=int, help="image tokens per pass of parallel decoding; default: depends on the batch")
    add("--tiling", action="store_true", help="encode and decode large images in tiles")
    output = flags.add_mutually_exclusive_group()
    output.add_argument("--output", help="PNG file for a single image; replaced if it exists")
    output.add_argument("--output_dir", default="outputs", help="directory for images, samples.jsonl and grid.png; "
                        "files get the next free number, so several runs can share it")  # fmt: skip
    return flags


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    with reported(args.debug):
        keep_programs()
        from blip3o_jax.cli import generation  # imports jax

        generation.run(args)
