"""Help pages: short and quick, true to the parser, ending in examples that are understood."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from launch import usage
from launch.cli import COMMANDS, main
from launch.errors import UsageError

from ..command_line import ROOT, ParseOnly

LIGHTNING = ("fit", "validate", "test", "predict")


def test_every_command_has_two_examples() -> None:
    assert usage.EXAMPLES.keys() == COMMANDS.keys()
    for command, examples in usage.EXAMPLES.items():
        assert len(set(examples)) == 2
        assert all(example.startswith(f"isr {command}") for example in examples)


@pytest.mark.parametrize("command", COMMANDS)
def test_its_help_fits_on_a_screen_or_two_and_ends_in_the_examples(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.rstrip().endswith(usage.examples(command))
    assert len(text.splitlines()) < 90


def test_help_answers_without_heavy_imports() -> None:
    code = (
        "import sys; from launch.cli import COMMANDS, main; codes = [main([name, '--help']) for name in COMMANDS]; "
        "print(codes, sorted({'torch', 'lightning', 'diffusers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{[0] * len(COMMANDS)} []"


@pytest.mark.parametrize("command", LIGHTNING)
def test_each_option_of_a_short_help_is_one_of_the_parser(command: str) -> None:
    ParseOnly([command, "-c", str(ROOT / "papers/dfosd/configs/demo/01_dfosd.yaml")])
    known = {
        option
        for action in ParseOnly._made["_subcommand_parsers"][command]._actions
        for option in action.option_strings
    }
    named = set(
        re.findall(r"(?<=[ ,(])(--?[a-z_]+(?:\.[a-z_]+)?)(?=[ ,)\n])", usage.page(command).partition("more help")[0])
    )
    assert len(named) >= 9
    assert {option for option in named if option.partition(".")[0] not in ("--model", "--data")} <= known


def test_a_configurations_help_is_that_of_its_classes(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "papers/dm_sr/configs/demo/02_dm_sr.yaml")
    assert main(["fit", "-c", config, "--data", "data.SRData", "--help"]) == 0
    text = capsys.readouterr().out
    assert "papers.dm_sr.DMSR" in text
    assert "--model.estimator" in text
    assert "--data.global_batch_size" in text
    assert "--data.test_seeds" not in text  # of data.Photos, which the flag replaces
    assert "--trainer.devices" not in text.partition("examples:")[0]


def test_all_options_are_there_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help-all"]) == 0
    assert "--trainer.accumulate_grad_batches" in capsys.readouterr().out


def test_a_configuration_that_is_not_there_is_named() -> None:
    with pytest.raises(UsageError, match=r"-c nix\.yaml cannot be read"):
        usage.classes(["-c", "nix.yaml", "--help"])
