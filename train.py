"""Trains any stage: `python train.py --config=configs/NAME.py --workdir=DIR [--config.key=value ...]`.

The same command resumes. Ctrl-C or SIGTERM: a checkpoint, one line that says so, exit 0.
"""

from absl import app, flags, logging

from blip3o_jax.compilation import keep_programs
from blip3o_jax.errors import UserError, reported
from blip3o_jax.flags import define_config, parse

CONFIG = define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run: checkpoints, metrics, samples")
DEBUG = flags.DEFINE_bool("debug", False, "show tracebacks")
COORDINATOR = flags.DEFINE_string("coordinator_address", None, "host:port of process 0; found by itself on most pods")
PROCESSES = flags.DEFINE_integer("num_processes", None, "processes in all, likewise")
PROCESS = flags.DEFINE_integer("process_id", None, "number of this process, likewise")


def main(arguments: list[str]) -> None:
    """Dispatches to the training loop."""
    if not DEBUG.value:
        logging.set_verbosity(logging.WARNING)  # Orbax tells much about every checkpoint
    with reported(DEBUG.value):
        if len(arguments) > 1:
            raise UserError("arguments", got=arguments[1], expected="flags only", do="write --name=value")
        for flag, value in (("--config", CONFIG.value), ("--workdir", WORKDIR.value)):
            if value is None:
                raise UserError(f"{flag}: missing", expected="it on the command line", do="see train.py --help")
        keep_programs()
        from blip3o_jax import experiment  # imports jax
        from blip3o_jax.train import distributed, loop

        distributed.initialize(COORDINATOR.value, PROCESSES.value, PROCESS.value)
        settings = CONFIG.value.to_dict()
        config = experiment.from_settings(settings)
        loop.train(experiment.build(config, settings, WORKDIR.value), config.loop, WORKDIR.value)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
