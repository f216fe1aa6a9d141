from .api import kmeans

__all__ = ["kmeans"]
