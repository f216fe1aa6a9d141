from .api import uncertainty_info_nce, uncertainty_similarity, wasserstein2

__all__ = ["uncertainty_info_nce", "uncertainty_similarity", "wasserstein2"]
