"""RFSR: further training of a multi-step model by rewards (arXiv:2412.03268, section 3; rollout: arXiv:2304.05977).

`configs/seesr.yaml` is the paper's run, `README.md` the card. At test time RFSR samples as its base does.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from common.adapters import ATTENTION_TARGETS, add_lora, without_adapters
from common.checkpoints import read_checkpoint
from common.draws import Draws, generator
from common.ema import EMA
from common.files import csv_text, replacing
from common.images import to_01
from common.losses import GramKL, dwt_low_loss, l1
from common.losses.dwt import Wavelet
from common.losses.gram import GramDistance, GramFeatures
from common.parameters import Row
from common.rewards import Reward, build_reward, reward_loss
from common.training import Batch
from papers.rfsr.base_models import Base, Description, TileConditions
from papers.rfsr.drift import plot_drift
from papers.rfsr.pretraining import BaseSR
from papers.rfsr.sampling import advance, bands, trained_steps
from papers.rfsr.tags import TagFiles

log = logging.getLogger(__name__)

HINGE = 2.0
"""ReFL's margin: a reward above it has no loss. CLIP-IQA never reaches it."""


class Start(nn.Module):
    """Starting values of the trained parameters: with them the networks are theta', the untouched base.

    Parameters and not buffers, which DDP would broadcast at every step.

    Args:
        parameters: Trained parameters by name, at their starting values.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.values = nn.ParameterList([nn.Parameter(p.detach().clone(), False) for p in parameters.values()])

    @contextmanager
    def in_place_of(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Within this context the parameters have their starting values; nothing is copied."""
        self._exchange(parameters)
        try:
            yield
        finally:
            self._exchange(parameters)

    def _exchange(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for start, parameter in zip(self.values, parameters.values(), strict=True):
            start.data, parameter.data = parameter.data, start.data
        torch.clear_autocast_cache()  # it holds 16-bit copies of the values before


def _trainable_by(reward: Reward) -> Reward:
    """The reward, after a check that it has a gradient and needs no reference image.

    Raises:
        ValueError: The reward has no gradient, or compares with a reference.
    """
    if not reward.differentiable or reward.referenced:
        why = "compares with a reference" if reward.referenced else "has no gradient in the image"
        raise ValueError(f"rewards={reward.name}: this reward {why}; use clipiqa, imagereward or a weightless one")
    return reward


class Reference(NamedTuple):
    """The output of theta' at the same z_t: its noise, and for `gram` its image, (B,3,H,W) in [0,1]."""

    eps: Tensor
    x_01: Tensor | None


class RFSR(BaseSR):
    """Reward feedback on one random step of the base's sampler: a wavelet loss at early steps, rewards at late steps.

    Args:
        base: Base model, which is trained further.
        trained: Trained parameters: the ControlNet and those that the base's authors trained in the U-Net
            (`base_trained`), or ControlNet and U-Net (`full`).
        t_early_min: Lowest timestep of the early steps.
        t_late_max: Highest timestep of the late steps.
        rollout: Source of a step's input: the steps before it (`sampler`), or the start latents under the step's label
            (`none`, as in the released code).
        train_cfg_scale: Guidance scale in training; 1 is no guidance.
        early_loss: Loss of early steps: L1 in the low band (`dwt`), L1 of pixels (`l1`), or `none`.
        wavelet: Transform of the low band: one level of `haar` (the paper), or the released code's `dtcwt3`.
        lambda_dwt: Weight of the early loss.
        rewards: Weight of each reward of the late steps, by name; see `common.rewards.build_reward`.
        reward_args: Further arguments of a reward, by its name, e.g. {imagereward: {weights: ImageReward.pt}}.
        reward_prompt: Text that rewards read: the text before `prompt_dropout` (`kept`), or the generator's (`same`).
        regulariser: Term that keeps late steps near the base: Gram matrices (`gram`), noise (`kl`), adapters in the
            place of weights (`lora`), or `none`.
        lambda_r: Weight of `gram` or `kl`.
        gram_features: Features of the Gram matrices: `plain`, or `layernorm` as in the released code, which needs a
            much larger `lambda_r`.
        gram_distance: Distance of two Gram matrices: `sq_frobenius` (Eq. 6) or the released code's `l1_mean`.
        gram_weights: Weights of VGG19: `pretrained`, `random` or a file.
        gram_width: Factor on VGG19's channels, for `random` only.
        reference: theta': the whole untouched base (`full`), or its U-Net with the trained ControlNet
            (`shared_control`).
        lora_rank: Rank of the adapters of `regulariser: lora`.
        measure_drift: Test also with theta', and write both images' rewards and their Gram distance.
        ema_decay: Decay of the average of the trained weights, which starts at the base's weights; null for none.
        **kwargs: As for `BaseSR`, without `weight_limit`; `prompt_dropout` acts on the generator's texts only.
    """

    trainable: ClassVar = {"generator": ("base.controlnet.*", "base.unet.*")}
    takes_losses = True

    def __init__(
        self,
        base: Base,
        trained: Literal["base_trained", "full"] = "base_trained",
        t_early_min: int = 600,
        t_late_max: int = 200,
        rollout: Literal["sampler", "none"] = "sampler",
        train_cfg_scale: float = 1.0,
        early_loss: Literal["dwt", "l1", "none"] = "dwt",
        wavelet: Wavelet = "haar",
        lambda_dwt: float = 5e-4,
        rewards: dict[str, float] | None = None,
        reward_args: dict[str, dict[str, Any]] | None = None,
        reward_prompt: Literal["kept", "same"] = "kept",
        regulariser: Literal["gram", "kl", "lora", "none"] = "gram",
        lambda_r: float = 5e-5,
        gram_features: GramFeatures = "plain",
        gram_distance: GramDistance = "sq_frobenius",
        gram_weights: str = "pretrained",
        gram_width: float = 1.0,
        reference: Literal["full", "shared_control"] = "full",
        lora_rank: int = 16,
        measure_drift: bool = False,
        ema_decay: float | None = 0.999,
        **kwargs: Any,
    ) -> None:
        super().__init__(base, weight_limit=None, ema_decay=ema_decay, **kwargs)
        self.trained, self.regulariser, self.lambda_r = trained, regulariser, lambda_r
        self.rollout_kind, self.train_cfg_scale, self.lora_rank = rollout, train_cfg_scale, lora_rank
        self.early_loss, self.wavelet, self.lambda_dwt = early_loss, wavelet, lambda_dwt
        self.reward_weights = {"clipiqa": 5e-5, "imagereward": 5e-5} if rewards is None else rewards
        self.reward_args = reward_args or {}
        if unknown := sorted(set(self.reward_args) - set(self.reward_weights)):
            raise ValueError(f"reward_args is for {unknown}, which are not in rewards={list(self.reward_weights)}")
        self.reward_prompt, self.reference_kind, self.measure_drift = reward_prompt, reference, measure_drift
        self.gram_options = (gram_weights, gram_width, gram_features, gram_distance)
        # a band without a loss has no step that could be trained
        has_late_loss = bool(self.reward_weights) or regulariser in ("gram", "kl")
        self.t_early_min = t_early_min if early_loss != "none" else 10**9
        self.t_late_max = t_late_max if has_late_loss else -1
        if ema_decay is not None:
            self.ema = EMA(ema_decay, warmup=False)
        self.start, self.rewards = Start({}), nn.ModuleDict()
        self._is_loaded = False  # true once a checkpoint's weights have replaced the base's
        self._given_start: list[Tensor] | None = None  # theta' of a run (--init_from), if it is not the base's
        self.gram: GramKL | None = None
        self._drifts: list[dict[str, Any]] = []

    # Networks

    def builds_training(self) -> bool:
        """True for a fit, and for a test that measures the drift."""
        tested = self._trainer is not None and self.trainer.state.fn == "test"
        return super().builds_training() or (self.measure_drift and tested)

    def configure_training(self) -> None:
        """Keep the starting values as theta', and build the networks of the losses."""
        self.steps = trained_steps(self.base.timesteps, self.t_early_min, self.t_late_max)
        self.start = Start(self._untouched() if self.keeps_start else {})
        self._take_start()
        if self.regulariser == "gram" or self.measure_drift:
            weights, width, features, distance = self.gram_options
            self.gram = GramKL(weights, width, features, distance)
        self.rewards = nn.ModuleDict(
            {name: _trainable_by(build_reward(name, **self.reward_args.get(name, {}))) for name in self.reward_weights}
        )

    def _untouched(self) -> dict[str, nn.Parameter]:
        """The base's values of the trained parameters, read again if a checkpoint has replaced them."""
        trained = self.all_trainable()
        if not self._is_loaded:
            return trained
        unet, controlnet = self.base.load_networks()
        fresh = nn.ModuleDict({"unet": unet, "controlnet": controlnet})
        named = dict(fresh.named_parameters(prefix="base"))
        return {name: named[name] for name in trained}

    def _take_start(self) -> None:
        """Make the given run's theta', if there is one, the starting values."""
        if self._given_start is not None:
            for value, given in zip(self.start.values, self._given_start, strict=True):
                value.data.copy_(given)

    def adapt(self) -> None:
        """Add the adapters of `regulariser: lora`."""
        if self.regulariser == "lora":
            for network in (self.base.unet, self.base.controlnet):
                add_lora(network, self.lora_rank, self.lora_rank, ATTENTION_TARGETS, seed=self.seed)

    @property
    def keeps_start(self) -> bool:
        """True if theta' is kept beside theta; an adapter's base already is theta'."""
        return self.regulariser != "lora" and (self.regulariser != "none" or self.measure_drift)

    def trainable_patterns(self) -> dict[str, tuple[str, ...]]:
        """Name patterns of this configuration's trained parameters."""
        if self.regulariser == "lora":
            return {"generator": ("base.controlnet.*lora_*", "base.unet.*lora_*")}
        if self.trained == "full":
            return {"generator": self.trainable["generator"]}
        return {"generator": tuple(f"base.{pattern}" for pattern in self.base.trained)}

    def networks(self) -> dict[str, nn.Module]:
        """Networks of the base and of the losses."""
        losses: dict[str, Any] = {
            f"reward {name}": reward for name, reward in self.rewards.items() if any(True for _ in reward.parameters())
        }
        return {**super().networks(), **losses, **({"loss network (VGG19)": self.gram} if self.gram else {})}

    def parameter_rows(self) -> list[Row]:
        """Rows of the networks, of theta', and of the text encoder."""
        kept = sum(value.numel() for value in self.start.values)
        return [
            *super().parameter_rows(),
            *([Row("theta' (what is trained, as it was)", "copy", kept, 0)] * bool(kept)),
        ]

    def on_fit_start(self) -> None:
        """Fetch the rewards' weights before the first step, and start the average at the starting weights."""
        super().on_fit_start()
        self._check_tags()
        if self.ema is not None and not self.ema.average:
            self.ema.start(self.all_trainable())
        for reward in self.rewards.values():
            assert isinstance(reward, Reward)
            if reward.prompted and self.base.text_source == "none" and not self.data_info.has_prompts("train"):
                log.warning(
                    "rewards=%s scores every image for the empty text: base.tagger gives no tags and no training image "
                    "has a prompt. Set base.tagger to papers.rfsr.DAPE, or data.prompts, or leave this reward out.",
                    reward.name,
                )
            elif reward.prompted and self.base.text_source == "data":
                self.data_info.check_prompts(f"rewards={reward.name}", self.without_prompts)
            reward.load(self.device)

    def _check_tags(self) -> None:
        """Refuse files of tags that lack validation images now, not when their turn comes in the middle of the run."""
        tagger, datamodule = getattr(self.base, "tagger", None), getattr(self.trainer, "datamodule", None)
        if isinstance(tagger, TagFiles) and datamodule is not None and self.trainer.enable_validation:
            limit = self.trainer.limit_val_batches
            loaders: list[Any] = datamodule.val_dataloader()
            samples = (
                loader.dataset[index]
                for loader in loaders
                for index in islice(loader.sampler, limit if isinstance(limit, int) else None)
            )
            tagger.check((sample["name"], sample["lq"].float() / 255) for sample in samples)

    def start_from(self, path: str | Path) -> None:
        """Start a fit from a checkpoint's trained weights. theta' is that checkpoint's; of a base, its own weights."""
        super().start_from(path)
        checkpoint = read_checkpoint(path)
        is_base = str(checkpoint["hyper_parameters"].get("_class_path")).endswith(".BaseSR")
        if self.keeps_start:
            self._given_start = list(self.all_trainable().values()) if is_base else checkpoint.get("start")
            self._take_start()
            self._given_start = list(self.start.values) if self._given_start is not None else None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save theta' if `base` does not hold it."""
        super().on_save_checkpoint(checkpoint)
        if self._given_start is not None:
            checkpoint["start"] = [value.detach() for value in self.start.values]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take theta' from the checkpoint if it is there."""
        super().on_load_checkpoint(checkpoint)
        self._is_loaded, self._given_start = True, checkpoint.get("start")
        if len(self.start.values):
            self._take_start()

    # Training

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Section 3.5: roll out to a random step without a graph, take that step with a graph, and score its image."""
        draws, st = self.draws(batch), self.draw_step()
        t = self.base.timesteps[st - 1]
        which = bands(t, self.t_early_min, self.t_late_max)
        with torch.no_grad():
            texts, e_img = self.base.look(batch["lq"], batch["prompt"])
            told = self.dropped(texts, draws)
            c = self.see(batch["lq"], told, e_img)
            z_t = self.rollout(c, st, draws)
            x_ref = self.reference(z_t, t, c) if "late" in which and self.regulariser in ("gram", "kl") else None
        with self.optimizer_turn("generator") as update:
            eps = self.base.predict(z_t, t, c, self.train_cfg_scale)
            x_01 = self.image(z_t, eps, t)
            loss = eps.new_zeros(())
            if "early" in which:
                loss = loss + self.fidelity_loss(x_01, batch["hq"])
            if "late" in which:
                loss = loss + self.preference_loss(x_01, texts if self.reward_prompt == "kept" else told)
            for term in self.added_terms(x_01, batch["hq"]):
                loss = loss + term
            if x_ref is not None:
                loss = loss + self.lambda_r * self.regularisation_loss(eps, x_01, x_ref)
            update(loss)
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log(f"train/loss_st{st:02d}", loss.detach())
        for band in which:
            self.log(f"train/grad_norm_{band}", self.updates.grad_norm)

    def draw_step(self) -> int:
        """Draw one trained step for all batches and processes of an update, so that their rollouts have one length."""
        chosen = torch.randint(
            len(self.steps), (), generator=generator(self.seed, "st", self.update_step), device="cpu"
        )
        return self.steps[int(chosen)]

    def rollout(self, c: TileConditions, st: int, draws: Draws) -> Tensor:
        """z_t, the input of step st (1 .. S): the sampler's steps 1 .. st - 1 from the base's own start latents."""
        z = self.base.start(c, draws.normal("start", c.z_lq.shape[1:]).to(c.z_lq))
        if self.rollout_kind == "none":
            return z
        sampler = self.base.sampler()
        generators = [generator(self.seed, "rollout", index) for index in draws.index]
        for t in self.base.timesteps[: st - 1]:
            z = advance(sampler, self.base.predict(z, t, c, self.train_cfg_scale), t, z, generators)
        return z

    def image(self, z_t: Tensor, eps: Tensor, t: int) -> Tensor:
        """I_t = clamp((D(x0) + 1) / 2, 0, 1) of x0 = (z_t - sqrt(1 - abar) eps) / sqrt(abar); (B,3,H,W)."""
        return to_01(self.base.codec.decode(self.base.schedule.x0_from_eps(z_t, eps, t))).clamp(0, 1)

    def reference(self, z_t: Tensor, t: int, c: TileConditions) -> Reference:
        """Output of theta' for the same step, from the same z_t and conditions."""
        shared = self.reference_kind == "shared_control"
        controls = self.base.controls(z_t, t, c, self.train_cfg_scale) if shared else None
        with self.as_it_was():
            eps = self.base.predict(z_t, t, c, self.train_cfg_scale, controls)
            return Reference(eps, self.image(z_t, eps, t) if self.regulariser == "gram" else None)

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """A context in which the networks are theta', the untouched base; for forward passes without a graph."""
        if self.regulariser == "lora":
            with without_adapters(self.base.unet), without_adapters(self.base.controlnet):
                yield
            return
        with self.start.in_place_of(self.all_trainable()):
            yield

    def fidelity_loss(self, x_01: Tensor, x_hq: Tensor) -> Tensor:
        """Eq. 2: lambda_dwt mean |LL(x_hq) - LL(I_t)|; or the same weight on L1 of pixels (Table 5)."""
        loss = (dwt_low_loss(x_01, x_hq, self.wavelet) if self.early_loss == "dwt" else l1(x_01, x_hq)).mean()
        self.log(f"train/{self.early_loss}", loss.detach())
        return self.lambda_dwt * loss

    def preference_loss(self, x_01: Tensor, prompts: list[str]) -> Tensor:
        """sum_i lambda_i mean relu(2 - r_i), r_i the raw score."""
        loss = x_01.new_zeros(())
        for name, reward in self.rewards.items():
            score = reward(x_01, prompts)
            loss = loss + self.reward_weights[name] * reward_loss(score, HINGE).mean()
            self.log(f"train/reward_{name}", score.mean().detach())
        return loss

    def regularisation_loss(self, eps: Tensor, x_01: Tensor, reference: Reference) -> Tensor:
        """Eq. 6 on the images' Gram matrices; or |eps - eps'|^2 (Table 4's KL)."""
        if self.regulariser == "gram":
            assert self.gram is not None
            assert reference.x_01 is not None
            loss = self.gram(x_01, reference.x_01).mean()
        else:
            loss = (eps - reference.eps).square().sum((1, 2, 3)).mean()
        self.log(f"train/{self.regulariser}", loss.detach())
        return loss

    # Drift: training's effect on each test image

    def tested(self, batch: Batch, conditions: Description, sr: Tensor, batch_idx: int, dataloader_idx: int) -> None:
        """With `measure_drift`, compare a restored batch with that of theta' from the same noise."""
        if not self.measure_drift:
            return
        assert self.gram is not None
        with self.as_it_was():
            was = self.upscale(batch["lq"], batch["prompt"], conditions).sr
        columns = {"gram": self.gram(sr, was)}
        texts = self.base.look(batch["lq"], batch["prompt"]).texts
        for name, reward in self.rewards.items():
            columns |= {f"{name}_base": reward(was, texts), name: reward(sr, texts)}
        dataset = self.data_info.dataset_name("test", dataloader_idx)
        for i, image in enumerate(batch["name"]):
            numbers = {column: float(values[i]) for column, values in columns.items()}
            self._drifts.append({"dataset": csv_text(dataset), "image": csv_text(image)} | numbers)

    def on_test_epoch_end(self) -> None:
        """Write the drifts next to the scores: `drift.csv` and a figure."""
        drifts, self._drifts = self.gathered(self._drifts), []
        path = self.output_folder("test") / "drift.csv"
        if drifts and self.trainer.is_global_zero:
            drifts = list({(row["dataset"], row["image"]): row for row in drifts}.values())
            with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(drifts[0]))
                writer.writeheader()
                writer.writerows(drifts)
            for name in self.rewards:
                plot_drift(path.parent / "figures" / f"drift_{name.replace(':', '_')}.png", drifts, name)
        super().on_test_epoch_end()
