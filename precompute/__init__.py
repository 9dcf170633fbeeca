"""The dask job: pending shards -> images -> teacher -> store.

In the order of a run: config, plan (selection, sizing), opening, cluster (scratch), job (progress, interrupts, watch,
suspects), auditor in the coordinator; worker (tasks, decoding, decoders, process), audit in dask's workers.

Names are loaded on first use (`__init__.pyi` lists them), so that importing this package costs nothing.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
