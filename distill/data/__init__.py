"""Training data: images with their stored embeddings, their order, their split, their labels."""
