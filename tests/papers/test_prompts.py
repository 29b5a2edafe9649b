"""Training by texts without a text is refused in every paper, and said by every other command."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from papers.dfosd import DFOSD
from papers.dm_sr import DMSR
from papers.dnf_sr import DNFSR, NF2T
from papers.f2idiff import F2IDiffSR, Foundation
from papers.rfsr import RFSR, BaseSR, ControlNet, SeeSR, TagFiles, Untagged

Make = Callable[[], Any]
TOLD: dict[str, Make] = {
    "condition=prompt reads": lambda: DFOSD(condition="prompt"),
    "prompt=null reads": lambda: DMSR(timestep=1, prompt=None),
    "condition=text reads": lambda: F2IDiffSR(condition="text"),
    "condition=text reads the": lambda: Foundation(condition="text"),
    "or set model.prompt": lambda: DNFSR(),
    "or set model.prompt to": lambda: NF2T(rewards=("neg_mse",)),
    "prompt_dropout=0.5 reads": lambda: BaseSR(ControlNet()),
    "set model.prompt_dropout=1": lambda: RFSR(ControlNet()),
}
UNTOLD: list[Make] = [
    lambda: DFOSD(),
    lambda: DFOSD(condition="empty"),
    lambda: DMSR(timestep=1),
    lambda: F2IDiffSR(),
    lambda: Foundation(),
    lambda: DNFSR(prompt=""),
    lambda: NF2T(rewards=("neg_mse",), prompt="a photo"),
    lambda: BaseSR(ControlNet(), prompt_dropout=1.0),
    lambda: RFSR(SeeSR(tagger=TagFiles("x"))),
    lambda: RFSR(SeeSR(tagger=Untagged())),
]


def with_prompts(model: Any, *splits: str) -> Any:
    """The model under a trainer whose data has prompts in some splits."""
    data = SimpleNamespace(has_prompts=lambda split: split in splits)
    model._trainer = SimpleNamespace(
        datamodule=data, log_dir=None, loggers=[], precision="32-true", enable_validation=False
    )
    return model


@pytest.mark.parametrize("message", TOLD)
def test_a_fit_is_refused_where_texts_are_the_condition_and_no_image_has_one(
    message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=message):
        with_prompts(TOLD[message](), "val", "test").setup("fit")
    with_prompts(TOLD[message](), "train", "val").setup("fit")
    assert not caplog.records


@pytest.mark.parametrize("number", range(len(UNTOLD)))
def test_other_conditions_need_none(number: int, caplog: pytest.LogCaptureFixture) -> None:
    for stage in ("fit", "validate", "test", "predict"):
        with_prompts(UNTOLD[number]()).setup(stage)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(("stage", "split"), [("fit", "val"), ("validate", "val"), ("test", "test")])
def test_where_only_other_images_have_none_it_is_said(stage: str, split: str, caplog: pytest.LogCaptureFixture) -> None:
    with_prompts(DFOSD(condition="prompt"), "train").setup(stage)
    assert caplog.messages == [
        f"condition=prompt: the {split} images have no prompts, so each gets the empty text; give data.prompts"
    ]
    with_prompts(F2IDiffSR(condition="text", captioner="a/b"), "train").setup("test")
    assert len(caplog.messages) == 1  # the captioner writes them


def test_a_reward_that_reads_texts_warns_without_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A tagger gives them; zeros in its place do not."""
    reward = SimpleNamespace(prompted=True, name="imagereward", load=lambda device: None)
    monkeypatch.setattr("papers.rfsr.module.Reward", SimpleNamespace)
    model = with_prompts(RFSR(SeeSR(tagger=Untagged()), ema_decay=None))
    model._modules["rewards"] = {"imagereward": reward}
    model.trainer.log_dir, model.trainer.global_rank = None, 0
    monkeypatch.setattr(type(model), "check_tile", lambda self: None)
    model.on_fit_start()
    (message,) = caplog.messages
    assert message.startswith("rewards=imagereward scores every image for the empty text")
    model.base.tagger = TagFiles("x")
    model.on_fit_start()
    assert len(caplog.messages) == 1
