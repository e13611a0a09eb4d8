"""Makes and edits images: `python sample.py --help`. The command line is `blip3o_jax.cli.sample`."""

from blip3o_jax.cli.sample import main

if __name__ == "__main__":
    main()
