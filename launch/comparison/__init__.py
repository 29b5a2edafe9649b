"""Methods side by side under one protocol: the engine of `isr compare`, of the demo's report and of the notebook.

`compare` takes trained runs, baselines, GANs from weights files and folders of foreign results. It restores and
measures what an earlier call has not kept, and writes the report. The files, in the order of the work:

* `inputs` (test sets), `methods`, `measures` (metrics and their weights), `store` (files kept between two calls)
* `work` (restores and measures), `efficiency`
* `report` (content), `statistics`, `fid`, `windows` (images), `published`
* `outputs` (files), `tables`, `markdown`, `latex`, `pictures`
* `engine`, which calls them
"""

from launch.comparison.engine import WrittenReport, compare

__all__ = ["WrittenReport", "compare"]
