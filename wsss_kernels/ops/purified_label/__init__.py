from .api import purified_label_loss

__all__ = ["purified_label_loss"]
