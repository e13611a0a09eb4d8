"""`python -m blip3o_jax.plan`: the command line of `blip3o_jax.cli.plan`."""

from blip3o_jax.cli.plan import main

if __name__ == "__main__":
    main()
