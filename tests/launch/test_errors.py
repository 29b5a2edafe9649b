"""Errors come out as one line, wherever they were raised."""

import pytest
from torch.utils.data import DataLoader, Dataset

from data.decoding import ImageError
from launch.errors import UsageError, report


class Broken(Dataset[int]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, _: int) -> int:
        raise ImageError("train: none of the 1 images can be read, among them a.png; replace the files")


def test_an_error_of_a_data_worker_is_its_own_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ImageError) as caught:
        next(iter(DataLoader(Broken(), num_workers=1)))
    assert report(caught.value, debug=False) == 1
    assert capsys.readouterr().err == (
        "isr: error: train: none of the 1 images can be read, among them a.png; replace the files\n"
    )


def test_exit_codes_and_the_hint_for_what_nobody_expected(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(UsageError("a\n b"), debug=False) == 2
    assert report(KeyboardInterrupt(), debug=False) == 130
    assert report(ZeroDivisionError("x"), debug=False) == 1
    err = capsys.readouterr().err
    assert "isr: error: a b\n" in err
    assert "ZeroDivisionError: x\nisr: run the same command with --debug for the traceback\n" in err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ValueError("seen")
    except ValueError as error:
        report(error, debug=True)
    assert "Traceback" in capsys.readouterr().err
