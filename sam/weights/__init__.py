"""Weights as people bring them: found, downloaded, read without running code, and given SAM's names."""
