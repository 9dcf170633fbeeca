"""Student encoders: the registry, timm backbones, costs, initial weights, files."""
