"""`python -m blip3o_jax.convert`: the command line of `blip3o_jax.cli.convert`."""

from blip3o_jax.cli.convert import main

if __name__ == "__main__":
    main()
