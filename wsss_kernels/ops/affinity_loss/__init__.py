from .api import affinity_loss

__all__ = ["affinity_loss"]
