"""What the methods share: configuration, stages, training, writing, evaluation. `README.md` says how to add a method."""

from .checkpoint import load_weights
from .config import RunConfig
from .context import Context
from .evaluation import Evaluation, evaluate_masks
from .method import Method, Stage
from .metrics import Confusion, auc
from .schedules import cosine_restarts, polynomial
from .training import Training
from .writing import Writing, png

__all__ = [
    "Confusion",
    "Context",
    "Evaluation",
    "Method",
    "RunConfig",
    "Stage",
    "Training",
    "Writing",
    "auc",
    "cosine_restarts",
    "evaluate_masks",
    "load_weights",
    "png",
    "polynomial",
]
