"""DNF-SR: an image-editing flow model in one step, then negative-aware fine-tuning by rewards, arXiv:2609.15120."""

from papers.dnf_sr.nf2t import NF2T
from papers.dnf_sr.sft import DNFSR

__all__ = ["DNFSR", "NF2T"]
