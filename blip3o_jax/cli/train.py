"""Trains any stage: `python train.py --config=configs/NAME.py --workdir=DIR [--config.key=value ...]`.

The same command resumes. Ctrl-C or SIGTERM saves a checkpoint, says so in one line, and exits with 0.
"""

import pathlib

from absl import logging

from blip3o_jax.cli import configuration
from blip3o_jax.command_line import Parser, of
from blip3o_jax.compilation import keep_programs
from blip3o_jax.config.schema import Count, Natural
from blip3o_jax.errors import reported
from blip3o_jax.files import writable


def parser() -> Parser:
    flags = Parser(description=__doc__)
    add = flags.add_argument
    add("--config", required=True, help=configuration.HELP)
    add("--workdir", required=True, help="directory of the run: checkpoints, metrics, samples")
    add("--coordinator_address", help="host:port of process 0; found automatically on most clusters")
    add("--num_processes", type=of(Count), help="number of processes; found automatically on most clusters")
    add("--process_id", type=of(Natural), help="index of this process; found automatically on most clusters")
    return flags


def main(arguments: list[str] | None = None) -> None:
    args = configuration.parse(parser(), arguments)
    if not args.debug:
        logging.set_verbosity(logging.WARNING)  # Orbax logs every checkpoint in detail
    with reported(args.debug):
        settings = configuration.read(args.config, args.changes, with_paths=True)
        keep_programs()
        from blip3o_jax import experiment  # imports jax
        from blip3o_jax.train import distributed, loop

        distributed.initialize(args.coordinator_address, args.num_processes, args.process_id)
        config = experiment.from_settings(settings)
        with writable(pathlib.Path(args.workdir)):  # before anything is computed
            loop.train(experiment.build(config, settings, args.workdir), config.loop, args.workdir)
