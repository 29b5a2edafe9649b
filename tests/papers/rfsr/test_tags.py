"""Files of what a tagger said, found by an image's pixels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import papers.rfsr
from common.conditioning.ram import RamTagger
from data import SRData
from launch.cli import main
from papers.rfsr import DAPE, TagFiles, Untagged, write_tags
from papers.rfsr.tags import fingerprint

from ...ram_files import sizes, write_folder


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 8, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_what_is_written_of_an_image_is_found_again_in_any_order(pixels: torch.Tensor, tmp_path: Path) -> None:
    tokens, texts = torch.randn(3, 145, 512), ["cat", "", "tree, sky, \u00e9t\u00e9"]
    paths = write_tags(tmp_path / "new", pixels.float() / 255, texts, tokens)
    assert len({path.name for path in paths}) == 3
    found = TagFiles(str(tmp_path / "new"))(pixels[[2, 0]].float() / 255)
    assert found.texts == [texts[2], texts[0]]
    assert torch.equal(found.e_img, tokens[[2, 0]])


def test_every_8_bit_value_is_recognised_however_it_became_a_float() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1)
    ways = [levels.float() / 255, levels.double() / 255, levels.float() * (1 / 255), (levels.double() / 255).float()]
    assert len({fingerprint(way) for way in ways}) == 1
    assert fingerprint(ways[0].flip(1).flip(1)) == fingerprint(ways[0])
    assert fingerprint(ways[0][:, ::2].contiguous()) == fingerprint(ways[0][:, ::2])  # whatever the memory's layout


def test_another_image_has_another_name(pixels: torch.Tensor) -> None:
    image = pixels[0].float() / 255
    other = image.clone()
    other[1, 3, 4] += 1 / 255 if other[1, 3, 4] < 0.5 else -1 / 255
    names = {fingerprint(x) for x in (image, other, image.flip(2), image.flip(0), image.reshape(3, 12, 8))}
    assert len(names) == 5


def test_an_image_without_a_file_is_named_with_the_way_to_make_one(pixels: torch.Tensor, tmp_path: Path) -> None:
    write_tags(tmp_path, pixels[:1].float() / 255, ["cat"], torch.zeros(1, 2, 3))
    x = pixels.float() / 255
    message = rf"tagger.folder=.* has no {fingerprint(x[1])}.safetensors for an image of 12 x 8 px; .*write_tags"
    with pytest.raises(FileNotFoundError, match=message):
        TagFiles(str(tmp_path))(x[:2])


def test_texts_and_images_must_be_as_many(pixels: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zip"):
        write_tags(tmp_path, pixels.float() / 255, ["cat"], torch.zeros(3, 2, 3))


def test_untagged_says_nothing_in_the_shape_of_dapes_tokens() -> None:
    seen = Untagged()(torch.rand(2, 3, 8, 8))
    assert seen.texts == ["", ""]
    assert seen.e_img.shape == (2, 145, 512)
    assert not seen.e_img.any()


@pytest.fixture
def fit(sd: str, seesr: str, tmp_path: Path) -> list[str]:
    """One step of the card's demo on a small SeeSR, with a validation set of two crops."""
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
        pixels = np.random.default_rng(len(name)).integers(0, 256, (32, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name / "photo.png")
    base = {"pretrained": sd, "networks": seesr, "sampler": "ddim", "steps": 2, "cfg_scale": 1}
    return [
        *("fit", "-c", str(Path(papers.rfsr.__file__).parent / "configs/demo/02_rfsr.yaml")),
        *("--runs", str(tmp_path / "runs"), "--name=tags", "--data=data.SRData", f"--data.train={tmp_path}/train"),
        *(f"--data.val={tmp_path}/val", "--data.crop_size=32", "--data.batch_size=1", "--data.num_workers=0"),
        *("--trainer.max_steps=1", "--trainer.val_check_interval=1", "--trainer.enable_progress_bar=false"),
        *("--data.batches_per_epoch=1", "--model.inference.color_fix=none"),
        "--model.base=papers.rfsr.SeeSR",
        *(f"--model.base.init_args.{name}={value}" for name, value in base.items()),
    ]


def test_dape_runs_in_a_fit_and_files_of_its_tags_are_checked_at_the_start(
    fit: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training makes new crops at each step, which DAPE tags and files never cover."""
    monkeypatch.setattr(RamTagger, "sizes", sizes(context=10))
    folder = write_folder(tmp_path / "models", context=10)
    argument = "--model.base.init_args.tagger=papers.rfsr."
    named = [f"{argument}DAPE", f"--model.base.init_args.tagger.init_args.folder={folder}"]
    assert main([*fit, *named]) == 0
    state = torch.load(next((tmp_path / "runs").rglob("last.ckpt")), weights_only=True)["state_dict"]
    assert not [key for key in state if "tagger" in key]
    tagger = DAPE(str(folder))
    data = SRData(val=str(tmp_path / "val"), crop_size=32)
    data.setup("validate")
    (loader,) = data.val_dataloader()
    crops = [sample["lq"].float() / 255 for sample in loader]
    files = [f"{argument}TagFiles"]
    files.append(f"--model.base.init_args.tagger.init_args.folder={tmp_path / 'tags'}")
    write_tags(tmp_path / "tags", crops[0], *tagger(crops[0]))
    capsys.readouterr()
    assert main([*fit, *files]) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert "has no file for 1 of 2 validation images: photo_r0c1_s0; write DAPE's answers" in message
    write_tags(tmp_path / "tags", crops[1], *tagger(crops[1]))
    assert main([*fit, *files]) == 1  # validation is covered, new training crops never are
    assert "for an image of 8 x 8 px; write DAPE" in " ".join(capsys.readouterr().err.split())
