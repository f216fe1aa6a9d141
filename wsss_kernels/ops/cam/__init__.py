from .api import normalize_cam

__all__ = ["normalize_cam"]
