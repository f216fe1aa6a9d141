"""A method of four stages on discs, small enough to test the engine with: `wsss run tests.models.toy`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from wsss_models.data import read_image, read_mask
from wsss_models.engine import Evaluation, Method, RunConfig, Stage, Training, Writing, png, polynomial

from .conftest import scene


@dataclass
class Recipe:
    lr: float = 0.05
    steps: int = 8
    batch_size: int = 4
    accumulate: int = 1


@dataclass
class ToyConfig(RunConfig):
    width: int = 4
    dropout: float = 0.3
    noise: float = 0.1
    log_every: int = 1
    checkpoint_every: int = 3
    recipe: Recipe = field(default_factory=Recipe)
    best: str | None = None
    patience: int | None = None


def make_data(folder: Path, count: int = 6, size: int = 16) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image, disc = scene(size, size, seed=i)
        Image.fromarray(image).save(folder / f"{i}.png")
        Image.fromarray(disc.astype(np.uint8)).save(folder / f"{i}_mask.png")
    return folder


def names(context) -> list[str]:
    return sorted(p.stem for p in context.data.glob("?.png"))


class Discs(Dataset):
    def __init__(self, context):
        self.context, self.names = context, names(context)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        path = self.context.data / f"{self.names[index]}.png"
        image = torch.from_numpy(read_image(path)).permute(2, 0, 1).float() / 255
        mask = torch.from_numpy(read_mask(path.with_name(f"{path.stem}_mask.png"))).long()
        return image + self.context.config.noise * torch.randn(image.shape), mask


class Net(nn.Sequential):
    def __init__(self, config):
        super().__init__(nn.Conv2d(3, config.width, 3, padding=1), nn.ReLU(), nn.Dropout2d(config.dropout), nn.Conv2d(config.width, 2, 1))


def train(context) -> Training:
    config, model = context.config, Net(context.config)
    data = Discs(context)

    def loss(model, batch):
        entropy = nn.functional.cross_entropy(model(batch[0]), batch[1])
        return {"loss": entropy, "twice": 2 * entropy}

    def validate(model):
        return {
            "score": -float(nn.functional.cross_entropy(model(data[0][0][None].to(context.device)), data[0][1][None].to(context.device)))
        }

    return Training(
        model=model,
        dataset=data,
        loss=loss,
        optimizer=torch.optim.SGD(model.parameters(), config.recipe.lr, momentum=0.9),
        steps=config.recipe.steps,
        batch_size=config.recipe.batch_size,
        accumulate=config.recipe.accumulate,
        schedule=polynomial(config.recipe.steps, warmup=2),
        validate=validate if config.best else None,
        validate_every=2,
        best=config.best,
        patience=config.patience,
    )


def predictor(context):
    model = context.load(Net(context.config), "net")

    def predict(image: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            pixels = torch.from_numpy(image).permute(2, 0, 1).float()[None].to(context.device) / 255
            return model(pixels)[0].argmax(0).byte().cpu().numpy()

    return predict


def write(context) -> Writing:
    predict = predictor(context)
    return Writing(names(context), lambda name: [f"{name}.png"], lambda name: [png(predict(read_image(context.data / f"{name}.png")))])


def evaluate(context) -> Evaluation:
    return Evaluation(
        names(context),
        lambda name: read_mask(context.data / f"{name}_mask.png"),
        lambda name: read_mask(context.folder("labels") / f"{name}.png"),
        ("blue", "disc"),
        image=lambda name: read_image(context.data / f"{name}.png"),
    )


STAGES = [Stage("net", "train", train), Stage("labels", "pseudo-label", write), Stage("test", "evaluate", evaluate)]
METHOD = Method("toy", ToyConfig, lambda config: STAGES, predictor)
