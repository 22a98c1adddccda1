"""What sampling and decoding do with many images: units and batches, labels, the way to a file, resuming by index."""
