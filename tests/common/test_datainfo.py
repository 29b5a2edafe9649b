"""Facts that a module asks of its data module, with defaults for a foreign one."""

from pathlib import Path

import pytest

from common.datainfo import DataInfo


class Known:
    def __init__(self) -> None:
        self.dataset_names = {"test": ["A", "B"]}

    def has_prompts(self, split: str) -> bool:
        return split == "train"

    def texts(self) -> list[str]:
        return ["a cat"]

    def names_to_predict(self) -> list[str]:
        return ["x"]

    def check_apart(self, stage: str, output: Path, within: bool = False) -> None:
        raise ValueError(f"{stage} {output} {within}")


def test_a_data_module_that_knows_its_facts_is_asked() -> None:
    info = DataInfo(Known())
    assert (info.has_prompts("train"), info.has_prompts("val")) == (True, False)
    assert (info.texts(), info.names_to_predict()) == (["a cat"], ["x"])
    assert (info.dataset_names("test"), info.dataset_names("val")) == (["A", "B"], [])
    with pytest.raises(ValueError, match="predict out True"):
        info.check_apart("predict", Path("out"), within=True)


@pytest.mark.parametrize("foreign", [None, object()])
def test_a_foreign_one_has_the_defaults(foreign: object) -> None:
    info = DataInfo(foreign)
    assert info.has_prompts("train")
    assert (info.texts(), info.names_to_predict(), info.dataset_names("val")) == ([], [], [])
    info.check_apart("predict", Path("out"))
