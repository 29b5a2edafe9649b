"""The trained timestep estimator T of stage 1, read for stage 2."""

from common.checkpoints import check_keys, check_shapes, read_stage, resolved, trained_state
from common.loading import is_architecture_only
from common.stages import Stage, digest
from papers.dm_sr.networks import TimestepEstimator

LAST = 499
"""The largest timestep: the estimator's outputs lie in 0 .. 499 (equation 10)."""


def read_estimator(path: str) -> Stage:
    """T of a stage-1 checkpoint, with averaged weights if it has them.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is another stage's.
    """
    checkpoint = read_stage(path, "estimator", "papers.dm_sr.TimestepEstimation")
    state = {
        name.removeprefix("estimator."): value.clone()  # of a mapped file
        for name, value in trained_state(checkpoint).items()
        if name.startswith("estimator.")
    }
    settings = {"width": checkpoint["hyper_parameters"].get("width", 1.0)}
    return Stage(resolved(path), digest(state), state, settings)


def build_estimator(stage: Stage) -> TimestepEstimator:
    """T with the weights of stage 1, frozen.

    Raises:
        ValueError: They do not fit.
    """
    estimator = TimestepEstimator("empty", stage.settings["width"], LAST + 1).requires_grad_(False).eval()
    if is_architecture_only():
        return estimator
    expected = {name for name, _ in estimator.named_parameters()}
    check_keys(expected, set(stage.weights), f"estimator={stage.path}")
    check_shapes(estimator, stage.weights, f"estimator={stage.path}")
    estimator.load_state_dict(stage.weights, strict=False)
    return estimator
