from .api import affinity_random_walk, random_walk

__all__ = ["affinity_random_walk", "random_walk"]
