"""Trains any stage: `python train.py --help`. The command line is `blip3o_jax.cli.train`."""

from blip3o_jax.cli.train import main

if __name__ == "__main__":
    main()
