"""Architectures that SAM weights exist for: image encoders, prompt encoder, mask decoder."""
