"""The stages: slices, diffusion model, classifiers, activation and gradient maps, seeds, pixel decoder, masks, test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..data import read_mask
from ..engine import Context, Evaluation, Method, Stage, Training, Writing, auc, count_steps, dice_and_iou, png
from ..engine.stream import local_seed
from ..engine.writing import Saver, npy
from ..errors import InputError, UsageError
from . import cam as cams, data, decoder as pixel
from .classifier import EncoderClassifier, gradient_maps, noisy_loss
from .config import CldfConfig
from .data import Labelled, Slices
from .diffusion import DiffusionModel, denoising_loss, make_schedule
from .features import Extractor

CLASSES = ("background", "object")
_BATCH = 16
_SMALLEST = 64  # ResNet-18 divides by 32, and a norm over one pixel is nothing


def _channels(slices: Slices) -> int:
    return slices.image(next(iter(slices.by_name))).shape[0]


def _diffusion(context: Context, slices: Slices, *, trained: bool) -> DiffusionModel:
    config = context.config
    recipe = replace(config.diffusion, weights=None) if trained else config.diffusion
    model = DiffusionModel(recipe, config.data.size, _channels(slices))
    return context.load(model, "diffusion") if trained else model


def _schedule(context: Context):
    return make_schedule(context.config.diffusion.timesteps)


def _adamw(module: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr, weight_decay=weight_decay)


def train_diffusion(context: Context) -> Training:
    recipe, slices, schedule = context.config.diffusion, Slices(context), _schedule(context)
    model = _diffusion(context, slices, trained=False)
    return Training(
        model=model,
        dataset=Labelled(slices, slices.names("train"), flip=True),
        loss=lambda model, batch: {"loss": denoising_loss(model, schedule, *batch)},
        optimizer=_adamw(model.unet, recipe.lr, recipe.weight_decay),
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        accumulate=recipe.accumulate,
        clip=recipe.clip,
        after_step=lambda step: model.follow(),
    )


def train_noisy_classifier(context: Context) -> Training:
    recipe, slices, schedule = context.config.classifier, Slices(context), _schedule(context)
    model = EncoderClassifier(recipe.unet, context.config.data.size, _channels(slices))
    return Training(
        model=model,
        dataset=Labelled(slices, _both(slices), flip=True),
        loss=lambda model, batch: noisy_loss(model, schedule, *batch),
        optimizer=_adamw(model, recipe.lr, recipe.weight_decay),
        steps=recipe.steps,
        batch_size=recipe.batch_size,
    )


def _both(slices: Slices) -> list[str]:
    """The training slices, provided that both labels occur."""
    names = slices.names("train")
    if len({slices.by_name[n].positive for n in names}) < 2:
        raise InputError(f"data: expected training slices with and without the object, got {len(names)} of one kind")
    return names


def _cam_model(context: Context, slices: Slices, *, fresh: bool = False) -> cams.AmeCam | cams.LayerCamClassifier:
    config = context.config.cam if fresh else replace(context.config.cam, weights=None)
    if context.config.data.size < _SMALLEST:
        raise UsageError(
            f"data.size: the classifier of the activation maps needs at least {_SMALLEST} pixels, got {context.config.data.size}"
        )
    return (cams.AmeCam if config.source == "ame" else cams.LayerCamClassifier)(_channels(slices), config)


def train_cam(context: Context) -> Training:
    recipe, slices = context.config.cam, Slices(context)
    model = _cam_model(context, slices, fresh=True)

    def loss(model: nn.Module, batch) -> dict[str, Tensor]:
        logit = model(batch[0]).float()
        return {"loss": nn.functional.binary_cross_entropy_with_logits(logit, batch[1][:, None].float().expand_as(logit))}

    trained = [p for name, p in model.named_parameters() if not name.startswith("attention")]
    return Training(
        model=model,
        dataset=Labelled(slices, _both(slices), flip=True),
        loss=loss,
        optimizer=torch.optim.AdamW(trained, recipe.lr, weight_decay=recipe.weight_decay),
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        unused_parameters=recipe.source == "ame",
    )


class _Attention(nn.Module):
    """AME-CAM while its attention is trained: `forward` → the attended maps and the features; the rest stays in eval mode."""

    def __init__(self, model: cams.AmeCam):
        super().__init__()
        self.ame = model.requires_grad_(False)
        self.ame.attention.requires_grad_(True)

    def train(self, mode: bool = True):
        super().train(mode)
        self.ame.trunk.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.ame.aggregate(x)


def train_cam_attention(context: Context) -> Training:
    recipe, slices = context.config.cam, Slices(context)
    model = _Attention(context.load(_cam_model(context, slices), "cam"))
    return Training(
        model=model,
        dataset=Labelled(slices, slices.names("train", positive=True), flip=True),
        loss=lambda model, batch: {"loss": cams.foreground_contrast(*model(batch[0]))},
        optimizer=_adamw(model.ame.attention, recipe.lr, recipe.weight_decay),
        steps=recipe.attention_steps,
        batch_size=recipe.batch_size,
    )


def _trained_cam(context: Context, slices: Slices) -> cams.AmeCam | cams.LayerCamClassifier:
    model = _cam_model(context, slices)
    if context.config.cam.source == "ame":
        return context.load(_Attention(model), "cam_attention").ame
    return context.load(model, "cam")


def _seeded_names(slices: Slices) -> list[str]:
    """Slices that get maps: the positive ones of the training part, and those that are tested."""
    return slices.names("train", positive=True) + slices.names("test", positive=True)


def write_cams(context: Context) -> Writing:
    config, slices = context.config, Slices(context)
    if config.cam.source == "files":
        if config.cam.folder is None:
            raise UsageError("cam.folder: say where the maps are, or choose another cam.source")
        folder = Path(config.cam.folder)

        def read(name: str) -> list[Saver]:
            return [npy(cams.read_cam(folder, name, config.data.size))]

        return Writing(_seeded_names(slices), lambda name: [f"{name}.npy"], read)
    model = _trained_cam(context, slices)

    def write(name: str) -> list[Saver]:
        map_ = model.maps(slices.image(name)[None].to(context.device))[0]
        return [npy((1 - map_ if config.cam.invert else map_).half())]

    return Writing(_seeded_names(slices), lambda name: [f"{name}.npy"], write)


def write_gradient_maps(context: Context) -> Writing:
    config, slices, schedule = context.config, Slices(context), _schedule(context)
    model = context.load(EncoderClassifier(config.classifier.unet, config.data.size, _channels(slices)), "classifier").requires_grad_(False)

    def write(name: str) -> list[Saver]:
        image = slices.image(name)[None].to(context.device)
        return [npy(gradient_maps(model, schedule, image, [name], config.classifier, config.seed)[0].half())]

    return Writing(_seeded_names(slices), lambda name: [f"{name}.npy"], write)


def binary_maps(context: Context, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The thresholded activation map and the thresholded gradient map, `[S, S]` bool."""
    cam, gradient = context.array("cams", name), context.array("gradient_maps", name)
    return cams.binarize(cam, context.config.cam.threshold), cams.binarize(gradient, None)


def write_seeds(context: Context) -> Writing:
    names = _seeded_names(Slices(context))
    return Writing(names, lambda name: [f"{name}.png"], lambda name: [png(cams.seeds(*binary_maps(context, name)))])


def _extractor(context: Context, slices: Slices) -> Extractor:
    unet = _diffusion(context, slices, trained=True).trained
    return Extractor(unet.to(context.device), _schedule(context), context.config.features, context.config.seed)


def write_features(context: Context) -> Writing:
    slices = Slices(context)
    extractor = _extractor(context, slices)

    def write(name: str) -> list[Saver]:
        label = torch.ones(1, dtype=torch.long, device=context.device)
        maps = extractor.mean(slices.image(name)[None].to(context.device), [name], label)
        return [data.npz({f"layer_{i}": m[0].half().cpu().numpy() for i, m in enumerate(maps)})]

    return Writing(_seeded_names(slices), lambda name: [f"{name}.npz"], write)


class FeatureMaps:
    """The averaged feature maps of slices, from the cache or from the U-Net."""

    def __init__(self, context: Context, slices: Slices):
        self.context, self.slices, self.cached = context, slices, context.config.features.cache
        self.extractor = None if self.cached else _extractor(context, slices)

    def channels(self) -> list[int]:
        if self.extractor is not None:
            return self.extractor.channels(self.context.config.data.size)
        return [len(m) for m in self.load(self.slices.names("train", positive=True)[0])]

    def load(self, name: str) -> list[Tensor]:
        path = self.context.folder("features") / f"{name}.npz"
        try:
            with np.load(path, allow_pickle=False) as found:
                return [torch.from_numpy(found[f"layer_{i}"].astype(np.float32)) for i in range(len(found.files))]
        except Exception as error:  # a damaged file provokes many
            raise InputError(f"{path}: cannot be read ({type(error).__name__}: {error}); delete it and run stage features again") from None

    def __call__(self, given: Any, names: Sequence[str]) -> list[Tensor]:
        """`given`: a batch of what `sample` returns."""
        if self.extractor is None:
            return given
        return self.extractor.mean(given, names, torch.ones(len(names), dtype=torch.long, device=given.device))

    def sample(self, name: str) -> Any:
        return self.load(name) if self.cached else self.slices.image(name)


class Seeded(Dataset):
    """(features or image, seed `Tensor[S, S]`, name) of positive training slices."""

    def __init__(self, context: Context, maps: FeatureMaps, names: Sequence[str]):
        self.context, self.maps, self.names = context, maps, list(names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Any, Tensor, str]:
        name = self.names[index]
        size = self.context.config.data.size
        seed = torch.from_numpy(read_mask(self.context.folder("seeds") / f"{name}.png", (size, size)))
        return self.maps.sample(name), seed, name


def train_decoder(context: Context) -> Training:
    recipe, slices = context.config.decoder, Slices(context)
    maps = FeatureMaps(context, slices)
    names = slices.names("train", positive=True)
    if not names:
        raise InputError("data: expected training slices with the object, got none")
    model = pixel.PixelDecoder(maps.channels(), context.config.data.size, recipe)

    def loss(network: nn.Module, batch) -> dict[str, Tensor]:
        z, label = pixel.select(network(maps(batch[0], batch[2])), batch[1], recipe)
        model.remember(z, label)
        return {"loss": pixel.contrastive_loss(z, label, recipe), "foreground": (label == pixel.FOREGROUND).float().sum()}

    return Training(
        model=model,
        dataset=Seeded(context, maps, names),
        loss=loss,
        optimizer=torch.optim.SGD(model.parameters(), recipe.lr, momentum=recipe.momentum),
        steps=count_steps(recipe.steps, recipe.epochs, len(names), recipe.batch_size),
        batch_size=recipe.batch_size,
    )


def write_masks(context: Context) -> Writing:
    """Masks of the test slices by k-means on their embeddings; slices whose label says that there is no object are empty."""
    config, slices = context.config, Slices(context)
    maps, size = FeatureMaps(context, slices), context.config.data.size
    network = context.load(pixel.PixelDecoder(maps.channels(), size, config.decoder), "decoder")

    def write(name: str) -> list[Saver]:
        if not slices.by_name[name].positive:
            return [png(np.zeros((size, size), np.uint8))]
        given = maps.sample(name)
        given = [m[None].to(context.device) for m in given] if isinstance(given, list) else given[None].to(context.device)
        embedding = network(maps(given, [name]))
        seed = torch.from_numpy(read_mask(context.folder("seeds") / f"{name}.png", (size, size))).to(context.device)[None]
        own = config.decoder.prototypes == "seeds"
        start = pixel.seed_prototypes(embedding, seed, network.prototypes) if own else network.prototypes
        mask = pixel.cluster(embedding, start, config.decoder.kmeans_iter)
        if not (network.seen > 0).all():
            mask = pixel.name_clusters(mask, seed)
        return [png(mask[0])]

    return Writing(slices.names("test"), lambda name: [f"{name}.png"], write)


@torch.no_grad()
def held_out(context: Context, slices: Slices) -> dict[str, Any]:
    """Of the test slices: the AUC of the classifier behind the activation maps, and the denoising loss of the averaged U-Net."""
    names, found = slices.names("test"), {}
    batches = [names[i : i + _BATCH] for i in range(0, len(names), _BATCH)]
    if context.config.cam.source != "files":
        model = _trained_cam(context, slices)
        score = np.concatenate([model.score(slices.images(b).to(context.device)).float().cpu().numpy() for b in batches])
        found["cam_auc"] = auc(score, np.array([slices.by_name[n].positive for n in names]))
    model, schedule, total = _diffusion(context, slices, trained=True), _schedule(context), 0.0
    with local_seed(context.seed("denoising")):
        for batch in batches:
            label = torch.tensor([int(slices.by_name[n].positive) for n in batch], device=context.device)
            average = lambda noisy, t, y: model.trained(noisy, t, class_labels=y if model.config.conditional else None).sample  # noqa: E731
            total += len(batch) * float(denoising_loss(average, schedule, slices.images(batch).to(context.device), label))
    return {**found, "denoising_loss": total / len(names)}


def evaluate(context: Context) -> Evaluation:
    slices = Slices(context)
    names = slices.names("test", positive=True)
    if not names:
        raise InputError("data: expected test slices with the object, got none; choose other data.test_cases")

    def predicted(name: str) -> np.ndarray:
        return read_mask(context.folder("masks") / f"{name}.png")

    def more() -> dict[str, Any]:
        table: dict[str, list[tuple[float, float]]] = {"mask": [], "cam": [], "gradient": [], "all": []}
        for name in names:
            truth, (cam, gradient) = slices.mask(name), binary_maps(context, name)
            for kind, mask in (("mask", predicted(name)), ("cam", cam), ("gradient", gradient), ("all", np.ones_like(truth))):
                table[kind].append(dice_and_iou(mask, truth))
        figures = {}
        for kind, rows in table.items():
            for i, metric in enumerate(("dice", "iou")):
                values = np.array([row[i] for row in rows])
                figures |= {f"{kind}_{metric}": float(values.mean()), f"{kind}_{metric}_std": float(values.std())}
        return {**figures, "test_slices": len(slices.names("test")), **held_out(context, slices)}

    return Evaluation(names, slices.mask, predicted, CLASSES, image=slices.picture, more=more)


def stages(config: CldfConfig) -> list[Stage]:
    cam: list[Stage] = []
    if config.cam.source != "files":
        cam.append(Stage("cam", "train", train_cam))
    if config.cam.source == "ame":
        cam.append(Stage("cam_attention", "train", train_cam_attention))
    features = [Stage("features", "precompute", write_features)] if config.features.cache else []
    return [
        Stage(data.FOLDER, "precompute", data.prepare),
        Stage("diffusion", "train", train_diffusion),
        Stage("classifier", "train", train_noisy_classifier),
        *cam,
        Stage("cams", "pseudo-label", write_cams),
        Stage("gradient_maps", "pseudo-label", write_gradient_maps),
        Stage("seeds", "pseudo-label", write_seeds),
        *features,
        Stage("decoder", "segment", train_decoder),
        Stage("masks", "predict", write_masks),
        Stage("test", "evaluate", evaluate),
    ]


METHOD = Method("cldf", CldfConfig, stages, None)
