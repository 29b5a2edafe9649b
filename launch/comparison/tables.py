"""Tables of the report in Markdown, and the choice of what is bold in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launch.comparison.report import Report
from launch.comparison.statistics import gain_of


def significantly_best(data: Report, dataset: str, metric: Mapping[str, Any]) -> str | None:
    """The method with the best mean, if its paired difference to each other method has an interval beside zero."""
    means = {
        method: of_metric["mean"]
        for method, found in data.means[dataset].items()
        if (of_metric := found.get(metric["id"])) is not None
    }
    if len(means) < 2:
        return None
    lower, values = metric["lower_better"], data.values[dataset]
    best = (min if lower else max)(means, key=lambda method: means[method])
    for other in means.keys() - {best}:
        ours, theirs = (values[method].get(metric["id"], {}) for method in (best, other))
        gain = gain_of(ours, theirs, lower)
        if gain is None or not gain.better(lower):
            return None
    return best


def cells(data: Report) -> list[tuple[str, str, Mapping[str, Any], Mapping[str, Any]]]:
    """Every mean there is: data set, method, metric, mean."""
    return [
        (dataset, method, metric, found[metric["id"]])
        for dataset, methods in data.means.items()
        for method, found in methods.items()
        for metric in data.metrics
        if metric["id"] in found
    ]


def arrow(metric: Mapping[str, Any], up: str, down: str) -> str:
    """The text for the better direction of a metric."""
    return down if metric["lower_better"] else up


def shown(metric: Mapping[str, Any], data: Report, dataset: str) -> bool:
    """True where a metric has a mean on a test set."""
    return any(metric["id"] in found for found in data.means[dataset].values())


def count(dataset: Mapping[str, Any], method: Mapping[str, Any]) -> str:
    """Number of a method's results on a test set, `19 of 21`."""
    failed = sum(failure["dataset"] == dataset["name"] for failure in method["failures"])
    return f"{len(dataset['images']) - failed} of {len(dataset['images'])}"


def means_table(data: Report, dataset: Mapping[str, Any]) -> str:
    """Markdown table of the means on one of the data sets, a row for each method."""
    name = dataset["name"]
    metrics = [metric for metric in data.metrics if shown(metric, data, name)]
    best = {metric["id"]: significantly_best(data, name, metric) for metric in metrics}
    rows = []
    for method in data.methods:
        cells = []
        for metric in metrics:
            mean = data.means[name].get(method["name"], {}).get(metric["id"])
            text = "-" if mean is None else f"{mean['mean']:.{metric['digits']}f}"
            if mean is not None and mean["n"] < len(dataset["images"]):
                text += f" (n={mean['n']})"
            cells.append(f"**{text}**" if best[metric["id"]] == method["name"] else text)
        rows.append([method["name"], count(dataset, method), *cells])
    heads = [f"{metric['id']} ({arrow(metric, 'higher', 'lower')})" for metric in metrics]
    return _table(["method", "images", *heads], rows)


def details_table(data: Report, dataset: str, metric: Mapping[str, Any]) -> str:
    """Markdown table of one metric on one test set: mean, difference, wins and rank."""
    digits, rows = metric["digits"], []
    for method in data.methods:
        name = method["name"]
        mean = data.means[dataset].get(name, {}).get(metric["id"])
        if mean is None:
            continue
        gain = data.gains[dataset].get(name, {}).get(metric["id"])
        rank = data.ranks[dataset].get(name, {}).get(metric["id"])
        row = [name, str(mean["n"]), _with_interval(mean, digits, "")]
        if gain is None:
            row += ["-", "-"]
        else:
            row += [_gain_cell(gain, metric), f"{gain['wins']:.0%} of {gain['n']}"]
        rows.append([*row, "-" if rank is None else f"{rank:.2f}"])
    return _table(["method", "n", "mean", f"difference to {data.reference}", "wins", "mean rank"], rows)


def pairs_table(data: Report, dataset: str) -> str:
    """The differences to other methods than the reference; empty where there are none."""
    pairs = data.pairs[dataset]
    metrics = [metric for metric in data.metrics if any(metric["id"] in found for found in pairs.values())]
    rows = []
    for label, found in pairs.items():
        gains = [(found.get(metric["id"]), metric) for metric in metrics]
        rows.append([label, *("-" if gain is None else _gain_cell(gain, metric) for gain, metric in gains)])
    heads = [f"{metric['id']} ({arrow(metric, 'higher', 'lower')})" for metric in metrics]
    return _table(["method over another", *heads], rows) if rows else ""


def _gain_cell(gain: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    """A difference with its interval, bold where that lies on the better side of zero."""
    text, low, high = _with_interval(gain, metric["digits"], "+"), gain["low"], gain["high"]
    good = low is not None and (high < 0 if metric["lower_better"] else low > 0)
    return f"**{text}**" if good else text


def _with_interval(found: Mapping[str, Any], digits: int, sign: str) -> str:
    text = f"{found['mean']:{sign}.{digits}f}"
    if found["low"] is None:
        return text
    return f"{text} [{found['low']:{sign}.{digits}f}, {found['high']:{sign}.{digits}f}]"


def costs_table(data: Report) -> str:
    """Markdown table of the costs."""

    def cell(value: Any, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = [
        [
            *(row["method"], cell(row["trainable"], ",d"), cell(row["total"], ",d"), cell(row["macs"], ".4g")),
            *(cell(row["seconds"], ".4g"), cell(row["spread"], ".2g"), cell(row["memory_mb"], ".4g")),
            cell(row["denoiser_calls"], "d"),
        ]
        for row in data.efficiency
    ]
    heads = ["trained parameters", "parameters", "MACs", "s an image", "std of s", "peak MB", "denoiser calls"]
    return _table(["method", *heads], rows)


def published_table(table: Mapping[str, Any], dataset: str) -> str:
    """Markdown table of published numbers on one test set."""
    rows = [
        [method, *("-" if number is None else str(number) for number in numbers)]
        for method, numbers in table["rows"][dataset].items()
    ]
    return _table([f"{table['paper']}: {dataset}", *table["columns"]], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |" for cells in lines)
