"""Grids of runs, each trained and verified, and their results side by side."""
