"""DNF-SR, stage 2: negative-aware feature fine-tuning (NF2T) of the transformer by rewards (section 3.4, Algorithm 1).

`configs/kontext_nf2t.yaml` is the paper's run; `losses.py` has the equations, `module.py` the step itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from common.adapters import (
    add_lora,
    load_adapter_state,
    merge,
    set_adapter,
    vae_encoder_targets,
)
from common.autoencoder import ImageCodec
from common.checkpoints import read_stage, resolved, trained_state
from common.denoisers.flux import FLUX_TARGETS, FluxText
from common.diffusion import flow_velocity
from common.guard import Later, reduce
from common.images import to_01
from common.loading import HUB_ID, is_architecture_only, load_vae
from common.losses import mse
from common.metrics import to_uint8
from common.parameters import Row
from common.pyiqa import MetricUnavailableError
from common.rewards import Reward, build_reward
from common.stages import Stage, digest
from common.training import Batch
from papers.dnf_sr.figures import Comparison, write_comparison
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

log = logging.getLogger(__name__)

OLD, THETA = "old", "theta"
MOST_UNSCORED = 5
"""Train steps in a row with a reward that is not finite, after which a fit stops."""
MOST_SAVED = 10
"""Batches with such a reward that one process saves; the others are only counted."""
SHARED = ("pretrained", "frozen_dtype", "input", "t_mid", "clean_estimate", "guidance", "lora_rank", "lora_alpha")
"""Settings that must be stage 1's."""
SHARED_IN_FIT = ("prompt_suffix", "max_tokens")
"""Settings that must be stage 1's in a fit of stage 2; a test may use others."""


class UnscoredError(RuntimeError):
    """A reward gave numbers that are not finite, step after step."""


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
    said: dict[str, Tensor]
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
        self.sft, self.variant, self.reward_names, self.reward_args = sft, variant, rewards, reward_args or {}
        self.group_size, self.beta, self.std, self.rec_weights = group_size, beta, std, rec_weights
        self.updates_per_rollout, self.eta_schedule = updates_per_rollout, eta_schedule
        self.fast_on_policy, self.nf2t_noise = fast_on_policy, nf2t_noise
        self.nft_factor, self.nft_kl = nft_factor, nft_kl
        self.compared, self.pictured = compared, pictured
        self._check()
        self._policy = THETA
        self._sft_adapter: dict[str, Tensor] = {}
        self._comparison: list[Comparison] = []
        self.rewards = nn.ModuleDict()
        self._scoring, self._unscored, self._saved = Later(), torch.zeros(3, dtype=torch.long), 0

    def _check(self) -> None:
        """Refuse settings that contradict each other."""
        if self.group_size < 2:
            raise ValueError(f"group_size={self.group_size} is out of range; a group to compare in has 2 or more")
        if not self.reward_names:
            raise ValueError("rewards is empty; name at least one, e.g. [clipiqa, neg_lpips]")
        if set(self.reward_args) - set(self.reward_names):
            unknown = sorted(set(self.reward_args) - set(self.reward_names))
            raise ValueError(f"reward_args is for {unknown}, which are not in rewards={list(self.reward_names)}")
        if self.input == "lr":
            raise ValueError("input=lr takes no noise, so all restorations of a group are equal; use dual or mix")
        if self.updates_per_rollout == "K" and self.accumulate != 1:
            raise ValueError(
                f"accumulate={self.accumulate} with updates_per_rollout=K: each update is of one batch; set "
                "accumulate=1 and the photos of an update by data.global_batch_size or data.batch_size, or set "
                "updates_per_rollout=1"
            )
        off_policy = self.updates_per_rollout != 1 or self.eta_schedule != "hard_copy" or self.accumulate != 1
        if self.fast_on_policy and (off_policy or self.variant != "nf2t"):
            raise ValueError(
                "fast_on_policy=true holds where v = v_old: set variant=nf2t, updates_per_rollout=1, "
                "eta_schedule=hard_copy and accumulate=1, or fast_on_policy=false"
            )
        if self.nft_kl and self.variant != "nft":
            raise ValueError(f"nft_kl={self.nft_kl} with variant={self.variant}: set variant=nft, or nft_kl=0")

    # Networks

    def configure_networks(self) -> None:
        """Build the VAE and the transformer with both policies, from stage 1."""
        sft = {} if is_architecture_only() else self._read_sft()  # before anything large is loaded
        self._sft_adapter = _adapter_of(sft, "flow.transformer.")
        super().configure_networks()
        assert self.flow is not None
        transformer = self.flow.transformer
        for name in (OLD, THETA):
            add_lora(transformer, self.lora_rank, self.lora_alpha, FLUX_TARGETS, name, seed=self.seed)
        if sft:
            self._merge_encoder(_adapter_of(sft, "codec.vae."))
            for name in (OLD, THETA):  # v_ref, with which both policies start
                load_adapter_state(transformer, self._sft_adapter, name)
        _make_buffers(transformer, OLD)
        set_adapter(transformer, THETA)

    def configure_training(self) -> None:
        """Build losses and rewards."""
        super().configure_training()
        for name in self.reward_names:
            self.rewards[name] = self._reward(name)

    def _open_reward(self, name: str) -> None:
        """Build a reward if it is missing, and load its weights."""
        if name not in self.rewards:
            self.rewards[name] = self._reward(name).to(self.device)
        self._judges()[name].load(self.device)

    def _reward(self, name: str) -> Reward:
        arguments = self.reward_args.get(name, {})
        if is_architecture_only() and name in ("neg_lpips", "neg_dists"):
            arguments = {**arguments, "weights": "random"}
        return build_reward(name, **arguments)

    def _read_sft(self) -> dict[str, Tensor]:
        """Adapters of stage 1's checkpoint; empty if its file is missing but a checkpoint of stage 2 will be loaded.

        Raises:
            FileNotFoundError: There is no such checkpoint, and no checkpoint of stage 2 will be loaded.
            ValueError: It is another stage's, or was trained with other settings.
        """
        try:
            checkpoint = read_stage(self.sft, "sft", "papers.dnf_sr.DNFSR")
        except FileNotFoundError as error:
            self.miss_stage("sft", error)
            return {}
        settings = checkpoint["hyper_parameters"]
        for key in (*SHARED, *(SHARED_IN_FIT if self.builds_training() else ())):
            before, here = settings.get(key, getattr(self, key)), getattr(self, key)
            if before == here or (key == "pretrained" and _is_same_place(before, here)):
                continue
            difference = f"sft={self.sft} was trained with {key}={before}, here is {key}={here}"
            if key != "pretrained":
                raise ValueError(f"{difference}; set model.{key}={before}")
            if _is_name(before) and _is_name(here):
                raise ValueError(f"{difference}; set model.pretrained={before}, or to a folder with those weights")
            log.warning("%s. Make sure that both hold the same weights; their names do not show it.", difference)
        state = {key: value.clone() for key, value in trained_state(checkpoint).items() if "lora_" in key}  # mapped
        kept, v_ref = _adapter_of(state, "codec.vae."), digest(_adapter_of(state, "flow.transformer."))
        self.stages["sft"] = Stage(resolved(self.sft), digest(state), kept, {"v_ref": v_ref})
        return state

    def _merge_encoder(self, state: dict[str, Tensor]) -> None:
        """Make E_ref: merge stage 1's adapter into the encoder."""
        add_lora(self.codec.vae, self.lora_rank, self.lora_alpha, vae_encoder_targets(self.codec.vae))
        load_adapter_state(self.codec.vae, state)
        merge(self.codec.vae)

    def restore_stage(self, argument: str, stage: Stage) -> None:
        """Take E_ref from the checkpoint. It also holds both policies, and the digest of v_ref."""
        self.codec = ImageCodec(load_vae(self.pretrained), self.gradient_checkpointing)
        self._merge_encoder(stage.weights)
        self.codec.to(self.device)
        if digest(self._sft_adapter) != stage.settings["v_ref"]:
            self._sft_adapter = {}

    def networks(self) -> dict[str, nn.Module]:
        """The networks by the paper's names, and rewards that are modules (pyiqa's load when they are first used)."""
        judges = {f"reward {name}": reward for name, reward in self.rewards.items() if list(reward.parameters())}
        return super().networks() | judges

    def parameter_rows(self) -> list[Row]:
        """Rows of the networks, with `old` after `theta`."""
        rows: list[Row] = []
        for row in super().parameter_rows():
            if row.name.startswith("transformer LoRA"):
                row = replace(row, name=row.name.replace("LoRA", f"LoRA {THETA}"))
                copy = replace(row, name=row.name.replace(THETA, OLD), kind="copy", trainable=0)
                rows += [row, replace(copy, total=sum(weight.numel() for weight in self._old()))]
            else:
                rows.append(row)
        return rows

    def memory_plan(self) -> dict[str, int]:
        """Bytes as for stage 1, those of `old`, and those of three copies of the transformer, for comparison."""
        plan = super().memory_plan()
        (base, *_) = plan.values()
        return plan | {
            f"{OLD}: weights": sum(weight.nbytes for weight in self._old()),
            "instead of adapters: three copies of the transformer": 3 * base,
        }

    def checkpoint_keys(self) -> set[str]:
        """Keys of the trained parameters and of the old policy."""
        return super().checkpoint_keys() | {key for key in self.state_dict() if _is_of(key, OLD)}

    # Policies: two adapters on one base

    @contextmanager
    def policy(self, name: str) -> Iterator[None]:
        """A context in which the transformer is the policy of that name; outside it is theta.

        A backward pass belongs outside: gradient checkpointing recomputes with the adapter that is active then.
        """
        assert self.flow is not None
        before = self._policy
        set_adapter(self.flow.transformer, name)  # leaves requires_grad alone, which peft's own would not
        self._policy = name
        try:
            yield
        finally:
            set_adapter(self.flow.transformer, before)
            self._policy = before

    @contextmanager
    def stage_one(self) -> Iterator[None]:
        """A context in which the transformer is v_ref, stage 1's policy: its weights and `old`'s change places."""
        self._exchange_reference()
        try:
            with self.policy(OLD):
                yield
        finally:
            self._exchange_reference()

    def _exchange_reference(self) -> None:
        """Swap the storages of `old` and v_ref; nothing is copied once v_ref is on the device."""
        assert self.flow is not None
        for key, old in self.flow.transformer.named_buffers():
            if _is_of(key, OLD):
                name = key.replace(f".{OLD}.", ".")
                reference = self._sft_adapter[name].to(old)
                self._sft_adapter[name], old.data = old.data, reference

    def _old(self) -> list[Tensor]:
        """Weights of the old policy, in the order of theta's."""
        assert self.flow is not None
        return [weight for key, weight in self.flow.transformer.named_buffers() if _is_of(key, OLD)]

    # Training

    def on_fit_start(self) -> None:
        """Load the rewards' weights, so that a run without them fails before it starts."""
        super().on_fit_start()
        self._said_samples = False
        self._scoring, self._unscored, self._saved = Later(), torch.zeros(3, dtype=torch.long), 0
        for name in self.reward_names:
            self._open_reward(name)
        if self.nft_kl and not self._sft_adapter:
            raise ValueError(
                f"nft_kl={self.nft_kl} needs stage 1's policy, which sft={self.sft} no longer holds; put that "
                "checkpoint back, or set nft_kl=0"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Algorithm 1: a round of rollout (lines 5 to 12), gradient steps (13 to 23) and online update (24)."""
        draws, text = self.draws(batch), self.text(batch["prompt"])
        if not self._said_samples:
            self._say_samples(len(batch["lq"]))
        # 14. z_L = E_ref(x_L)
        with torch.no_grad():
            z_lq = self.encode(batch["lq"])
        noises = [draws.normal(f"rollout/{k}", z_lq.shape[1:]) for k in range(self.group_size)]
        # 6. K restorations by v_old
        samples = self.rollout(z_lq, noises, text)
        # 7.-10. Raw rewards, standardised in their group, through the normal distribution function, averaged
        r = self.judge(samples, batch)
        said = []
        with self.turn(THETA) as update:
            for k, sample in enumerate(samples):
                # 15. z_t = t eps + (1 - t) z_L, with fresh noise
                eps = draws.normal(f"gradient/{k}", z_lq.shape[1:]) if self.nf2t_noise == "fresh" else sample.eps
                # 16.-21. L+ and L-
                objective = self.policy_objective(sample, r[k], self.fill(z_lq, eps), text)
                # 22. theta <- theta - lambda grad [L+ + L-]
                self.descend(update, objective.surrogate, last=k == self.group_size - 1)
                said.append(objective.said)
        # 24. v_old <- eta v_old + (1 - eta) v_theta
        self.follow()
        self.log_dict({f"train/{name}": torch.stack([one[name] for one in said]).mean() for name in said[0]})

    def _say_samples(self, batch_size: int) -> None:
        """Print the number of restorations in an update."""
        self._said_samples = True
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
        with self.policy(OLD):
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
        self._count_unscored(normalised.unscored.sum())
        return normalised.r

    def _count_unscored(self, found: Tensor) -> None:
        """Count groups without preference on the device: steps in a row with any, groups in this step and in total."""
        row, _, in_all = self._unscored.to(found.device)
        self._unscored = torch.stack([torch.where(found > 0, row + 1, 0), found, in_all + found])

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Report the step before this one, whose numbers are ready without waiting."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        self._say_unscored(self._steps - 1)

    def on_train_end(self) -> None:
        """Report the last step."""
        super().on_train_end()
        self._say_unscored(self._steps)

    def _say_unscored(self, step: int) -> None:
        """Save the batch of a train step that a reward could not score.

        Raises:
            UnscoredError: A process had one in each of the last steps; all processes raise it.
        """
        longest = self._unscored[0].clone()
        reduce(longest, "MAX")
        told = self._scoring.exchange(torch.cat([self._unscored, longest[None]]))
        if told is None:
            return
        _, found, in_all, row = told.tolist()
        if found:
            saved = f"; only the first {MOST_SAVED} such batches are saved"
            if self._saved < MOST_SAVED:
                self._saved += 1
                saved = f"; the batch is in {self.save_batch('unscored', step)}"
            log.warning(
                "a reward is not finite for %d groups at train step %d: they have no preference (%d so far)%s",
                *(found, step, in_all, saved),
            )
        if row >= MOST_UNSCORED:
            raise UnscoredError(
                f"a reward is not finite in {row} train steps in a row, up to step {step}: the last checkpoint is "
                f"unharmed. Inspect {self._run_dir}/unscored_*.pt, or leave that reward out of model.rewards."
            )

    def score(self, x_01: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Raw rewards of images (B,3,H,W) in [0,1] by name, each (B,); those with a reference need `hq`."""
        judges = {name: reward for name, reward in self._judges().items() if "hq" in batch or not reward.referenced}
        return {name: reward(x_01, batch["prompt"], batch.get("hq")) for name, reward in judges.items()}

    def _judges(self) -> dict[str, Reward]:
        return {name: reward for name, reward in self.rewards.items() if isinstance(reward, Reward)}

    def policy_objective(self, sample: Sample, r: Tensor, slots: Slots, text: FluxText) -> Objective:
        """Lines 16 to 21 for one restoration of each image, with the rewards (B,)."""
        image_of = partial(self._image_of, slots)
        distance = partial(self.distance, target=sample.x)
        if self.fast_on_policy:
            loss = on_policy_loss(distance(image_of(self.velocity(slots, text))), r, self.beta).mean()
            return Objective(loss, {"loss": loss.detach()})
        with torch.no_grad(), self.policy(OLD):
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
            with torch.no_grad(), self.stage_one():
                v_ref = self.velocity(slots, text)
            loss = loss + self.nft_kl * (v - v_ref).square().mean()
        return Objective(loss, {"loss": loss.detach(), "gap": 2 * self.beta * (v - v_old).detach().abs().mean()})

    def descend(self, update: Callable[[Tensor], None], loss: Tensor, last: bool) -> None:
        """Line 22: one update of a whole group, or one of each restoration; a round counts as one train step.

        Raises:
            RuntimeError: Another policy than theta is active.
        """
        if self._policy != THETA:
            raise RuntimeError(
                f"the policy {self._policy!r} is active; leave its context before a backward pass, which needs theta"
            )
        if self.updates_per_rollout == "K":
            with self._uncounted() if not last else nullcontext():
                update(loss)
        elif last:
            update(loss / self.group_size)
        else:
            self.check_loss(THETA, loss)
            with self._unsynchronised():
                self.manual_backward(loss / self.group_size / self.accumulate)

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        """A context in which an optimiser's step does not count as Lightning's `global_step`."""
        optimizer: Any = self.optimizers()
        hooks = optimizer._on_before_step, optimizer._on_after_step
        optimizer._on_before_step = optimizer._on_after_step = lambda: None
        try:
            yield
        finally:
            optimizer._on_before_step, optimizer._on_after_step = hooks

    def _unsynchronised(self) -> AbstractContextManager[None]:
        """A context without gradient synchronisation between processes; a group's last backward sends the sum."""
        block = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
        context: AbstractContextManager[None] = block()
        return context

    @torch.no_grad()
    def follow(self) -> None:
        """Line 24, after each update: old <- eta old + (1 - eta) theta."""
        if self._steps % self.accumulate:
            return  # theta has not moved since the last time
        updates = self.group_size if self.updates_per_rollout == "K" else 1
        eta = old_share(self.eta_schedule, self.update_step * updates)
        for old, theta in zip(self._old(), self.trainable_parameters(THETA), strict=True):
            old.copy_(theta if eta == 0 else eta * old + (1 - eta) * theta)

    # Test: the same images with the same noise, before and after

    def on_test_start(self) -> None:
        """Load the rewards; unlike training, a test leaves out those that cannot be loaded."""
        super().on_test_start()
        if self.compared and not self._sft_adapter:
            log.warning("sft=%s no longer holds stage 1's policy: no image is compared with it", self.sft)
        for name in self.reward_names if self.compared else ():
            try:
                self._open_reward(name)
            except (MetricUnavailableError, FileNotFoundError) as error:
                log.warning("reward %s is not computed: %s", name, error)
                if name in self.rewards:
                    del self.rewards[name]

    def tested(self, batch: Batch, conditions: Conditions, sr: Tensor, batch_idx: int, dataloader_idx: int) -> None:
        """Restore a batch with several noises by stage 1's policy and by theta, and note the rewards."""
        if not self.compared or not self._sft_adapter:
            return
        dataset = self._dataset_name("test", dataloader_idx)
        size = len(batch["name"])
        numbers = batch.get("index", torch.arange(batch_idx * size, (batch_idx + 1) * size))  # a foreign data module
        drawn = [dataloader_idx == 0 and int(number) == self.pictured for number in numbers]
        for noise in range(max(self.compared, self.group_size if any(drawn) else 0)):
            told = conditions._replace(noise=noise)
            after = self.upscale(batch["lq"], batch["prompt"], told).sr
            with self.stage_one():
                before = self.upscale(batch["lq"], batch["prompt"], told).sr
            scores = [self._test_scores(x, batch) for x in (before, after)]
            for i, name in enumerate(batch["name"]):
                one, other = ({metric: float(values[i]) for metric, values in score.items()} for score in scores)
                images = (before[i].cpu(), after[i].cpu()) if drawn[i] and noise < self.group_size else None
                self._comparison.append(Comparison(dataset, name, noise, one, other, images))

    def _test_scores(self, x_01: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Raw rewards and PSNR-Y, each (B,)."""
        scores = self.score(x_01, batch)
        psnr = self.scores.metric("psnr_y", self.device)
        if "hq" in batch and not isinstance(psnr, str):
            pairs = zip(to_uint8(x_01), to_uint8(batch["hq"]), strict=True)
            values = [psnr(*(image.permute(1, 2, 0).cpu().numpy() for image in pair)) for pair in pairs]
            scores["psnr_y"] = torch.tensor(values)
        return scores

    def on_test_epoch_end(self) -> None:
        """Write and log the rewards before and after stage 2, and draw the samples."""
        super().on_test_epoch_end()
        gathered, self._comparison = self.gathered(self._comparison), []
        # an image that two processes saw only once
        rows = list({(row.dataset, row.image, row.noise): row for row in gathered}.values())
        folder = self._results() / "test"
        if not rows or not self.trainer.is_global_zero:
            return
        for gain in write_comparison(folder, rows, self.compared):
            values = {"before": gain.before, "after": gain.after, "low": gain.low, "high": gain.high}
            self.log_dict({f"test/{gain.metric}/{k}": v for k, v in values.items()}, rank_zero_only=True)


def _is_same_place(one: str, other: str) -> bool:
    """True if both paths are the same folder."""
    return Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def _is_name(pretrained: str) -> bool:
    """True if the name fixes the weights: a hub id, `tiny` or `random:<architecture>`; a folder may hold any."""
    if pretrained == "tiny" or pretrained.startswith("random:"):
        return True
    return HUB_ID.fullmatch(pretrained) is not None and not Path(pretrained).is_dir()


def _make_buffers(module: nn.Module, name: str) -> None:
    """Turn an adapter's weights into buffers, which no optimiser, clipping or gradient bucket takes up."""
    for key, _ in [(key, p) for key, p in module.named_parameters() if _is_of(key, name)]:
        place, _, leaf = key.rpartition(".")
        layer = module.get_submodule(place)
        weight = getattr(layer, leaf).detach()
        delattr(layer, leaf)
        layer.register_buffer(leaf, weight)


def _is_of(key: str, adapter: str) -> bool:
    """True if a dotted name is that of an adapter's weight."""
    return f".lora_A.{adapter}." in key or f".lora_B.{adapter}." in key


def _adapter_of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The adapter of the network at `prefix` in a checkpoint of stage 1, as `load_adapter_state` takes it."""
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return {key.replace(".default.", "."): value for key, value in inside.items()}
