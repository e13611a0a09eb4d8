"""Flow matching: schedule, samplers, guidance and the stochastic sampler, on arrays and a denoise callable."""
