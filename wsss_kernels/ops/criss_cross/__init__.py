from .api import CrissCrossAttention, criss_cross_attention

__all__ = ["CrissCrossAttention", "criss_cross_attention"]
