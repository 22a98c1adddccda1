"""A sweep over settings of `sample`: its axes, the networks that all settings share, what is finished, its report."""
