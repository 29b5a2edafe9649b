"""Time of one DFOSD training step by part, on the embedded foundation.

python benchmarks/train_step.py [--steps N] [--threads N] [--crop PX] [--batch N]

The parts are timed apart, forward and backward as the step needs them; shares are of their sum.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from common.images import bicubic_upsample, to_01, to_pm1
from papers.dfosd import DFOSD


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Median wall time after one warm-up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5, help="repeats of each part")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--crop", type=int, default=64, help="HQ px")
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    method = DFOSD("tiny", perceptual_weights="random", perceptual_width=0.25, embedding_tokens=32, disc_hidden=64)
    method.configure_model()
    generator = torch.Generator().manual_seed(0)
    x_h = to_pm1(torch.rand(options.batch, 3, options.crop, options.crop, generator=generator))
    x_l = to_pm1(bicubic_upsample(to_01(x_h)[..., ::4, ::4], 4))
    t = torch.randint(0, 1000, (options.batch,), generator=generator)
    z = method.codec.encode(x_l)
    loss, _ = method.image_losses["ea_dists"]
    assert method.discriminator is not None

    def through(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
        return lambda: function(x.detach().requires_grad_()).sum().backward()

    assert method.generator is not None
    unet, discriminator, prompt = method.generator, method.discriminator, method.disc_empty_prompt
    both, t2 = torch.cat([z, z]), torch.cat([t, t])
    parts: dict[str, Callable[[], object]] = {
        "encode LQ and HQ, no gradient": lambda: (method.codec.encode(x_l), method.codec.encode(x_h)),
        "U-Net, forward and backward": lambda: unet(z, 200, method.text_condition([])).x0.sum().backward(),
        "decode, forward and backward to z": through(method.codec.decode, z),
        "EA-DISTS, forward and backward": through(lambda x: loss(to_01(x), to_01(x_h)), x_h),
        "discriminator in the generator's step": through(lambda x: discriminator(x, t, prompt), z),
        "discriminator in its own step": lambda: discriminator(both, t2, prompt).sum().backward(),
    }
    times = {name: seconds(function, options.steps) for name, function in parts.items()}
    total = sum(times.values())
    print(
        f"DFOSD demo, batch {options.batch}, {options.crop} px, {options.threads} thread(s), median of {options.steps}"
    )
    for name, value in times.items():
        print(f"  {name:<40}{value * 1e3:9.1f} ms {value / total:6.0%}")
    print(f"  {'sum of the parts':<40}{total * 1e3:9.1f} ms")


if __name__ == "__main__":
    main()
