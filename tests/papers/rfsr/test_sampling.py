"""Samplers by their published steps and by formulas; rollouts and restoration against loops written by hand."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UniPCMultistepScheduler
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from common.draws import Draws, generator
from papers.rfsr import RFSR
from papers.rfsr.base_models import Base, TileConditions
from papers.rfsr.sampling import advance, bands, make_sampler, trained_steps

from .steps import ABAR, Batch, Make, described, see

CONFIG = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DIFFBIR = sorted({round(i * 999 / 49) for i in range(50)}, reverse=True)  # its SpacedSampler's, of 50 steps


def timesteps(kind: Any, steps: int, spacing: Any) -> list[int]:
    return [int(t) for t in make_sampler(CONFIG, kind, steps, spacing).timesteps]


class TestTimesteps:
    """Section 2's table, and the bands by t >= 600 and t <= 200."""

    def test_seesr(self) -> None:
        for kind in ("ddpm", "ddim"):
            t = timesteps(kind, 50, "leading")
            assert t == list(range(981, 0, -20))
            assert trained_steps(t, 600, 200) == [*range(1, 21), *range(41, 51)]
            assert (t[19], t[20], t[39], t[40]) == (601, 581, 201, 181)

    def test_diffbir(self) -> None:
        assert (DIFFBIR[:3], DIFFBIR[-2:]) == ([999, 979, 958], [20, 0])
        assert trained_steps(DIFFBIR, 600, 200) == [*range(1, 21), *range(41, 51)]
        assert (DIFFBIR[19], DIFFBIR[20], DIFFBIR[39], DIFFBIR[40]) == (612, 591, 204, 183)

    def test_pasd(self) -> None:
        t = timesteps("unipc", 20, "linspace")
        assert t == [math.floor(999 * i / 20 + 0.5) for i in range(20, 0, -1)]
        assert trained_steps(t, 600, 200) == [*range(1, 9), *range(17, 21)]
        assert (t[0], t[7], t[8], t[16:]) == (999, 649, 599, [200, 150, 100, 50])

    def test_bands_hold_their_limits(self) -> None:
        assert bands(600, 600, 200) == ("early",)
        assert bands(200, 600, 200) == ("late",)
        assert bands(599, 600, 200) == bands(201, 600, 200) == ()
        assert bands(300, 300, 300) == ("early", "late")

    def test_numbers_of_steps_that_cannot_be_are_named(self) -> None:
        with pytest.raises(ValueError, match=r"steps=0 is out of range; set 1 \.\. 1000"):
            make_sampler(CONFIG, "ddpm", 0)
        with pytest.raises(ValueError, match=r"steps=30 does not divide 1000; .* spacing: linspace"):
            make_sampler(CONFIG, "ddpm", 30)
        assert len(timesteps("ddpm", 30, "linspace")) == 30
        with pytest.raises(ValueError, match=r"t_early_min=990 and t_late_max=0 hold none .*\[981, .*widen the bands"):
            trained_steps(timesteps("ddpm", 50, "leading"), 990, 0)


class TestSteps:
    """One step by its formula in float64."""

    @pytest.mark.parametrize("respaced", [DIFFBIR, list(range(981, 0, -20))])
    def test_ddpm_is_the_respaced_posterior(self, respaced: list[int]) -> None:
        """Check 11: DiffBIR's SpacedSampler, and SeeSR's steps, as betas of the shorter chain say."""
        sampler = make_sampler(CONFIG, "ddpm", 50)
        if respaced is DIFFBIR:
            sampler.set_timesteps(timesteps=respaced)
        chain = ABAR[respaced[::-1]]
        betas = 1 - chain / np.concatenate([[1.0], chain[:-1]])
        g = torch.Generator().manual_seed(0)
        z, eps = (torch.randn(1, 4, 8, 8, generator=g, dtype=torch.float64) for _ in range(2))
        for i, t in enumerate(respaced):
            k = 49 - i
            before = chain[k - 1] if k else 1.0
            x0 = (z - math.sqrt(1 - chain[k]) * eps) / math.sqrt(chain[k])
            mean = math.sqrt(before) * betas[k] / (1 - chain[k]) * x0
            mean = mean + math.sqrt(1 - betas[k]) * (1 - before) / (1 - chain[k]) * z
            deviation = math.sqrt(betas[k] * (1 - before) / (1 - chain[k]))
            noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            found = advance(sampler, eps, t, z, [torch.Generator().manual_seed(i)])
            assert found.dtype == torch.float64
            assert_close(found, mean + deviation * noise, rtol=2e-5, atol=2e-5)  # its table is float32

    def test_ddim_is_deterministic_and_its_formula(self) -> None:
        sampler = make_sampler(CONFIG, "ddim", 50)
        z, eps = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
        x0 = (z - math.sqrt(1 - ABAR[501]) * eps) / math.sqrt(ABAR[501])
        expected = math.sqrt(ABAR[481]) * x0 + math.sqrt(1 - ABAR[481]) * eps
        assert_close(advance(sampler, eps, 501, z, [torch.Generator()]), expected, rtol=1e-5, atol=1e-5)
        x0 = (z - math.sqrt(1 - ABAR[1]) * eps) / math.sqrt(ABAR[1])
        assert_close(advance(sampler, eps, 1, z, [torch.Generator()]), x0, rtol=1e-5, atol=1e-5)

    def test_ddpm_noise_is_each_samples_own(self) -> None:
        sampler = make_sampler(CONFIG, "ddpm", 50)
        z = torch.zeros(2, 4, 8, 8)

        def make(*seeds: int) -> list[torch.Generator]:
            return [torch.Generator().manual_seed(seed) for seed in seeds]

        both = advance(sampler, z, 501, z, make(1, 2))
        assert_close(both[1:], advance(sampler, z[:1], 501, z[:1], make(2)))
        assert not torch.equal(both[0], both[1])
        equal = advance(sampler, z, 501, z, make(1, 1))
        assert torch.equal(equal[0], equal[1])


def conditions(model: RFSR, batch: Batch) -> TileConditions:
    with torch.no_grad():
        return see(model, batch["lq"].to(model.base.unet.dtype) / 255, batch["prompt"])


SPACING = {"ddpm": "leading", "ddim": "leading", "unipc": "linspace"}
TIMES = {"ddpm": [801, 601, 401, 201, 1], "unipc": [999, 799, 599, 400, 200]}
TIMES["ddim"] = TIMES["ddpm"]
SAMPLERS = {
    "ddpm": lambda: DDPMScheduler(**CONFIG, variance_type="fixed_small", clip_sample=False, steps_offset=1),
    "ddim": lambda: DDIMScheduler(**CONFIG, clip_sample=False, set_alpha_to_one=True, steps_offset=1),
    "unipc": lambda: UniPCMultistepScheduler(**CONFIG, solver_order=2, timestep_spacing="linspace"),
}


class TestRollout:
    """Check 2: the last step's x0 is what the sampler ends with."""

    @pytest.mark.parametrize(
        ("sampler", "spacing"), [("ddpm", "leading"), ("ddpm", "linspace"), ("ddim", "leading"), ("unipc", "linspace")]
    )
    def test_the_last_step_gives_the_pipelines_own_latents(
        self, make: Make, batch: Batch, sampler: str, spacing: str
    ) -> None:
        model = make("seesr", {"sampler": sampler, "spacing": spacing}).double()
        c, draws = conditions(model, batch), Draws(0, torch.tensor([0, 1]))
        base = model.base
        with torch.no_grad():
            z_t = model.rollout(c, len(base.timesteps), draws)
            t = base.timesteps[-1]
            x0 = base.schedule.x0_from_eps(z_t, base.predict(z_t, t, c), t)
            # the whole pipeline
            z = base.start(c, draws.normal("start", (4, 8, 8)).double())
            scheduler, g = base.sampler(), [generator(0, "rollout", i) for i in (0, 1)]
            for step in base.timesteps:
                noise = {"generator": g} if sampler == "ddpm" else {}
                z = scheduler.step(base.predict(z, step, c), step, z, **noise).prev_sample
        assert z_t.dtype == torch.float64
        assert_close(x0, z, rtol=2e-6, atol=2e-6)  # diffusers' table is float32
        assert float((x0 - z_t).abs().max()) > 1e-3

    @pytest.mark.parametrize("sampler", ["ddpm", "ddim", "unipc"])
    def test_every_step_is_diffusers(self, make: Make, batch: Batch, sampler: str) -> None:
        """Against a scheduler made here, with noise drawn by sample."""
        model = make("plain", {"sampler": sampler, "spacing": SPACING[sampler]})
        index = torch.tensor([5, 9])
        c, base = conditions(model, batch), model.base
        scheduler: Any = SAMPLERS[sampler]()
        scheduler.set_timesteps(5)
        assert [int(t) for t in scheduler.timesteps] == base.timesteps == TIMES[sampler]
        noise = torch.stack([torch.randn(4, 8, 8, generator=generator(0, "start", int(i))) for i in index])
        z = math.sqrt(ABAR[999]) * c.z_lq + math.sqrt(1 - ABAR[999]) * noise
        g = [generator(0, "rollout", int(i)) for i in index]
        with torch.no_grad():
            for st, t in enumerate(base.timesteps, 1):
                found = model.rollout(c, st, Draws(0, index))
                assert_close(found, z, rtol=1e-5, atol=1e-5)
                draw = {"generator": g} if sampler == "ddpm" else {}
                z = scheduler.step(base.predict(z, t, c), t, z, **draw).prev_sample

    def test_guidance_rolls_out_too(self, make: Make, batch: Batch) -> None:
        plain, guided = make(), make(train_cfg_scale=4.0)
        c, draws = conditions(plain, batch), Draws(0, batch["index"])
        with torch.no_grad():
            a, b = (model.rollout(c, 3, draws) for model in (plain, guided))
            z = guided.base.start(c, draws.normal("start", (4, 8, 8)))
            for t in (801, 601):
                z = guided.base.sampler().step(guided.base.predict(z, t, c, 4.0), t, z).prev_sample
        assert_close(b, z)
        assert not torch.equal(a, b)

    def test_a_samples_noise_does_not_depend_on_its_batch(self, make: Make, batch: Batch) -> None:
        model = make("plain", {"sampler": "ddpm"})
        c = conditions(model, batch)
        with torch.no_grad():
            both = model.rollout(c, 5, Draws(0, torch.tensor([3, 4])))
            assert torch.equal(both, model.rollout(c, 5, Draws(0, torch.tensor([3, 4]))))
            assert not torch.equal(both, model.rollout(c, 5, Draws(0, torch.tensor([4, 3]))))
            for i in (0, 1):
                own = c.description._replace(e_txt=c.description.e_txt[i : i + 1])
                one = TileConditions(c.z_lq[i : i + 1], c.control[i : i + 1], own)
                assert_close(
                    model.rollout(one, 5, Draws(0, torch.tensor([3 + i]))), both[i : i + 1], rtol=1e-4, atol=1e-5
                )

    def test_without_a_rollout_start_latents_get_the_steps_label(self, make: Make, batch: Batch) -> None:
        model: Any = make(rollout="none")
        c, draws = conditions(model, batch), Draws(0, batch["index"])
        noise = torch.stack([torch.randn(4, 8, 8, generator=generator(0, "start", i)) for i in (0, 1)])
        start = math.sqrt(ABAR[999]) * c.z_lq + math.sqrt(1 - ABAR[999]) * noise
        asked: list[tuple[Tensor, Any]] = []
        model.base.unet.register_forward_pre_hook(lambda _, args: asked.append(args[:2]))
        for st in (1, 3, 5):
            assert_close(model.rollout(c, st, draws), start)
        assert not asked
        with torch.no_grad():
            model.base.predict(model.rollout(c, 5, draws), model.base.timesteps[4], c)
        ((z_t, t),) = asked
        assert_close(z_t, start)
        assert t == 1


class TestStart:
    @pytest.mark.parametrize("kind", ["plain", "seesr"])
    def test_each_start_latent_is_of_its_own_image(self, make: Make, batch: Batch, kind: str) -> None:
        """Check 9; the released code gave the whole batch the first one's."""
        from diffusers import AutoencoderKL

        model = make(kind)
        c = conditions(model, batch)
        z = model.rollout(c, 1, Draws(0, batch["index"]))
        noise = torch.stack([torch.randn(4, 8, 8, generator=generator(0, "start", i)) for i in (0, 1)])
        found = (z - math.sqrt(1 - ABAR[999]) * noise) / math.sqrt(ABAR[999])
        vae = AutoencoderKL.from_pretrained(model.base.pretrained, subfolder="vae").eval()
        x_up = F.interpolate(batch["lq"].float() / 255, scale_factor=4, mode="bicubic").clamp(0, 1)
        with torch.no_grad():
            expected = 0.18215 * vae.encode(2 * x_up - 1).latent_dist.mode()
        assert_close(found, expected, rtol=1e-3, atol=1e-4)
        own = found.flatten(1) - expected.flatten(1).mean(0)
        other = expected.flatten(1) - expected.flatten(1).mean(0)
        similar = F.normalize(own, dim=1) @ F.normalize(other, dim=1).T
        assert bool((similar.diagonal() > 0.99).all())
        assert float(similar[0, 1]) < 0


class TestRestore:
    @pytest.mark.parametrize(
        ("kind", "sampler", "cfg"), [("plain", "ddim", 1.0), ("seesr", "ddpm", 3.0), ("plain", "unipc", 2.0)]
    )
    def test_it_is_a_loop_over_diffusers_own_steps(
        self, make: Make, batch: Batch, kind: str, sampler: str, cfg: float
    ) -> None:
        options = {"spacing": SPACING[sampler], "cfg_scale": cfg, "prompt_suffix": "8k", "negative_prompt": "blur"}
        model = make(kind, {"sampler": sampler, **options})
        base, x_lq = model.base, batch["lq"].float() / 255
        noise = torch.randn(4, 8, 8, generator=generator(0, "test/start", 0))
        scheduler: Any = SAMPLERS[sampler]()
        scheduler.set_timesteps(5)
        with torch.no_grad():
            found = model.restore(x_lq, model.prepare(x_lq, batch["prompt"]))
            c = base.see(x_lq, 4, described(base, x_lq, ["a house, 8k", "two dogs, 8k"]))
            negative = c._replace(description=described(base, x_lq, ["blur", "blur"]))
            z = math.sqrt(ABAR[999]) * c.z_lq + math.sqrt(1 - ABAR[999]) * noise
            g = [generator(0, "test/steps", 0) for _ in range(2)]
            for t in TIMES[sampler]:
                eps, eps_neg = (base.denoise(z, t, x, base.residuals(z, t, x)) for x in (c, negative))
                draw = {"generator": g} if sampler == "ddpm" else {}
                z = scheduler.step(eps_neg + cfg * (eps - eps_neg), t, z, **draw).prev_sample
            expected = (base.codec.vae.decode(z / 0.18215).sample + 1) / 2
        assert_close(found, expected, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize(("kind", "sampler"), [("plain", "unipc"), ("seesr", "ddpm")])
    def test_it_repeats_and_does_not_depend_on_the_batch(
        self, make: Make, batch: Batch, kind: str, sampler: str
    ) -> None:
        model, x_lq = make(kind, {"sampler": sampler, "cfg_scale": 2.0}), batch["lq"].float() / 255
        both = model.upscale(x_lq, batch["prompt"]).sr
        assert torch.equal(both, model.upscale(x_lq, batch["prompt"]).sr)
        turned = model.upscale(x_lq.flip(0), batch["prompt"][::-1]).sr
        assert_close(turned.flip(0), both, rtol=0, atol=1e-5)
        alone = model.upscale(x_lq[1:], batch["prompt"][1:]).sr
        assert_close(alone, both[1:], rtol=0, atol=1e-5)
        assert float((both[0] - both[1]).abs().mean()) > 1e-4

    def test_guidance_of_1_asks_once_a_step(self, make_base: Callable[..., Base], make: Make, batch: Batch) -> None:
        for cfg, calls in ((1.0, 5), (2.0, 10)):
            model, asked = make("plain", {"cfg_scale": cfg}), []
            model.base.unet.register_forward_pre_hook(lambda *_, asked=asked: asked.append(1))
            model.upscale(batch["lq"].float() / 255, batch["prompt"])
            assert len(asked) == calls
