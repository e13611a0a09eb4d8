"""A small verifiable world of coloured shapes and signs: every task of the model, drawn from (seed, index) alone."""
