"""The quickstart's data set of handwritten digits, its foundation model, and its classifier."""
