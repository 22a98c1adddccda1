"""Decoders of image files: Pillow, torchvision, DALI, all with squares for a batch as what they give."""
