"""Serves one model as a web page for generating and editing images, and as OpenAI's image API.

    python -m blip3o_jax.app                                # http://127.0.0.1:7860, with the embedded model
    python -m blip3o_jax.app --checkpoint hf://org/name --host 0.0.0.0 --api_key KEY

Requests are queued and batched. On SIGTERM or Ctrl-C the server finishes queued requests, then exits. docs/serving.md
lists endpoints, limits and metrics.
"""

import argparse
import os
import sys
from typing import Annotated

from blip3o_jax.cli.flags import add_model, named_model
from blip3o_jax.command_line import Parser, of
from blip3o_jax.compilation import keep_programs
from blip3o_jax.config.schema import Range
from blip3o_jax.errors import UserError, reported

KEY = "BLIP3O_API_KEY"
LOCAL = ("127.0.0.1", "localhost", "::1")


def parser() -> Parser:
    flags = Parser(prog="python -m blip3o_jax.app", description=__doc__,
                   formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add_model(flags)
    add = flags.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; default: this machine only")
    add("--port", type=of(Annotated[int, Range(0, 65_535)]), default=7860, help="port; 0: any free one; default: 7860")
    add("--api_key", default=os.environ.get(KEY), help=f"key that clients must send; default: ${KEY}, else no key")
    add("--served_model_name", help="the model's name for clients; default: that of the checkpoint's directory, and "
        "+NAME for each adapter")  # fmt: skip
    add("--size", action="append", default=[], help="WIDTHxHEIGHT that clients may choose; repeatable, the first is "
        "their default; default: the model's square, and 3:2 in both directions")  # fmt: skip
    add("--num_inference_steps", type=of(Annotated[int, Range(1, 1000)]), action="append",
        help="denoising steps that clients may choose; repeatable, the first is their default; default: the "
        "checkpoint's, then 30, 15, 8 and 4, or what it was distilled to")  # fmt: skip
    add("--reward", help="reward for requests with best_of, one that needs no metadata, such as text; default: "
        "best_of is not available")  # fmt: skip
    add("--max_batch", type=of(Annotated[int, Range(1, 256)]), default=8, help="images per batch; default: 8")
    add("--max_queue", type=of(Annotated[int, Range(1, 100_000)]), default=64, help="queued images; default: 64")
    add("--max_upload", type=of(Annotated[int, Range(1, 1024)]), default=20, help="MiB per request; default: 20")
    return flags


def main(arguments: list[str] | None = None) -> None:
    """Parses, loads, compiles and serves."""
    args = parser().parse_args(arguments)
    with reported(args.debug):
        keep_programs()
        try:
            from blip3o_jax.app import page, server
        except ModuleNotFoundError as error:
            expected, do = "the extra [app]", "pip install 'blip3o_jax[app]'"
            raise UserError("packages", got=f"no {error.name}", expected=expected, do=do) from error
        place, key = server.bound(args.host, args.port), args.api_key or None
        if key is None and args.host not in LOCAL:
            print(f"note: {args.host}: anyone who can reach it can use it; set --api_key", file=sys.stderr)
        limits = server.Limits(args.max_queue, args.max_upload * 2**20, key)
        application = server.Application(_service(args), limits, served_name(args), page.add_page)
        host, port = place.getsockname()[:2]
        server.serve(application, place, lambda: print(f"ready: http://{host}:{port}", flush=True))


def served_name(args: argparse.Namespace) -> str:
    """The name by which clients know the model."""
    parts = args.checkpoint or "embedded", *(args.adapter or ())
    return args.served_model_name or "+".join(os.path.basename(os.path.abspath(part)) for part in parts)


def _service(args: argparse.Namespace):
    """Loads the model and compiles the programs for requests with default settings."""
    from blip3o_jax.app.service import Service, choices_of
    from blip3o_jax.pipeline import Pipeline, open_model
    from blip3o_jax.sharding import default_mesh

    opened, adapters = open_model(**named_model(args))
    distilled = opened.config.dit.mean_flow
    offered = range(distilled.max_steps, 0, -1) if distilled else (opened.config.num_inference_steps, 30, 15, 8, 4)
    steps = args.num_inference_steps or offered
    choices = choices_of(opened.config, args.size, steps, args.max_batch)
    pipeline = Pipeline.from_checkpoint(opened, args.dtype, default_mesh(), adapters=adapters)
    origin = {"checkpoint": args.checkpoint or "embedded"}
    origin |= {"image_tokenizer": args.image_tokenizer, "diffusion": args.diffusion}
    origin |= {"adapter": [(adapter.name, scale) for adapter, scale in adapters]} if adapters else {}
    service = Service(pipeline, origin, choices, args.reward)
    print("compiling", flush=True)
    service.warm_up()
    return service
