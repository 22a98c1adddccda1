"""The gate against regressions: committed rows, and which rows of a run fall behind them."""
