"""LoRA: the papers' counts, no effect at the start, gradients to the adapter alone, merging without loss."""

import copy
from typing import Literal

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.testing import assert_close

from common.adapters import (
    ATTENTION_TARGETS,
    OSEDIFF_TARGETS,
    TIME_TARGETS,
    adapter_names,
    adapter_state,
    add_lora,
    count_lora,
    load_adapter_state,
    lora_parameters,
    merge,
    set_adapter,
    vae_encoder_targets,
    without_adapters,
)
from common.loading import architecture_only, load_unet, load_vae

from .networks import small_unet


def make_unet(**config: object) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return small_unet(
        use_linear_projection=True,
        **config,
    )


def disturb(module: nn.Module, name: str = "default") -> None:
    """Give an adapter values as training would: B is zero at first."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in lora_parameters(module, name):
            parameter.add_(0.1 * torch.randn_like(parameter))


def run(unet: nn.Module) -> Tensor:
    torch.manual_seed(1)
    return unet(torch.randn(2, 4, 8, 8), 9, torch.randn(2, 3, 32)).sample


class TestCounts:
    """specs: DFOSD (rank 16), OSEDiff and F2IDiff (rank 4), on the U-Net of SD 2.1-base."""

    @pytest.mark.parametrize(
        ("rank", "targets", "layers", "parameters"),
        [
            (16, OSEDIFF_TARGETS, 258, 16_222_848),
            (16, ATTENTION_TARGETS, 128, 3_319_808),
            (16, OSEDIFF_TARGETS + TIME_TARGETS, 280, 16_222_848 + 773_120),
            (4, OSEDIFF_TARGETS, 258, 4_055_712),
        ],
    )
    def test_on_stable_diffusion_2_1(self, rank: int, targets: tuple[str, ...], layers: int, parameters: int) -> None:
        with architecture_only():
            unet = add_lora(load_unet("random:sd21"), rank, rank, targets)
        assert count_lora(unet) == (layers, parameters)
        assert unet.device.type == "meta"
        assert sum(p.numel() for p in unet.parameters() if p.requires_grad) == parameters

    def test_on_the_down_and_middle_part(self) -> None:
        with architecture_only():
            unet = load_unet("random:sd21")
            del unet.up_blocks, unet.conv_norm_out, unet.conv_out
            add_lora(unet, 16, 16, OSEDIFF_TARGETS)
        assert count_lora(unet) == (110, 6_522_432)

    @pytest.mark.parametrize(
        ("name", "rank", "layers", "parameters"),
        [("sd21", 4, 31, 369_292), ("sd21", 16, 31, 1_477_168), ("flux_kontext", 64, 31, 5_910_208)],
    )
    def test_on_a_vaes_encoder(self, name: str, rank: int, layers: int, parameters: int) -> None:
        """DNF-SR's spec counts without SD's quant_conv, 8 -> 8; the decoder stays as it is."""
        with architecture_only():
            vae = load_vae(f"random:{name}")
            quant_conv = int(vae.quant_conv is not None)
            add_lora(vae, rank, rank, vae_encoder_targets(vae))
        assert count_lora(vae) == (layers + quant_conv, parameters + 16 * rank * quant_conv)
        assert not any("lora" in key for key, _ in vae.decoder.named_parameters())

    def test_leaves_time_and_norm_layers_alone(self) -> None:
        unet = add_lora(make_unet(), 2, 2, OSEDIFF_TARGETS)
        touched = [name for name, _ in unet.named_parameters() if "lora_A" in name]
        assert touched
        assert not any("time_" in name or "norm" in name for name in touched)


class TestAdding:
    def test_changes_no_output(self) -> None:
        unet = make_unet()
        before = run(unet)
        assert torch.equal(run(add_lora(unet, 4, 4, OSEDIFF_TARGETS)), before)

    def test_scale_is_alpha_over_rank(self) -> None:
        # A = B = 1 at rank 2: B A x = 2 * sum(x); times alpha / rank = 3 that is 6 * (1 + 2 + 3) = 36.
        net = nn.Sequential(nn.Linear(3, 1, bias=False))
        with torch.no_grad():
            net[0].weight.zero_()
            add_lora(net, 2, 6, ["0"])
            for parameter in lora_parameters(net):
                parameter.fill_(1.0)
            assert net(torch.tensor([[1.0, 2.0, 3.0]])).item() == pytest.approx(36.0)

    def test_gradients_reach_the_adapter_alone(self) -> None:
        unet = add_lora(make_unet(), 4, 4, OSEDIFF_TARGETS)
        disturb(unet)
        run(unet).square().mean().backward()
        adapter = {id(parameter) for parameter in lora_parameters(unet)}
        for name, parameter in unet.named_parameters():
            if id(parameter) in adapter:
                assert parameter.grad is not None, name
                assert parameter.grad.abs().sum() > 0, name
            else:
                assert parameter.grad is None, name
                assert not parameter.requires_grad, name

    def test_is_decided_by_its_seed_and_leaves_the_global_state_alone(self) -> None:
        first = adapter_state(add_lora(make_unet(), 4, 4, OSEDIFF_TARGETS, seed=5))
        torch.rand(7)
        unet = make_unet()
        state = torch.get_rng_state()
        second = adapter_state(add_lora(unet, 4, 4, OSEDIFF_TARGETS, seed=5))
        assert torch.equal(torch.get_rng_state(), state)
        other = adapter_state(add_lora(make_unet(), 4, 4, OSEDIFF_TARGETS, seed=6))
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert not torch.equal(first["conv_in.lora_A.weight"], other["conv_in.lora_A.weight"])

    @pytest.mark.parametrize("init", ["gaussian", "kaiming"])
    def test_the_default_device_does_not_decide_it(self, init: Literal["gaussian", "kaiming"]) -> None:
        first = adapter_state(add_lora(make_unet(), 4, 4, OSEDIFF_TARGETS, init=init, seed=5))
        unet = make_unet()
        with torch.device("meta"):
            second = adapter_state(add_lora(unet, 4, 4, OSEDIFF_TARGETS, init=init, seed=5))
        assert all(torch.equal(first[key], second[key]) for key in first)

    def test_of_an_architecture_takes_no_memory(self, calls: list[tuple[str, str]]) -> None:
        with architecture_only():
            unet = load_unet("random:f2idiff_tiny")
            add_lora(unet, 4, 4, OSEDIFF_TARGETS)
        assert {device for _, device in calls} == {"meta"}

    def test_gaussian_start_has_deviation_one_over_rank(self) -> None:
        net = add_lora(nn.Sequential(nn.Linear(4096, 8)), 4, 4, ["0"])
        a, b = lora_parameters(net)
        assert a.std().item() == pytest.approx(0.25, rel=0.03)
        assert not b.any()

    def test_is_float32_on_a_bfloat16_base(self) -> None:
        unet = add_lora(make_unet().bfloat16(), 4, 4, ATTENTION_TARGETS)
        assert {p.dtype for p in lora_parameters(unet)} == {torch.float32}
        assert unet.conv_in.weight.dtype == torch.bfloat16

    def test_wrong_arguments_are_named(self) -> None:
        unet = make_unet()
        with pytest.raises(ValueError, match="rank=0"):
            add_lora(unet, 0, 4, ATTENTION_TARGETS)
        with pytest.raises(ValueError, match="match no layer of UNet2DConditionModel"):
            add_lora(unet, 4, 4, ["to_qq"])
        add_lora(unet, 4, 4, ATTENTION_TARGETS)
        with pytest.raises(ValueError, match="'default' is already an adapter"):
            add_lora(unet, 4, 4, ATTENTION_TARGETS)


class TestSwitching:
    @pytest.fixture
    def unet(self) -> nn.Module:
        """Two adapters of which the first is frozen, as a stage's result is."""
        unet = add_lora(make_unet(), 2, 2, ATTENTION_TARGETS, name="first")
        disturb(unet, "first")
        for parameter in lora_parameters(unet, "first"):
            parameter.requires_grad_(False)
        add_lora(unet, 4, 4, OSEDIFF_TARGETS, name="second", seed=1)
        disturb(unet, "second")
        return unet

    def test_each_name_gives_its_own_output_and_none_the_base(self, unet: nn.Module) -> None:
        outputs = {}
        for name in ("first", "second", None):
            set_adapter(unet, name)
            outputs[name] = run(unet)
        assert torch.equal(outputs[None], run(make_unet()))
        assert not torch.equal(outputs["first"], outputs["second"])
        set_adapter(unet, "first")
        assert torch.equal(run(unet), outputs["first"])

    def test_the_newest_is_active(self, unet: nn.Module) -> None:
        newest = run(unet)
        set_adapter(unet, "second")
        assert torch.equal(run(unet), newest)

    def test_two_at_once_add_up_in_the_weights(self) -> None:
        net = nn.Sequential(nn.Linear(3, 2))
        add_lora(net, 2, 2, ["0"], name="a")
        add_lora(net, 2, 4, ["0"], name="b")
        disturb(net, "a")
        disturb(net, "b")
        x = torch.randn(5, 3)
        outputs = []
        for names in (None, "a", "b", ["a", "b"]):
            set_adapter(net, names)
            outputs.append(net(x))
        base, a, b, both = outputs
        assert_close(both - base, (a - base) + (b - base))

    def test_leaves_what_is_trained_as_it_is(self, unet: nn.Module) -> None:
        before = {name: p.requires_grad for name, p in unet.named_parameters()}
        assert sum(before.values()) == len(lora_parameters(unet, "second"))
        for name in ("first", None, "second", ["first", "second"]):
            set_adapter(unet, name)
        with without_adapters(unet):
            pass
        assert {name: p.requires_grad for name, p in unet.named_parameters()} == before

    def test_the_base_is_back_only_within_the_context(self, unet: nn.Module) -> None:
        adapted = run(unet)
        with without_adapters(unet):
            assert torch.equal(run(unet), run(make_unet()))
        assert torch.equal(run(unet), adapted)
        set_adapter(unet, None)
        with without_adapters(unet):
            pass
        assert torch.equal(run(unet), run(make_unet()))

    def test_counts_and_lists_are_one_adapters(self, unet: nn.Module) -> None:
        assert adapter_names(unet) == ["first", "second"]
        assert count_lora(unet, "first").layers < count_lora(unet, "second").layers
        first, second = ({id(p) for p in lora_parameters(unet, name)} for name in ("first", "second"))
        assert not first & second
        assert len(first | second) == sum("lora_" in name for name, _ in unet.named_parameters())

    def test_an_unknown_name_is_named_beside_the_known(self, unet: nn.Module) -> None:
        for call in (set_adapter, lora_parameters, count_lora, adapter_state):
            with pytest.raises(ValueError, match=r"third.*\['first', 'second'\]"):
                call(unet, "third")


class TestMerging:
    def test_gives_the_same_output_from_the_plain_architecture(self) -> None:
        plain = make_unet()
        unet = add_lora(copy.deepcopy(plain), 4, 8, OSEDIFF_TARGETS)
        disturb(unet)
        adapted = run(unet)
        assert (adapted - run(plain)).abs().max() > 0.05
        assert merge(unet) is unet
        assert_close(run(unet), adapted, rtol=1e-4, atol=1e-4)
        assert list(unet.state_dict()) == list(plain.state_dict())

    def test_merged_weights_save_and_reload_as_an_ordinary_model(self, tmp_path: object) -> None:
        unet = add_lora(make_unet(), 4, 4, OSEDIFF_TARGETS)
        disturb(unet)
        merge(unet).save_pretrained(tmp_path)
        assert torch.equal(run(UNet2DConditionModel.from_pretrained(tmp_path)), run(unet))

    def test_a_merged_module_takes_a_new_adapter(self) -> None:
        unet = add_lora(make_unet(), 2, 2, ATTENTION_TARGETS)
        disturb(unet)
        merged = run(merge(unet))
        assert torch.equal(run(add_lora(unet, 2, 2, ATTENTION_TARGETS)), merged)

    def test_only_the_active_adapter_is_folded_in(self) -> None:
        unet = add_lora(make_unet(), 2, 2, ATTENTION_TARGETS, name="a")
        add_lora(unet, 2, 2, OSEDIFF_TARGETS, name="b")
        disturb(unet, "a")
        disturb(unet, "b")
        set_adapter(unet, "a")
        expected = run(unet)
        assert_close(run(merge(unet)), expected, rtol=1e-4, atol=1e-4)

    def test_a_switched_off_adapter_is_left_out(self) -> None:
        unet = add_lora(make_unet(), 2, 2, ATTENTION_TARGETS)
        disturb(unet)
        set_adapter(unet, None)
        assert torch.equal(run(merge(unet)), run(make_unet()))

    def test_nothing_to_merge_is_said(self) -> None:
        with pytest.raises(ValueError, match="no adapter to merge"):
            merge(make_unet())


class TestSaving:
    def test_state_brings_the_output_back_on_a_fresh_base(self) -> None:
        unet = add_lora(make_unet(), 4, 4, OSEDIFF_TARGETS)
        disturb(unet)
        fresh = add_lora(make_unet(), 4, 4, OSEDIFF_TARGETS, name="other", seed=9)
        load_adapter_state(fresh, adapter_state(unet), name="other")
        assert torch.equal(run(fresh), run(unet))

    def test_holds_the_adapter_and_nothing_else(self) -> None:
        unet = add_lora(make_unet(), 4, 4, OSEDIFF_TARGETS)
        state = adapter_state(unet)
        assert len(state) == 2 * count_lora(unet).layers
        assert all(".lora_A." in key or ".lora_B." in key for key in state)
        assert not any(value.requires_grad for value in state.values())

    def test_another_adapters_state_is_refused(self) -> None:
        state = adapter_state(add_lora(make_unet(), 4, 4, ATTENTION_TARGETS))
        with pytest.raises(ValueError, match=r"lacks \d+ keys"):
            load_adapter_state(add_lora(make_unet(), 4, 4, OSEDIFF_TARGETS), state)
