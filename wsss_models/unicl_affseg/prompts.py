"""Class names and background words as CLIP-ES found them to work, and the sentence that they stand in."""

from __future__ import annotations

TEMPLATE = "a clean origami {}."

FOREGROUND = (
    "aeroplane",
    "bicycle",
    "bird avian",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair seat",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person with clothes,people,human",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor screen",
)
BACKGROUND = [
    "ground",
    "land",
    "grass",
    "tree",
    "building",
    "wall",
    "sky",
    "lake",
    "water",
    "river",
    "sea",
    "railway",
    "railroad",
    "keyboard",
    "helmet",
    "cloud",
    "house",
    "mountain",
    "ocean",
    "road",
    "rock",
    "street",
    "valley",
    "bridge",
    "sign",
]


def prompts() -> list[str]:
    """The 20 classes of Pascal VOC, then the 25 background words."""
    return [TEMPLATE.format(word) for word in (*FOREGROUND, *BACKGROUND)]
