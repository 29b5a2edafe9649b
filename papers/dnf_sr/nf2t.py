"""DNF-SR, stage 2: negative-aware feature fine-tuning (NF2T) of the transformer by rewards (section 3.4, Algorithm 1).

`configs/kontext_nf2t.yaml` is the paper's run. `losses.py` has the equations, `module.py` the step itself,
`judges.py` the rewards, `policies.py` v_old and v_theta, `stage1.py` the start, `before_after.py` a test's comparison.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from common.autoencoder import ImageCodec
from common.denoisers.flux import FluxText
from common.diffusion import flow_velocity
from common.images import to_01
from common.loading import load_vae
from common.losses import mse
from common.parameters import Row
from common.stages import Stage, digest
from common.training import Batch
from common.updates import Update
from papers.dnf_sr.before_after import BeforeAfter
from papers.dnf_sr.judges import Judges
from papers.dnf_sr.losses import (
    Schedule,
    Std,
    nft_loss,
    normalised_rewards,
    old_share,
    on_policy_loss,
    self_normalised_nft_loss,
    two_branches,
)
from papers.dnf_sr.module import Conditions, FlowRestorer, Slots
from papers.dnf_sr.policies import OLD, THETA, Policies, is_of
from papers.dnf_sr.settings import check_settings
from papers.dnf_sr.stage1 import merge_encoder, open_stage_one
from papers.dnf_sr.unscored import UnscoredGroups

log = logging.getLogger(__name__)


class Sample(NamedTuple):
    """One restoration of each image of a batch by the old policy."""

    eps: Tensor
    """Its noise, (B,C,h,w)."""
    z: Tensor
    """Clean latent, (B,C,h,w)."""
    x: Tensor
    """Image, (B,3,H,W), in [-1,1]."""


class Objective(NamedTuple):
    """Objective of the gradient step for one restoration of each image."""

    surrogate: Tensor
    """A number whose gradient at theta is the objective's."""
    logged: dict[str, Tensor]
    """Numbers to log, without a graph."""


class NF2T(FlowRestorer):
    """Stage 2: the transformer's adapter learns from the rewards of K restorations of each image.

    Two adapters on one frozen base are the policies: `theta`, which is trained, and `old`, which makes the restorations
    and follows theta. Both start as stage 1's adapter. Stage 1's encoder is merged and frozen.

    Args:
        sft: Stage 1's checkpoint, or its run, e.g. `runs/dnf_sr/kontext_sft`, whose newest checkpoint is taken.
        variant: Space of the positive and the negative branch: image and feature space (`nf2t`), or velocity space
            as in DiffusionNFT (`nft`).
        rewards: Rewards of the restorations, with equal weights, see `common.rewards.build_reward`.
        reward_args: Further arguments of a reward, by its name.
        group_size: Number of restorations of one image, K.
        beta: Mixing weight of the policies; 1 / beta is the guidance strength.
        std: Standard deviation of a group: of the `population` (1 / K) or the `sample` (1 / (K - 1)).
        rec_weights: Weights of MSE and DISTS in L_rec.
        updates_per_rollout: Updates after each rollout. `K` makes one for each restoration, as in Algorithm 1: on 8
            processes with a batch of 1 that is the paper's 8 samples an update. 1 makes one update of a whole group.
        eta_schedule: Share of its weights that `old` keeps at the end of a round: none (`hard_copy`), or DiffusionNFT's
            `type1` or `type2`.
        fast_on_policy: Skip the second policy when v = v_old, with one update and a hard copy after each rollout: half
            the transformer calls and decodings of the gradient step, the same gradient.
        nf2t_noise: Noise of the gradient step: `fresh`, or the `rollout`'s own, which carries no reward signal.
        nft_factor: For `nft` alone: scale each branch by its own error, and both by this over beta (DiffusionNFT: 5);
            null for the plain objective.
        nft_kl: For `nft` alone: weight of |v - v_ref|^2 (DiffusionNFT: 1e-4), v_ref stage 1's policy.
        compared: Number of noises with which a test compares each image's rewards with stage 1's; 0 for no comparison
            and no picture.
        pictured: Number, from 0, of the first test set's image whose K restorations before and after are drawn.
        **kwargs: As for `FlowRestorer`.
    """

    trainable: ClassVar = {THETA: ("flow.transformer.*lora_*",)}
    takes_losses = False

    def __init__(
        self,
        sft: str = "runs/dnf_sr/kontext_sft",
        variant: Literal["nf2t", "nft"] = "nf2t",
        rewards: tuple[str, ...] = ("clipiqa", "pyiqa:musiq", "pyiqa:maniqa-pipal", "neg_lpips", "neg_dists"),
        reward_args: dict[str, dict[str, Any]] | None = None,
        group_size: int = 8,
        beta: float = 1.0,
        std: Std = "population",
        rec_weights: tuple[float, float] = (2.0, 5.0),
        updates_per_rollout: Literal[1, "K"] = "K",
        eta_schedule: Schedule = "hard_copy",
        fast_on_policy: bool = False,
        nf2t_noise: Literal["fresh", "rollout"] = "fresh",
        nft_factor: float | None = None,
        nft_kl: float = 0.0,
        compared: int = 1,
        pictured: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters()
        self.sft, self.variant, self.reward_names = sft, variant, rewards
        self.group_size, self.beta, self.std, self.rec_weights = group_size, beta, std, rec_weights
        self.updates_per_rollout, self.eta_schedule = updates_per_rollout, eta_schedule
        self.fast_on_policy, self.nf2t_noise = fast_on_policy, nf2t_noise
        self.nft_factor, self.nft_kl = nft_factor, nft_kl
        self.compared, self.pictured = compared, pictured
        check_settings(self)
        self.policies: Policies
        self.rewards = Judges(rewards, reward_args or {})
        self._unscored, self._before_after = UnscoredGroups(), BeforeAfter()

    # Networks

    def configure_networks(self) -> None:
        """Build the VAE and the transformer with both policies, from stage 1."""
        sft = open_stage_one(self)  # before anything large is loaded
        super().configure_networks()
        assert self.flow is not None
        v_ref = {} if sft is None else sft.v_ref
        self.policies = Policies(self.flow.transformer, self.lora_rank, self.lora_alpha, self.seed, v_ref)
        if sft is not None:
            merge_encoder(self.codec.vae, sft.stage.weights, self.lora_rank, self.lora_alpha)

    def configure_training(self) -> None:
        """Build losses and rewards."""
        super().configure_training()
        self.rewards.build()

    def restore_stage(self, argument: str, stage: Stage) -> None:
        """Take E_ref from the checkpoint. It also holds both policies, and the digest of v_ref."""
        self.codec = ImageCodec(load_vae(self.pretrained), self.gradient_checkpointing)
        merge_encoder(self.codec.vae, stage.weights, self.lora_rank, self.lora_alpha)
        self.codec.to(self.device)
        if digest(self.policies.reference) != stage.settings["v_ref"]:
            self.policies.reference = {}

    def networks(self) -> dict[str, nn.Module]:
        """The networks by the paper's names, and rewards that are modules (pyiqa's load when they are first used)."""
        return super().networks() | self.rewards.networks()

    def parameter_rows(self) -> list[Row]:
        """Rows of the networks, with `old` after `theta`."""
        return self.policies.parameter_rows(super().parameter_rows())

    def memory_plan(self) -> dict[str, int]:
        """Bytes as for stage 1, those of `old`, and those of three copies of the transformer, for comparison."""
        plan = super().memory_plan()
        (base, *_) = plan.values()
        return plan | {
            f"{OLD}: weights": sum(weight.nbytes for weight in self.policies.old()),
            "instead of adapters: three copies of the transformer": 3 * base,
        }

    def checkpoint_keys(self) -> set[str]:
        """Keys of the trained parameters and of the old policy."""
        return super().checkpoint_keys() | {key for key in self.state_dict() if is_of(key, OLD)}

    # Training

    def on_fit_start(self) -> None:
        """Load the rewards' weights, so that a run without them fails before it starts."""
        super().on_fit_start()
        self._unscored, self._logged_samples = UnscoredGroups(), False
        self.rewards.load(self.device)
        if self.nft_kl and not self.policies.reference:
            raise ValueError(
                f"nft_kl={self.nft_kl} needs stage 1's policy, which sft={self.sft} no longer holds; put that "
                "checkpoint back, or set nft_kl=0"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Algorithm 1: a round of rollout (lines 5 to 12), gradient steps (13 to 23) and online update (24)."""
        draws, text = self.draws(batch), self.text(batch["prompt"])
        self._log_samples(len(batch["lq"]))
        # 14. z_L = E_ref(x_L)
        with torch.no_grad():
            z_lq = self.encode(batch["lq"])
        noises = [draws.normal(f"rollout/{k}", z_lq.shape[1:]) for k in range(self.group_size)]
        # 6. K restorations by v_old
        samples = self.rollout(z_lq, noises, text)
        # 7.-10. Raw rewards, standardised in their group, through the normal distribution function, averaged
        r = self.judge(samples, batch)
        logged = []
        with self.optimizer_turn(THETA) as update:
            for k, sample in enumerate(samples):
                # 15. z_t = t eps + (1 - t) z_L, with fresh noise
                eps = draws.normal(f"gradient/{k}", z_lq.shape[1:]) if self.nf2t_noise == "fresh" else sample.eps
                # 16.-21. L+ and L-
                objective = self.policy_objective(sample, r[k], self.fill(z_lq, eps), text)
                # 22. theta <- theta - lambda grad [L+ + L-]
                self.descend(update, objective.surrogate, last=k == self.group_size - 1)
                logged.append(objective.logged)
        # 24. v_old <- eta v_old + (1 - eta) v_theta
        self.follow()
        self.log_dict({f"train/{name}": torch.stack([one[name] for one in logged]).mean() for name in logged[0]})

    def _log_samples(self, batch_size: int) -> None:
        """Log the number of restorations in an update, once a fit."""
        if self._logged_samples:
            return
        self._logged_samples = True
        processes, each = self.trainer.world_size, 1 if self.updates_per_rollout == "K" else self.group_size
        rank_zero_info(
            f"samples per update: {batch_size * processes * self.accumulate * each} = {batch_size} x {processes} x "
            f"{self.accumulate} x {each} (batch of a process x processes x accumulated batches x restorations of an "
            f"image); {self.group_size // each} updates a rollout"
        )

    @torch.no_grad()
    def rollout(self, z_lq: Tensor, noises: list[Tensor], text: FluxText) -> list[Sample]:
        """Restore each image of the batch once with each noise by the old policy."""
        samples = []
        with self.policies.use(OLD):
            for eps in noises:
                slots = self.fill(z_lq, eps)
                z = self.clean(slots, self.velocity(slots, text))
                samples.append(Sample(eps, z, self.codec.decode(z).clamp(-1, 1)))
        return samples

    @torch.no_grad()
    def judge(self, samples: list[Sample], batch: Batch) -> Tensor:
        """Rewards r in (0, 1) of each sample, (K,B); logs raw rewards and their spread."""
        outputs = [self.fix_colors(to_01(sample.x), batch["lq"]) for sample in samples]  # a user's output
        scores = [self.score(x_01, batch) for x_01 in outputs]
        raw = {name: torch.stack([score[name] for score in scores]) for name in scores[0]}  # each (K,B)
        normalised = normalised_rewards(torch.stack(list(raw.values())), self.std)
        for name, values in raw.items():
            self.log(f"train/reward/{name}", values.mean())
            self.log(f"train/spread/{name}", values.std(0, correction=0).mean())
        self.log("train/flat_groups", normalised.flat)
        self.log("train/sum_2r-1", (2 * normalised.r - 1).sum(0).mean())
        self.log("train/unscored_groups", normalised.unscored.float().mean())
        self._unscored.count(normalised.unscored.sum())
        return normalised.r

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Report the step before this one, whose numbers are ready without waiting."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        self._unscored.report(self._steps - 1, self.guard)

    def on_train_end(self) -> None:
        """Report the last step."""
        super().on_train_end()
        self._unscored.report(self._steps, self.guard)

    def score(self, x_01: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Raw rewards of images (B,3,H,W) in [0,1] by name, each (B,); those with a reference need `hq`."""
        return self.rewards.score(x_01, batch)

    def policy_objective(self, sample: Sample, r: Tensor, slots: Slots, text: FluxText) -> Objective:
        """Lines 16 to 21 for one restoration of each image, with the rewards (B,)."""
        image_of = partial(self._image_of, slots)
        distance = partial(self.distance, target=sample.x)
        if self.fast_on_policy:
            loss = on_policy_loss(distance(image_of(self.velocity(slots, text))), r, self.beta).mean()
            return Objective(loss, {"loss": loss.detach()})
        with torch.no_grad(), self.policies.use(OLD):
            v_old = self.velocity(slots, text)
        v = self.velocity(slots, text)
        if self.variant == "nft":
            return self._nft_objective(v, v_old, sample, r, slots, text)
        branches = two_branches(v, v_old, self.beta, r, image_of, distance)
        return Objective((v * branches.gradient).sum(), {"loss": branches.loss, "gap": branches.gap})

    def _image_of(self, slots: Slots, v: Tensor) -> Tensor:
        return self.codec.decode(self.clean(slots, v))

    def distance(self, x: Tensor, target: Tensor) -> Tensor:
        """L_rec = lambda_2 MSE in [-1,1] + lambda_3 DISTS in [0,1], (B,)."""
        weight_mse, weight_dists = self.rec_weights
        return weight_mse * mse(x, target) + weight_dists * self.feature_loss(x, target)

    def _nft_objective(
        self, v: Tensor, v_old: Tensor, sample: Sample, r: Tensor, slots: Slots, text: FluxText
    ) -> Objective:
        """Objective of the ablation in velocity space, y = (z_t - z_hat) / t; its gap is |v+ - v-|."""
        assert self.flow is not None
        y = flow_velocity(slots.start, sample.z, self.t_mid)
        if self.nft_factor is None:
            loss = nft_loss(v, v_old, y, r, self.beta).mean()
        else:
            loss = self_normalised_nft_loss(v, v_old, y, r, self.beta, self.t_mid, self.nft_factor).mean()
        if self.nft_kl:
            with torch.no_grad(), self.policies.stage_one():
                v_ref = self.velocity(slots, text)
            loss = loss + self.nft_kl * (v - v_ref).square().mean()
        return Objective(loss, {"loss": loss.detach(), "gap": 2 * self.beta * (v - v_old).detach().abs().mean()})

    def descend(self, update: Update, loss: Tensor, last: bool) -> None:
        """Line 22: one update of a whole group, or one of each restoration; a round counts as one train step.

        Raises:
            RuntimeError: Another policy than theta is active.
        """
        self.policies.check_backward()
        if self.updates_per_rollout == "K":
            update(loss, count=last)
        else:
            update(loss / self.group_size, step=last)

    def follow(self) -> None:
        """Line 24, after each update: old <- eta old + (1 - eta) theta."""
        if self.is_accumulating:
            return  # theta has not moved since the last time
        updates = self.group_size if self.updates_per_rollout == "K" else 1
        eta = old_share(self.eta_schedule, self.update_step * updates)
        self.policies.follow(self.trainable_parameters(THETA), eta)

    # Test: the same images with the same noise, before and after

    def on_test_start(self) -> None:
        """Load the rewards; unlike training, a test leaves out those that cannot be loaded."""
        super().on_test_start()
        if self.compared and not self.policies.reference:
            log.warning("sft=%s no longer holds stage 1's policy: no image is compared with it", self.sft)
        if self.compared:
            self.rewards.load_available(self.device)

    def tested(self, batch: Batch, conditions: Conditions, sr: Tensor, batch_idx: int, dataloader_idx: int) -> None:
        """Restore a batch with several noises by stage 1's policy and by theta, and note the rewards."""
        if self.compared and self.policies.reference:
            self._before_after.add(self, batch, conditions, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Write and log the rewards before and after stage 2, and draw the samples."""
        super().on_test_epoch_end()
        self.log_dict(self._before_after.write(self), rank_zero_only=True)
