from .api import info_nce, supervised_contrastive_loss

__all__ = ["info_nce", "supervised_contrastive_loss"]
