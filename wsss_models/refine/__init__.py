"""From class activation maps to masks: box mask, affinity, Sinkhorn and random walk, pixel-adaptive refinement.

`refine(image, cam, encoder, settings)` is the pipeline, `wsss refine` the command around it.
"""

from .pipeline import Refined, refine
from .settings import Settings

__all__ = ["Refined", "Settings", "refine"]
