"""Command lines. They stand above all layers; nothing imports them."""
