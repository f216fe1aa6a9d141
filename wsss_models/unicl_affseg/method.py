"""The stages: decoder, pseudo-labels of the training images, predictions, test, and the refinement on its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from ..data import read_image, read_mask
from ..engine import Context, Evaluation, Method, Stage, Training, Writing, evaluate_masks, png, polynomial
from ..errors import InputError
from .cam import grad_cam
from .config import UniclConfig
from .data import CLASSES, Crops, image_labels, train_items, val_items
from .decoder import AffinityDecoder, selected
from .encoder import UniCL, load_unicl
from .inference import pseudo_label, segment
from .losses import IGNORE, total_loss
from .prompts import prompts
from .pseudo_label import pseudo_labels
from .refinement_check import RefinementCheck
from .tokenizer import load_tokenizer, token_ids


def frozen(context: Context) -> tuple[UniCL, Tensor]:
    """The encoder on the device, and the unit vectors of classes and background words."""
    config = context.config
    tokenizer = load_tokenizer(config.encoder.tokenizer)
    with torch.random.fork_rng(devices=[]):  # random weights are those of the seed, whatever was drawn before
        torch.manual_seed(context.seed("unicl"))
        unicl = load_unicl(config.encoder, len(tokenizer)).to(context.device)
    return unicl, unicl.embed_text(token_ids(tokenizer, prompts()).to(context.device))


def make_decoder(config: UniclConfig) -> AffinityDecoder:
    widths = [config.encoder.embed_dim * 2**stage for stage, depth in enumerate(config.encoder.depths) for _ in range(depth)]
    start = sum(config.encoder.depths[:2])
    used = widths[start : start + config.encoder.depths[2]] if config.decoder.blocks == "stage3" else widths
    return AffinityDecoder(config.decoder, used, len(CLASSES))


def targets(context: Context, unicl: UniCL, text: Tensor) -> Callable[..., Tensor]:
    """(features, F_u, steps so far, image, mask, present) → the labels that the decoder is trained on."""
    config = context.config

    def make(features, fused: Tensor, steps: int, image: Tensor, mask: Tensor, present: Tensor) -> Tensor:
        if config.train.supervision == "masks":
            return mask
        cams = grad_cam(unicl, features, text, present)
        reliable = fused.detach() if steps >= config.refine.warmup else None
        label = pseudo_labels(cams, reliable, selected(features.blocks, config.decoder.blocks), image, present, config.refine)
        return label.masked_fill(mask == IGNORE, IGNORE)

    return make


def train_decoder(context: Context) -> Training:
    config, recipe = context.config, context.config.train
    unicl, text = frozen(context)
    decoder, make_targets = make_decoder(config), targets(context, unicl, text)

    def loss(model: nn.Module, batch) -> dict[str, Tensor]:
        image, mask, present = batch
        features = unicl.features(image)
        logits, fused = model(selected(features.blocks, config.decoder.blocks))
        label = make_targets(features, fused, int(decoder.steps), image, mask, present)
        return total_loss(logits, fused, label, recipe)

    chosen = [item for item in val_items(context) if item.mask is not None] if recipe.validate_images else []
    if recipe.validate_images and not chosen:
        raise InputError(f"data.val: no image of the list {config.data.val} has a mask, which train.validate_images needs")
    items = {item.name: item for item in chosen[: recipe.validate_images]}

    def validate(model: nn.Module) -> dict[str, float]:
        pooled, _ = evaluate_masks(
            context,
            list(items),
            lambda name: read_mask(items[name].mask),
            lambda name: segment(unicl, model, read_image(items[name].image), config, context.device),
            CLASSES,
        )
        return {"miou": pooled.metrics()["miou"]}

    return Training(
        model=decoder,
        dataset=Crops(context),
        loss=loss,
        optimizer=torch.optim.AdamW(
            decoder.parameters(), recipe.lr * recipe.decoder_factor, recipe.betas, weight_decay=recipe.weight_decay
        ),
        schedule=polynomial(recipe.steps, recipe.power, warmup=recipe.warmup),
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        accumulate=recipe.accumulate,
        after_step=lambda step: decoder.steps.fill_(step),  # not the bound method: moving to a GPU replaces the buffer
        validate=validate if recipe.validate_images else None,
        validate_every=recipe.validate_every,
        best="miou" if recipe.validate_images else None,
    )


def write_pseudo_labels(context: Context) -> Writing:
    config = context.config
    items = {item.name: item for item in train_items(context)}
    unicl, text = frozen(context)
    decoder = context.load(make_decoder(config), "decoder")

    def write(name: str):
        item = items[name]
        image, by_mask = read_image(item.image), config.data.labels_from_mask
        mask = read_mask(item.mask, image.shape[:2]) if by_mask and item.mask is not None else None
        present = image_labels(item, mask, from_mask=by_mask)
        return [png(pseudo_label(unicl, text, decoder, image, present, config, context.device))]

    return Writing(list(items), lambda name: [f"{name}.png"], write)


def _evaluation(context: Context, items, stage: str) -> Evaluation:
    found = {item.name: item for item in items if item.mask is not None and (context.folder(stage) / f"{item.name}.png").is_file()}
    return Evaluation(
        list(found),
        lambda name: read_mask(found[name].mask),
        lambda name: read_mask(context.folder(stage) / f"{name}.png"),
        CLASSES,
        image=lambda name: read_image(found[name].image),
    )


def evaluate_pseudo_labels(context: Context) -> Evaluation:
    return _evaluation(context, train_items(context), "pseudo_labels")


def evaluate_fit(context: Context) -> Evaluation:
    """How well the decoder fits what it was trained on: meaningful where `data.fit`, `scale` and `flip` leave the crops fixed."""
    config, data = context.config, Crops(context)
    unicl, _ = frozen(context)
    decoder = context.load(make_decoder(config), "decoder")
    place = {item.name: i for i, item in enumerate(data.items)}
    crop = lru_cache(maxsize=1)(lambda name: data[place[name]])  # truth and prediction are of the same crop

    def prediction(name: str) -> np.ndarray:
        image = crop(name)[0][None].to(context.device)
        with torch.no_grad():
            logits, _ = decoder(selected(unicl.features(image).blocks, config.decoder.blocks))
        large = nn.functional.interpolate(logits.float(), image.shape[-2:], mode="bilinear", align_corners=False)
        return large[0].argmax(dim=0).byte().cpu().numpy()

    return Evaluation(list(place), lambda name: crop(name)[1].byte().numpy(), prediction, CLASSES)


def predictor(context: Context) -> Callable[[np.ndarray], np.ndarray]:
    unicl, _ = frozen(context)
    decoder = context.load(make_decoder(context.config), "decoder")
    return lambda image: segment(unicl, decoder, image, context.config, context.device)


def write_predictions(context: Context) -> Writing:
    items, predict = {item.name: item for item in val_items(context)}, predictor(context)
    return Writing(list(items), lambda name: [f"{name}.png"], lambda name: [png(predict(read_image(items[name].image)))])


def evaluate_predictions(context: Context) -> Evaluation:
    return _evaluation(context, val_items(context), "predictions")


def check_refinement(context: Context) -> RefinementCheck:
    return RefinementCheck(Crops(context), frozen(context)[0])


def stages(config: UniclConfig) -> list[Stage]:
    found = [Stage("decoder", "train", train_decoder)]
    if config.train.supervision == "masks":
        return [*found, Stage("fit", "evaluate", evaluate_fit), Stage("refinement", "evaluate", check_refinement)]
    return [
        *found,
        Stage("pseudo_labels", "pseudo-label", write_pseudo_labels),
        Stage("pseudo_label_quality", "evaluate", evaluate_pseudo_labels),
        Stage("predictions", "predict", write_predictions),
        Stage("test", "evaluate", evaluate_predictions),
    ]


METHOD = Method("unicl_affseg", UniclConfig, stages, predictor)
