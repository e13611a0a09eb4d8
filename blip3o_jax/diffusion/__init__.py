"""Flow matching: schedule, samplers and guidance. Knows arrays and a denoise function, no model."""
