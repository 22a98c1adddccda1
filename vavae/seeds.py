"""Purposes of the tokenizer's random numbers, a word of their seeds (`common.seeds`): each has a stream of its own."""

INITIAL_WEIGHTS, POSTERIOR_NOISE, CROP, EXTRACTION_NOISE, FLIP = range(5)
