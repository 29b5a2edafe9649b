"""DNF-SR, stage 1: supervised fine-tuning of VAE encoder and transformer by LoRA (section 3.3, equations 3 to 5).

`configs/kontext_sft.yaml` is the paper's run; `module.py` has the step itself.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from common.adapters import add_lora, vae_encoder_targets, without_adapters
from common.denoisers.flux import FLUX_TARGETS
from common.draws import Draws
from common.images import to_01, to_pm1
from common.losses import discriminator_loss, generator_loss, mse
from common.training import Batch
from papers.dnf_sr.module import FlowRestorer
from papers.dnf_sr.networks import Discriminator


class DNFSR(FlowRestorer):
    """Stage 1: one-step restoration by LoRA, with latent, pixel, feature and adversarial losses.

    Args:
        lambda_z: Weight of the latent loss, which makes the encoder's z_L the clean latent.
        lambda_mse: Weight of the MSE (lambda_2), on images in [-1,1].
        lambda_dists: Weight of the loss in feature space (lambda_3).
        lambda_gan: Weight of the adversarial loss; 0 for no discriminator.
        disc: DINOv3 under the discriminator's heads: hub id, folder or `random:<architecture>`.
        disc_hidden: Width of the heads.
        disc_augment: Change the discriminator's input images, real and restored, at random.
        disc_optimizer: Optimiser of the discriminator.
        **kwargs: As for `FlowRestorer`.
    """

    trainable: ClassVar = {
        "generator": ("flow.transformer.*lora_*", "codec.vae.*lora_*"),
        "discriminator": ("discriminator.heads.*",),
    }
    training_only = ("discriminator",)

    def __init__(
        self,
        lambda_z: float = 5.0,
        lambda_mse: float = 2.0,
        lambda_dists: float = 5.0,
        lambda_gan: float = 0.5,
        disc: str = "facebook/dinov3-vitb16-pretrain-lvd1689m",
        disc_hidden: int = 128,
        disc_augment: bool = True,
        disc_optimizer: OptimizerCallable = torch.optim.AdamW,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters()
        self.lambda_z, self.lambda_mse, self.lambda_dists = lambda_z, lambda_mse, lambda_dists
        self.lambda_gan, self.disc = lambda_gan, disc
        self.disc_hidden, self.disc_augment, self.disc_optimizer = disc_hidden, disc_augment, disc_optimizer
        self.discriminator: Discriminator | None = None

    # Networks

    def configure_networks(self) -> None:
        """Build VAE and transformer, each with an adapter."""
        super().configure_networks()
        assert self.flow is not None
        targets = vae_encoder_targets(self.codec.vae)
        add_lora(self.codec.vae, self.lora_rank, self.lora_alpha, targets, seed=self.seed)
        add_lora(self.flow.transformer, self.lora_rank, self.lora_alpha, FLUX_TARGETS, seed=self.seed)

    def configure_training(self) -> None:
        """Build losses and discriminator."""
        super().configure_training()
        if self.lambda_gan:
            self.discriminator = Discriminator(
                self.disc,
                self.disc_augment,
                hidden=self.disc_hidden,
                gradient_checkpointing=self.gradient_checkpointing,
                seed=self.seed,
            )

    def networks(self) -> dict[str, nn.Module]:
        """The networks by the paper's names, the discriminator in its two parts."""
        networks = super().networks()
        if self.discriminator is not None:
            networks["discriminator trunk (DINOv3)"] = self.discriminator.trunk
            networks["discriminator heads"] = self.discriminator.heads
        return networks

    def trainable_patterns(self) -> dict[str, tuple[str, ...]]:
        """Name patterns of the trained parameters; without an adversarial loss there is no discriminator."""
        return {name: patterns for name, patterns in self.trainable.items() if name == "generator" or self.lambda_gan}

    def _make_optimizer(self, name: str) -> torch.optim.Optimizer:
        make = self.disc_optimizer if name == "discriminator" else self.optimizer
        return make(self.trainable_parameters(name))

    # Training

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Equations 3 to 5: one update of the two adapters, then one of the discriminator's heads."""
        x_h, draws, text = to_pm1(batch["hq"]), self.draws(batch), self.text(batch["prompt"])
        with torch.no_grad(), without_adapters(self.codec.vae):
            z_hr = self.codec.encode(x_h)  # the original encoder's
        with self.optimizer_turn("generator") as update:
            # z_L = E_theta(x_L), z_mix = (1 - t) z_L + t eps
            z_l = self.encode(batch["lq"])
            slots = self.fill(z_l, draws.normal("noise", z_l.shape[1:]))
            # Equation 3: z_H = z_mix - t v, x_H = D(z_H)
            x_h_hat = self.codec.decode(self.clean(slots, self.velocity(slots, text)))
            # Equation 5: lambda_1 L_z + lambda_2 L_MSE + lambda_3 L_DISTS + lambda_4 L_GAN
            loss = self.restoration_loss(z_l, z_hr, x_h_hat, x_h)
            if self.discriminator is not None:
                logits = self.discriminator(x_h_hat, draws, "generator/augment")
                loss_gan = generator_loss("bce_smooth", logits).mean()
                self.log("train/gan", loss_gan.detach())
                loss = loss + self.lambda_gan * loss_gan
            update(loss)
        self.log("train/loss", loss.detach(), prog_bar=True)
        if self.discriminator is not None:
            self.discriminator_step(self.discriminator, x_h_hat.detach(), x_h, draws)

    def restoration_loss(self, z_l: Tensor, z_hr: Tensor, x_h_hat: Tensor, x_h: Tensor) -> Tensor:
        """Equation 4 and the latent loss: L_z on latents, MSE in [-1,1], DISTS in [0,1]; logs each, unweighted."""
        terms = {
            "latent": (self.lambda_z, (z_l - z_hr).square().mean()),
            "mse": (self.lambda_mse, mse(x_h_hat, x_h).mean()),
            self.dists_kind: (self.lambda_dists, self.feature_loss(x_h_hat, x_h).mean()),
        }
        self.log_dict({f"train/{name}": value.detach() for name, (_, value) in terms.items()})
        added = self.added_terms(to_01(x_h_hat), to_01(x_h))
        return torch.stack([*(weight * value for weight, value in terms.values()), *added]).sum()

    def discriminator_step(self, discriminator: Discriminator, x_h_hat: Tensor, x_h: Tensor, draws: Draws) -> None:
        """L_D = 0.5 (BCE(D(x_H), 0.8) + BCE(D(x_H_hat), 0)), summed over levels, on a restoration without a graph."""
        with self.optimizer_turn("discriminator") as update:
            real = discriminator(x_h, draws, "discriminator/augment/real")
            fake = discriminator(x_h_hat, draws, "discriminator/augment/restored")
            loss = discriminator_loss("bce_smooth", real, fake).mean()
            update(loss)
        means = {"train/d_real": _mean(real), "train/d_fake": _mean(fake)}
        self.log_dict({"train/discriminator": loss.detach(), **means})


def _mean(logits: list[Tensor]) -> Tensor:
    """Mean logit with equal weights of all levels."""
    return torch.stack([level.detach().mean() for level in logits]).mean()
