"""Command lines: what they parse and dispatch to. They stand above all layers and are imported by none."""
