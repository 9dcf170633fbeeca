"""How near a student comes to its teacher: metrics against the store, thresholds, the report.

In the order of a run: config, subject (what is compared), compare, masks, gates (thresholds), table (the terminal),
report with its gallery, pictures and charts.

An evaluation of any number of models: evaluation_config, arena (what is compared: opening, scenes, contender and its
kinds sam_contenders, predictors, fastsam), evaluate (protocols, centres, tally), evaluation_table, evaluation_report.

Names are loaded on first use (`__init__.pyi` lists them), so that importing this package costs nothing.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
