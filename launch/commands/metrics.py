"""`isr metrics list | doctor | fetch`: which metrics there are, whether they work here, and what they would download.

list    every metric: whether it needs a reference, whether its weights are here, the licence of the code
doctor  compute each metric that needs no weights on a fixed pair and compare with the recorded value
fetch   say what would be downloaded from where, and do so after a yes (or with --yes)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from launch import usage


def run(command: str, argv: Sequence[str]) -> int:
    """Do one of the three.

    Returns:
        0; 1 where the doctor finds a difference, or something could not be fetched.

    Raises:
        UsageError: A metric is unknown.
    """
    parser = usage.parser(command, __doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="every metric")
    actions.add_parser("doctor", help="check those that need no weights")
    fetch = actions.add_parser("fetch", help="download weights")
    fetch.add_argument("names", nargs="*", metavar="NAME", help="metrics, e.g. lpips musiq; default: all of the list")
    fetch.add_argument("--yes", action="store_true", help="do not ask")
    options = parser.parse_args(list(argv))
    if options.action == "list":
        return _list()
    return _doctor() if options.action == "doctor" else _fetch(options.names, options.yes)


def _list() -> int:
    from launch.comparison.measures import KNOWN

    width = max(map(len, KNOWN))
    for known in KNOWN.values():
        files = len(known.weights)
        state = "no weights" if not files else f"{files - len(known.absent)} of {files} files here"
        reference = "reference" if known.reference else "no reference"
        print(f"{known.id:<{width}}  {reference:<12}  {state:<18}  {known.licence}")
    return 0


def _doctor() -> int:
    from launch.comparison.measures import examine

    findings = examine()
    for found in findings:
        value = "-" if found.value is None else f"{found.value:.6f}"
        print(f"{found.metric:<22}  {value:>12}  recorded {found.expected:>12.6f}  {found.verdict}")
    wrong = [found.metric for found in findings if not found.ok]
    print(f"{len(wrong)} of {len(findings)} differ{': ' if wrong else ''}{', '.join(wrong)}")
    return 1 if wrong else 0


def _fetch(names: Sequence[str], yes: bool) -> int:
    from common.pyiqa import MetricUnavailableError
    from launch.comparison.measures import KNOWN, fetch, full_id

    wanted = [KNOWN[full_id(name)] for name in names] or list(KNOWN.values())
    lacking = [known for known in wanted if known.absent]
    for known in lacking:
        for file in known.absent:
            print(f"{known.id}: {file.url} -> {file.path}  [{known.licence}; the weights have their makers' licences]")
    if not lacking:
        print("nothing to fetch: all weights are here")
        return 0
    if not yes and (not sys.stdin.isatty() or input("fetch these? [y/N] ").strip().lower() not in ("y", "yes")):
        print("nothing was fetched; --yes does not ask")
        return 0
    failed = 0
    for known in lacking:
        try:
            fetch(known.id)
            print(f"{known.id}: fetched")
        except MetricUnavailableError as error:
            failed += 1
            print(f"{known.id}: not fetched: {error}")
    return 1 if failed else 0
