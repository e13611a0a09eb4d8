"""Command lines, the top layer: nothing imports them."""
