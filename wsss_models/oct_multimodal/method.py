"""The stages: label vectors, captions, healthy counterparts, model, λ sweep, pseudo-labels, segmentation network, test."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from skimage.filters import gaussian
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..data import read_mask
from ..data.oct import BScan
from ..engine import Context, Evaluation, Method, Stage, Training, Writing, auc, count_steps, png
from ..engine.writing import Saver, npy
from ..errors import InputError, UsageError
from . import data, text
from .config import OctConfig
from .data import HEALTHY, Labelled, Pairs, Scans, resized
from .generator import Ganomaly
from .model import OctModel, losses
from .network import Network
from .pseudo_label import Sweep, fused_maps, mask_at

_LABEL_TEXT, _CAPTIONS, _GENERATOR = "label_text", "captions", "healthy_generator"


def write_label_text(context: Context) -> Writing:
    """The vectors of the label prompts, `[K, D]`."""
    config = context.config
    prompts = config.text.prompts or data.PROMPTS[config.data.dataset]
    classes = len(Scans(context).classes)
    if len(prompts) != classes:
        raise UsageError(f"text.prompts: expected {classes}, of healthy and of each lesion, got {len(prompts)}")

    def write(name: str) -> list[Saver]:
        if config.text.labels == "random":
            return [npy(text.random_vectors(classes, config.text.width, context.seed("labels")))]
        return [npy(text.ClipText(config.text.labels, "text.labels", context.device)(prompts))]

    return Writing(["labels"], lambda name: [f"{name}.npy"], write)


def write_captions(context: Context) -> Writing:
    """A caption of every B-scan as text and as vector."""
    config, scans = context.config.text, Scans(context)
    every = {scan.name: scan for part in scans.scans.values() for scan in part}
    captioner = text.Captioner(config.captions, config.prompt, config.new_tokens, context.device)
    encoder = text.ClipText(config.caption_encoder, "text.caption_encoder", context.device)

    def write(name: str) -> list[Saver]:
        grey = scans.reader.read_scan(every[name])
        caption = captioner(np.repeat(grey[..., None], 3, axis=2))
        content = (json.dumps({"caption": caption}, ensure_ascii=False) + "\n").encode()
        return [lambda file: file.write(content), npy(encoder([caption])[0])]

    return Writing(list(every), lambda name: [f"{name}.json", f"{name}.npy"], write)


class Healthy(Dataset):
    """B-scans without lesions, `Tensor[1, S, S]` in 0 … 1, mirrored at random."""

    def __init__(self, scans: Scans, size: int):
        self.scans, self.size = scans, size
        self.chosen = [scan for scan in scans.scans["train"] if not any(scans.scan_label(scan))]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Tensor:
        image = _square(self.scans, self.chosen[index], self.size)
        return image.flip(2) if torch.rand(()) < 0.5 else image


def _square(scans: Scans, scan: BScan, size: int) -> Tensor:
    grey = np.ascontiguousarray(scans.reader.read_scan(scan))
    return resized(torch.from_numpy(grey)[None].float() / 255, (size, size))


def train_generator(context: Context) -> Training:
    config, scans = context.config.generator, Scans(context)
    dataset = Healthy(scans, config.size)
    if not len(dataset):
        raise InputError("data.healthy=generator: expected training B-scans without a lesion, got none")
    model = Ganomaly(config)
    return Training(
        model=model,
        dataset=dataset,
        loss=lambda model, batch: model(batch),
        optimizer=torch.optim.Adam(model.parameters(), config.lr, betas=(0.5, 0.999)),
        steps=config.steps,
        batch_size=config.batch_size,
    )


def write_healthy(context: Context) -> Writing:
    """G(X) of every B-scan at its own size."""
    scans, config = Scans(context), context.config.generator
    every = {scan.name: scan for part in scans.scans.values() for scan in part}
    model = context.load(Ganomaly(config), _GENERATOR)

    def write(name: str) -> list[Saver]:
        made = model.reconstruct(_square(scans, every[name], config.size)[None].to(context.device))
        size = scans.reader.read_scan(every[name]).shape
        large = F.interpolate(made, size, mode="bilinear", align_corners=False)[0, 0]
        grey = (large.clamp(0, 1) * 255).round().byte().cpu().numpy()
        return [lambda file: _grey_png(grey, file)]

    return Writing(list(every), lambda name: [f"{name}.png"], write)


def _grey_png(grey: np.ndarray, file) -> None:
    from PIL import Image

    Image.fromarray(grey).save(file, "PNG")


def _captions(context: Context, scans: Scans) -> dict[str, Tensor] | None:
    """The caption vector of each B-scan; zeros where there is no caption model."""
    config = context.config
    if not config.model.caption:
        return None
    names = [scan.name for part in scans.scans.values() for scan in part]
    if config.text.captions == "none":
        return {name: torch.zeros(config.text.caption_width) for name in names}
    return {name: torch.from_numpy(context.array(_CAPTIONS, name)) for name in names}


def _model(context: Context, scans: Scans, captions: dict[str, Tensor] | None, *, trained: bool) -> OctModel:
    config = replace(context.config.model, weights=None) if trained else context.config.model
    labels = torch.from_numpy(context.array(_LABEL_TEXT, "labels")) if config.clip else torch.zeros(len(scans.classes), 2)
    width = len(next(iter(captions.values()))) if captions else 0
    model = OctModel(config, len(scans.classes), labels, width)
    return context.load(model, "model") if trained else model


def _run(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return model(batch["primary"], batch["structural"], batch.get("caption"))


class Fuser:
    """B-scans or crops → fused lesion maps at full size, by a model."""

    def __init__(self, context: Context, scans: Scans, model: OctModel, captions: dict[str, Tensor] | None):
        self.context, self.scans, self.model, self.captions = context, scans, model, captions

    @torch.no_grad()
    def __call__(self, name: str) -> Tensor:
        """`Tensor[K − 1, H, W]`."""
        batch = Pairs(self.scans, [name], self.captions, augment=False)[0]
        batch = {k: v[None].to(self.context.device) for k, v in batch.items()}
        maps = self.model.maps(batch["primary"], batch["structural"], batch.get("caption"))
        return fused_maps(maps, batch["label"][0], self.scans.grey(name).shape, self.context.config.masks)

    def sweep(self, names: list[str]) -> Sweep:
        found = Sweep(len(self.scans.classes), self.context.config.masks.step)
        for name in names:
            found.add(self(name).float().cpu().numpy(), self.scans.truth(name))
        return found


def _validated(scans: Scans) -> list[str]:
    """The views on which λ is chosen: those with a lesion and an annotation, of the validation part or else of the training part."""
    for part in ("validation", "train"):
        names = [name for name in scans.names(part, lesion=True) if scans.views[name].scan.mask is not None]
        if names:
            return names
    raise InputError("data: expected annotated B-scans with a lesion to choose λ on; set masks.threshold instead")


def train_model(context: Context) -> Training:
    config, scans = context.config, Scans(context)
    recipe, captions = config.train, _captions(context, scans)
    model = _model(context, scans, captions, trained=False)
    dataset = Pairs(scans, scans.names("train"), captions, augment=True)
    steps = count_steps(recipe.steps, recipe.epochs, len(dataset), recipe.batch_size * recipe.accumulate)
    held = [n for n in scans.names("validation", lesion=True) if scans.views[n].scan.mask is not None]

    def validate(model: nn.Module) -> dict[str, float]:
        threshold, miou = Fuser(context, scans, model, captions).sweep(held).best()
        return {"miou": miou, "threshold": threshold}

    return Training(
        model=model,
        dataset=dataset,
        loss=lambda model, batch: losses(_run(model, batch), batch["label"]),
        optimizer=torch.optim.Adam([p for p in model.parameters() if p.requires_grad], recipe.lr),
        steps=steps,
        batch_size=recipe.batch_size,
        accumulate=recipe.accumulate,
        clip=recipe.clip,
        validate=validate if held else None,
        validate_every=max(1, steps * recipe.validate_epochs // max(recipe.epochs, 1)),
        best="miou" if held and recipe.keep_best else None,
    )


def _fuser(context: Context) -> Fuser:
    scans = Scans(context)
    captions = _captions(context, scans)
    return Fuser(context, scans, _model(context, scans, captions, trained=True), captions)


class SweepStage:
    """Chooses λ; leaves the mIoU of every λ in `sweep.csv`."""

    def run(self, context: Context) -> dict[str, Any]:
        fuser = _fuser(context)
        names = _validated(fuser.scans)
        found = fuser.sweep(names)
        threshold, miou = found.best()
        if context.main:
            rows = "".join(f"{a:.4f},{b:.6f}\n" for a, b in zip(found.grid, found.miou(), strict=True))
            (context.folder() / "sweep.csv").write_text("threshold,miou\n" + rows)
        return {"threshold": threshold, "miou": miou, "images": len(names)}


def _threshold(context: Context) -> float:
    if context.config.masks.threshold is not None:
        return context.config.masks.threshold
    try:
        return float(json.loads((context.folder("sweep") / "done.json").read_text())["metrics"]["threshold"])
    except (OSError, ValueError, KeyError):
        raise UsageError(f"stage {context.stage}: stage sweep must be run first, or masks.threshold set") from None


def write_masks(part: str) -> Callable[[Context], Writing]:
    """Pseudo-labels of the views with a lesion."""

    def build(context: Context) -> Writing:
        fuser, threshold = _fuser(context), _threshold(context)
        return Writing(
            fuser.scans.names(part, lesion=True), lambda name: [f"{name}.png"], lambda name: [png(mask_at(fuser(name), threshold))]
        )

    return build


@torch.no_grad()
def localization(context: Context, fuser: Fuser, part: str) -> dict[str, Any]:
    """How well the model finds lesions: AUC of the views' labels; over views with a lesion the AUC of their pixels, and how often
    the highest value lies on it, beside chance and the blurred brightness of the image."""
    scans, names = fuser.scans, fuser.scans.names(part)
    scores, labels = [], []
    for batch in DataLoader(Pairs(scans, names, fuser.captions, augment=False), context.config.masks.batch_size):
        output = _run(fuser.model, {k: v.to(context.device) for k, v in batch.items()})
        logits = [x for x in (output.primary, output.similarity3, output.similarity4) if x is not None]
        scores.append(torch.stack([x.float().sigmoid()[:, 1:].amax(1) for x in logits]).mean(0).cpu())
        labels.append(batch["label"][:, 1:].amax(1))
    found: dict[str, Any] = {"label_auc": auc(torch.cat(scores).numpy(), torch.cat(labels).numpy()), "views": len(names)}
    rows: dict[str, list[float]] = {k: [] for k in ("pixel_auc", "hit", "chance", "brightness_auc", "brightness_hit", "darkness_hit")}
    for name in scans.names(part, lesion=True):
        if scans.views[name].scan.mask is None:
            continue
        lesion = scans.truth(name) > 0
        if lesion.all() or not lesion.any():
            continue
        fused, bright = fuser(name).amax(0).cpu().numpy(), gaussian(scans.grey(name).astype(np.float32), 4)
        rows["pixel_auc"].append(auc(fused.ravel(), lesion.ravel()) or 0.0)
        rows["brightness_auc"].append(auc(bright.ravel(), lesion.ravel()) or 0.0)
        rows["hit"].append(float(lesion.ravel()[fused.argmax()]))
        rows["brightness_hit"].append(float(lesion.ravel()[bright.argmax()]))
        rows["darkness_hit"].append(float(lesion.ravel()[bright.argmin()]))
        rows["chance"].append(float(lesion.mean()))
    return {**found, **{k: float(np.mean(v)) for k, v in rows.items() if v}}


def evaluate(part: str, stage: str, *, model: bool) -> Callable[[Context], Evaluation]:
    """Compares masks with the annotations of the views with a lesion."""

    def build(context: Context) -> Evaluation:
        scans = Scans(context)
        names = [n for n in scans.names(part, lesion=True) if (context.folder(stage) / f"{n}.png").is_file()]
        names = [n for n in names if scans.views[n].scan.mask is not None]
        return Evaluation(
            names,
            scans.truth,
            lambda name: read_mask(context.folder(stage) / f"{name}.png"),
            scans.classes,
            image=scans.picture,
            more=(lambda: localization(context, _fuser(context), part)) if model else None,
        )

    return build


def train_network(context: Context) -> Training:
    recipe, scans = context.config.segment, Scans(context)
    folder = context.folder("pseudo_labels")
    names = [name for name in scans.names("train", lesion=True) if (folder / f"{name}.png").is_file()]
    if not names:
        raise InputError(f"{folder}: expected the pseudo-labels of the training B-scans, got none")
    network = Network(recipe, len(scans.classes), trained=False)

    def loss(network: nn.Module, batch) -> dict[str, Tensor]:
        total = F.cross_entropy(network(batch[0]).float(), batch[1], ignore_index=255, reduction="sum")
        return {"loss": total / (batch[1] != 255).sum().clamp(min=1)}

    return Training(
        model=network,
        dataset=Labelled(scans, names, folder, recipe.size),
        loss=loss,
        optimizer=torch.optim.Adam(network.parameters(), recipe.lr),
        steps=count_steps(recipe.steps, recipe.epochs, len(names), recipe.batch_size),
        batch_size=recipe.batch_size,
    )


def predictor(context: Context) -> Callable[[np.ndarray], np.ndarray]:
    recipe = context.config.segment
    classes = len(data.READERS[context.config.data.dataset].CLASSES)
    network = context.load(Network(recipe, classes, trained=True), "network")

    @torch.no_grad()
    def predict(image: np.ndarray) -> np.ndarray:
        pixels = resized(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float() / 255, recipe.size)[None].to(context.device)
        logit = F.interpolate(network(pixels).float(), image.shape[:2], mode="bilinear", align_corners=False)
        return logit[0].argmax(0).byte().cpu().numpy()

    return predict


def write_predictions(context: Context) -> Writing:
    scans, predict = Scans(context), predictor(context)
    part = "validation" if scans.parts["validation"] else "train"
    return Writing(scans.names(part, lesion=True), lambda name: [f"{name}.png"], lambda name: [png(predict(scans.picture(name)))])


def evaluate_network(context: Context) -> Evaluation:
    part = "validation" if Scans(context).parts["validation"] else "train"
    return evaluate(part, "predictions", model=False)(context)


def stages(config: OctConfig) -> list[Stage]:
    first = [Stage(_LABEL_TEXT, "precompute", write_label_text)] if config.model.clip else []
    if config.model.caption and config.text.captions != "none":
        first.append(Stage(_CAPTIONS, "precompute", write_captions))
    if config.model.structural and config.data.healthy == "generator":
        first += [Stage(_GENERATOR, "train", train_generator), Stage(HEALTHY, "precompute", write_healthy)]
    sweep = [Stage("sweep", "evaluate", lambda context: SweepStage())] if config.masks.threshold is None else []
    return [
        *first,
        Stage("model", "train", train_model),
        *sweep,
        Stage("pseudo_labels", "pseudo-label", write_masks("train")),
        Stage("pseudo_label_quality", "evaluate", evaluate("train", "pseudo_labels", model=True)),
        Stage("network", "segment", train_network),
        Stage("predictions", "predict", write_predictions),
        Stage("test", "evaluate", evaluate_network),
    ]


METHOD = Method("oct_multimodal", OctConfig, stages, predictor)
