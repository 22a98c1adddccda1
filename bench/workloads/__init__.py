"""Workloads: training steps, samplers and passes of the tokenizer, their variants, and the providers of an op."""
