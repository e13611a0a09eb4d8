"""Generic training: it receives objectives, parameters and batches, and knows none of them."""
