"""Comparison of any models by their masks: with the teacher's, with labels, and by their costs."""
