from .api import normalize_cam
from .fuse import fuse_cams

__all__ = ["fuse_cams", "normalize_cam"]
