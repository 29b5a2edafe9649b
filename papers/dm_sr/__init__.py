"""DM-SR: low-quality images moved onto the noisy latents that a frozen diffusion model knows (under review)."""

from papers.dm_sr.estimation import TimestepEstimation
from papers.dm_sr.module import DMSR

__all__ = ["DMSR", "TimestepEstimation"]
