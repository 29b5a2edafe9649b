"""SeeSR's U-Net and ControlNet: the authors' names and shapes, the way of the data, diffusers' networks as limit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from common.checkpoints import matching
from common.loading import architecture_only, load_diffusers_model, load_unet
from papers.rfsr.seesr import IMAGE_ATTENTIONS, SEESR_TRAINED, Residuals, SeeSRControlNet, SeeSRUNet

KEYS = Path(__file__).parents[2] / "data/keys"
TEXT, IMAGE = 12, 10  # widths of the tokens, small
SMALL: dict[str, Any] = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": (2, 4, 4),
    "cross_attention_dim": TEXT,
    "norm_num_groups": 4,
    "use_linear_projection": True,
}
UNET = SMALL | {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")}
CONTROL = SMALL | {"conditioning_embedding_out_channels": (4, 6, 8, 8)}
# by hand: of each cross-attention block its pairs in turn, text before image
DOWN = [f"down_blocks.{b}.{kind}.{i}" for b in (0, 1) for i in (0, 1) for kind in ("attentions", "image_attentions")]
MID = ["mid_block.attentions.0", "mid_block.image_attentions.0"]
UP = [f"up_blocks.{b}.{kind}.{i}" for b in (1, 2) for i in (0, 1, 2) for kind in ("attentions", "image_attentions")]


class Inputs(NamedTuple):
    z: Tensor
    t: Tensor
    e_txt: Tensor
    x_up_01: Tensor
    e_img: Tensor


def randomise(net: nn.Module, seed: int = 3) -> Any:
    """Move all parameters, zero convolutions too, off their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return net


def make_unet(**config: Any) -> SeeSRUNet:
    torch.manual_seed(0)
    return randomise(SeeSRUNet(**UNET | {"image_cross_attention_dim": IMAGE} | config))


def make_control(**config: Any) -> SeeSRControlNet:
    torch.manual_seed(1)
    return randomise(SeeSRControlNet(**CONTROL | {"image_cross_attention_dim": IMAGE} | config))


def make_inputs(seed: int = 2, image_width: int = IMAGE) -> Inputs:
    torch.manual_seed(seed)
    return Inputs(
        torch.randn(2, 4, 8, 8),
        torch.tensor([981, 20]),
        torch.randn(2, 5, TEXT),
        torch.rand(2, 3, 64, 64),
        torch.randn(2, 7, image_width),
    )


def predict(unet: SeeSRUNet, control: SeeSRControlNet, inputs: Inputs) -> Tensor:
    z, t, e_txt, x_up_01, e_img = inputs
    return unet(z, t, e_txt, control(z, t, e_txt, x_up_01, e_img), e_img)


def flat(residuals: Residuals) -> list[Tensor]:
    return [*residuals.down, residuals.mid]


def released(name: str) -> dict[str, tuple[int, ...]]:
    lines = (KEYS / f"{name}.txt").read_text().splitlines()
    return {key: tuple(int(n) for n in shape.split("x")) for key, shape in (line.split() for line in lines if line)}


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def full() -> tuple[SeeSRUNet, SeeSRControlNet]:
    """Both at full size, without memory."""
    with architecture_only():
        return (
            load_diffusers_model(SeeSRUNet, "random:seesr", "unet"),
            load_diffusers_model(SeeSRControlNet, "random:seesr", "controlnet"),
        )


Full = tuple[SeeSRUNet, SeeSRControlNet]


class TestReleasedLayout:
    @pytest.mark.parametrize(("which", "name"), [(0, "seesr_unet"), (1, "seesr_controlnet")])
    def test_the_authors_file_fits_without_a_key_missing_or_left_over(self, full: Full, which: int, name: str) -> None:
        shapes = released(name)
        assert {key: tuple(value.shape) for key, value in full[which].state_dict().items()} == shapes
        state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        copy.deepcopy(full[which]).load_state_dict(state, strict=True, assign=True)

    def test_counts_are_those_of_the_spec(self, full: Full) -> None:
        unet, control = full
        assert size(unet) == 1_126_760_324 == 865_910_724 + 260_849_600
        assert size(control) == 489_031_440
        assert size(control.controlnet_cond_embedding) == 1_086_480
        assert size(control.controlnet_down_blocks) + size(control.controlnet_mid_block) == 11_479_680
        assert len(control.controlnet_down_blocks) == 12

    @pytest.mark.parametrize(("which", "blocks"), [(0, 16), (1, 7)])
    def test_image_attentions_are_as_many_and_as_large_as_the_spec_says(
        self, full: Full, which: int, blocks: int
    ) -> None:
        found = [m for name, m in full[which].named_modules() if name.split(".")[-2:-1] == ["image_attentions"]]
        assert len(found) == blocks
        by_width = {module.in_channels: size(module) for module in found}
        assert by_width == {320: 2_382_400, 640: 8_860_800, 1280: 34_105_600}

    def test_the_patterns_pick_what_seesr_trains(self, full: Full) -> None:
        holder = nn.ModuleDict({"unet": full[0], "controlnet": full[1], "vae": nn.Linear(3, 3)})
        trained = matching(holder, SEESR_TRAINED)
        assert sum(p.numel() for p in trained.values()) == 749_881_040
        assert sum(p.numel() for p in matching(full[0], [IMAGE_ATTENTIONS]).values()) == 260_849_600

    def test_a_start_from_stable_diffusion_is_counted_without_memory(self, full: Full) -> None:
        with architecture_only():
            unet = SeeSRUNet.from_base(load_unet("random:sd21"))
            control = SeeSRControlNet.from_base(unet)
        assert {p.device.type for net in (unet, control) for p in net.parameters()} == {"meta"}
        assert (size(unet), size(control)) == (size(full[0]), size(full[1]))


class TestFiles:
    """Saving, and loading through our loader."""

    @pytest.mark.parametrize("kind", ["unet", "controlnet"])
    def test_a_saved_network_comes_back_as_it_was(self, kind: str, tmp_path: Path) -> None:
        net: Any = make_unet() if kind == "unet" else make_control()
        net.save_pretrained(tmp_path / kind)
        again = load_diffusers_model(type(net), str(tmp_path), kind)
        assert again.config.image_cross_attention_dim == IMAGE
        assert again.config.block_out_channels == [8, 16, 16]
        assert not again.training
        assert not any(p.requires_grad for p in again.parameters())
        state = again.state_dict()
        assert state.keys() == net.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())

    def authors_folder(self, root: Path, net: Any, plain: Any, file: str) -> str:
        """A folder as SeeSR's code writes it: diffusers' class in the config, and no width of the image tokens."""
        (root / "part").mkdir()
        config = {name: value for name, value in plain.config.items() if not name.startswith("_")}
        config |= {"_class_name": type(plain).__name__, "_diffusers_version": "0.21.0"}
        (root / "part/config.json").write_text(json.dumps(config | {"use_image_cross_attention": True}))
        if file.endswith(".bin"):
            torch.save(net.state_dict(), root / "part" / file)
        else:
            save_file(net.state_dict(), root / "part" / file, {"format": "pt"})
        return str(root)

    @pytest.mark.parametrize("file", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"])
    @pytest.mark.parametrize("kind", ["unet", "controlnet"])
    def test_the_authors_folder_loads_in_both_file_formats(self, kind: str, file: str, tmp_path: Path) -> None:
        if kind == "unet":
            net, plain = make_unet(image_cross_attention_dim=512), UNet2DConditionModel(**UNET)
        else:
            net, plain = make_control(image_cross_attention_dim=512), ControlNetModel(**CONTROL)
        again = load_diffusers_model(type(net), self.authors_folder(tmp_path, net, plain, file), "part")
        state = again.state_dict()
        assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())

    def test_a_plain_u_net_is_refused_and_pointed_to_from_base(self, tmp_path: Path) -> None:
        UNet2DConditionModel(**UNET).save_pretrained(tmp_path / "unet")
        with pytest.raises(
            ValueError, match=r"286 missing \(down_blocks.0.image_attentions.0.*from_base"
        ) as error:  # 26 x 11
            load_diffusers_model(SeeSRUNet, str(tmp_path), "unet")
        assert "\n" not in str(error.value)

    def test_what_is_left_over_is_refused(self, tmp_path: Path) -> None:
        net = make_unet()
        net.save_pretrained(tmp_path / "unet")
        state = {**net.state_dict(), "down_blocks.0.pixel_attentions.0.norm.weight": torch.ones(8)}
        save_file(state, tmp_path / "unet/diffusion_pytorch_model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=r"1 unexpected \(down_blocks.0.pixel_attentions"):
            load_diffusers_model(SeeSRUNet, str(tmp_path), "unet")

    def test_a_network_of_another_kind_is_refused(self) -> None:
        with pytest.raises(ValueError, match="use_image_cross_attention=False"):
            SeeSRUNet(**UNET, use_image_cross_attention=False)
        with pytest.raises(ValueError, match="SimpleCrossAttnDownBlock2D cannot have image attentions"):
            SeeSRUNet(**UNET | {"down_block_types": ("SimpleCrossAttnDownBlock2D", *SMALL["down_block_types"][1:])})


class TestPlainTorch:
    """Each kind of block against the authors' layout written out in functions of torch, in float64."""

    def convolve(self, w: dict[str, Tensor], x: Tensor, temb: Tensor) -> Tensor:
        h = F.conv2d(
            F.silu(F.group_norm(x, 4, w["norm1.weight"], w["norm1.bias"])), w["conv1.weight"], w["conv1.bias"], 1, 1
        )
        h = h + F.linear(F.silu(temb), w["time_emb_proj.weight"], w["time_emb_proj.bias"])[:, :, None, None]
        h = F.conv2d(
            F.silu(F.group_norm(h, 4, w["norm2.weight"], w["norm2.bias"])), w["conv2.weight"], w["conv2.bias"], 1, 1
        )
        if "conv_shortcut.weight" in w:
            x = F.conv2d(x, w["conv_shortcut.weight"], w["conv_shortcut.bias"])
        return x + h

    def attend(self, w: dict[str, Tensor], name: str, x: Tensor, context: Tensor, heads: int) -> Tensor:
        q, k, v = (
            F.linear(source, w[f"{name}.to_{part}.weight"]).unflatten(-1, (heads, -1)).transpose(1, 2)
            for part, source in (("q", x), ("k", context), ("v", context))
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return F.linear(out, w[f"{name}.to_out.0.weight"], w[f"{name}.to_out.0.bias"])

    def transform(self, w: dict[str, Tensor], x: Tensor, context: Tensor, heads: int) -> Tensor:
        width, side = x.shape[1], x.shape[2:]
        h = F.group_norm(x, 4, w["norm.weight"], w["norm.bias"], 1e-6).flatten(2).transpose(1, 2)
        h = F.linear(h, w["proj_in.weight"], w["proj_in.bias"])
        w, whole = {n.removeprefix("transformer_blocks.0."): v for n, v in w.items()}, w
        n1, n2, n3 = (
            lambda y, i=i: F.layer_norm(y, (width,), w[f"norm{i}.weight"], w[f"norm{i}.bias"]) for i in (1, 2, 3)
        )
        normed = n1(h)
        h = h + self.attend(w, "attn1", normed, normed, heads)
        h = h + self.attend(w, "attn2", n2(h), context, heads)
        value, gate = F.linear(n3(h), w["ff.net.0.proj.weight"], w["ff.net.0.proj.bias"]).chunk(2, -1)
        h = h + F.linear(value * F.gelu(gate), w["ff.net.2.weight"], w["ff.net.2.bias"])
        h = F.linear(h, whole["proj_out.weight"], whole["proj_out.bias"])
        return x + h.transpose(1, 2).unflatten(2, side)

    def part(self, block: nn.Module, prefix: str) -> dict[str, Tensor]:
        state = block.state_dict()
        return {name.removeprefix(f"{prefix}."): v for name, v in state.items() if name.startswith(f"{prefix}.")}

    def pair(self, block: nn.Module, i: int, x: Tensor, e_txt: Tensor, e_img: Tensor, heads: int) -> Tensor:
        x = self.transform(self.part(block, f"attentions.{i}"), x, e_txt, heads)
        return self.transform(self.part(block, f"image_attentions.{i}"), x, e_img, heads)

    @pytest.fixture
    def given(self) -> dict[str, Any]:
        inputs = make_inputs()
        torch.manual_seed(4)
        return {
            "temb": torch.randn(2, 32).double(),
            "encoder_hidden_states": inputs.e_txt.double(),
            "cross_attention_kwargs": {"image_tokens": inputs.e_img.double()},
        }

    @pytest.mark.parametrize("make", [make_unet, make_control])
    def test_a_down_block(self, make: Any, given: dict[str, Any]) -> None:
        block = make().double().down_blocks[1]
        temb, e_txt, e_img = given["temb"], given["encoder_hidden_states"], make_inputs().e_img.double()
        start = torch.randn(2, 8, 8, 8).double()
        out, skips = block(start, **given)
        x, expected = start, []
        for i in range(2):
            x = self.convolve(self.part(block, f"resnets.{i}"), x, temb)
            x = self.pair(block, i, x, e_txt, e_img, heads=4)
            expected.append(x)
        down = self.part(block, "downsamplers.0.conv")
        expected.append(F.conv2d(x, down["weight"], down["bias"], 2, 1))
        assert_close(skips, tuple(expected), rtol=1e-10, atol=1e-10)
        assert torch.equal(out, skips[-1])

    @pytest.mark.parametrize("make", [make_unet, make_control])
    def test_the_mid_block(self, make: Any, given: dict[str, Any]) -> None:
        block = make().double().mid_block
        temb, e_txt, e_img = given["temb"], given["encoder_hidden_states"], make_inputs().e_img.double()
        start = torch.randn(2, 16, 4, 4).double()
        x = self.convolve(self.part(block, "resnets.0"), start, temb)
        x = self.pair(block, 0, x, e_txt, e_img, heads=4)
        x = self.convolve(self.part(block, "resnets.1"), x, temb)
        assert_close(block(start, **given), x, rtol=1e-10, atol=1e-10)

    def test_an_up_block(self, given: dict[str, Any]) -> None:
        block = make_unet().double().up_blocks[1]
        temb, e_txt, e_img = given["temb"], given["encoder_hidden_states"], make_inputs().e_img.double()
        start = torch.randn(2, 16, 4, 4).double()
        skips = tuple(torch.randn(2, width, 4, 4).double() for width in (8, 16, 16))
        x = start
        for i, skip in enumerate((skips[2], skips[1], skips[0])):
            x = self.convolve(self.part(block, f"resnets.{i}"), torch.cat([x, skip], 1), temb)
            x = self.pair(block, i, x, e_txt, e_img, heads=4)
        up = self.part(block, "upsamplers.0.conv")
        expected = F.conv2d(F.interpolate(x, scale_factor=2.0), up["weight"], up["bias"], 1, 1)
        assert_close(block(start, res_hidden_states_tuple=skips, **given), expected, rtol=1e-10, atol=1e-10)


class TestWayOfTheData:
    def record(self, net: nn.Module) -> list[tuple[str, Tensor]]:
        """Which transformers ran, in order, and what they read."""
        calls: list[tuple[str, Tensor]] = []

        def note(name: str) -> Any:
            return lambda module, args, kwargs: calls.append((name, args[1]))

        for name, module in net.named_modules():
            if name.rpartition(".")[0].endswith("attentions"):
                module.register_forward_pre_hook(note(name), with_kwargs=True)
        return calls

    def test_text_comes_before_image_in_every_block_of_both(self) -> None:
        unet, control, inputs = make_unet(), make_control(), make_inputs()
        in_unet, in_control = self.record(unet), self.record(control)
        predict(unet, control, inputs)
        for calls, expected in ((in_unet, DOWN + MID + UP), (in_control, DOWN + MID)):
            assert [name for name, _ in calls] == expected
            for name, read in calls:
                assert torch.equal(read, inputs.e_img if "image_attentions" in name else inputs.e_txt)

    def test_image_tokens_change_what_comes_after_the_first_image_attention(self) -> None:
        control, inputs = make_control(), make_inputs()
        before, after = (flat(control(*inputs._replace(e_img=e))) for e in (inputs.e_img, make_inputs(seed=9).e_img))
        assert len(before) == 10
        assert torch.equal(before[0], after[0])  # the first convolution, of latents and image
        assert not any(torch.equal(a, b) for a, b in zip(before[1:], after[1:], strict=True))

    def test_image_tokens_reach_the_prediction_by_either_network(self) -> None:
        unet, control, inputs = make_unet(), make_control(), make_inputs()
        z, t, e_txt, x_up_01, e_img = inputs
        other = make_inputs(seed=9).e_img
        eps = predict(unet, control, inputs)
        by_unet = unet(z, t, e_txt, control(z, t, e_txt, x_up_01, e_img), other)
        by_control = unet(z, t, e_txt, control(z, t, e_txt, x_up_01, other), e_img)
        assert eps.shape == z.shape
        for changed in (by_unet, by_control):
            assert (changed - eps).abs().max() > 1e-3

    @pytest.mark.parametrize("kind", ["down", "mid"])
    def test_residuals_reach_the_prediction(self, kind: str) -> None:
        unet, control, (z, t, e_txt, x_up_01, e_img) = make_unet(), make_control(), make_inputs()
        given = control(z, t, e_txt, x_up_01, e_img)
        without = Residuals(tuple(torch.zeros_like(r) for r in given.down), torch.zeros_like(given.mid))
        other = given._replace(**{kind: getattr(without, kind)})
        assert not torch.equal(unet(z, t, e_txt, given, e_img), unet(z, t, e_txt, other, e_img))

    def test_samples_of_a_batch_do_not_mix(self) -> None:
        unet, control, inputs = make_unet(), make_control(), make_inputs()
        together = predict(unet, control, inputs)
        alone = [predict(unet, control, Inputs(*(value[i : i + 1] for value in inputs))) for i in range(2)]
        assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)

    def test_one_prompt_and_one_image_serve_the_whole_batch(self) -> None:
        unet, control, inputs = make_unet(), make_control(), make_inputs()
        one = inputs._replace(e_txt=inputs.e_txt[:1], e_img=inputs.e_img[:1])
        both = inputs._replace(e_txt=inputs.e_txt[[0, 0]], e_img=inputs.e_img[[0, 0]])
        assert torch.equal(predict(unet, control, one), predict(unet, control, both))

    @pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 3, 64, 64)])
    def test_images_of_another_size_or_number_are_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"these latents need \(2, 3, 64, 64\)"):
            make_control()(*make_inputs()._replace(x_up_01=torch.rand(shape)))

    def test_sides_that_no_level_divides_keep_their_size(self) -> None:
        unet, control, inputs = make_unet(), make_control(), make_inputs()
        inputs = inputs._replace(z=torch.randn(2, 4, 7, 6), x_up_01=torch.rand(2, 3, 56, 48))
        assert predict(unet, control, inputs).shape == (2, 4, 7, 6)

    def test_bfloat16_weights_give_float32_noise(self) -> None:
        unet, control, inputs = make_unet(), make_control(), make_inputs()
        eps = predict(unet, control, inputs)
        low = predict(unet.to(torch.bfloat16), control.to(torch.bfloat16), inputs)
        assert low.dtype == torch.float32
        assert (low - eps).norm() < 0.05 * eps.norm()


class TestLimits:
    """Without what the image attentions add, the networks are diffusers' own."""

    def without_image(self, net: Any, plain: Any) -> None:
        for name, parameter in net.named_parameters():
            if ".image_attentions." in name and ".proj_out." in name:
                nn.init.zeros_(parameter)
        plain.load_state_dict({n: v for n, v in net.state_dict().items() if "image_attentions" not in n}, strict=True)

    def test_the_controlnet_is_diffusers(self) -> None:
        net, plain, (z, t, e_txt, x_up_01, e_img) = make_control(), ControlNetModel(**CONTROL), make_inputs()
        self.without_image(net, plain)
        down, mid = plain(z, t, e_txt, x_up_01, return_dict=False)
        assert all(torch.equal(a, b) for a, b in zip(flat(net(z, t, e_txt, x_up_01, e_img)), [*down, mid], strict=True))

    def test_the_u_net_is_diffusers(self) -> None:
        net, plain, (z, t, e_txt, _, e_img) = make_unet(), UNet2DConditionModel(**UNET), make_inputs()
        self.without_image(net, plain)
        residuals = make_control()(*make_inputs())
        expected = plain(
            z,
            t,
            e_txt,
            down_block_additional_residuals=residuals.down,
            mid_block_additional_residual=residuals.mid,
        ).sample
        assert torch.equal(net(z, t, e_txt, residuals, e_img), expected)


class TestFromBase:
    def test_only_image_attentions_are_new_and_the_controlnet_takes_the_u_nets(self) -> None:
        base = randomise(UNet2DConditionModel(**UNET))
        unet = SeeSRUNet.from_base(base, IMAGE)
        control = SeeSRControlNet.from_base(unet, CONTROL["conditioning_embedding_out_channels"])
        ours, theirs, copied = unet.state_dict(), base.state_dict(), control.state_dict()
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
        assert all("image_attentions" in name for name in ours.keys() - theirs.keys())
        shared = copied.keys() & ours.keys()
        assert sum("image_attentions" in name for name in shared) == 130  # 5 x 26
        assert all(torch.equal(copied[name], ours[name]) for name in shared)
        assert all(name.startswith("controlnet_") for name in copied.keys() - ours.keys())

    def test_the_start_shares_no_memory_with_its_base(self) -> None:
        base = UNet2DConditionModel(**UNET)
        unet = SeeSRUNet.from_base(base, IMAGE)
        control = SeeSRControlNet.from_base(unet, CONTROL["conditioning_embedding_out_channels"])
        pointers = [{p.data_ptr() for p in net.parameters()} for net in (base, unet, control)]
        assert len(set.union(*pointers)) == sum(map(len, pointers))

    def test_it_is_random_as_in_seesr_or_changes_nothing_when_asked(self) -> None:
        base, (z, t, e_txt, x_up_01, e_img) = UNet2DConditionModel(**UNET), make_inputs()
        expected = base(z, t, e_txt).sample
        for zero in (False, True):
            unet = SeeSRUNet.from_base(base, IMAGE, zero=zero)
            control = SeeSRControlNet.from_base(unet, CONTROL["conditioning_embedding_out_channels"])
            residuals = control(z, t, e_txt, x_up_01, e_img)
            assert not any(r.any() for r in flat(residuals))  # its zero convolutions
            assert torch.equal(unet(z, t, e_txt, residuals, e_img), expected) is zero

    def test_it_is_the_same_at_every_call_and_leaves_the_generator_alone(self) -> None:
        base = UNet2DConditionModel(**UNET)
        state = torch.get_rng_state()
        first, second, other = (SeeSRUNet.from_base(base, IMAGE, seed=seed).state_dict() for seed in (0, 0, 1))
        assert torch.equal(torch.get_rng_state(), state)
        name = "mid_block.image_attentions.0.proj_in.weight"
        assert torch.equal(first[name], second[name])
        assert not torch.equal(first[name], other[name])

    def test_the_default_device_does_not_decide_it(self) -> None:
        base = UNet2DConditionModel(**UNET)
        unet = SeeSRUNet.from_base(base, IMAGE)
        control = SeeSRControlNet.from_base(unet, (4, 6, 8, 8))
        with torch.device("meta"):
            found = SeeSRUNet.from_base(base, IMAGE), SeeSRControlNet.from_base(unet, (4, 6, 8, 8))
        for expected, net in zip((unet, control), found, strict=True):
            assert all(torch.equal(value, net.state_dict()[key]) for key, value in expected.state_dict().items())

    def test_it_has_the_dtype_of_its_base(self) -> None:
        unet = SeeSRUNet.from_base(UNet2DConditionModel(**UNET).to(torch.bfloat16), IMAGE)
        assert {p.dtype for p in unet.parameters()} == {torch.bfloat16}

    def test_a_base_with_adapters_is_refused(self) -> None:
        from common.adapters import add_lora

        base = UNet2DConditionModel(**UNET)
        add_lora(base, 2, 2, ["to_q"])
        with pytest.raises(ValueError, match="without adapters"):
            SeeSRUNet.from_base(base, IMAGE)

    def test_the_embedded_foundation_serves_as_base(self) -> None:
        unet = SeeSRUNet.from_base(load_unet("tiny"), 512, zero=True)
        z, t, e_txt = torch.randn(1, unet.config.in_channels, 8, 8), torch.tensor([500]), torch.randn(1, 3, 32)
        control = SeeSRControlNet.from_base(unet, (8, 8, 8))
        e_img = torch.randn(1, 145, 512)
        eps = unet(z, t, e_txt, control(z, t, e_txt, torch.rand(1, 3, 32, 32), e_img), e_img)
        assert torch.equal(eps, load_unet("tiny")(z, t, e_txt).sample)


class TestTraining:
    def test_gradients_reach_every_parameter_of_both(self) -> None:
        unet, control = make_unet(), make_control()
        predict(unet, control, make_inputs()).square().mean().backward()
        for net in (unet, control):
            assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]

    def test_frozen_text_lets_gradients_through_to_the_image_attentions(self) -> None:
        unet, control = make_unet().requires_grad_(False), make_control()
        holder = nn.ModuleDict({"unet": unet, "controlnet": control})
        trained = matching(holder, SEESR_TRAINED)
        for parameter in trained.values():
            parameter.requires_grad_(True)
        predict(unet, control, make_inputs()).square().mean().backward()
        assert {name for name, p in holder.named_parameters() if p.grad is not None} == set(trained)

    def test_checkpointing_computes_layers_twice_and_the_same_gradients(self) -> None:
        found = []
        for checkpointing in (False, True):
            unet, control, inputs, calls = make_unet(), make_control(), make_inputs(), []
            for net in (unet, control):
                if checkpointing:
                    net.enable_gradient_checkpointing()
                for name, module in net.named_modules():
                    if type(module).__name__ in ("ResnetBlock2D", "BasicTransformerBlock"):
                        module.register_forward_pre_hook(lambda *_, calls=calls, name=name: calls.append(name))
            eps = predict(unet, control, inputs)
            forward = len(calls)
            eps.square().mean().backward()
            assert len(calls) == (2 * forward if checkpointing else forward)
            found.append([eps, *(p.grad for net in (unet, control) for p in net.parameters())])
        assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)

    def test_a_copy_computes_the_same_and_keeps_to_itself(self) -> None:
        """As the reference theta' does."""
        unet, control, inputs = make_unet(), make_control(), make_inputs()
        eps = predict(unet, control, inputs)
        unet_copy, control_copy = copy.deepcopy(unet), copy.deepcopy(control)
        assert torch.equal(predict(unet_copy, control_copy, inputs), eps)
        randomise(unet), randomise(control)
        assert torch.equal(predict(unet_copy, control_copy, inputs), eps)
