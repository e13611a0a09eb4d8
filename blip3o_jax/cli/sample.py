"""Generates and edits images. Flags are named as in diffusers.

A row of --prompts_file may set any flag by name and overrides the command line, except for --checkpoint, --adapter,
--dtype, --image_tokenizer and --diffusion, which override the file. samples.jsonl and any image of an earlier run are
prompt files too: they reproduce the same images.
"""

import argparse

from blip3o_jax.command_line import Parser
from blip3o_jax.compilation import keep_programs
from blip3o_jax.errors import reported


def parser() -> Parser:
    """The command line."""
    flags = Parser(description=__doc__)
    add = flags.add_argument
    add("--checkpoint", help="directory (native or released layout), or hf://org/name; default: the embedded model")
    add("--prompt", action="append", help="caption, or instruction where an image is given; repeatable")
    add("--prompts_file", help=".txt (one a line), .jsonl, .json, .csv or .tsv with a column `prompt`; samples.jsonl "
        "or a PNG of an earlier run; or a directory of .txt files with one prompt each")  # fmt: skip
    add("--image", action="append", help="reference image; repeatable")
    add("--task", help="t2i, edit, reconstruct or package.module:attribute; default: edit with an image, else t2i")
    add("--negative_prompt", help="prompt to steer away from, instead of the null condition")
    add("--height", type=int, help="height in pixels, a multiple of the autoencoder's factor; default: the model's")
    add("--width", type=int, help="width in pixels, a multiple of the autoencoder's factor; default: the model's")
    add("--num_inference_steps", type=int, help="denoising steps; default: the checkpoint's, 30 if it is not distilled")
    add(
        "--guidance_scale",
        type=float,
        help="guidance of the denoising; 1 turns it off; default: the checkpoint's, 2 if it is not distilled",
    )
    add(
        "--token_guidance_scale",
        type=float,
        help="guidance of the image tokens; default: the checkpoint's",
    )
    add("--num_images_per_prompt", type=int, default=1, help="images per prompt; default: 1")
    add("--best_of", type=int, default=1, help="candidates of each image, of which --reward chooses; default: 1")
    add("--reward", help="what chooses: text, text_exact, geneval, edit or another reward (docs/reinforcement.md), or "
        "package.module:attribute")  # fmt: skip
    add("--seed", type=int, default=0, help="random seed, 0 to 2**32 - 1; default: 0")
    add("--temperature", type=float, default=1.0, help="temperature of the image tokens; 0 is greedy; default: 1")
    add("--top_k", type=int, default=1200, help="sample from this many most probable tokens; 0: all; default: 1200")
    add("--top_p", type=float, default=0.95, help="sample from this probability mass; default: 0.95")
    add("--image_ids_only", action=argparse.BooleanOptionalAction, default=True,
        help="sample image tokens only (default), or the whole vocabulary as the reference does")  # fmt: skip
    add("--token_decoding", default="auto", help="parallel: several image tokens in a pass of the decoder, sequential: "
        "one by one, auto: the faster of them; the tokens are the same; default: auto")  # fmt: skip
    add("--token_window", type=int, help="image tokens in a pass of parallel decoding; default: by the batch")
    add("--sampler", default="euler", help="euler, heun or dpmpp_2m")
    add("--batch_size", type=int, default=8, help="images per batch; default: 8")
    add("--tiling", action="store_true", help="encode and decode large images in tiles")
    add("--dtype", help="float32, bfloat16, int8 or auto; default: auto")
    add("--image_tokenizer", help="ta_tok.pth, for a checkpoint without an image tokenizer")
    add("--diffusion", help="diffusers folder of SANA-1.5, for a checkpoint without diffusion models")
    add("--backbone", help="package.module:attribute of the checkpoint's diffusion backbone, where it is not built in")
    add("--adapter", action="append", help="low-rank adapter of the checkpoint, as PEFT or diffusers write it: "
        "directory or hf://org/name; repeatable")  # fmt: skip
    add(
        "--adapter_scale",
        action="append",
        type=float,
        help="scale of the adapters, one for all or one for each; default: 1",
    )
    output = flags.add_mutually_exclusive_group()
    output.add_argument("--output", help="PNG file for a single image; replaced if it exists")
    output.add_argument("--output_dir", default="outputs", help="directory for images, samples.jsonl and grid.png; "
                        "files get the next free number, so that several runs may share it")  # fmt: skip
    return flags


def main(arguments: list[str] | None = None) -> None:
    """Parses and dispatches."""
    args = parser().parse_args(arguments)
    with reported(args.debug):
        keep_programs()
        from blip3o_jax.cli import generation  # imports jax

        generation.run(args)
