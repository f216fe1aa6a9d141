"""What the methods share: configuration, stages, training, writing, evaluation. `README.md` says how to add a method."""

from .checkpoint import load_weights
from .config import RunConfig
from .context import Context
from .evaluation import Evaluation, evaluate_masks
from .method import Method, Stage
from .metrics import Confusion, auc, dice_and_iou
from .schedules import cosine_restarts, count_steps, polynomial
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
    "count_steps",
    "dice_and_iou",
    "evaluate_masks",
    "load_weights",
    "png",
    "polynomial",
]
