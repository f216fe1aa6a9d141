from .api import sinkhorn, sinkhorn_scaling

__all__ = ["sinkhorn", "sinkhorn_scaling"]
