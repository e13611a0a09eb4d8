"""Flags that several command lines share: the model, and how it is sampled. Imports jax on first use only."""

import argparse
from typing import Any

from blip3o_jax.command_line import Parser

BACKBONE = "package.module:attribute of the checkpoint's diffusion backbone, if it is not built in"

SAMPLING: dict[str, dict] = {
    "num_inference_steps": {"type": int, "help": "denoising steps; default: the checkpoint's"},
    "guidance_scale": {"type": float, "help": "guidance of the denoising; 1 turns it off; default: the checkpoint's"},
    "token_guidance_scale": {"type": float, "help": "guidance of the image tokens; default: the checkpoint's"},
    "temperature": {"type": float, "default": 1.0, "help": "temperature of the image tokens; 0 is greedy; default: 1"},
    "top_k": {"type": int, "default": 1200, "help": "sample from the k most probable tokens; 0: all; default: 1200"},
    "top_p": {"type": float, "default": 0.95, "help": "sample from this probability mass; default: 0.95"},
    "token_decoding": {
        "default": "auto",
        "help": "parallel (several image tokens per decoder pass), sequential, or auto (the faster); does not change "
        "the tokens; default: auto",
    },
    "sampler": {"default": "euler", "help": "euler, heun, dpmpp_2m or package.module:attribute; default: euler"},
    "seed": {"type": int, "default": 0, "help": "random seed, 0 to 2**32 - 1; default: 0"},
    "batch_size": {"type": int, "default": 8, "help": "images per batch; default: 8"},
}
"""Flag -> arguments of `add_argument`; the flags are fields of `generate.settings.Settings`."""


def add_sampling(parser: Parser) -> None:
    """Adds the flags of SAMPLING."""
    for name, options in SAMPLING.items():
        parser.add_argument(f"--{name}", **options)


def add_model(parser: Parser, dtype: str | None = "auto") -> None:
    """Adds the flags of a model and its adapters; `dtype` is the default of --dtype."""
    add = parser.add_argument
    add("--checkpoint", help="directory (native or released layout), or hf://org/name; default: the embedded model")
    add("--adapter", action="append", help="low-rank adapter of the checkpoint, in PEFT's or diffusers' format: "
        "directory or hf://org/name; repeatable")  # fmt: skip
    add("--adapter_scale", action="append", type=float, help="scale of the adapters: one, or one for each; default: 1")
    add("--dtype", default=dtype, help="float32, bfloat16, int8 or auto; default: auto")
    add("--backbone", help=BACKBONE)
    add_parts(parser)


def named_model(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what the flags of `add_model` name, as arguments of `pipeline.open_model`."""
    from blip3o_jax.convert.adapters import weighted
    from blip3o_jax.demo import embedded

    adapters = dict(weighted(args.adapter or (), args.adapter_scale or ()))
    sources = {name: getattr(args, name) for name in ("image_tokenizer", "diffusion", "backbone")}
    return {"path": args.checkpoint or embedded.CHECKPOINT, "adapters": adapters, **sources}


def add_parts(parser: Parser) -> None:
    """Adds the flags of parts that a released checkpoint may lack."""
    parser.add_argument("--image_tokenizer", help="ta_tok.pth, for a checkpoint without an image tokenizer")
    parser.add_argument("--diffusion", help="diffusers folder of SANA-1.5, for a checkpoint without diffusion models")
