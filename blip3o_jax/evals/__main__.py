"""`python -m blip3o_jax.evals`: the command line of `blip3o_jax.cli.evals`."""

from blip3o_jax.cli.evals import main

if __name__ == "__main__":
    main()
