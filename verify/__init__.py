"""How near a student comes to its teacher: metrics against the store, thresholds, the report.

In the order of a run: config, subject (what is compared), compare, masks, gates (thresholds), table (the terminal),
report with its gallery, pictures and charts.

An evaluation of any number of models: evaluation_config, arena (what is compared: opening, scenes, contender and its
kinds sam_contenders, predictors, fastsam), evaluate (protocols, centres, tally), evaluation_table, evaluation_report.

And of a sweep: sweep_config, trials (its runs), sweep_job, trial (one run), trial_loop (all of them here) or
trial_cluster with trial_tasks (on dask), sweep_results, spread (over seeds), sweep_tables, sweep_page and
sweep_charts.

Names are loaded on first use (`__init__.pyi` lists them), so that importing this package costs nothing.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
