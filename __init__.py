"""Decoupled distillation of Segment Anything's image encoder (MobileSAM, arXiv 2306.14289).

A teacher's image embeddings are computed once into a Zarr store (`precompute`), a small student learns to
reproduce them by mean squared error (`distill`), and a verifier says how close it came (`verify`).
"""

__version__ = "0.1.0"
