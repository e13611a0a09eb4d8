"""`python -m blip3o_jax.app`: the command line of `blip3o_jax.cli.app`."""

from blip3o_jax.cli.app import main

if __name__ == "__main__":
    main()
