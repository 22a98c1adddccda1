"""Runs beside each other and beside the published curve: loss curves, a table, a picture."""
