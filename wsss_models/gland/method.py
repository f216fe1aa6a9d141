"""The stages: classifier, pseudo-masks, their quality, segmentation network, predictions, test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from ..data import read_mask
from ..engine import Confusion, Context, Evaluation, Method, Stage, Training, Writing, auc, count_steps, load_weights, png, polynomial
from ..errors import UsageError
from .config import Classify, GlandConfig
from .data import CLASSES, CropData, Images, PatchData, distortion, usable
from .losses import classification_loss, segmentation_loss
from .model import GlandClassifier
from .pseudo_label import activation_maps, otsu_mask, pseudo_mask, segment_image
from .psp import PSPNet


def _after_each_epoch(images: Images, steps: int, epochs: int, validate: Callable[[nn.Module], dict[str, float]]) -> dict[str, Any]:
    """Arguments of `Training` for a validation after each epoch, if there are validation images."""
    return {"validate": validate, "validate_every": max(1, steps // epochs)} if images.parts["validation"] else {}


def _adapt(model: nn.Module, context: Context, stage: str) -> None:
    """Domain adaptation: starts from the weights that the same stage of another run ended with."""
    if context.config.adapt_from is not None:
        file = Path(context.config.adapt_from) / stage / "model.pt"
        try:
            model.load_state_dict(load_weights(file))
        except RuntimeError as error:
            raise UsageError(f"adapt_from {file}: holds another model ({str(error).rpartition(chr(10))[2].strip()})") from None


def _optimizer(groups: list[dict], recipe: Classify) -> torch.optim.Optimizer:
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(groups, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)


def train_classifier(context: Context) -> Training:
    config, recipe = context.config, context.config.classify
    images = Images(context)
    data = PatchData(images, images.names("train"), distortion(recipe.jitter, recipe.blur))
    model = GlandClassifier(config.model)
    _adapt(model, context, "classifier")
    steps = count_steps(recipe.steps, recipe.epochs, len(data), recipe.batch_size * recipe.accumulate)

    def loss(model: nn.Module, batch) -> dict[str, torch.Tensor]:
        return {"loss": classification_loss(model(batch[0])[0], batch[1])}

    held = images.names("validation")

    def validate(model: nn.Module) -> dict[str, float]:
        score, label = _scores(model, context, images, held)
        return {"validation_loss": float(classification_loss(score, label))}

    return Training(
        model=model,
        dataset=data,
        loss=loss,
        optimizer=_optimizer(model.groups(recipe.lr, recipe.new_layers), recipe),
        schedule=polynomial(steps, recipe.power),
        steps=steps,
        batch_size=recipe.batch_size,
        accumulate=recipe.accumulate,
        clip=recipe.clip,
        **_after_each_epoch(images, steps, recipe.epochs, validate),
    )


def _classifier(context: Context) -> GlandClassifier:
    return context.load(GlandClassifier(replace(context.config.model, weights=None)), "classifier")


def image_label(label: np.ndarray, cover: float) -> torch.Tensor:
    """`Tensor[2]`: which classes cover more than their share of an annotation `[H, W]`."""
    return torch.from_numpy(np.bincount(label.ravel(), minlength=len(CLASSES)) / label.size > cover)


def write_masks(part: str) -> Callable[[Context], Writing]:
    def build(context: Context) -> Writing:
        config, images, model = context.config, Images(context), _classifier(context)

        def write(name: str):
            maps = activation_maps(model, images.image(name), config.data, config.masks, context.device)
            present = image_label(images.label(name), config.data.cover)
            return [png(pseudo_mask(maps, present, normalize=config.masks.normalize))]

        return Writing(images.names(part), lambda name: [f"{name}.png"], write)

    return build


def evaluate(part: str, stage: str, *, classifier: bool) -> Callable[[Context], Evaluation]:
    """Compares the masks that a stage wrote with the annotations; for the classifier's also the baselines and the patch AUC."""

    def build(context: Context) -> Evaluation:
        images = Images(context)
        names = [name for name in images.names(part) if (context.folder(stage) / f"{name}.png").is_file()]

        def more() -> dict[str, Any]:
            return {**baselines(images, names), **patch_auc(context, images, names)}

        return Evaluation(
            names,
            images.label,
            lambda name: read_mask(context.folder(stage) / f"{name}.png"),
            CLASSES,
            image=images.image,
            more=more if classifier and names else None,
        )

    return build


def baselines(images: Images, names: Sequence[str]) -> dict[str, float]:
    """mIoU of masks that nothing was learned for: all gland, a random half of the pixels, Otsu's threshold."""
    random = np.random.default_rng(0)
    made = {
        "all_gland": lambda image: np.ones(image.shape[:2], np.uint8),
        "random": lambda image: random.integers(0, 2, image.shape[:2], np.uint8),
        "otsu": otsu_mask,
    }
    found = {}
    for name, make in made.items():
        confusion = Confusion(CLASSES)
        for item in names:
            confusion.add(images.label(item), make(images.image(item)))
        found[f"miou_{name}"] = confusion.metrics()["miou"]
    return found


@torch.no_grad()
def _scores(model: nn.Module, context: Context, images: Images, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels `Tensor[n, 2]` of all patches of the images, on the CPU."""
    found = [
        (model(batch.to(context.device))[0].float().cpu(), label)
        for batch, label in DataLoader(PatchData(images, names, None), context.config.masks.batch_size)
    ]
    return torch.cat([score for score, _ in found]), torch.cat([label for _, label in found])


def patch_auc(context: Context, images: Images, names: Sequence[str]) -> dict[str, float | None]:
    """The classifier's AUC for each class on the patches of the images."""
    score, label = (t.numpy() for t in _scores(_classifier(context), context, images, names))
    return {f"auc_{name}": auc(score[:, k], label[:, k]) for k, name in enumerate(CLASSES)}


def train_network(context: Context) -> Training:
    config, recipe = context.config, context.config.segment
    if recipe.batch_size < 2 * context.processes:
        raise UsageError(
            f"segment.batch_size: expected at least 2 images for each process (BatchNorm over one bin), got {recipe.batch_size}"
        )
    images = Images(context)
    names = usable(images, images.names("train"), context.folder("masks"))
    data = CropData(images, names, context.folder("masks"), recipe, distortion(config.classify.jitter, config.classify.blur))
    network = PSPNet(recipe)
    _adapt(network, context, "network")
    steps = count_steps(recipe.steps, recipe.epochs, len(data), recipe.batch_size * recipe.accumulate)

    def loss(network: nn.Module, batch) -> dict[str, torch.Tensor]:
        return segmentation_loss(*network(batch[0]), batch[1], weight=recipe.auxiliary, purified=recipe.purified)

    def validate(network: nn.Module) -> dict[str, float]:
        confusion = Confusion(CLASSES)
        for name in images.names("validation"):
            confusion.add(images.label(name), segment_image(network, images.image(name), config.data, recipe, context.device))
        return {"validation_miou": confusion.metrics()["miou"]}

    return Training(
        model=network,
        dataset=data,
        loss=loss,
        optimizer=torch.optim.SGD(network.parameters(), recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay),
        schedule=polynomial(steps, recipe.power, floor=recipe.floor),
        steps=steps,
        batch_size=recipe.batch_size,
        accumulate=recipe.accumulate,
        best="validation_miou" if recipe.keep_best and images.parts["validation"] else None,
        **_after_each_epoch(images, steps, recipe.epochs, validate),
    )


def predictor(context: Context) -> Callable[[np.ndarray], np.ndarray]:
    config = context.config
    network = context.load(PSPNet(replace(config.segment, pretrained=None)), "network")
    return lambda image: segment_image(network, image, config.data, config.segment, context.device)


def write_predictions(context: Context) -> Writing:
    images, predict = Images(context), predictor(context)
    return Writing(images.names("test"), lambda name: [f"{name}.png"], lambda name: [png(predict(images.image(name)))])


def stages(config: GlandConfig) -> list[Stage]:
    return [
        Stage("classifier", "train", train_classifier),
        Stage("test_masks", "pseudo-label", write_masks("test")),
        Stage("test_mask_quality", "evaluate", evaluate("test", "test_masks", classifier=True)),
        Stage("masks", "pseudo-label", write_masks("train")),
        Stage("mask_quality", "evaluate", evaluate("train", "masks", classifier=False)),
        Stage("network", "segment", train_network),
        Stage("predictions", "predict", write_predictions),
        Stage("test", "evaluate", evaluate("test", "predictions", classifier=False)),
    ]


METHOD = Method("gland", GlandConfig, stages, predictor)
