"""M2: parameter counts and names, identity at the start, losses, sliding maps, kernels against reference, the chain."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import wsss_kernels as wk
from wsss_models import cli
from wsss_models.engine import config as configs
from wsss_models.errors import UsageError
from wsss_models.gland import method, model as models, pseudo_label
from wsss_models.gland.attention import PositionAttention, attention
from wsss_models.gland.config import Data, GlandConfig, Masks, Model, Segment
from wsss_models.gland.losses import classification_loss, segmentation_loss
from wsss_models.gland.model import GlandClassifier
from wsss_models.gland.psp import PSPNet
from wsss_models.gland.resnet38 import ResNet38d

from .parity import assert_steps_agree

TINY = Model(backbone="resnet18", width=0.125, train_norm=True, freeze_stem=False)


def millions(module: nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.fixture(scope="module")
def trunk():
    return ResNet38d()


def test_parameter_counts(trunk):
    assert round(millions(trunk), 2) == 105.07
    assert [round(millions(attention("cca", c)), 2) for c in (512, 1024, 2048)] == [1.05, 4.20, 16.79]
    with torch.device("meta"):
        full, plain = GlandClassifier(Model()), GlandClassifier(Model(attention="none", mpfp=False))
        network = PSPNet(Segment())
    assert millions(full.attention) == pytest.approx(1.05 + 4.20 + 16.79, abs=0.01)
    assert millions(full) == pytest.approx(millions(plain) + millions(full.attention) + millions(full.pool))
    assert millions(plain) == pytest.approx(millions(trunk) + 2 * 4096 / 1e6)
    assert round(millions(network.encoder), 1) == 68.2
    assert millions(full.pool) == 2 * 3 * 2 * 4 * 9 / 1e6


def test_names_of_the_published_weights(trunk):
    names = set(trunk.state_dict())
    blocks = ["b2", "b2_1", "b2_2", "b3", "b3_2", "b4", "b4_5", "b5", "b5_2"]
    for name in [f"{b}.{layer}.weight" for b in blocks for layer in ("bn_branch2a", "conv_branch2a", "bn_branch2b1", "conv_branch2b1")]:
        assert name in names
    for name in ("conv1a.weight", "bn7.running_mean", "b6.conv_branch2b2.weight", "b7.bn_branch2b2.bias", "b2.conv_branch1.weight"):
        assert name in names
    shortcuts = {name for name in names if "conv_branch1" in name}
    assert shortcuts == {f"b{i}.conv_branch1.weight" for i in range(2, 8)}
    assert trunk.b7.conv_branch2b1.weight.shape == (2048, 1024, 3, 3)


def test_dilations_and_strides(trunk):
    def of(conv):
        return conv.stride[0], conv.dilation[0]

    assert [of(trunk.b2.conv_branch2a), of(trunk.b3.conv_branch2a), of(trunk.b4.conv_branch2a)] == [(2, 1)] * 3
    assert [of(trunk.b5.conv_branch2a), of(trunk.b5.conv_branch2b1), of(trunk.b5_1.conv_branch2a)] == [(1, 1), (1, 2), (1, 2)]
    assert [of(trunk.b6.conv_branch2b1), of(trunk.b7.conv_branch2b1)] == [(1, 4), (1, 4)]
    assert (trunk.b6.dropout.p, trunk.b7.dropout.p) == (0.3, 0.5)


def test_shapes_of_the_paper(trunk):
    """Stride 8 and the widths of section 3.1, on a smaller patch."""
    x, sizes = torch.rand(1, 3, 32, 32), []
    with torch.no_grad():
        for stage in trunk.eval().stages():
            for module in stage:
                x = module(x)
            sizes.append(tuple(x.shape[1:]))
    assert sizes == [(128, 16, 16), (256, 8, 8), (512, 4, 4), (1024, 4, 4), (2048, 4, 4), (4096, 4, 4)] and x.min() >= 0


def test_imagenet_weights_round_trip(tmp_path):
    small = models.SmallTrunk("resnet18", 0.125)
    file = tmp_path / "res.pth"
    torch.save({**small.net.state_dict(), "fc.weight": torch.zeros(1000, 64)}, file)
    loaded = GlandClassifier(Model(backbone="resnet18", width=0.125, weights=str(file)))
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), loaded.trunk.parameters(), strict=True))
    torch.save({"conv1.weight": small.net.conv1.weight.data}, file)
    with pytest.raises(UsageError, match="expected the weights of the trunk; it lacks"):
        GlandClassifier(Model(backbone="resnet18", width=0.125, weights=str(file)))


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta")
def test_resnet38_weights_round_trip(tmp_path, monkeypatch):
    """The keys that the file of the ResNet38 conversion has, with its classification layer, on the meta device's shapes."""
    with torch.device("meta"):
        own = ResNet38d()
    weights = {name: torch.empty(t.shape, device="meta") for name, t in own.state_dict().items()} | {"linear1000.weight": torch.empty(2)}
    monkeypatch.setattr(models, "load_weights", lambda file: {f"module.{k}": v for k, v in weights.items() if "tracked" not in k})
    models.load_trunk(own, "res38d.pth")
    del weights["b4_3.conv_branch2a.weight"]
    with pytest.raises(UsageError, match=r"lacks 1 of \d+, such as b4_3.conv_branch2a.weight"):
        models.load_trunk(own, "res38d.pth")


@pytest.mark.parametrize("kind", ["cca", "criss_cross_1", "criss_cross_2", "none"])
def test_attention_is_the_identity_at_the_start(kind):
    x = torch.randn(2, 16, 5, 7)
    module = attention(kind, 16)
    assert torch.equal(module(x), x)
    assert sum(isinstance(m, wk.CrissCrossAttention) for m in module.modules()) == {"cca": 2, "none": 0}.get(
        kind, int(kind[-1:] == "2") + 1
    )


def test_position_attention_is_the_printed_sum():
    module = PositionAttention(8).double()
    nn.init.constant_(module.gamma, 0.7)
    x = torch.randn(1, 8, 3, 2, dtype=torch.float64)
    h, m, n = (c(x)[0].flatten(1) for c in (module.query_conv, module.key_conv, module.value_conv))
    expected = torch.stack([(torch.softmax(h[:, j] @ m, 0) * n).sum(1) for j in range(6)], 1).reshape(8, 3, 2)
    torch.testing.assert_close(module(x)[0], 0.7 * expected + x[0])


def test_frozen_parts():
    frozen = GlandClassifier(Model(backbone="resnet18", width=0.125)).train()
    norms = [m for m in frozen.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(m.training or m.weight.requires_grad for m in norms)
    assert not any(p.requires_grad for module in frozen.trunk.stem() for p in module.parameters())
    groups = frozen.groups(0.01, 10.0)
    assert [g["lr"] for g in groups] == [0.01, 0.1] and all(p.requires_grad for g in groups for p in g["params"])
    assert all(m.training for m in GlandClassifier(TINY).train().modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("change", [{}, {"mpfp": False}, {"attention": "criss_cross_1"}, {"backbone": "resnet50", "width": 1.0}])
def test_classifier_shapes(change):
    network = GlandClassifier(Model(**{**vars(TINY), **change})).eval()
    with torch.no_grad():
        logit, maps = network(torch.rand(2, 3, 48, 40))
        assert logit.shape == (2, 2) and maps.shape == (2, 2, 6, 5)
        if not network.config.mpfp:
            torch.testing.assert_close(logit, maps.mean((2, 3)))
        else:
            fused = network.pool(maps)[1]
            expected = (fused.relu() * maps.relu() - (-fused).relu() * (-maps).relu()).mean((2, 3))
            torch.testing.assert_close(logit, expected, atol=1e-6, rtol=1e-5)


def test_losses():
    logit, label = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]])
    expected = (np.log(2) + np.log1p(np.exp(2))) / 2
    assert float(classification_loss(logit, label)) == pytest.approx(expected, rel=1e-6)
    main, auxiliary = torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4)
    truth = torch.randint(0, 2, (2, 4, 4))
    truth[0, 0] = 255
    found = segmentation_loss(main, auxiliary, truth, weight=0.4, purified=True)
    torch.testing.assert_close(found["loss"], wk.purified_label_loss(main, truth) + 0.4 * wk.purified_label_loss(auxiliary, truth))
    plain = segmentation_loss(main, auxiliary, truth, weight=0.0, purified=False)["loss"]
    torch.testing.assert_close(plain, nn.functional.cross_entropy(main, truth, ignore_index=255))
    nothing = segmentation_loss(main, auxiliary, torch.full_like(truth, 255), weight=0.4, purified=False)
    assert float(nothing["loss"]) == 0


def test_sliding_maps_of_a_pointwise_function_are_its_values():
    image = torch.rand(3, 23, 17)
    found = pseudo_label.sliding_maps(image, 8, 5, lambda crops: crops[:, :2] * 2, batch=3)
    torch.testing.assert_close(found, image[:2] * 2)
    sizes = set()
    pseudo_label.sliding_maps(image, 20, 9, lambda crops: sizes.add(tuple(crops.shape[2:])) or crops, resize=40)
    assert sizes == {(40, 34)}


def test_pseudo_mask():
    maps = torch.tensor([[[4.0, 1.0, -3.0]], [[1.0, 2.0, -1.0]]])
    assert pseudo_label.pseudo_mask(maps, torch.tensor([1, 1])).tolist() == [[0, 1, 1]]
    assert pseudo_label.pseudo_mask(maps, torch.tensor([1, 0])).tolist() == [[0, 0, 0]]
    assert pseudo_label.pseudo_mask(maps, torch.tensor([0, 0])).tolist() == [[0, 1, 1]]
    assert pseudo_label.pseudo_mask(maps, torch.tensor([1, 1]), normalize=True).tolist() == [[0, 1, 0]]


def test_auc():
    assert method.auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1])) == 0.75
    assert method.auc(np.ones(4), np.array([0, 0, 1, 1])) == 0.5
    assert method.auc(np.ones(2), np.ones(2)) is None


def test_multi_scale_maps_and_weighing():
    network, image = GlandClassifier(TINY).eval(), np.random.default_rng(0).integers(0, 255, (40, 33, 3), np.uint8)
    data = Data(side=16, resize=32)
    with torch.no_grad():
        one, two, weighed = (
            pseudo_label.activation_maps(network, image, data, Masks(scales=s, stride=8, weigh=w), torch.device("cpu"))
            for s, w in (((1.0,), False), ((1.0, 1.5), False), ((1.0,), True))
        )
    assert one.shape == two.shape == (2, 40, 33) and not torch.allclose(one, two) and not torch.allclose(one, weighed)


def test_classification_steps_fused_and_reference():
    torch.manual_seed(1)
    network = GlandClassifier(TINY)
    network.dropout.p = 0.0
    for module in network.modules():
        if hasattr(module, "gamma"):
            nn.init.constant_(module.gamma, 0.5)  # at 0 the attention would have no part in the loss
    batches = [(torch.randn(3, 3, 32, 32), torch.randint(0, 2, (3, 2)).float()) for _ in range(20)]

    def loss(model, batch):
        return nn.functional.binary_cross_entropy_with_logits(model(batch[0])[0], batch[1])

    assert_steps_agree(network, loss, batches)


def test_segmentation_steps_fused_and_reference():
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    labels = [torch.randint(0, 2, (2, 12, 10)) for _ in range(20)]
    for label in labels:
        label[:, :2] = 255
    batches = [(torch.randn(2, 3, 12, 10), label) for label in labels]
    assert_steps_agree(network, lambda model, batch: wk.purified_label_loss(model(batch[0]), batch[1]), batches)


@pytest.fixture
def data(tmp_path):
    """Four images in the layout of GlaS: dark discs are glands."""
    folder = tmp_path / "glas"
    folder.mkdir()
    y, x = np.mgrid[:48, :64]
    for i, name in enumerate(("train_1", "train_2", "testA_1", "testB_2")):
        gland = (y - 24) ** 2 + (x - 16 - 8 * i) ** 2 < 150
        noise = np.random.default_rng(i).integers(0, 30, (48, 64, 3))
        Image.fromarray((np.where(gland[..., None], (120, 60, 120), (200, 150, 190)) + noise).astype(np.uint8)).save(folder / f"{name}.bmp")
        Image.fromarray((gland * (i + 1)).astype(np.uint8)).save(folder / f"{name}_anno.bmp")
    return folder


SETTINGS = ["device=cpu", "data.validation=0", "data.side=24", "data.stride=12", "data.resize=32", "model.backbone=resnet18"]
SETTINGS += ["model.width=0.125", "model.train_norm=true", "model.freeze_stem=false", "classify.steps=3", "classify.batch_size=4"]
SETTINGS += ["masks.scales=[1.0]", "masks.stride=12", "segment.encoder=resnet18", "segment.channels=8", "segment.steps=2"]
SETTINGS += ["segment.batch_size=2", "segment.crop=56", "segment.stride=24", "segment.flip=true", "segment.scales=[1.0, 0.75]"]


def run(*arguments, settings=()):
    return cli.main([*map(str, arguments), *[a for s in (*SETTINGS, *settings) for a in ("--set", s)]])


def test_chain_and_domain_adaptation(data, tmp_path):
    first, second = tmp_path / "run", tmp_path / "adapted"
    assert run("run", "gland", "--data", data, "--out", first) == 0
    summary = json.loads((first / "summary.json").read_text())
    assert summary["complete"] and 0 <= summary["stages"]["test"]["metrics"]["miou"] <= 1
    quality = summary["stages"]["test_mask_quality"]["metrics"]
    assert {"miou_all_gland", "miou_random", "miou_otsu", "auc_gland", "auc_stroma"} <= set(quality) and quality["images"] == 2
    assert (
        run(
            "run",
            "gland",
            "--data",
            data,
            "--out",
            second,
            settings=[
                f"adapt_from={first}",
                "data.fraction=0.1",
                "data.validation=1",
                "segment.keep_best=true",
                "classify.optimizer=adamw",
            ],
        )
        == 0
    )
    assert (second / "classifier" / "validation.csv").is_file() and (second / "network" / "best.pt").is_file()
    assert json.loads((second / "summary.json").read_text())["stages"]["masks"]["metrics"]["items"] == 1
    assert run("predict", "gland", "--out", first, "--images", data / "testA_1.bmp", "--to", tmp_path / "seen") == 0
    assert (tmp_path / "seen" / "testA_1.png").read_bytes() == (first / "predictions" / "testA_1.png").read_bytes()


def test_shipped_configuration_and_the_papers_defaults():
    small, paper = configs.load(GlandConfig, "configs/gland_small.yaml"), configs.load(GlandConfig)
    assert small.model.backbone == "resnet18" and paper.model.backbone == "resnet38d"
    assert (paper.classify.lr, paper.classify.epochs, paper.segment.lr, paper.segment.epochs) == (0.01, 20, 0.005, 30)
    assert paper.masks.scales == (1, 1.25, 1.5, 1.75, 2) and paper.segment.auxiliary == 0.4
