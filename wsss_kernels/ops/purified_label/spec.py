from __future__ import annotations

import torch
from torch import Tensor

from ..._spec import Case, Malformed, OpSpec, Sample, Sweep, generator, randint, randn
from . import api, reference


def _pair(batch: int, classes: int, height: int, width: int, *, ignored: bool = True) -> tuple[Tensor, Tensor]:
    label = randint(classes, batch, height, width, seed=1)
    if ignored:
        label = label.masked_fill(randint(4, batch, height, width, seed=2) == 0, 255)
    return randn(batch, classes, height, width), label


def samples() -> list[Sample]:
    def sample(note: str, *size: int, kind: torch.dtype = torch.int64, scale: float = 1.0, ignored: bool = True, **options) -> Sample:
        logit, label = _pair(*size, ignored=ignored)
        # the loss is differentiated through l alone, so that finite differences of it give something else
        return Sample(note, (scale * logit, label.to(kind)), options, small=logit.numel() <= 600, gradcheck=False)

    logit, label = _pair(4, 3, 5, 7)
    label[0], label[1, :, :3], label[1, :, 3:], label[2] = 2, 255, 1, 255
    return [
        sample("typical", 2, 3, 5, 7),
        sample("nothing ignored", 2, 2, 6, 5, ignored=False),
        sample("more pixels than a row of registers", 1, 3, 17, 31),
        sample("more pixels than a chunk", 1, 2, 67, 71),
        sample("many classes", 1, 23, 5, 3),
        sample("uint8 labels", 2, 3, 5, 7, kind=torch.uint8),
        sample("int32 labels", 2, 3, 5, 7, kind=torch.int32),
        sample("one class", 2, 1, 3, 4),
        sample("large logits", 1, 3, 5, 7, scale=16.0),
        sample("1×1", 3, 2, 1, 1, ignored=False),
        sample("empty batch", 0, 3, 4, 5),
        Sample("single-class and empty images", (logit, label), gradcheck=False),
        Sample("single-class images, whose weights are 1", (logit[:2], torch.where(label[:2] == 255, 255, 1))),
        Sample("nothing valid", (logit, torch.full_like(label, 255)), gradcheck=False),
        Sample("other ignore_index", (logit, label.masked_fill(label == 255, -1)), {"ignore_index": -1}, gradcheck=False),
    ]


def malformed() -> list[Malformed]:
    logit, label = _pair(2, 3, 4, 5)
    logit = logit.float()
    return [
        Malformed("rank", (logit[0], label), {}, ValueError, "logit must be .* B×C×H×W, got float32 of shape 3×4×5"),
        Malformed("integer", (logit.long(), label), {}, TypeError, "logit must be a floating-point tensor .* got int64"),
        Malformed("floating label", (logit, label.float()), {}, TypeError, "label must be an int64, int32 or uint8 tensor .* got float32"),
        Malformed("boolean label", (logit, label > 1), {}, TypeError, "label must be an int64, int32 or uint8 tensor .* got bool"),
        Malformed("label rank", (logit, label[:, None]), {}, ValueError, "label must be .* B×H×W, got int64 of shape 2×1×4×5"),
        Malformed("sizes", (logit, label[:, :3]), {}, ValueError, "logit and label must have the same batch size, height and width"),
        Malformed("no class", (logit[:, :0], label), {}, ValueError, "logit must have at least one class"),
        Malformed("empty map", (logit[..., :0], label[..., :0]), {}, ValueError, "logit must be .* a spatial extent must not be 0"),
        Malformed("ignore_index", (logit, label), {"ignore_index": None}, TypeError, "ignore_index must be an int, got None"),
    ]


def ignored_pixels_are_cropped_away(run) -> None:
    """Ignored columns give what the map without them gives."""
    logit, label = _pair(2, 3, 6, 9, ignored=False)
    ignored = label.clone()
    ignored[:, :, 5:] = 255
    torch.testing.assert_close(run(logit, ignored), run(logit[..., :5], label[..., :5]), rtol=1e-12, atol=0)


def images_are_averaged(run) -> None:
    logit, label = _pair(3, 3, 5, 6)
    each = [run(logit[i : i + 1], label[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(run(logit, label), sum(each) / 3, rtol=1e-12, atol=0)
    label[1] = 255
    torch.testing.assert_close(run(logit, label), (each[0] + each[2]) / 3, rtol=1e-12, atol=0)


def one_class_is_plain_cross_entropy(run) -> None:
    logit, label = _pair(2, 3, 5, 6)
    label = torch.where(label == 255, label, 1)
    wanted = torch.stack([torch.nn.functional.cross_entropy(x[None], y[None], ignore_index=255) for x, y in zip(logit, label, strict=True)])
    torch.testing.assert_close(run(logit, label).cpu(), wanted.mean(), rtol=1e-12, atol=0)


def _case(batch: int, classes: int, size: int) -> Case:
    def make():
        g = generator(0)
        logit = 3 * torch.randn(batch, classes, size, size, generator=g)
        label = torch.randint(classes, (batch, size, size), generator=g)
        return (logit, label.masked_fill(torch.rand(label.shape, generator=g) < 0.2, 255)), {}

    return Case(f"{batch}x{classes}x{size}x{size}", make, backward=True)


SPECS = (
    OpSpec(
        operator=api.PURIFIED_OP,
        public=api.purified_label_loss,
        reference=reference.purified_label_loss,
        paper="M2 Eq. 10–11",
        samples=samples,
        gradients=("logit",),
        float32_outputs=(0,),
        autocast="fp32",
        invariants=(ignored_pixels_are_cropped_away, images_are_averaged, one_class_is_plain_cross_entropy),
        malformed=malformed,
        paths={
            "cpu": ("purified_label.fwd", "purified_label.bwd"),
            "cuda": ("purified_label.cuda.fwd", "purified_label.cuda.bwd"),
        },
        cases=(_case(4, 2, 224), _case(4, 21, 112)),
        sweeps=(
            Sweep("H·W", {n * n: _case(4, 2, n) for n in (56, 112, 224, 448)}, 1),
            Sweep("classes", {k: _case(4, k, 112) for k in (2, 5, 21, 41)}, 1),
        ),
        baselines=("eager",),
        flops=lambda logit, label, **_: 30.0 * logit.numel(),
        bytes_moved=lambda logit, label, **_: 4.0 * logit.numel() + 8.0 * label.numel(),
        peak_bytes=lambda logit, label, **_: 12 * label.numel(),
    ),
)
