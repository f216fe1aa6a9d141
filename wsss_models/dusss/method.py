"""The stages: vision-language model, grounding decoder, text-guided masks, mean teacher, predictions, test."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..data import read_mask, sliding
from ..engine import Context, Evaluation, Method, Stage, Training, Writing, cosine_restarts, count_steps, dice_and_iou, png
from ..engine.writing import Saver, npy
from ..errors import InputError, UsageError
from .config import DusssConfig
from .data import CLASSES, Captioned, Images, Semi, to_input
from .encoders import Tokenizer, Tokens
from .grounding import GroundingDecoder, text_guided_loss
from .unet import MeanTeacher, UNet, pixel_loss, semi_loss
from .vlm import VisionLanguage, vlm_loss


def _tokens(context: Context, images: Images) -> dict[str, Tokens]:
    """Of every training view; a sentence is tokenised once."""
    tokenizer = Tokenizer(context.config.text)
    once = functools.cache(lambda text: tokenizer([text]))
    return {name: once(images.text(name)) for name in images.views}


def _model(context: Context) -> VisionLanguage:
    config = context.config
    return VisionLanguage(config.image, config.text, config.vlm, config.data.size)


def train_vlm(context: Context) -> Training:
    recipe, images = context.config.vlm, Images(context)
    tokens = _tokens(context, images)
    model = _model(context)
    dataset = Captioned(images, list(images.views), tokens)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return vlm_loss(model(batch["image"], batch["second"], Tokens(batch["ids"], batch["mask"], batch["word"])), recipe)

    return Training(
        model=model,
        dataset=dataset,
        loss=loss,
        optimizer=torch.optim.Adam([p for p in model.parameters() if p.requires_grad], recipe.lr, weight_decay=recipe.weight_decay),
        steps=count_steps(recipe.steps, recipe.epochs, len(dataset), recipe.batch_size),
        batch_size=recipe.batch_size,
        after_step=lambda step: model.follow(),
        unused_parameters=True,
    )


class Grounded(nn.Module):
    """The frozen vision-language model and the grounding decoder. `forward(image, tokens)` → the text-guided loss."""

    def __init__(self, context: Context):
        super().__init__()
        self.model = _model(context)
        self.model.requires_grad_(False)
        self.decoder = GroundingDecoder(context.config.vlm.width, context.config.grounding, context.config.vlm.temperature)

    def train(self, mode: bool = True):
        super().train(mode)
        self.model.eval()
        return self

    def embed(self, image: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Patch features `Tensor[N, L, D]` and global sentence vectors `Tensor[N, D]`, without gradient."""
        with torch.no_grad():
            return self.model.encoders.of_image(image).local, self.model.encoders.of_text(tokens).semantic

    def forward(self, image: Tensor, tokens: Tokens) -> Tensor:
        return text_guided_loss(self.decoder, *self.embed(image, tokens))

    def masks(self, image: Tensor, tokens: Tokens) -> Tensor:
        """Logits of the text-guided masks `Tensor[N, s, s]`."""
        patches, text = self.embed(image, tokens)
        return self.decoder.own_logits(self.decoder(patches), text)


def train_grounding(context: Context) -> Training:
    recipe, images = context.config.grounding, Images(context)
    tokens = _tokens(context, images)
    model = Grounded(context)
    context.load(model.model, "vlm")
    model.model.requires_grad_(False)
    dataset = Captioned(images, list(images.views), tokens)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": model(batch["second"], Tokens(batch["ids"], batch["mask"], batch["word"]))}

    return Training(
        model=model,
        dataset=dataset,
        loss=loss,
        optimizer=torch.optim.Adam([p for p in model.parameters() if p.requires_grad], recipe.lr),
        steps=count_steps(recipe.steps, recipe.epochs, len(dataset), recipe.batch_size),
        batch_size=recipe.batch_size,
    )


def write_guides(context: Context) -> Writing:
    """Logits of the text-guided masks of the unlabelled views."""
    images = Images(context)
    tokens = _tokens(context, images)
    model = context.load(Grounded(context), "grounding")

    def write(name: str) -> list[Saver]:
        given = tokens[name]
        moved = Tokens(*(t.to(context.device) for t in (given.ids, given.mask, given.word)))
        return [npy(model.masks(images.image(name)[None].to(context.device), moved)[0].half())]

    return Writing(images.unlabelled(), lambda name: [f"{name}.npy"], write)


def _guide(context: Context) -> Callable[[str], Tensor]:
    return lambda name: torch.from_numpy(context.array("text_masks", name))


def _ramp(step: int, length: int) -> float:
    return math.exp(-5 * (1 - min(step / length, 1)) ** 2) if length else 1.0


def train_student(context: Context) -> Training:
    config, recipe, images = context.config, context.config.semi, Images(context)
    if config.data.size % 16:
        raise UsageError(f"data.size: expected a multiple of 16 for the U-Net, got {config.data.size}")
    unlabelled = images.unlabelled() if recipe.unlabelled else []
    if recipe.unlabelled and not unlabelled:
        raise InputError("data: every training image is labelled; set semi.unlabelled=false to train on them alone")
    dataset: Dataset = Semi(images, images.labelled, unlabelled, _guide(context) if recipe.text and unlabelled else None)
    model = MeanTeacher(recipe)
    progress = {"step": 0}

    def loss(network: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if "other" not in batch:
            supervised = pixel_loss(network(batch["image"]).float(), batch["mask"], recipe.loss)
            return {"loss": supervised, "supervised": supervised}
        logit = network(torch.cat([batch["image"], batch.get("distorted", batch["other"])])).float()
        ours, student = logit.split(len(batch["image"]))
        with torch.no_grad():
            teacher = model.teacher(batch["other"]).float()
        supervised = pixel_loss(ours, batch["mask"], recipe.loss)
        semi = semi_loss(student, teacher, batch.get("guide"), recipe)
        return {
            "loss": supervised + recipe.weight * _ramp(progress["step"], recipe.ramp) * semi,
            "supervised": supervised,
            "unlabelled": semi,
        }

    def after(step: int) -> None:
        progress["step"] = step
        model.follow()

    per_epoch = math.ceil(len(images.views) / recipe.batch_size)  # the same rates with and without unlabelled images
    held = images.names("validation")

    def validate(network: nn.Module) -> dict[str, float]:
        return {"dice": per_image(images, held, lambda name: predict(model.student, images.picture(name), context) > recipe.threshold)[0]}

    return Training(
        model=model,
        dataset=dataset,
        loss=loss,
        optimizer=torch.optim.Adam(model.student.parameters(), recipe.lr),
        schedule=cosine_restarts(recipe.restart, floor=min(1.0, recipe.floor / recipe.lr), every=per_epoch),
        steps=count_steps(recipe.steps, recipe.epochs, len(dataset), recipe.batch_size),
        batch_size=recipe.batch_size,
        extra={"progress": _Progress(progress)},
        after_step=after,
        validate=validate if held and recipe.patience is not None else None,
        validate_every=per_epoch,
        best="dice" if held and recipe.patience is not None else None,
        patience=recipe.patience,
    )


class _Progress:
    """The step that the loss sees, kept in checkpoints."""

    def __init__(self, values: dict[str, int]):
        self.values = values

    def state_dict(self) -> dict[str, int]:
        return dict(self.values)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.values.update(state)


@torch.no_grad()
def predict(network: UNet, pixels: np.ndarray, context: Context) -> np.ndarray:
    """Foreground probability `[H, W]` of a whole image: at once, or square by square as in training."""
    config = context.config.data
    size = pixels.shape[:2]

    def one(rows: slice, columns: slice) -> Tensor:
        part = pixels[rows, columns]
        logit = network(to_input(part, config)[None].to(context.device)).float()
        return F.interpolate(logit[None], part.shape[:2], mode="bilinear", align_corners=False)[0].sigmoid()

    if config.crop is None:
        return one(slice(0, size[0]), slice(0, size[1]))[0].cpu().numpy()
    places = sliding.windows(size, config.crop, max(1, config.crop * 3 // 4))
    return sliding.overlap_add(size, places, (one(*place) for place in places))[0].cpu().numpy()


def per_image(images: Images, names: list[str], mask: Callable[[str], np.ndarray]) -> tuple[float, float]:
    """Mean Dice and IoU over the images."""
    rows = [dice_and_iou(mask(name), images.truth(name)) for name in names]
    return (float(np.mean([r[0] for r in rows])), float(np.mean([r[1] for r in rows]))) if rows else (float("nan"),) * 2


def _student(context: Context) -> MeanTeacher:
    return context.load(MeanTeacher(context.config.semi), "student")


def predictor(context: Context) -> Callable[[np.ndarray], np.ndarray]:
    network, threshold = _student(context).student, context.config.semi.threshold
    return lambda image: (predict(network, image, context) > threshold).astype(np.uint8)


def write_predictions(context: Context) -> Writing:
    images, label = Images(context), predictor(context)
    return Writing(images.names("test"), lambda name: [f"{name}.png"], lambda name: [png(label(images.picture(name)))])


def evaluate(context: Context) -> Evaluation:
    images = Images(context)
    names = [name for name in images.names("test") if (context.folder("predictions") / f"{name}.png").is_file()]
    if not names:
        raise InputError(f"{context.data}: expected test images with masks, got none")

    def mask(name: str) -> np.ndarray:
        return read_mask(context.folder("predictions") / f"{name}.png")

    def more() -> dict[str, Any]:
        teacher, threshold = _student(context).teacher, context.config.semi.threshold
        dice, iou = per_image(images, names, mask)
        of_teacher = per_image(images, names, lambda name: predict(teacher, images.picture(name), context) > threshold)
        found = {"dice_per_image": dice, "iou_per_image": iou, "teacher_dice": of_teacher[0], "teacher_iou": of_teacher[1]}
        return {**found, "labelled": len(images.labelled), "unlabelled": len(images.unlabelled())}

    return Evaluation(names, images.truth, mask, CLASSES, image=images.picture, more=more)


class GuideQuality:
    """How well the text-guided masks alone fit the (otherwise unused) masks of the unlabelled views."""

    def run(self, context: Context) -> dict[str, Any]:
        images, guide, rows = Images(context), _guide(context), []
        for name in (n for n in images.unlabelled() if images.views[n].pair.mask is not None):
            truth = images.mask(name)
            logit = F.interpolate(guide(name)[None, None], truth.shape, mode="bilinear", align_corners=False)[0, 0]
            rows.append(dice_and_iou((logit > 0).numpy(), truth.numpy()))
        if not rows:
            return {"images": 0}
        return {"images": len(rows), "dice": float(np.mean([r[0] for r in rows])), "iou": float(np.mean([r[1] for r in rows]))}


def stages(config: DusssConfig) -> list[Stage]:
    text = [
        Stage("vlm", "train", train_vlm),
        Stage("grounding", "train", train_grounding),
        Stage("text_masks", "pseudo-label", write_guides),
        Stage("text_mask_quality", "evaluate", lambda context: GuideQuality()),
    ]
    return [
        *(text if config.semi.unlabelled and config.semi.text else []),
        Stage("student", "segment", train_student),
        Stage("predictions", "predict", write_predictions),
        Stage("test", "evaluate", evaluate),
    ]


METHOD = Method("dusss", DusssConfig, stages, predictor)
