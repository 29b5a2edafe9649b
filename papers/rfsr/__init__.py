"""RFSR: reward feedback for multi-step super-resolution, arXiv:2412.03268."""

from papers.rfsr.base_models import ControlNet, SeeSR
from papers.rfsr.module import RFSR
from papers.rfsr.pretraining import BaseSR
from papers.rfsr.tags import DAPE, TagFiles, Tagger, Untagged, write_tags

__all__ = ["DAPE", "RFSR", "BaseSR", "ControlNet", "SeeSR", "TagFiles", "Tagger", "Untagged", "write_tags"]
