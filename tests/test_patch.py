"""`wsss_kernels.patch` on replicas of the released modules, written from the equations."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wsss_kernels as wk

DIRECTIONS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]


def one_hot(positions, sign=1.0):
    kernel = torch.zeros(len(positions), 1, 3, 3)
    for k, (dy, dx) in enumerate(positions):
        kernel[k, 0, 1 + dy, 1 + dx] = sign
    return kernel


def filtered(x, kernel, dilations):
    """`Tensor[B, Q, H, W]` → `Tensor[B, Q, P, H, W]` by dilated convolutions of the padded map."""
    b, q, h, w = x.shape
    planes = [F.conv2d(F.pad(x.flatten(0, 1)[:, None], [d] * 4, mode="replicate"), kernel, dilation=d) for d in dilations]
    return torch.cat(planes, dim=1).view(b, q, -1, h, w)


class PAR(nn.Module):
    """AFA's; WeCLIP's with `image_to_mask`."""

    def __init__(self, dilations, num_iter, image_to_mask=False):
        super().__init__()
        self.dilations, self.num_iter, self.image_to_mask = dilations, num_iter, image_to_mask
        self.register_buffer("kernel", one_hot(DIRECTIONS))
        self.w1, self.w2 = 0.3, 0.01

    def forward(self, imgs, masks):
        if self.image_to_mask:
            imgs = F.interpolate(imgs, size=masks.shape[-2:], mode="bilinear", align_corners=True)
        else:
            masks = F.interpolate(masks, size=imgs.shape[-2:], mode="bilinear", align_corners=True)
        near = filtered(imgs, self.kernel, self.dilations)
        logit = -(((near - imgs[:, :, None]).abs() / (near.std(2, keepdim=True) + 1e-8) / self.w1) ** 2).mean(1, keepdim=True)
        distance = torch.tensor([d * (2**0.5 if dy and dx else 1.0) for d in self.dilations for dy, dx in DIRECTIONS]).to(imgs)
        position = -((distance / (distance.std() + 1e-8) / self.w1) ** 2)
        weight = logit.softmax(2) + self.w2 * position.softmax(0)[None, None, :, None, None]
        for _ in range(self.num_iter):
            masks = (filtered(masks, self.kernel, self.dilations) * weight).sum(2)
        return masks


class Affinity(nn.Module):
    def __init__(self, kernel, dilations):
        super().__init__()
        self.dilations = dilations
        self.register_buffer("kernel", kernel)

    def forward(self, x):
        return filtered(x, self.kernel, self.dilations)


class PAMR(nn.Module):
    def __init__(self, num_iter=1, dilations=(1,)):
        super().__init__()
        self.num_iter = num_iter
        self.aff_x = Affinity(one_hot([(0, 0)] * 8) + one_hot(DIRECTIONS, -1.0), dilations)
        self.aff_m = Affinity(one_hot(DIRECTIONS), dilations)
        self.aff_std = Affinity(one_hot(sorted([*DIRECTIONS, (0, 0)])), dilations)

    def forward(self, x, mask):
        mask = F.interpolate(mask, size=x.shape[-2:], mode="bilinear", align_corners=True)
        deviation = self.aff_std(x).std(2, keepdim=True)
        weight = (-self.aff_x(x).abs() / (1e-8 + 0.1 * deviation)).mean(1, keepdim=True).softmax(2)
        for _ in range(self.num_iter):
            mask = (self.aff_m(mask) * weight).sum(2)
        return mask


class CrissCrossAttention(nn.Module):
    def __init__(self, in_dim, mask_own_position=True):
        super().__init__()
        self.query_conv, self.key_conv = nn.Conv2d(in_dim, in_dim // 8, 1), nn.Conv2d(in_dim, in_dim // 8, 1)
        self.value_conv = nn.Conv2d(in_dim, in_dim, 1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.mask_own_position = mask_own_position

    def forward(self, x):
        q, k, v = self.query_conv(x), self.key_conv(x), self.value_conv(x)
        column, row = torch.einsum("bcyx,bcjx->byxj", q, k), torch.einsum("bcyx,bcyi->byxi", q, k)
        if self.mask_own_position:
            column = column.masked_fill(torch.eye(x.shape[2], dtype=torch.bool)[:, None], -torch.inf)
        weight = torch.cat([column, row], 3).softmax(3)
        along_column = torch.einsum("byxj,bcjx->bcyx", weight[..., : x.shape[2]], v)
        return self.gamma * (along_column + torch.einsum("byxi,bcyi->bcyx", weight[..., x.shape[2] :], v)) + x


class Model(nn.Module):
    """Two names for one module, and one in a container."""

    def __init__(self):
        super().__init__()
        self.par, self.weclip, self.pamr = PAR([1, 2, 4], 3), PAR([1, 2], 2, image_to_mask=True), PAMR(2, [1, 2])
        self.head = nn.Sequential(nn.Conv2d(3, 16, 1), CrissCrossAttention(16))
        self.again = self.head[1]

    def forward(self, image, mask):
        return self.par(image, mask), self.weclip(image, mask), self.pamr(image, mask), self.again(self.head(image))


def trained():
    model = Model().eval()
    nn.init.constant_(model.again.gamma, 0.7)
    return model


INPUTS = torch.rand(2, 3, 20, 17), torch.rand(2, 4, 9, 8)


def test_replaces_every_class_and_agrees():
    model = trained()
    wanted = model(*INPUTS)
    report = wk.patch(model)
    assert not report.skipped and {r.kind for r in report.replaced} == {"PAR", "PAMR", "CrissCrossAttention"}
    assert {n for r in report.replaced for n in r.names} == {"par", "weclip", "pamr", "head.1", "again"}
    assert (model.par.resize, model.weclip.resize, model.pamr.resize) == ("mask", "image", "mask")
    assert isinstance(model.par, wk.PAR) and isinstance(model.pamr, wk.PAMR) and isinstance(model.again, wk.CrissCrossAttention)
    assert model.again is model.head[1] and not model.again.training
    for a, b in zip(model(*INPUTS), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert "replaced 4, skipped 0" in str(report) and "resize='image'" in str(report)


def test_undo():
    model = trained()
    before = dict(model.named_modules())
    report = wk.patch(model)
    assert dict(model.named_modules()).keys() != before.keys() or model.par is not before["par"]
    model.train()
    report.undo()
    report.undo()
    after = dict(model.named_modules())
    assert after.keys() == before.keys() and all(after[name] is module for name, module in before.items())
    assert model.par.training


def test_state_dict_round_trip():
    model, patched = trained(), Model()
    wk.patch(patched)
    assert patched.state_dict().keys() == model.state_dict().keys()
    patched.load_state_dict(model.state_dict())
    for a, b in zip(patched(*INPUTS), model(*INPUTS), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    back = Model()
    back.load_state_dict(patched.state_dict())


def test_parameters_stay_the_same_objects():
    model = trained()
    parameters = [id(p) for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wk.patch(model)
    assert sorted(id(p) for p in model.parameters()) == sorted(parameters)
    gamma = model.again.gamma.clone()
    model.head(INPUTS[0]).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.again.gamma, gamma)


def test_leaves_alone_what_behaves_otherwise():
    model = nn.ModuleDict({"own": CrissCrossAttention(8, mask_own_position=False), "par": PAR([1], 1), "hooked": PAMR()})
    model["par"].w1 = 0.5
    model["hooked"].register_forward_hook(lambda *_: None)
    report = wk.patch(model)
    assert not report.replaced and [name for name, _ in report.skipped] == ["own", "par", "hooked"]
    reasons = dict(report.skipped)
    assert "differs from ours" in reasons["own"] and "differs from ours" in reasons["par"] and reasons["hooked"] == "it has hooks"


def test_leaves_alone_namesakes():
    other = type("PAR", (nn.Linear,), {})(2, 3)
    broken = type("PAMR", (nn.Module,), {})()
    report = wk.patch(nn.Sequential(other, broken, CrissCrossAttention(8).query_conv))
    assert not report.replaced and len(report.skipped) == 2 and "no attribute" in str(report)
    assert wk.patch(PAR([1], 1)).skipped[0][1].startswith("it is the model itself")
    assert not wk.patch(nn.Sequential(wk.PAR([1], 1))).skipped
    with pytest.raises(TypeError, match="patch: model must be an nn.Module, got 3"):
        wk.patch(3)
