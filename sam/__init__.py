"""SAM's own definitions: image decoding and preprocessing, annotations, checkpoints, and SAM's architectures.

Names are loaded on first use (`__init__.pyi` lists them), so that importing this package costs nothing.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
