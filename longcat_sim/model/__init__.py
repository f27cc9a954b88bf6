"""The executable LongCat-Flash: it runs, is equal to the published implementation, and is what gets profiled."""

from longcat_sim.model.attention import AttentionVariant
from longcat_sim.model.cache import LatentCache
from longcat_sim.model.longcat import LongcatFlash

__all__ = ["AttentionVariant", "LatentCache", "LongcatFlash"]
