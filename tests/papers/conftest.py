"""A small random base in the hub's layout, shaped as Stable Diffusion 2.1 is, for all papers that build on it."""

from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import ByT5Tokenizer, CLIPTextConfig, CLIPTextModel

TEXT_WIDTH = 16


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_sd(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Makes the base and says in which folder; `noise` is a factor on the U-Net's last convolution."""

    def make(noise: float = 1.0) -> str:
        root = tmp_path_factory.mktemp("sd")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            unet = UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(8, 16),
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=TEXT_WIDTH,
                attention_head_dim=2,
                norm_num_groups=4,
                use_linear_projection=True,
            )
            with torch.no_grad():
                unet.conv_out.weight *= noise
            unet.save_pretrained(root / "unet")
            AutoencoderKL(
                block_out_channels=(8, 12, 16),
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                latent_channels=4,
                layers_per_block=1,
                norm_num_groups=4,
                sample_size=32,
            ).save_pretrained(root / "vae")
            text = CLIPTextConfig(
                vocab_size=384,
                hidden_size=TEXT_WIDTH,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=77,
            )
            CLIPTextModel(text).save_pretrained(root / "text_encoder")
        schedule = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        schedule.save_pretrained(root / "scheduler")
        ByT5Tokenizer(model_max_length=77).save_pretrained(root / "tokenizer")
        return str(root)

    return make
