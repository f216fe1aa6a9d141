"""M0: parameter table, weights of both formats, exchange, losses, λ sweep, readers, text steps, generator, the chain."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import wsss_kernels as wk
from wsss_models import cli
from wsss_models.data import duke, resc
from wsss_models.data.oct import read_mat
from wsss_models.engine import config as configs
from wsss_models.engine.metrics import Confusion
from wsss_models.errors import InputError, UsageError
from wsss_models.oct_multimodal import data as scans, text
from wsss_models.oct_multimodal.config import Generator, Masks, Model, OctConfig, Segment
from wsss_models.oct_multimodal.encoder import from_original, load_mit, make_encoder
from wsss_models.oct_multimodal.generator import Ganomaly
from wsss_models.oct_multimodal.method import Network
from wsss_models.oct_multimodal.model import CaptionFusion, OctModel, Output, losses
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
    first = float(model(smooth)["context"])
    for _ in range(60):
        optimizer.zero_grad()
        model(smooth)["loss"].backward()
        optimizer.step()
    assert float(model(smooth)["context"]) < first / 2
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


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


def scan_of(i, size=(64, 96)):
    """A noisy band; odd ones hold a dark disc."""
    y, x = np.mgrid[: size[0], : size[1]]
    disc = (y - 32) ** 2 + (x - 30 - 6 * i) ** 2 < 120
    band = 150 * (np.abs(y - 32) < 20) + np.random.default_rng(i).integers(0, 40, size)
    fluid = disc & bool(i % 2)
    return np.where(fluid, 20, band).astype(np.uint8), fluid


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "duke"
    for i in range(4):
        image, fluid = scan_of(i)
        write(root / "images" / f"Subject_0{i // 2 + 1}_annotated{i:02d}.png", image)
        write(root / "manualFluid" / f"Subject_0{i // 2 + 1}_annotated{i:02d}.png", np.where(fluid, 255 - i, 0))
    return root


def test_duke_as_pictures_and_as_matlab(folder, tmp_path):
    from scipy.io import savemat

    found = duke.read(folder)["all"]
    assert [s.subject for s in found] == ["Subject_01", "Subject_01", "Subject_02", "Subject_02"]
    assert duke.read_label(found[1], (64, 96)).sum() == scan_of(1)[1].sum() and not duke.read_label(found[0], (64, 96)).any()
    volumes = tmp_path / "mat"
    volumes.mkdir()
    images = np.stack([scan_of(i)[0] for i in range(4)], 2).astype(np.float64)
    fluid = np.full(images.shape, np.nan)
    fluid[..., 1], fluid[..., 2] = scan_of(1)[1] * 3.0, 0
    savemat(volumes / "Subject_07.mat", {"images": images, "manualFluid1": fluid})
    found = duke.read(volumes)["all"]
    assert [s.name for s in found] == ["Subject_07_01", "Subject_07_02"]
    assert np.array_equal(duke.read_scan(found[0]), scan_of(1)[0]) and np.array_equal(duke.read_label(found[0], (64, 96)), scan_of(1)[1])
    (volumes / "Subject_07.mat").write_bytes(b"MATLAB 7.3 nothing")
    read_mat.cache_clear()
    with pytest.raises(InputError, match=r"volume .*Subject_07.mat: cannot be read as a MATLAB file"):
        duke.read(volumes)
    with pytest.raises(InputError, match="expected Subject_NN.mat, or images"):
        duke.read(tmp_path)


def test_duke_with_lists(tmp_path):
    for i in range(3):
        image, fluid = scan_of(i)
        write(tmp_path / "images" / f"s{i}.png", image)
        write(tmp_path / "labels" / f"s{i}.png", np.where(fluid, 255, 100))
        write(tmp_path / "gan_healthy" / f"s{i}.png", image)
        (tmp_path / "mask").mkdir(exist_ok=True)
        np.save(tmp_path / "mask" / f"s{i}.npy", np.zeros((12, 4, 4), np.float32))
    (tmp_path / "train.csv").write_text("path,label\nimages/s0.png,0\n/elsewhere/s1.png,1\n")
    (tmp_path / "valid.csv").write_text("path,label\nimages/s2.png,0\n")
    found = duke.read(tmp_path)
    assert [s.labels for s in found["train"]] == [(0.0,), (1.0,)] and len(found["validation"]) == 1
    assert found["train"][1].healthy and found["train"][1].layers
    assert np.array_equal(duke.read_label(found["train"][1], (64, 96)), scan_of(1)[1])
    (tmp_path / "train.csv").write_text("path,label\n../../etc/passwd.png,1\n")
    assert duke.read(tmp_path)["train"][0].image == tmp_path / "images" / "passwd.png"
    (tmp_path / "train.csv").write_text("file,label\na,1\n")
    with pytest.raises(InputError, match="expected the columns path and label"):
        duke.read(tmp_path)


def test_resc_layouts(tmp_path):
    for part in ("train", "valid"):
        write(tmp_path / "a" / part / "original_images" / "P1_3.bmp", np.zeros((8, 8)))
        write(tmp_path / "a" / part / "label_images" / "P1_3.bmp", np.array([[191, 128, 255, 0]] * 8).repeat(2, 1))
    np.save(tmp_path / "a" / "resc_cls_labels.npy", {"P1_3.bmp": [1, 0]}, allow_pickle=True)
    found = resc.read(tmp_path / "a")
    scan = found["train"][0]
    assert scan.labels == (1.0, 0.0) and scan.subject == "P1"
    assert resc.read_label(scan, (8, 8))[0].tolist() == [1, 1, 2, 2, 0, 0, 0, 0]
    for i in (1, 2, 10):
        write(tmp_path / "b" / "validset" / "PC7.img" / f"{i}.bmp", np.zeros((8, 8)))
        write(tmp_path / "b" / "validset" / "label" / "PC7_labelMark" / f"{i}.bmp", np.full((8, 8), 128))
    found = resc.read(tmp_path / "b")["validation"]
    assert [s.name for s in found] == ["PC7_001", "PC7_002", "PC7_010"] and (resc.read_label(found[2], (8, 8)) == 2).all()
    with pytest.raises(InputError, match="expected train/original_images"):
        resc.read(tmp_path / "a" / "train")


def tiny_clip(path, width):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    vocabulary = {w: i for i, w in enumerate([*"abcdefghijklmnopqrstuvwxyz-", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz-")])}
    vocabulary |= {"<|startoftext|>": len(vocabulary), "<|endoftext|>": len(vocabulary) + 1}
    path.mkdir()
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    (path / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt")).save_pretrained(path)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        eos_token_id=vocabulary["<|endoftext|>"],
        bos_token_id=vocabulary["<|startoftext|>"],
    )
    CLIPTextModel(config).save_pretrained(path)


def tiny_blip(path):
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    path.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", "a", "black", "and", "white", "photo", "of", "retina", "fluid"]
    (path / "vocab.txt").write_text("\n".join(words))
    text_config = {"vocab_size": len(words), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text_config |= {
        "projection_dim": 8,
        "encoder_hidden_size": 16,
        "bos_token_id": 5,
        "sep_token_id": 3,
        "pad_token_id": 0,
        "eos_token_id": 3,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    }
    model = BlipForConditionalGeneration(BlipConfig(text_config=text_config, vision_config=vision, projection_dim=8))
    model.save_pretrained(path)
    processor = BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), BertTokenizer(str(path / "vocab.txt")))
    processor.save_pretrained(path)


SETTINGS = ["device=cpu", "data.dataset=duke", "data.size=[64, 64]", "data.labels_from_mask=true", "data.layers=zero", "data.validation=1"]
SETTINGS += ["data.healthy=zero", "model.encoder=mit_tiny", "model.drop_path=0.0", "text.labels=random", "text.width=8", "train.steps=2"]
SETTINGS += ["text.captions=none", "text.caption_width=4", "train.batch_size=2", "segment.encoder=mit_tiny", "segment.size=[64, 64]"]
SETTINGS += ["segment.steps=2", "segment.batch_size=2", "train.epochs=1"]


def run(*arguments, settings=()):
    return cli.main([*map(str, arguments), *[a for s in (*SETTINGS, *settings) for a in ("--set", s)]])


def test_chain(folder, tmp_path):
    assert run("run", "oct_multimodal", "--data", folder, "--out", tmp_path / "run") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    quality = summary["stages"]["pseudo_label_quality"]["metrics"]
    assert summary["complete"] and {"label_auc", "pixel_auc", "hit", "chance", "brightness_auc"} <= set(quality)
    assert 0 <= summary["stages"]["sweep"]["metrics"]["threshold"] <= 1 and (tmp_path / "run" / "sweep" / "sweep.csv").is_file()
    assert summary["stages"]["test"]["metrics"]["images"] == 1
    image = next(iter((folder / "images").glob("*1.png")))
    assert run("predict", "oct_multimodal", "--out", tmp_path / "run", "--images", image, "--to", tmp_path / "seen") == 0
    assert Image.open(tmp_path / "seen" / image.name).size == (96, 64)


@pytest.mark.filterwarnings("ignore")
def test_chain_with_texts_generator_and_crops(folder, tmp_path):
    """Label prompts by CLIP, captions by BLIP and CLIP (real classes, tiny random weights), a generator, crops, windows."""
    tiny_clip(tmp_path / "large", 12)
    tiny_clip(tmp_path / "base", 8)
    tiny_blip(tmp_path / "blip")
    settings = [f"text.labels={tmp_path / 'large'}", f"text.captions={tmp_path / 'blip'}", f"text.caption_encoder={tmp_path / 'base'}"]
    settings += ["data.healthy=generator", "generator.size=16", "generator.width=4", "generator.latent=4", "generator.steps=2"]
    settings += ["generator.batch_size=2", "data.crop=[48, 48]", "data.stride=[16, 48]", "data.cover=0.02", "model.exchange_window=2"]
    settings += [
        "segment.network=deeplabv3plus",
        "segment.encoder=resnet18",
        "masks.threshold=0.4",
        "data.validation=0",
        "text.new_tokens=4",
    ]
    assert run("run", "oct_multimodal", "--data", folder, "--out", tmp_path / "run", settings=settings) == 0
    out = tmp_path / "run"
    caption = json.loads((out / "captions" / "Subject_01_annotated00.json").read_text())["caption"]
    assert isinstance(caption, str) and np.load(out / "captions" / "Subject_01_annotated00.npy").shape == (8,)
    assert np.load(out / "label_text" / "labels.npy").shape == (2, 12)
    assert Image.open(out / "healthy" / "Subject_01_annotated00.png").size == (96, 64)
    assert len(list((out / "pseudo_labels").glob("*.png"))) >= 2
    (tmp_path / "large" / "config.json").write_text("{}")
    other = [f"text.labels={tmp_path / 'nowhere'}"]
    assert run("run", "oct_multimodal", "--data", folder, "--out", tmp_path / "second", settings=other) == 2


def test_what_is_missing_is_said(folder, tmp_path, capsys):
    for settings, message in (
        (["data.layers=files"], "it has no layer map; set data.layers=zero"),
        (["data.healthy=files"], "it has no healthy counterpart; set data.healthy=generator or zero"),
        (["data.labels_from_mask=false"], "no label is stated; set data.labels_from_mask=true"),
        (["text.prompts=[one]"], "text.prompts: expected 2, of healthy and of each lesion, got 1"),
    ):
        assert run("run", "oct_multimodal", "--data", folder, "--out", tmp_path / settings[0].partition("=")[0], settings=settings) != 0
        assert message in capsys.readouterr().err


def test_defaults_of_the_paper():
    paper, small = configs.load(OctConfig), configs.load(OctConfig, "configs/oct_multimodal_small.yaml")
    assert (paper.train.lr, paper.train.batch_size, paper.train.epochs, paper.data.size) == (1e-4, 8, 30, (512, 512))
    assert paper.model.encoder == "mit_b2" and paper.model.residual == "query" and paper.model.heads == 4
    assert paper.masks.weights == (0.4, 0.3, 0.3) and paper.masks.step == 0.01 and small.model.encoder == "mit_tiny"
    assert text.random_vectors(2, 3, 0).shape == (2, 3) and wk.CrossAttentionExchange is not None
