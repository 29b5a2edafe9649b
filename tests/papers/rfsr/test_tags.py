"""Files of what a tagger said, found by an image's pixels."""

from pathlib import Path

import pytest
import torch

from papers.rfsr import TagFiles, Untagged, write_tags
from papers.rfsr.tags import fingerprint


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
