"""F2IDiff: one-step super-resolution on a diffusion model that is conditioned on image features, arXiv:2512.24473."""

from papers.f2idiff.foundation import Foundation
from papers.f2idiff.module import F2IDiffSR

__all__ = ["F2IDiffSR", "Foundation"]
