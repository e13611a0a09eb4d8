"""Command line of the demo world: `export`, `preview`, `tokenizer` and `selftest`.

For TFDS and ArrayRecord, see `python -m blip3o_jax.data build tfds train OUT --kind world --option count=1000`.
"""

from blip3o_jax.command_line import Parser, of, seed
from blip3o_jax.config.schema import Count, Size
from blip3o_jax.data.images import save_png
from blip3o_jax.demo import sheet
from blip3o_jax.demo.world import export, prompts, selftest
from blip3o_jax.errors import reported
from blip3o_jax.files import output_file


def _parser() -> Parser:
    parser = Parser(prog="python -m blip3o_jax.demo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    to_disk = commands.add_parser("export", help="write samples in the layout of a data set")
    to_disk.add_argument("out", help="new folder")
    to_disk.add_argument("--format", choices=list(export.LAYOUTS), default="webdataset")
    to_disk.add_argument("--count", type=of(Count), default=1000)
    to_disk.add_argument("--split", choices=prompts.SPLITS, default="train")
    drawn = commands.add_parser("preview", help="draw a contact sheet of samples")
    drawn.add_argument("out", help="PNG file")
    words = commands.add_parser("tokenizer", help="train the text tokenizer of the embedded model")
    words.add_argument("out", help="folder")
    words.add_argument("--num_codes", type=of(Count), default=1024, help="codes of the image tokenizer; default: 1024")
    test = commands.add_parser("selftest", help="check the verifier")
    test.add_argument("--count", type=of(Count), default=700)
    for command in (to_disk, drawn, test):
        command.add_argument("--seed", type=seed, default=0)
        command.add_argument("--size", type=of(Size), default=64, help="side of the images in pixels")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Runs one command."""
    args = _parser().parse_args(arguments)
    with reported(args.debug):
        if args.command == "export":
            export.export(args.out, args.format, args.count, args.seed, args.size, args.split)
            print(f"{args.count} samples of the demo world in {args.out} ({args.format})")
        elif args.command == "preview":
            target = output_file(args.out, "out", (".png",))
            save_png(sheet.preview(args.seed, args.size), target)
            print(f"contact sheet in {args.out}")
        elif args.command == "tokenizer":
            from blip3o_jax.demo import tokenizer  # imports a library that the other commands do not need

            learned, ids = tokenizer.build(args.num_codes)
            learned.save(args.out)
            print(f"tokenizer in {args.out}: {ids}")
        else:
            result = selftest.self_test(args.count, args.seed, args.size)
            print(result)
            result.require()


if __name__ == "__main__":
    main()
