from .api import box_mask, connected_components

__all__ = ["box_mask", "connected_components"]
