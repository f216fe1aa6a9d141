"""M4: refinement of a batch, its options and switches, the losses, and whole steps with fused and reference kernels."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import wsss_kernels as wk
from wsss_models.unicl_affseg import inference, method
from wsss_models.unicl_affseg.cam import grad_cam
from wsss_models.unicl_affseg.config import Data, Decoder, Refine, Train, UniclConfig
from wsss_models.unicl_affseg.data import augment
from wsss_models.unicl_affseg.decoder import AffinityDecoder, selected
from wsss_models.unicl_affseg.encoder import UniCL
from wsss_models.unicl_affseg.losses import segmentation_loss, total_loss
from wsss_models.unicl_affseg.pseudo_label import pixel_scores, propagate, pseudo_labels, refine
from wsss_models.unicl_affseg.refinement_check import degraded_cams

from .parity import assert_steps_agree
from .test_unicl_encoder import TINY, VOCABULARY

QUICK = Refine(par_iter=3, dilations=(1, 2))


@pytest.fixture
def made():
    """CAMs, F_u, features of six blocks, image and present classes of three images."""
    torch.manual_seed(0)
    features = [torch.randn(3, 8, 5, 4, dtype=torch.float64) for _ in range(6)]
    present = torch.zeros(3, 20, dtype=torch.bool)
    present[0, [1, 4]] = present[1, 7] = present[2, [4, 19]] = True
    cams = torch.rand(3, 20, 3, 2, dtype=torch.float64) * present[:, :, None, None]
    return cams, torch.randn(3, 6, 5, 4, dtype=torch.float64) / 2, features, torch.randn(3, 3, 40, 32, dtype=torch.float64), present


def walk(cams, fused, features, config):
    """Eq. 3.8–3.16 of one image, matrix by matrix. `cams` K×h×w."""
    tokens = [nn.functional.normalize(f.flatten(1), dim=0) for f in features]
    maps = torch.stack([(t.T @ t).clamp(min=0) for t in tokens])
    if fused is None:
        refining = maps[-config.warmup_maps :].mean(0)
    else:
        f = fused.flatten(1)
        affinity = torch.sigmoid(f.T @ f / (len(f) ** 0.5 if config.scaled else 1))
        later = maps[int(config.first_layer * len(maps)) :]
        deviation = (affinity - later if config.signed else (affinity - later).abs()).sum((1, 2))
        refining = affinity * later[deviation <= deviation.mean()].mean(0)
    for _ in range(config.sinkhorn_iter):
        refining = refining / refining.sum(0, keepdim=True)
        refining = refining / refining.sum(1, keepdim=True)
    step = torch.matrix_power((refining + refining.T) / 2, config.power)
    boxes = wk.box_mask(cams, config.threshold, clip_border=config.clip_border)
    boxes[boxes.amax((1, 2)) == 0] = 1
    if config.mask_side == "source":
        found = (step @ (boxes * cams).flatten(1).T).T.reshape(cams.shape)
    else:
        found = boxes * (step @ cams.flatten(1).T).T.reshape(cams.shape)
    low, high = (getattr(found, f"a{m}")((1, 2), keepdim=True) for m in ("min", "max"))
    return (found - low) / (high - low).clamp(min=1e-7)


CHANGES = [{}, {"signed": True}, {"scaled": True}, {"mask_side": "target"}, {"clip_border": True}, {"first_layer": 0.0}, {"power": 3}]


@pytest.mark.parametrize("change", [*CHANGES, {"warmup_maps": 3}, {"sinkhorn_iter": 0}])
def test_refinement_is_the_printed_one(made, change):
    _, fused, features, _, _ = made
    config, cams = replace(Refine(), **change), torch.rand(3, 2, 5, 4, dtype=torch.float64)
    cams[:, 0, :2] = cams[:, 0, :, 3:] = 0
    decoder = None if "warmup_maps" in change else fused
    found = propagate(cams, decoder, features, config)
    for b in range(3):
        expected = walk(cams[b], None if decoder is None else fused[b], [f[b] for f in features], config)
        torch.testing.assert_close(found[b], expected, atol=1e-9, rtol=1e-9)
    if change:
        plain = propagate(cams, fused, features, Refine())
        assert not torch.allclose(found, plain, atol=1e-4)


def test_features_of_several_widths_are_compared_by_their_affinities(made):
    _, fused, features, _, _ = made
    cams = torch.rand(3, 2, 5, 4, dtype=torch.float64)
    padded = [torch.cat((f, torch.zeros_like(f)), dim=1) if i else f for i, f in enumerate(features)]  # the same cosines
    torch.testing.assert_close(propagate(cams, fused, padded, Refine()), propagate(cams, fused, features, Refine()))


def test_empty_box_means_the_whole_grid(made):
    _, fused, features, _, _ = made
    cams = torch.rand(3, 2, 5, 4, dtype=torch.float64)
    config = Refine(threshold=1.0)  # nothing exceeds the maximum
    assert (wk.box_mask(cams, config.threshold) == 0).all()
    tokens = torch.stack([f.flatten(2) for f in features], 1)
    expected = wk.affinity_random_walk(cams, fused.flatten(2), tokens, None, first_layer=3)
    torch.testing.assert_close(propagate(cams, fused, features, config), wk.normalize_cam(expected))


@pytest.mark.parametrize("warm", [True, False])
def test_batch_is_image_by_image(made, warm):
    cams, fused, features, image, present = made
    fused = None if warm else fused
    found = pseudo_labels(cams, fused, features, image, present, QUICK)
    assert found.shape == (3, 40, 32) and found.dtype == torch.int64
    for b in range(3):
        own = slice(b, b + 1)
        alone = pseudo_labels(cams[own], fused if warm else fused[own], [f[own] for f in features], image[own], present[own], QUICK)
        assert torch.equal(alone[0], found[b])
        assert set(found[b].unique().tolist()) <= {0, *(present[b].nonzero()[:, 0] + 1).tolist()} and found[b].max() > 0


def test_no_class_is_all_background(made):
    cams, fused, features, image, present = made
    found = pseudo_labels(cams, fused, features, image, torch.zeros_like(present), QUICK)
    assert found.shape == (3, 40, 32) and (found == 0).all()


def test_background_power():
    cams, image, present = torch.full((1, 1, 2, 2), 0.4), torch.rand(1, 3, 8, 8), torch.ones(1, 1, dtype=torch.bool)
    for alpha, shown, expected in ((1.0, present, 0), (2.0, present, 1), (2.0, ~present, 0)):
        assert (pixel_scores(cams, image, shown, replace(QUICK, alpha=alpha)).argmax(1) == expected).all()


def test_warm_up_switch(monkeypatch):
    """Up to `refine.warmup` steps the decoder's affinity has no part, neither in training nor for the labels that are written."""
    given = []

    def record(cams, fused, blocks, image, present, config):
        given.append(fused)
        return torch.zeros(len(image), *image.shape[-2:], dtype=torch.int64)

    torch.manual_seed(0)
    unicl, text, config = UniCL(TINY, VOCABULARY), torch.randn(45, 12), UniclConfig(encoder=TINY, refine=Refine(warmup=5))
    decoder, device = method.make_decoder(replace(config, decoder=Decoder(width=8, heads=2))).eval(), torch.device("cpu")
    present = torch.ones(1, 20, dtype=torch.bool)
    monkeypatch.setattr(method, "pseudo_labels", record)
    monkeypatch.setattr(inference, "pseudo_labels", record)
    image = torch.randn(1, 3, 64, 64)
    features, fused = unicl.features(image), torch.randn(1, 8, 4, 4, requires_grad=True)
    make = method.targets(SimpleNamespace(config=config), unicl, text)
    mask = torch.zeros(1, 64, 64, dtype=torch.int64)
    mask[:, :, 40:] = 255
    for steps in (4, 5):
        label = make(features, fused, steps, image, mask, present)
        assert (label[..., 40:] == 255).all() and (label[..., :40] == 0).all()
        decoder.steps.fill_(steps)
        inference.pseudo_label(unicl, text, decoder, np.zeros((40, 60, 3), np.uint8), present[0], config, device)
    assert [g is None for g in given] == [True, True, False, False] and not given[2].requires_grad


def test_padded_area_is_ignored():
    torch.manual_seed(0)
    data, image = Data(crop=64, scale=(0.5, 0.5), flip=False), torch.ones(3, 60, 80)
    for fit, side in ((False, (30, 40)), (True, (24, 32))):
        pixels, mask = augment(image, torch.full((60, 80), 3), replace(data, fit=fit))
        assert pixels.shape == (3, 64, 64) and mask.shape == (64, 64)
        assert ((mask == 3).sum() == side[0] * side[1]) and torch.equal(mask == 255, pixels[0] == 0)
    assert torch.equal(mask, mask.flip(0)) and torch.equal(mask, mask.flip(1))  # `fit` centres
    logits = torch.randn(1, 21, 64, 64, requires_grad=True)
    segmentation_loss(logits, mask[None]).backward()
    assert (logits.grad[0, :, mask == 255] == 0).all() and (logits.grad[0, :, mask == 3] != 0).any()


def test_segmentation_loss_by_hand():
    logits = torch.zeros(1, 21, 1, 4)
    logits[0, 0, 0, 0] = np.log(4.0)  # probability 4 / 24 of the background
    logits[0, 3, 0, 2] = np.log(20.0)  # one half of class 3
    label = torch.tensor([[[0, 0, 3, 255]]])
    expected = (np.log(6) + np.log(21)) / 2 / 2 + np.log(2) / 2
    assert float(segmentation_loss(logits, label)) == pytest.approx(expected, rel=1e-6)
    logits.requires_grad_()
    only = segmentation_loss(logits, torch.tensor([[[0, 0, 255, 255]]]))
    assert float(only.detach()) == pytest.approx((np.log(6) + np.log(21)) / 4, rel=1e-6)
    only.backward()
    assert logits.grad.isfinite().all()
    assert float(segmentation_loss(logits.detach(), torch.full_like(label, 255))) == 0


@pytest.mark.parametrize("kind", ["balanced", "bce"])
@pytest.mark.parametrize("radius", [1, None])
def test_total_loss_by_hand(kind, radius):
    torch.manual_seed(0)
    fused, label = torch.randn(1, 5, 2, 3), torch.tensor([[[0, 7, 7], [0, 255, 7]]])
    recipe = Train(affinity_kind=kind, radius=radius, affinity_weight=0.3)
    affinity, flat = torch.sigmoid(fused[0].flatten(1).T @ fused[0].flatten(1)), label.flatten().tolist()
    positive, negative = [], []
    for i in range(6):
        for j in range(6):
            near = radius is None or max(abs(i // 3 - j // 3), abs(i % 3 - j % 3)) <= radius
            if near and 255 not in (flat[i], flat[j]):
                (positive if flat[i] == flat[j] else negative).append(float(affinity[i, j]))
    if kind == "balanced":
        expected = sum(1 - a for a in positive) / (len(positive) + 1) / 2 + sum(negative) / (len(negative) + 1) / 2
    else:
        expected = -(sum(np.log(a) for a in positive) + sum(np.log1p(-a) for a in negative)) / (len(positive) + len(negative))
    found = total_loss(torch.randn(1, 21, 2, 3), fused, label, recipe)
    assert float(found["affinity"]) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(found["loss"], found["segmentation"] + 0.3 * found["affinity"])


def test_degraded_cams():
    mask = torch.zeros(96, 128, dtype=torch.int64)
    mask[16:80, 32:112], mask[:4, :4], mask[90:] = 5, 9, 255
    cams, shown = degraded_cams(mask)
    assert cams.shape == (20, 6, 8) and shown.nonzero()[:, 0].tolist() == [4, 8]
    assert cams[4].max() == 1 and cams[4].argmax() in (2 * 8 + 4, 3 * 8 + 4) and cams[8].argmax() == 0 and (cams[~shown] == 0).all()
    large = nn.functional.interpolate(cams[None], mask.shape, mode="bilinear")[0, 4]
    assert 0 < (large > 0.5).sum() < (mask == 5).sum() and (mask[large > 0.5] == 5).all()


class Student(nn.Module):
    """Encoder and decoder together, so that both have one precision."""

    def __init__(self):
        super().__init__()
        self.unicl = UniCL(TINY, VOCABULARY)
        self.unicl.text_encoder = None
        widths = [TINY.embed_dim * 4] * TINY.depths[2]
        self.decoder = AffinityDecoder(Decoder(width=8, heads=2, layers=1, dropout=0.0), widths, 21)


def test_steps_fused_and_reference():
    """Pixels whose two best classes are closer than rounding decides have no label that could be compared, and are ignored."""
    torch.manual_seed(0)
    student, recipe, config, certain = Student(), Train(), replace(QUICK, warmup=10), {}
    student.unicl.logit_scale.zero_()  # a saturated softmax has no gradient that float32 could hold
    text = nn.functional.normalize(torch.randn(45, 12, dtype=torch.float64), dim=1)

    def loss(model, batch):
        image, present, number = batch
        features = model.unicl.features(image)
        blocks = selected(features.blocks, "stage3")
        logits, fused = model.decoder(blocks)
        cams = grad_cam(model.unicl, features, text.to(image.dtype), present)
        scores, names = refine(cams, fused.detach() if number >= config.warmup else None, blocks, image, present, config)
        best = scores.topk(2, dim=1).values
        sure = certain.setdefault(number, best[:, 0] - best[:, 1] > 1e-3)  # the first call of a step is the truth
        return total_loss(logits, fused, names[scores.argmax(1)].where(sure, 255), recipe)["loss"]

    batches = [(torch.randn(2, 3, 64, 64), torch.arange(20).eq(number) | (torch.rand(2, 20) < 0.1), number) for number in range(20)]
    assert_steps_agree(student, loss, batches, lr=0.01)
    assert len(certain) == 20 and torch.stack(list(certain.values())).double().mean() > 0.9
