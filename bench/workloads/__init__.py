"""What is timed: steps, samplers and passes of the tokenizer, ours and plain ones, and who takes part for an op."""
