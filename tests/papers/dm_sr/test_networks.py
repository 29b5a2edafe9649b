"""DM-SR's networks: counts, agreement with torchvision and diffusers, what each looks at, where gradients go."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from common.loading import architecture_only, load_vae
from common.parameters import count
from papers.dm_sr.networks import ControlNetDiscriminator, TimeAwareEncoder, TimestepEstimator, soft_argmax

SD = {"channels": (64, 128, 256, 256), "heads": (1, 2, 4, 4)}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def sd_vae(**config: object) -> AutoencoderKL:
    """Shaped as Stable Diffusion's: four levels, two blocks each, attention in the middle."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKL(
            block_out_channels=(8, 16, 24, 24),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            norm_num_groups=4,
            **config,
        )


VAES: dict[str, Callable[[], AutoencoderKL]] = {
    "sd": sd_vae,
    "no_quant_conv": lambda: sd_vae(use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.36),
    "tiny": lambda: load_vae("tiny", trainable=True),
}


@pytest.fixture(params=VAES)
def make_vae(request: pytest.FixtureRequest) -> Callable[[], AutoencoderKL]:
    return VAES[request.param]


def scaled_mean(vae: AutoencoderKL, x_pm1: Tensor) -> Tensor:
    """What the frozen VAE says, scaled by its config, written out."""
    config = vae.config
    mean = vae.encode(x_pm1).latent_dist.mean
    if config.latents_mean is None:
        return mean / torch.tensor(1 / config.scaling_factor)
    return (mean - torch.tensor(config.latents_mean)[:, None, None]) / torch.tensor(config.latents_std)[:, None, None]


def demo_discriminator(**arguments: object) -> ControlNetDiscriminator:
    return ControlNetDiscriminator(8, (16, 32, 64), (1, 2, 4), 32, 4, 1, 8, **arguments)


def judged(batch: int = 2, side: int = 8) -> dict[str, Tensor]:
    """Arguments of `demo_discriminator`."""
    return {
        "z": random(batch, 8, side, side) * 4 - 2,
        "x_lq_pm1": random(batch, 3, 4 * side, 4 * side, seed=1) * 2 - 1,
        "t": torch.tensor([100, 300])[:batch],
        "prompt_embeds": random(1, 5, 32, seed=2),
    }


class TestFullSize:
    """Section 4 of the spec, on the meta device."""

    def test_the_estimator_is_vgg19s_blocks_and_500_bins(self) -> None:
        with architecture_only():
            net = TimestepEstimator("pretrained")
        assert count(net.features) == (20_024_384, 20_024_384)
        assert count(net.head) == (256_500, 256_500)
        assert count(net).total == 20_024_384 + 256_500
        assert all(tensor.is_meta for tensor in (*net.parameters(), *net.buffers()))
        assert net(torch.zeros(3, 3, 512, 512, device="meta")).shape == (3,)

    @pytest.mark.parametrize(("embedding", "parameters"), [("scalar", 2_816), ("sinusoidal", 451_968)])
    def test_the_encoder_has_34_16_million(self, embedding: str, parameters: int) -> None:
        with architecture_only():
            net = TimeAwareEncoder(load_vae("random:sd21"), embedding)
        assert count(net.encoder) == (34_163_592, 34_163_592)
        assert count(net.quant_conv) == (72, 0)
        assert count(net.time) == (parameters, parameters)
        assert count(net) == (34_163_592 + 72 + parameters, 34_163_592 + parameters)
        assert [layer.out_features for layer in net.time] == [128, 256, 512, 512]
        seen: list[tuple[int, ...]] = []
        for block in net.encoder.down_blocks:
            block.register_forward_hook(lambda _module, _args, out: seen.append(tuple(out.shape[1:])))
        x_sr = net(torch.zeros(1, 3, 512, 512, device="meta"), torch.zeros(1, device="meta"))
        assert x_sr.shape == (1, 4, 64, 64)
        assert seen == [(128, 256, 256), (256, 128, 128), (512, 64, 64), (512, 64, 64)]

    def test_the_discriminator_is_diffusers_controlnet_less_its_zero_convolutions(self) -> None:
        with architecture_only():
            net = ControlNetDiscriminator(**SD)
        assert count(net) == (16_483_345, 16_483_345)
        with torch.device("meta"):
            whole = ControlNetModel(
                block_out_channels=SD["channels"],
                attention_head_dim=SD["heads"],
                cross_attention_dim=1024,
                use_linear_projection=True,
            )
            zeros = count(whole.controlnet_down_blocks).total + count(whole.controlnet_mid_block).total
            assert count(whole).total == 16_944_016
            assert count(net).total == 16_944_016 - zeros + 257
            text = torch.zeros(1, 77, 1024)
            logits = net(torch.zeros(2, 4, 64, 64), torch.zeros(2, 3, 512, 512), torch.zeros(2).long(), text)
        assert logits.shape == (2, 1)


class TestSoftArgmax:
    def test_a_certain_bin_is_its_own_number(self) -> None:
        assert torch.equal(soft_argmax(torch.eye(500) * 1e4), torch.arange(500.0))

    def test_no_preference_is_the_middle(self) -> None:
        assert_close(soft_argmax(torch.full((2, 500), 3.0)), torch.full((2,), 249.5))

    @pytest.mark.parametrize("scale", [0.1, 1.0, 30.0, 1e4])
    def test_it_never_leaves_the_bins(self, scale: float) -> None:
        logits = torch.randn(256, 500, generator=torch.Generator().manual_seed(0)) * scale
        t_hat = soft_argmax(logits)
        assert ((t_hat >= 0) & (t_hat <= 499)).all()

    def test_nor_where_the_rounded_softmax_sums_to_more_than_one(self) -> None:
        logits = torch.full((1, 500), -100.0)
        logits[0, 498:] = torch.tensor([-16.9, 0.0])
        assert (logits.softmax(1) * torch.arange(500)).sum() > 499
        assert soft_argmax(logits).item() == 499

    def test_two_bins_are_weighed_by_the_softmax(self) -> None:
        logits = torch.full((1, 500), -1e4)
        logits[0, 100], logits[0, 400] = torch.tensor(3.0).log(), 0.0
        assert_close(soft_argmax(logits), torch.tensor([0.75 * 100 + 0.25 * 400]))

    def test_half_precision_is_summed_in_single(self) -> None:
        t_hat = soft_argmax(torch.zeros(2, 500, dtype=torch.bfloat16))
        assert t_hat.dtype == torch.float32
        assert_close(t_hat, torch.full((2,), 249.5))


class TestEstimator:
    def test_its_blocks_are_torchvisions(self) -> None:
        from torchvision.models.vgg import cfgs, make_layers

        net = TimestepEstimator("random").eval()
        blocks = make_layers(cfgs["E"])
        blocks.load_state_dict(net.features.state_dict())
        x_01 = random(2, 3, 64, 32)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        with torch.no_grad():
            features = blocks((x_01 - mean[:, None, None]) / std[:, None, None])
            assert features.shape == (2, 512, 2, 1)
            logits = features.mean((2, 3)) @ net.head.weight.T + net.head.bias
            expected = (logits.softmax(1) * torch.arange(500)).sum(1)
            assert_close(net(x_01), expected, rtol=1e-4, atol=1e-3)

    def test_a_weight_file_is_read_with_its_classifier_ignored(self, tmp_path: Path) -> None:
        state = {f"features.{k}": v for k, v in TimestepEstimator("random", seed=3).features.state_dict().items()}
        torch.save({**state, "classifier.0.weight": torch.zeros(1)}, tmp_path / "vgg19.pth")
        net = TimestepEstimator(str(tmp_path / "vgg19.pth"))
        assert all(torch.equal(net.state_dict()[key], value) for key, value in state.items())
        assert all(parameter.requires_grad for parameter in net.parameters())

    def test_a_width_needs_random_weights(self) -> None:
        with pytest.raises(ValueError, match=r"width=0\.5"):
            TimestepEstimator("pretrained", width=0.5)

    @pytest.mark.parametrize("seed", [0, 1])
    def test_random_weights_keep_the_signals_scale(self, seed: int) -> None:
        net = TimestepEstimator("random", width=0.25, seed=seed)
        logits: list[Tensor] = []
        net.head.register_forward_hook(lambda _module, _args, out: logits.append(out))
        with torch.no_grad():
            for side in (64, 128):
                net(random(2, 3, side, side))
        for each in logits:
            assert 0.1 < each.std() < 5

    def test_all_of_it_learns(self) -> None:
        net = TimestepEstimator("random", width=0.25)
        smooth = F.interpolate(random(4, 3, 4, 4), size=(32, 32), mode="bilinear")
        x_01 = torch.cat([smooth, random(4, 3, 32, 32)])
        target = torch.tensor([0.1] * 4 + [0.9] * 4)
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4)
        errors = []
        for _ in range(30):
            error = (net(x_01) / 500 - target).square().mean()
            optimizer.zero_grad()
            error.backward()
            assert all(parameter.grad is not None for parameter in net.parameters())
            assert all(parameter.grad.any() for parameter in net.parameters() if parameter.ndim > 1)
            optimizer.step()
            errors.append(error.item())
        assert min(errors) < 0.25 * errors[0]

    def test_it_runs_in_fp32_inside_autocast(self) -> None:
        net = TimestepEstimator("random", width=0.125, bins=20)
        x_01 = random(1, 3, 32, 32)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            inside = net(x_01)
        assert torch.equal(inside, net(x_01))
        assert 0 <= inside.item() <= 19


class TestEncoder:
    @pytest.mark.parametrize("embedding", ["scalar", "sinusoidal"])
    def test_it_starts_as_the_vaes_own_encoder_at_every_time(
        self, make_vae: Callable[[], AutoencoderKL], embedding: str
    ) -> None:
        vae, net = make_vae(), TimeAwareEncoder(make_vae(), embedding)
        x_pm1 = random(2, 3, 32, 48) * 2 - 1
        with torch.no_grad():
            expected = scaled_mean(vae, x_pm1)
            for t in ([0.0, 499.0], [17.3, 250.0], [3, 400]):
                assert torch.equal(net(x_pm1, torch.tensor(t)), expected)

    @pytest.mark.parametrize("embedding", ["scalar", "sinusoidal"])
    def test_each_level_adds_its_channel_bias_behind_its_block(
        self, make_vae: Callable[[], AutoencoderKL], embedding: str
    ) -> None:
        vae, x_pm1, t = make_vae(), random(2, 3, 32, 32) * 2 - 1, torch.tensor([20.5, 450.0])
        if embedding == "scalar":
            description = t[:, None] / 500
        else:  # as SD's U-Net: cosines, then sines, of t / 10000^(k / 160)
            angles = t[:, None] * torch.exp(-torch.tensor(1e4).log() * torch.arange(160) / 160)
            description = torch.cat([angles.cos(), angles.sin()], 1)
        outputs = []
        for level, width in enumerate(vae.config.block_out_channels):
            net = TimeAwareEncoder(make_vae(), embedding)
            generator = torch.Generator().manual_seed(level)
            with torch.no_grad():
                net.time[level].weight.normal_(generator=generator)
                net.time[level].bias.normal_(generator=generator)
                bias = description @ net.time[level].weight.T + net.time[level].bias
                assert bias.shape == (2, width)
                hook = vae.encoder.down_blocks[level].register_forward_hook(
                    lambda _module, _args, out, bias=bias: out + bias[:, :, None, None]
                )
                expected = scaled_mean(vae, x_pm1)
                hook.remove()
                outputs.append(net(x_pm1, t))
            assert_close(outputs[-1], expected, rtol=1e-4, atol=1e-4)
        unmoved = scaled_mean(vae, x_pm1)
        for i, one in enumerate(outputs):
            assert all(not torch.allclose(one, other, atol=1e-2) for other in (unmoved, *outputs[:i]))

    @pytest.mark.parametrize("embedding", ["scalar", "sinusoidal"])
    def test_one_step_makes_it_depend_on_the_time(self, embedding: str) -> None:
        net = TimeAwareEncoder(sd_vae(), embedding)
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
        x_pm1, t = random(2, 3, 32, 32) * 2 - 1, torch.tensor([30.0, 400.0])
        net(x_pm1, t).square().mean().backward()
        assert all(p.grad is None and not p.requires_grad for p in net.quant_conv.parameters())
        assert all(p.grad is not None for p in (*net.encoder.parameters(), *net.time.parameters()))
        assert all(layer.weight.grad.any() and layer.bias.grad.any() for layer in net.time)
        assert net.encoder.conv_in.weight.grad.any()
        optimizer.step()
        with torch.no_grad():
            early, late = net(x_pm1, torch.full((2,), 30.0)), net(x_pm1, torch.full((2,), 400.0))
            assert not torch.allclose(early, late, atol=1e-4)
            assert_close(net(x_pm1, t), torch.stack([early[0], late[1]]), rtol=1e-4, atol=1e-5)  # each its own t

    def test_a_frozen_vae_is_made_trainable_and_its_decoder_is_freed(self) -> None:
        vae = load_vae("tiny")
        net = TimeAwareEncoder(vae)
        assert vae.decoder is vae.post_quant_conv is None
        trained = {name.split(".")[0] for name, parameter in net.named_parameters() if parameter.requires_grad}
        assert trained == {"encoder", "time"}
        assert {name.split(".")[0] for name in net.state_dict()} == {"encoder", "quant_conv", "time"}

    def test_checkpointing_runs_blocks_twice_and_changes_no_gradient(self) -> None:
        runs, grads = [], []
        for checkpointing in (False, True):
            net = TimeAwareEncoder(load_vae("tiny"), gradient_checkpointing=checkpointing)
            calls: list[int] = []
            for block in (*net.encoder.down_blocks, net.encoder.mid_block):
                block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
            net(random(1, 3, 16, 16), torch.tensor([9.0])).square().mean().backward()
            runs.append(len(calls))
            grads.append([p.grad for p in net.parameters() if p.requires_grad])
        assert runs == [4, 8]
        assert_close(grads[0], grads[1])

    def test_it_works_in_the_dtype_of_its_weights(self) -> None:
        net = TimeAwareEncoder(load_vae("tiny"))
        x_pm1, t = random(1, 3, 16, 16) * 2 - 1, torch.tensor([100.0])
        with torch.no_grad():
            expected = net(x_pm1, t)
            with torch.autocast("cpu", torch.bfloat16):
                inside = net(x_pm1.bfloat16().float(), t)
            assert inside.dtype == torch.float32
            assert torch.equal(inside, net(x_pm1.bfloat16(), t))
            half = net.bfloat16()(x_pm1, t)
        assert half.dtype == torch.bfloat16
        assert_close(half.float(), expected, rtol=0.1, atol=0.1)

    def test_a_size_it_would_floor_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"18x16.*multiples of 4"):
            TimeAwareEncoder(load_vae("tiny"))(torch.zeros(1, 3, 18, 16), torch.zeros(1))


class TestDiscriminator:
    @pytest.mark.parametrize("changed", ["z", "x_lq_pm1", "t", "prompt_embeds"])
    def test_it_looks_at_everything_from_the_start(self, changed: str) -> None:
        net, arguments = demo_discriminator(), judged()
        other = arguments[changed] + 190 if changed == "t" else arguments[changed].flip(-1)
        with torch.no_grad():
            logits, moved = net(**arguments), net(**{**arguments, changed: other})
        assert logits.shape == (2, 1)
        assert ((logits - moved).abs() > 1e-4).all()

    def test_every_sample_is_judged_by_itself(self) -> None:
        net, arguments = demo_discriminator(), judged()
        arguments["prompt_embeds"] = random(2, 5, 32)
        with torch.no_grad():
            alone = torch.cat([net(**{name: value[i : i + 1] for name, value in arguments.items()}) for i in (0, 1)])
            assert_close(net(**arguments), alone, rtol=1e-4, atol=1e-6)

    def test_the_image_weighs_as_the_latents_do(self) -> None:
        net, arguments = ControlNetDiscriminator(**SD), judged()
        with torch.no_grad():
            image = net.trunk.controlnet_cond_embedding(arguments["x_lq_pm1"]).std((2, 3)).mean()
            latent = net.trunk.conv_in(arguments["z"][:, :4]).std((2, 3)).mean()
        assert 0.03 < image / latent < 3

    def test_one_prompt_serves_the_batch(self) -> None:
        net, arguments = demo_discriminator(), judged()
        with torch.no_grad():
            one = net(**arguments)
            assert torch.equal(one, net(**{**arguments, "prompt_embeds": arguments["prompt_embeds"].repeat(2, 1, 1)}))

    def test_its_head_reads_the_mid_blocks_mean(self) -> None:
        net, seen = demo_discriminator(), []
        net.trunk.mid_block.register_forward_hook(lambda _module, _args, out: seen.append(out))
        with torch.no_grad():
            logits = net(**judged())
            assert seen[0].shape == (2, 64, 2, 2)
            assert_close(logits, seen[0].mean((2, 3)) @ net.head.weight.T + net.head.bias)

    def test_no_zero_convolution_is_left_and_all_of_it_learns(self) -> None:
        net = demo_discriminator()
        assert not [name for name, _ in net.named_parameters() if "controlnet_down" in name or "controlnet_mid" in name]
        assert all(parameter.any() for parameter in net.parameters() if parameter.ndim > 1)
        F.softplus(-net(**judged())).mean().backward()
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any() or parameter.ndim == 1, name
        assert net.head.bias.grad.any()

    def test_its_gradient_reaches_the_latents(self) -> None:
        net, arguments = demo_discriminator().requires_grad_(False), judged()
        net(**{**arguments, "z": arguments["z"].requires_grad_()}).sum().backward()
        assert arguments["z"].grad.any()

    def test_heads_and_levels_are_as_asked(self) -> None:
        with architecture_only():
            trunk = ControlNetDiscriminator(**SD).trunk
        attended = [[a.transformer_blocks[0].attn1.heads for a in b.attentions] for b in trunk.down_blocks[:3]]
        assert attended == [[1, 1], [2, 2], [4, 4]]
        assert not hasattr(trunk.down_blocks[3], "attentions")
        assert trunk.mid_block.attentions[0].transformer_blocks[0].attn2.heads == 4
        assert isinstance(trunk.mid_block.attentions[0].proj_in, nn.Linear)

    @pytest.mark.parametrize(("downscale", "latent"), [(2, (8, 8)), (4, (9, 13)), (8, (8, 10))])
    def test_any_latent_size_from_8_on(self, downscale: int, latent: tuple[int, int]) -> None:
        net = ControlNetDiscriminator(4, (8, 8, 16, 16), (1, 1, 2, 2), 16, downscale, 1, 4)
        height, width = (side * downscale for side in latent)
        with torch.no_grad():
            logits = net(
                torch.zeros(1, 4, *latent),
                torch.zeros(1, 3, height, width),
                torch.zeros(1).long(),
                torch.ones(1, 2, 16),
            )
        assert logits.isfinite().all()

    def test_an_image_of_another_size_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"\(8, 8\).*\(32, 32\).*up-sample"):
            demo_discriminator()(**{**judged(), "x_lq_pm1": torch.zeros(2, 3, 8, 8)})

    def test_arguments_that_do_not_fit_are_refused(self) -> None:
        with pytest.raises(ValueError, match="downscale=16"):
            ControlNetDiscriminator(**SD, downscale=16)
        with pytest.raises(ValueError, match=r"heads=\[1, 2\]"):
            ControlNetDiscriminator(channels=SD["channels"], heads=(1, 2))

    def test_checkpointing_changes_no_gradient(self) -> None:
        grads = []
        for checkpointing in (False, True):
            net = demo_discriminator(gradient_checkpointing=checkpointing)
            net(**judged()).sum().backward()
            grads.append([parameter.grad for parameter in net.parameters()])
        assert net.trunk.is_gradient_checkpointing
        assert_close(grads[0], grads[1])


drawn_networks = pytest.mark.parametrize(
    "make", [lambda seed: TimestepEstimator("random", 0.125, seed=seed), lambda seed: demo_discriminator(seed=seed)]
)


@drawn_networks
def test_random_weights_are_the_seeds_alone(make: Callable[[int], nn.Module]) -> None:
    before = torch.get_rng_state()
    first, again, other = make(0), make(0), make(1)
    assert torch.equal(before, torch.get_rng_state())
    for one, two, three in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        assert one.ndim == 1 or not torch.equal(one, three)


@drawn_networks
def test_random_weights_are_drawn_on_the_cpu_and_go_to_the_default_device(
    make: Callable[[int], nn.Module], calls: list[tuple[str, str]]
) -> None:
    make(0)
    usual = list(calls)
    del calls[:]
    with torch.device("meta"):
        net = make(0)
    drawn, expected = ([c for c in of if c[0] in ("randn", "uniform_", "normal_")] for of in (calls, usual))
    assert drawn == expected
    assert ("uniform_", "cpu") in drawn
    assert {value.device.type for value in [*net.parameters(), *net.buffers()]} == {"meta"}


@drawn_networks
def test_an_architecture_takes_no_memory(make: Callable[[int], nn.Module], calls: list[tuple[str, str]]) -> None:
    with architecture_only():
        net = make(0)
    assert {device for name, device in calls if name in ("randn", "uniform_", "normal_")} == {"meta"}
    assert {value.device.type for value in [*net.parameters(), *net.buffers()]} == {"meta"}


def test_the_encoders_layers_draw_nothing() -> None:
    vae, before = load_vae("tiny"), torch.get_rng_state()
    TimeAwareEncoder(vae, "sinusoidal")
    assert torch.equal(before, torch.get_rng_state())
