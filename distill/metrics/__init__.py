"""Distance between student and teacher, in embeddings and in masks."""
