"""What an extraction of latents does with images: how they are divided and encoded, and the round trip back to them."""
