"""The means as LaTeX tables, for the package booktabs."""

from __future__ import annotations

from launch.comparison.report import Report
from launch.comparison.tables import arrow, shown, significantly_best

_TEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "|": r"\textbar{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", '"': r"\textquotedbl{}", "\n": " ", "\r": " "}
)


def latex(data: Report) -> str:
    """A table for each data set."""
    tables = []
    for dataset in data.datasets:
        name = dataset["name"]
        metrics = [metric for metric in data.metrics if shown(metric, data, name)]
        best = {metric["id"]: significantly_best(data, name, metric) for metric in metrics}
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_tex(name)}, {len(dataset['images'])} images. Bold: best, and the 95\,\% bootstrap intervals "
            r"of its paired differences to all other methods exclude zero.}",
            rf"\begin{{tabular}}{{l{'r' * (len(metrics) + 1)}}}",
            r"\toprule",
            " & ".join(
                [
                    "Method",
                    "$n$",
                    *(_tex(m["id"]) + arrow(m, r" $\uparrow$", r" $\downarrow$") for m in metrics),
                ]
            )
            + r" \\",
            r"\midrule",
        ]
        for method in data.methods:
            means = [data.means[name].get(method["name"], {}).get(metric["id"]) for metric in metrics]
            cells = []
            for metric, mean in zip(metrics, means, strict=True):
                text = "--" if mean is None else f"{mean['mean']:.{metric['digits']}f}"
                cells.append(rf"\textbf{{{text}}}" if best[metric["id"]] == method["name"] else text)
            failed = sum(failure["dataset"] == name for failure in method["failures"])
            cells = [_tex(method["name"]), str(len(dataset["images"]) - failed), *cells]
            lines.append(" & ".join(cells) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", *(f"% {m['id']}: {m['protocol']}" for m in metrics)]
        tables.append("\n".join([*lines, r"\end{table}"]))
    return "\n\n".join(tables) + "\n"


def _tex(text: str) -> str:
    return text.translate(_TEX)
