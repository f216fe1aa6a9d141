from .api import RefiningMap, affinity_deviation, cosine_affinity, refining_map, sigmoid_affinity

__all__ = ["RefiningMap", "affinity_deviation", "cosine_affinity", "refining_map", "sigmoid_affinity"]
