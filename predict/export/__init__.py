"""Files for other runtimes: MobileSAM's checkpoint format, ONNX, safetensors with a model card.

The way in is `run.py`.
"""
