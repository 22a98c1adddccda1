"""The clock, timed iterations, comparisons of several providers, the breakdown of a step, and the row format."""
