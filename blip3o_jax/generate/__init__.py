"""From token rows to pictures: autoregressive decoding and guided denoising."""
