"""M0: parameter table, weights of both formats, exchange, losses, λ sweep, generator."""

import numpy as np
import pytest
import torch
from torch import nn

from wsss_models.data import duke
from wsss_models.engine.metrics import Confusion
from wsss_models.errors import InputError, UsageError
from wsss_models.oct_multimodal import data as scans
from wsss_models.oct_multimodal.config import Generator, Masks, Model, Segment
from wsss_models.oct_multimodal.encoder import from_original, load_mit, make_encoder
from wsss_models.oct_multimodal.generator import Ganomaly
from wsss_models.oct_multimodal.model import CaptionFusion, OctModel, Output, losses
from wsss_models.oct_multimodal.network import Network
from wsss_models.oct_multimodal.pseudo_label import Sweep, fused_maps, mask_at

from .parity import assert_steps_agree

TINY = Model(encoder="mit_tiny", drop_path=0.0, freeze="none")


def millions(module: nn.Module, *, trainable: bool = False) -> float:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable) / 1e6


@pytest.mark.parametrize(
    ("change", "trainable"),
    [
        ({"freeze": "none"}, 54.07),
        ({"freeze": "stage1"}, 48.33),
        ({}, 44.60),
        ({"encoder": "mit_b1"}, 25.00),
        ({"encoder": "mit_b5"}, 157.23),
    ],
)
def test_parameter_table(change, trainable):
    with torch.device("meta"):
        model = OctModel(Model(**change), 3, torch.zeros(3, 768), 512)
    assert round(millions(model, trainable=True), 2) == trainable
    if not change:
        parts = [*model.exchange, *model.adaptors, model.fusion, model.head, model.structural_head]
        assert [round(sum(map(millions, group)), 3) for group in (parts[:2], parts[2:4], parts[4:5], parts[5:])] == [
            4.244,
            0.911,
            0.524,
            0.003,
        ]


def original(encoder) -> dict[str, torch.Tensor]:
    """The tensors of a MiT under the names of its original files, with a head."""
    found = {"head.weight": torch.zeros(1000, 8), "head.bias": torch.zeros(1000)}
    names = {"attention.q_proj": "attn.q", "attention.o_proj": "attn.proj", "layernorm_before": "norm1", "layernorm_after": "norm2"}
    names |= {"attention.sequence_reduction.sequence_reduction": "attn.sr", "attention.sequence_reduction.layer_norm": "attn.norm"}
    for s, stage in enumerate(encoder.stages, 1):
        for name, t in stage.patch_embeddings.state_dict().items():
            found[f"patch_embed{s}.{name.replace('layer_norm', 'norm')}"] = t
        found |= {f"norm{s}.{name}": t for name, t in stage.layer_norm.state_dict().items()}
        for i, block in enumerate(stage.blocks):
            state = block.state_dict()
            for kind in ("weight", "bias"):
                found[f"block{s}.{i}.attn.kv.{kind}"] = torch.cat([state.pop(f"attention.{p}_proj.{kind}") for p in "kv"])
            for name, t in state.items():
                module, _, kind = name.rpartition(".")
                found[f"block{s}.{i}.{names.get(module, module)}.{kind}"] = t
    return found


def test_mit_weights_round_trip(tmp_path):
    torch.manual_seed(0)
    encoder, other = (make_encoder("mit_tiny", 0.0, None).eval() for _ in range(2))
    torch.save(original(encoder), tmp_path / "mit_tiny.pth")
    assert set(from_original(original(encoder))) == set(encoder.state_dict())
    load_mit(other, str(tmp_path / "mit_tiny.pth"))
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(encoder(x).last_hidden_state, other(x).last_hidden_state)
    encoder.save_pretrained(tmp_path / "hub")
    third = make_encoder("mit_tiny", 0.0, str(tmp_path / "hub"))
    assert all(torch.equal(a, b) for a, b in zip(third.parameters(), encoder.parameters(), strict=True))
    lacking = original(encoder)
    del lacking["block3.0.attn.q.weight"]
    torch.save(lacking, tmp_path / "bad.pth")
    with pytest.raises(UsageError, match=r"lacks 1 of \d+, such as stages.2.blocks.0.attention.q_proj.weight"):
        load_mit(other, str(tmp_path / "bad.pth"))
    torch.save(original(make_encoder("mit_b0", 0.0, None)), tmp_path / "b0.pth")
    with pytest.raises(UsageError, match="expected the weights of this MiT|holds another encoder"):
        load_mit(other, str(tmp_path / "b0.pth"))


def test_old_hub_names(tmp_path):
    """`nvidia/mit-b2` has the names of transformers 4."""
    encoder = make_encoder("mit_tiny", 0.0, None)
    names = {
        "attention.q_proj": "attention.self.query",
        "attention.k_proj": "attention.self.key",
        "attention.v_proj": "attention.self.value",
    }
    names |= {"attention.o_proj": "attention.output.dense", "layernorm_before": "layer_norm_1", "layernorm_after": "layer_norm_2"}
    names |= {"attention.sequence_reduction.sequence_reduction": "attention.self.sr", "mlp.fc1": "mlp.dense1", "mlp.fc2": "mlp.dense2"}
    names |= {"attention.sequence_reduction.layer_norm": "attention.self.layer_norm"}
    old = {}
    for s, stage in enumerate(encoder.stages):
        old |= {f"segformer.encoder.patch_embeddings.{s}.{n}": t for n, t in stage.patch_embeddings.state_dict().items()}
        old |= {f"segformer.encoder.layer_norm.{s}.{n}": t for n, t in stage.layer_norm.state_dict().items()}
        for i, block in enumerate(stage.blocks):
            for name, t in block.state_dict().items():
                module, _, kind = name.rpartition(".")
                old[f"segformer.encoder.block.{s}.{i}.{names.get(module, module)}.{kind}"] = t
    torch.save(old, tmp_path / "pytorch_model.bin")
    other = make_encoder("mit_tiny", 0.0, str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), encoder.parameters(), strict=True))


def model_of(change=None, classes=3, size=64):
    torch.manual_seed(0)
    model = OctModel(Model(**{**vars(TINY), **(change or {})}), classes, torch.randn(classes, 12), 6)
    inputs = torch.rand(2, 3, size, size), torch.rand(2, 3, size, size), torch.randn(2, 6)
    return model, inputs


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"residual": "target"},
        {"kv_reduction": False},
        {"exchange_window": 4},
        {"structural": False},
        {"clip": False},
        {"caption": False},
        {"structural": False, "clip": False, "caption": False},
    ],
)
def test_shapes_of_every_option(change):
    model, inputs = model_of(change)
    output, maps = model(*inputs), model.maps(*inputs)
    assert output.primary.shape == (2, 3) and maps[0].shape == (2, 3, 2, 2)
    assert (output.structural is None) == (change.get("structural") is False)
    if change.get("clip") is not False:
        assert [tuple(m.shape) for m in maps[1:]] == [(2, 3, 4, 4), (2, 3, 2, 2)]
        torch.testing.assert_close(output.similarity3, maps[1].amax((2, 3)))
        torch.testing.assert_close(output.similarity4, maps[2].amax((2, 3)))
    label = torch.tensor([[1.0, 0, 1], [1, 0, 0]])
    found = losses(output, label)
    found["loss"].backward()
    assert found["loss"].item() == pytest.approx(sum(v.item() for k, v in found.items() if k != "loss"), rel=1e-5)
    unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused


def test_exchange_is_where_the_paper_puts_it():
    """After stages 2 and 3; the sum of stage 3 is taken before its exchange."""
    model, inputs = model_of()
    seen = []
    for i, exchange in enumerate(model.exchange):
        exchange.register_forward_hook(lambda module, given, output, i=i: seen.append((i, tuple(given[0].shape))))
    model(*inputs)
    assert seen == [(0, (2, 8, 8, 32)), (1, (2, 4, 4, 80))]
    assert [e.num_heads for e in model.exchange] == [4, 4]
    with torch.device("meta"):
        full = OctModel(Model(), 3, torch.zeros(3, 768), 512)
    reductions = [e.primary.reduce.stride for e in full.exchange] if hasattr(full.exchange[0].primary, "reduce") else None
    assert reductions in (None, [(4, 4), (2, 2)])


def test_both_encoders_start_alike_and_frozen_parts_stay():
    model, _ = model_of({"freeze": "stages12", "drop_path": 0.1})
    for a, b in zip(model.primary.parameters(), model.structural.parameters(), strict=True):
        assert torch.equal(a, b)
    model.train()
    for encoder in (model.primary, model.structural):
        assert not any(p.requires_grad for s in encoder.stages for p in s.patch_embeddings.parameters())
        assert not any(p.requires_grad for s in encoder.stages[:2] for p in s.parameters()) and not encoder.stages[0].blocks.training
        assert all(p.requires_grad for s in encoder.stages[2:] for p in s.blocks.parameters()) and encoder.stages[2].blocks.training


def test_caption_fusion_is_the_convolution_of_the_concatenation():
    torch.manual_seed(0)
    fusion = CaptionFusion(5, 3)
    feature, caption = torch.randn(2, 5, 4, 6), torch.randn(2, 3)
    whole = torch.cat([feature, caption[:, :, None, None].expand(-1, -1, 4, 6)], 1)
    torch.testing.assert_close(fusion(feature, caption), fusion.reduce(whole))
    assert fusion.reduce.bias is None


def test_similarity_maps_of_a_case_worked_out():
    model, inputs = model_of()
    with torch.no_grad():
        model.scales[0].fill_(2.0)
        _, _, z3, _ = model.features(*inputs)
        expected = 2 * torch.einsum("bchw,kc->bkhw", nn.functional.normalize(z3, dim=1), model.adaptors[0](model.text))
        torch.testing.assert_close(model.maps(*inputs)[1], expected, atol=1e-6, rtol=1e-4)
    assert [s.item() for s in OctModel(TINY, 2, torch.zeros(2, 4), 3).scales] == [1.0, 1.0]


def test_losses_of_a_case_worked_out():
    zero = torch.zeros(1, 2)
    found = losses(Output(zero, torch.tensor([[0.0, 2.0]]), zero, zero + 1), torch.tensor([[1.0, 0.0]]))
    assert float(found["primary"]) == float(found["similarity3"]) == pytest.approx(np.log(2))
    assert float(found["structural"]) == pytest.approx(np.log(1 + np.exp(2)))
    assert float(found["similarity4"]) == pytest.approx((np.log1p(np.exp(-1)) + np.log1p(np.exp(1))) / 2)
    assert float(found["loss"]) == pytest.approx(sum(float(v) for k, v in found.items() if k != "loss"))


@pytest.mark.parametrize(("window", "steps"), [(None, 20), (4, 5)])
def test_steps_fused_and_reference(window, steps):
    model, _ = model_of({"exchange_window": window}, classes=2, size=32)
    batches = []
    for i in range(steps):
        generator = torch.Generator().manual_seed(i)
        images = [torch.rand(2, 3, 32, 32, generator=generator) for _ in range(2)]
        label = torch.stack([torch.ones(2), torch.randint(0, 2, (2,), generator=generator).float()], 1)
        batches.append((*images, torch.randn(2, 6, generator=generator), label))
    assert_steps_agree(model, lambda m, b: losses(m(*b[:3]), b[3])["loss"], batches, lr=0.005)


def test_structural_input():
    primary, layers = torch.rand(3, 4, 4), torch.zeros(3, 4, 4)
    layers[:, 2:] = 255
    found = scans.structural_input(primary, layers, None)
    torch.testing.assert_close(found, layers / 255)
    healthy = primary.clone()
    healthy[:, 0, 0] -= 0.25
    found = scans.structural_input(primary, torch.zeros(3, 4, 4), healthy)
    assert float(found.sum()) == pytest.approx(3, rel=1e-5) and float(found[0, 0, 0]) == pytest.approx(1)
    assert not scans.structural_input(primary, torch.zeros(3, 4, 4), None).any()


def test_layer_map(tmp_path):
    probabilities = np.zeros((12, 4, 4), np.float32)
    probabilities[11, 0], probabilities[5, 1], probabilities[10, 2:] = 1, 1, 1
    np.save(tmp_path / "l.npy", probabilities)
    scan = duke.BScan("a", tmp_path / "a.png", layers=tmp_path / "l.npy")
    found = scans.layer_map(scans.View("a", scan), (8, 8), (4, 4))[0]
    assert found[:, 0].tolist() == [0, 127.5, 255, 255]
    crop = scans.layer_map(scans.View("a", scan, (slice(2, 4), slice(0, 8))), (8, 8), (2, 2))[0]
    assert crop[0].tolist() == [127.5, 127.5]
    np.save(tmp_path / "l.npy", probabilities[:3])
    with pytest.raises(InputError, match="expected probabilities 12×h×w, got float32 of shape 3×4×4"):
        scans.layer_map(scans.View("a", scan), (8, 8), (4, 4))


def test_fused_maps():
    torch.manual_seed(0)
    maps = [torch.randn(1, 3, s, s) for s in (2, 4, 2)]
    found = fused_maps(maps, torch.tensor([1.0, 0.0, 1.0]), (8, 6), Masks())
    assert found.shape == (2, 8, 6) and not found[0].any() and found.min() >= 0 and found.max() <= 1
    expected = 0
    for weight, m in zip((0.4, 0.3, 0.3), maps, strict=True):
        relu = m[:, 2:].relu()
        scaled = (relu - relu.min()) / (relu.max() - relu.min())
        expected = expected + weight * nn.functional.interpolate(scaled, (8, 6), mode="bilinear", align_corners=True)
    torch.testing.assert_close(found[1], expected[0, 0])
    other = fused_maps(maps, torch.ones(3), (8, 6), Masks(fuse="sum_then_normalize"))
    assert float(other.amax()) == 1 and not torch.allclose(other[1], found[1])
    alone = fused_maps(maps[:1], torch.ones(3), (2, 2), Masks())
    assert float(alone.amax()) == pytest.approx(1)


def test_the_sweep_is_every_threshold_by_itself():
    random = np.random.default_rng(0)
    sweep, images = Sweep(3, 0.05), []
    for _ in range(3):
        fused, truth = np.round(random.random((2, 9, 7)), 2).astype(np.float32), random.integers(0, 3, (9, 7)).astype(np.uint8)
        truth[0, 0] = 255
        images.append((fused, truth))
        sweep.add(fused, truth)
    for threshold, matrix in zip(sweep.grid, sweep.matrices(), strict=True):
        confusion = Confusion(("a", "b", "c"))
        for fused, truth in images:
            confusion.add(truth, mask_at(torch.from_numpy(fused).double(), float(threshold)).numpy())
        assert np.array_equal(confusion.matrix, matrix)
    threshold, miou = sweep.best()
    assert miou == pytest.approx(sweep.miou().max()) and threshold in sweep.grid
    with pytest.raises(ValueError, match="step must be in"):
        Sweep(2, 0)


def test_generator_learns_and_players_do_not_mix():
    torch.manual_seed(0)
    model = Ganomaly(Generator(size=16, width=8, latent=8))
    image = torch.rand(4, 1, 16, 16)
    found = model(image)
    found["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    model(image)["discriminator"].backward()
    assert all(p.grad is None or not p.grad.any() for n, p in model.named_parameters() if not n.startswith("discriminator"))
    model.zero_grad()
    found = model(image)
    (found["context"] + found["encoder"] + found["adversarial"]).backward()
    assert all(p.grad is None or not p.grad.any() for n, p in model.named_parameters() if n.startswith("discriminator"))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3, betas=(0.5, 0.999))
    smooth = nn.functional.interpolate(torch.rand(4, 1, 2, 2), (16, 16), mode="bilinear")
    first = float(model(smooth)["context"].detach())
    for _ in range(60):
        optimizer.zero_grad()
        model(smooth)["loss"].backward()
        optimizer.step()
    assert float(model(smooth)["context"].detach()) < first / 2
    with pytest.raises(UsageError, match="power of two"):
        Ganomaly(Generator(size=48))


def test_segmentation_networks(tmp_path):
    x = torch.rand(1, 3, 64, 64)
    for config in (Segment(encoder="mit_tiny"), Segment(network="deeplabv3plus", encoder="resnet18")):
        assert Network(config, 3, trained=False).eval()(x).shape == (1, 3, 64, 64)
    encoder = make_encoder("mit_tiny", 0.0, None)
    torch.save(original(encoder), tmp_path / "mit.pth")
    loaded = Network(Segment(encoder="mit_tiny", weights=str(tmp_path / "mit.pth")), 2, trained=False)
    assert torch.equal(loaded.net.segformer.stages[0].patch_embeddings.proj.weight, encoder.stages[0].patch_embeddings.proj.weight)
    with torch.device("meta"):
        assert round(millions(Network(Segment(network="deeplabv3plus", encoder="resnet101"), 3, trained=True)), 1) == 45.7
    for bad in (Segment(encoder="resnet18"), Segment(network="deeplabv3plus", encoder="nothing")):
        with pytest.raises(UsageError, match="segment.encoder"):
            Network(bad, 3, trained=True)
