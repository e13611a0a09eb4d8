"""`python -m blip3o_jax.data`: the command line of `blip3o_jax.cli.data`."""

from blip3o_jax.cli.data import main

if __name__ == "__main__":
    main()
