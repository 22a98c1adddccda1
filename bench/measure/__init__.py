"""How anything is measured: the clock, laps, contests of several entrants, the breakdown of a step, and rows."""
