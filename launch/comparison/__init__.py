"""Methods side by side under one protocol: the engine of `isr compare`, of the demo's report and of the notebook.

`compare` takes trained runs, baselines, GANs from weights files and folders of foreign results, restores and measures
what is not there yet, and writes the report. Files, in the order of the work: `inputs` (test sets), `methods`,
`measures` (metrics and their weights), `store` (what is kept between two runs), `statistics`, `efficiency`,
`published`, `pictures`, `outputs`, and `engine`, which calls them.
"""

from launch.comparison.engine import Comparison, compare

__all__ = ["Comparison", "compare"]
