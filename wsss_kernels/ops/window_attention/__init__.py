from .api import exchange_attention, window_attention
from .module import CrossAttentionExchange

__all__ = ["CrossAttentionExchange", "exchange_attention", "window_attention"]
