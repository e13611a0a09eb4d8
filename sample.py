"""Makes and edits pictures. `python sample.py --help` lists the flags, which have diffusers' names."""

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
    add("--prompts_file", help=".txt (one a line), .jsonl or .csv with `prompt`, and `image`, `task` where needed")
    add("--image", action="append", help="reference image; repeatable")
    add("--task", help="t2i, edit, reconstruct or package.module:attribute; default: edit with an image, else t2i")
    add("--negative_prompt", help="what to steer away from, in place of the null condition")
    add("--height", type=int, help="pixels, a multiple of the autoencoder's factor; default: the model's")
    add("--width", type=int, help="pixels, likewise")
    add("--num_inference_steps", type=int, default=30)
    add("--guidance_scale", type=float, default=2.0, help="1 turns guidance off")
    add("--token_guidance_scale", type=float, help="guidance of the image tokens, likewise; default: the checkpoint's")
    add("--num_images_per_prompt", type=int, default=1)
    add("--seed", type=int, default=0)
    add("--temperature", type=float, default=1.0, help="0 is greedy")
    add("--top_k", type=int, default=1200, help="0 keeps all")
    add("--top_p", type=float, default=0.95)
    add("--image_ids_only", action=argparse.BooleanOptionalAction, default=True,
        help="sample image tokens only (default), or the whole vocabulary as the reference does")  # fmt: skip
    add("--sampler", default="euler", help="euler, heun or dpmpp_2m")
    add("--batch_size", type=int, default=8, help="pictures at a time")
    add("--tiling", action="store_true", help="encode and decode large pictures in tiles")
    add("--dtype", default="auto", help="float32, bfloat16 or auto")
    add("--image_tokenizer", help="ta_tok.pth, for a checkpoint without an image tokenizer")
    add("--diffusion", help="diffusers folder of SANA-1.5, for a checkpoint without diffusion models")
    output = flags.add_mutually_exclusive_group()
    output.add_argument("--output", help="PNG file for a single picture")
    output.add_argument("--output_dir", default="outputs", help="directory for pictures, samples.jsonl and grid.png")
    return flags


def main() -> None:
    """Parses and dispatches."""
    arguments = parser().parse_args()
    with reported(arguments.debug):
        keep_programs()
        from blip3o_jax import sampling  # imports jax

        sampling.run(arguments)


if __name__ == "__main__":
    main()
