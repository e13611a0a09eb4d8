"""From token rows to images: autoregressive decoding and guided denoising."""
