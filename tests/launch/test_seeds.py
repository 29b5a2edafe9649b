"""One seed rules model and data, unless either has its own; a resumed fit goes on with its data's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ..command_line import ParseOnly

ROOT = Path(__file__).resolve().parents[2]
DEMO = sorted((ROOT / "papers").glob("*/configs/demo/*.yaml"))[0]


def seeds(*arguments: str, command: str = "fit") -> tuple[int, int]:
    """What model and data would be built with."""
    config = ParseOnly([command, "-c", str(DEMO), *arguments]).config[command]
    return config.model.init_args.seed, config.data.init_args.seed


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], (0, 0)),
        (["--seed_everything=3", "--model.seed=0"], (0, 3)),
        (["--seed_everything=3", "--data.seed=7"], (3, 7)),
        (["--seed_everything=false"], (0, 0)),
    ],
)
def test_one_argument_rules_both_unless_one_is_set_by_itself(arguments: list[str], expected: tuple[int, int]) -> None:
    assert seeds(*arguments) == expected


def test_a_resumed_fit_keeps_its_seeds(tmp_path: Path) -> None:
    settings = {"_class_path": "papers.dfosd.DFOSD", "seed": 4}
    parts = {"state_dict": {}, "hyper_parameters": settings, "seeds": {"seed_everything": 3, "model": 4, "data": 3}}
    torch.save(parts, tmp_path / "a.ckpt")
    path = ["--ckpt_path", str(tmp_path / "a.ckpt")]
    assert seeds(*path, "--data.seed=1") == (4, 1)
    assert seeds(*path, command="test") == (4, 0)
    del parts["seeds"]
    torch.save(parts, tmp_path / "a.ckpt")
    assert seeds(*path, "--seed_everything=2") == (4, 2)
