"""Prose is plain: no fragments that open with "Of" or "What", no words such as told, mend, shall, besides."""

from __future__ import annotations

from pathlib import Path

import pytest

from .prose import ROOT, Text, everything, found

LEFT = 0  # 475 on 2026-11-27


def test_no_words_or_openings_to_avoid_are_added() -> None:
    places = [f"{text.path.relative_to(ROOT)}:{line}: {words}" for text in everything() for line, words in found(text)]
    assert len(places) <= LEFT, (
        f"{len(places)} places, {LEFT} are allowed: rewrite the new ones in plain English (CONTRIBUTING.md, Words). "
        "All:\n" + "\n".join(places)
    )


@pytest.mark.parametrize(
    "text",
    [
        "Of every random draw in training.",
        "seed: Of the weights.",
        "What a denoiser is told besides the image.",
        "An image is read. Whether it is grey does not matter.",
        "config=a.yaml is no YAML; mend that line",
        "what you give beats them",
    ],
)
def test_the_worst_is_found(text: str) -> None:
    assert list(found(Text(Path("a.py"), 1, "docstring", text))) == [(1, text)]


@pytest.mark.parametrize(
    "text",
    [
        "seed: Random seed for all draws made in training.",
        "What must I download?",
        "Of course it does.",
        "`told` is a name.",
        "How to train: isr fit.",
    ],
)
def test_plain_prose_passes(text: str) -> None:
    assert not list(found(Text(Path("a.py"), 1, "docstring", text)))
