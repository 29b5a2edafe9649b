"""DFOSD: one-step diffusion-based real-world super-resolution, arXiv:2410.04224."""

from papers.dfosd.module import DFOSD

__all__ = ["DFOSD"]
