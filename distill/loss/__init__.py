"""Training objectives: the decoupled loss on embeddings, and losses on masks."""
