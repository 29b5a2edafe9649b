"""RAM and DAPE: the tagging head and the merged adapters by hand, published names, a folder of the authors' files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from common.conditioning.captions import Captioner
from common.conditioning.ram import RAM, RamTagger, merged

from ...ram_files import TAGS, dape_weights, ram_weights, sizes, write_folder

SIZES = sizes()
LAYER = "tagging_head.encoder.layer.{}.{}"


@pytest.fixture(scope="module")
def ram() -> dict[str, Tensor]:
    return ram_weights()


@pytest.fixture(scope="module")
def dape(ram: dict[str, Tensor]) -> dict[str, Tensor]:
    return dape_weights(ram)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(RamTagger, "sizes", SIZES)
    return write_folder(tmp_path)


def network(ram: dict[str, Tensor], dape: dict[str, Tensor] | None = None) -> RAM:
    found = RAM(len(TAGS), **SIZES).eval()
    found.load_published(ram, dape)
    return found


def test_it_has_the_published_size() -> None:
    with torch.device("meta"):
        found = RAM()
    assert sum(p.numel() for p in found.visual_encoder.parameters()) == 195_198_516
    head = 2 * (2 * (768 * 768 + 768) + 2 * (512 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768)
    rest = 1536 * 512 + 512 + 4585 * 512 + 512 * 768 + 768 + 768 + 1
    assert sum(p.numel() for p in found.parameters()) == 195_198_516 + head + rest == 212_117_045


def test_tokens_are_the_patches_mean_and_the_patches_and_logits_follow_the_equations(ram: dict[str, Tensor]) -> None:
    found, x = network(ram), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    logits, e_img = found(x)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    normalised = (x - mean) / std
    patches = found.visual_encoder.forward_features(normalised).reshape(2, 16, 16)
    tokens = torch.cat([patches.mean(1, keepdim=True), patches], 1) @ ram["image_proj.weight"].T
    assert_close(e_img, tokens + ram["image_proj.bias"])

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ ram[f"{name}.weight"].T + ram[f"{name}.bias"]

    def normed(name: str, value: Tensor) -> Tensor:
        spread = value.var(-1, correction=0, keepdim=True) + 1e-12
        scaled = (value - value.mean(-1, keepdim=True)) / spread.sqrt()
        return scaled * ram[f"{name}.weight"] + ram[f"{name}.bias"]

    y = linear("wordvec_proj", ram["label_embed"]).relu().expand(2, -1, -1)
    for i in range(2):
        q, k, v = (
            linear(LAYER.format(i, f"crossattention.self.{part}"), source).reshape(2, -1, 3, 4)
            for part, source in (("query", y), ("key", e_img), ("value", e_img))
        )
        weights = (torch.einsum("bthc,bnhc->bhtn", q, k) / 2).softmax(-1)  # sqrt of 12 / 3 channels a head
        attended = torch.einsum("bhtn,bnhc->bthc", weights, v).reshape(2, len(TAGS), 12)
        y = normed(LAYER.format(i, "crossattention.output.LayerNorm"),
                   linear(LAYER.format(i, "crossattention.output.dense"), attended) + y)  # fmt: skip
        hidden = torch.nn.functional.gelu(linear(LAYER.format(i, "intermediate.dense"), y))
        y = normed(LAYER.format(i, "output.LayerNorm"), linear(LAYER.format(i, "output.dense"), hidden) + y)
    assert_close(logits, linear("fc", y).squeeze(-1), atol=1e-4, rtol=1e-4)


def test_adapters_are_merged_into_query_and_value_or_query_and_key(
    ram: dict[str, Tensor], dape: dict[str, Tensor]
) -> None:
    state = merged(ram, dape)
    changed = {key for key, value in state.items() if not torch.equal(value, ram[key])}
    assert changed == {key.replace("lora_A", "weight") for key in dape if key.endswith("lora_A")}
    qkv = "visual_encoder.layers.0.blocks.0.attn.qkv."
    a, b = dape[f"{qkv}lora_A"], dape[f"{qkv}lora_B"]
    difference = (state[f"{qkv}weight"] - ram[f"{qkv}weight"]).chunk(3)
    for found, expected in zip(difference, (b[:8] @ a[:8] / 8, torch.zeros(8, 8), b[8:] @ a[8:] / 8), strict=True):
        assert_close(found, expected, atol=1e-5, rtol=1e-5)
    key = LAYER.format(1, "crossattention.self.key.")
    expected = dape[f"{key}lora_B"] @ dape[f"{key}lora_A"] / 8
    assert_close(state[f"{key}weight"] - ram[f"{key}weight"], expected, atol=1e-5, rtol=1e-5)


def test_older_names_load_and_missing_or_unknown_ones_do_not(ram: dict[str, Tensor], dape: dict[str, Tensor]) -> None:
    older = {key.replace("tagging_head", "vision_multi"): value for key, value in ram.items()}
    x = torch.rand(1, 3, 20, 30)
    assert torch.equal(network(older).forward(x).logits, network(ram).forward(x).logits)
    with pytest.raises(ValueError, match=r"Missing key.*fc\.bias"):
        network({key: value for key, value in ram.items() if key != "fc.bias"})
    with pytest.raises(ValueError, match=r"Unexpected key.*neck"):
        network({**ram, "neck": torch.zeros(1)})
    b = next(key for key in dape if key.endswith("lora_B"))
    with pytest.raises(ValueError, match=f"there is no {b}"):
        network(ram, {key: value for key, value in dape.items() if key != b})
    with pytest.raises(ValueError, match=r"there is no x\.weight"):
        network(ram, {"x.lora_A": torch.zeros(8, 2), "x.lora_B": torch.zeros(2, 8)})


def test_a_folder_gives_tags_above_their_own_thresholds(
    folder: Path, ram: dict[str, Tensor], dape: dict[str, Tensor]
) -> None:
    x = torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(3))
    probability = network(ram, dape).forward(x).logits.sigmoid()[0].tolist()
    above = [value - 0.001 if i % 2 else value + 0.001 for i, value in enumerate(probability)]
    (folder / "ram_tag_list_threshold.txt").write_text("\n".join(map(str, above)))
    tags, e_img = RamTagger(folder).tag(x)
    assert tags == ["sea, tree"]
    assert e_img.shape == (1, 17, 6)
    assert not e_img.requires_grad
    assert Captioner(f"dape:{folder}")(x) == tags
    plain = network(ram).forward(x).logits.sigmoid()[0] > torch.tensor(above)
    named = ", ".join(tag for tag, there in zip(TAGS, plain, strict=True) if there)
    assert Captioner(f"ram:{folder}")(x) == [named]


def test_missing_files_are_named_with_their_source(folder: Path) -> None:
    (folder / "DAPE.pth").unlink()
    assert Captioner(f"ram:{folder}")(torch.rand(1, 3, 8, 8))
    with pytest.raises(FileNotFoundError, match=r"lacks DAPE\.pth.*cswry/SeeSR"):
        RamTagger(folder).tag(torch.rand(1, 3, 8, 8))
    (folder / "ram_tag_list_threshold.txt").write_text("0.5\n")
    with pytest.raises(ValueError, match=r"has 4 tags and ram_tag_list_threshold\.txt 1 numbers"):
        RamTagger(folder, adapted=False).tag(torch.rand(1, 3, 8, 8))
