"""SAM's architectures: image encoders, prompt encoder, mask decoder."""
