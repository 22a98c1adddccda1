"""Metrics of samples, of reconstructions and of latents, and the images and features they are computed from."""
