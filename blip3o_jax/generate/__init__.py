"""Generation: prompts to image tokens by autoregressive decoding, then to pixels by guided denoising."""
