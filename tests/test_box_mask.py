"""What the shared matrix cannot hold: independent witnesses (OpenCV's contours, SciPy's labels) on adversarial maps."""

import numpy as np
import pytest
import torch

import wsss_kernels as wk
from wsss_kernels import registry
from wsss_kernels.ops.box_mask import spec as maps
from wsss_kernels.testing import runnable_backends

cv2, ndimage = pytest.importorskip("cv2"), pytest.importorskip("scipy.ndimage")

BACKENDS = [*runnable_backends(registry.spec("box_mask")), ("reference", "cpu")]
SIZES = [(1, 1), (1, 70), (70, 1), (2, 2), (14, 14), (13, 17), (7, 63), (7, 64), (7, 65), (9, 127), (9, 128), (9, 129), (67, 11), (3, 517)]


CALLS = [(*backend, size) for backend in BACKENDS for size in SIZES if backend[0] != "reference" or size[0] * size[1] < 250]


def contours(cam: np.ndarray, threshold: float, clip_border: bool) -> np.ndarray:
    height, width = cam.shape
    product = np.nan_to_num(np.float32(255) * cam.astype(np.float32), nan=0.0, posinf=255.0, neginf=0.0)
    level = np.clip(product, 0, 255).astype(np.uint8)
    foreground = (level > int(threshold * float(level.max()))).astype(np.uint8)
    mask = np.zeros((height, width), dtype=np.float32)
    for contour in cv2.findContours(foreground, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]:
        x, y, w, h = cv2.boundingRect(contour)
        mask[y : min(y + h, height - clip_border), x : min(x + w, width - clip_border)] = 1
    return mask


def shapes(height: int, width: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(height * 1000 + width)
    noise = torch.rand(height, width, generator=g)
    return {
        "full": torch.ones(height, width),
        "empty": torch.zeros(height, width),
        "single pixel": torch.zeros(height, width).index_fill_(0, torch.tensor([height // 2]), 0.7) * (torch.arange(width) == width - 1),
        "diagonal": torch.eye(height, width),
        "anti-diagonal": torch.eye(height, width).flip(1),
        "zigzag": ((torch.arange(height)[:, None] - torch.arange(width)).abs() % 4 == 1).float(),
        "checkerboard": maps.checkerboard(height, width).float(),
        "isolated pixels": maps.isolated(height, width).float(),
        "spiral": maps.spiral(height, width).float(),
        "combs": maps.combs(height, width).float(),
        "rings": torch.maximum((torch.arange(height)[:, None] - height // 2).abs(), (torch.arange(width) - width // 2).abs()).float() % 2,
        "noise": noise,
        "sparse noise": (noise > 0.8).float() * noise,
        "dense noise": (noise > 0.3).float(),
        "blobs": maps.blobs(height, width, noise=0.5).float(),
        "out of range": 4 * noise - 2,
        "NaN and infinity": noise.where(noise > 0.3, torch.nan)
        .where(noise < 0.9, torch.inf)
        .where((noise < 0.5) | (noise > 0.6), -torch.inf),
    }


@pytest.mark.parametrize(("backend", "device", "size"), CALLS)
def test_boxes_are_those_of_the_contours(backend, device, size):
    for name, cam in shapes(*size).items():
        for threshold in (0.0, 0.4, 0.85):
            for clip_border in (False, True):
                mask = wk.box_mask(cam.to(device), threshold, clip_border=clip_border, backend=backend).cpu().numpy()
                assert np.array_equal(mask, contours(cam.numpy(), threshold, clip_border)), (name, threshold, clip_border)


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize(("backend", "device", "size"), CALLS)
def test_labels_are_those_of_scipy(backend, device, connectivity, size):
    structure = ndimage.generate_binary_structure(2, connectivity // 4)
    for name, cam in shapes(*size).items():
        for mask in (cam > 0.5, cam.isnan() | (cam != 0)):
            label = wk.connected_components(mask.to(device), connectivity=connectivity, backend=backend)
            assert label.dtype == torch.int32
            assert np.array_equal(label.cpu().numpy(), ndimage.label(mask.numpy(), structure)[0]), name


@pytest.mark.parametrize(("backend", "device"), BACKENDS[:-1])
@pytest.mark.parametrize("share", [0.05, 0.4, 0.6])
def test_large_noise(backend, device, share):
    """Tens of thousands of components and boxes in one map."""
    size = (40, 531) if device == "cpu" and backend != "cpu" else (700, 901)  # an emulator takes minutes for the larger one
    cam = (torch.rand(size, generator=torch.Generator().manual_seed(1)) < share).float()
    assert np.array_equal(wk.box_mask(cam.to(device), backend=backend).cpu().numpy(), contours(cam.numpy(), 0.4, False))
    structure = ndimage.generate_binary_structure(2, 2)
    label = wk.connected_components(cam.to(device), backend=backend).cpu().numpy()
    assert np.array_equal(label, ndimage.label(cam.numpy(), structure)[0])


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_every_grey_level_is_compared_exactly(backend, device):
    levels = (torch.arange(256, dtype=torch.float64) / 255 + 1e-9).clamp(max=1).view(-1, 1, 1)
    cam = torch.cat([levels, torch.ones_like(levels), torch.zeros_like(levels)], dim=-1).to(device)
    for threshold in (0.0, 0.1, 0.25, 0.4, 0.7, 0.999):
        mask = wk.box_mask(cam, threshold, backend=backend).cpu()
        assert torch.equal(mask[:, 0, 0] == 1, torch.arange(256) > int(threshold * 255)), threshold


@pytest.mark.parametrize(("threshold", "expected"), [(-1.0, 1.0), (-1e-9, None), (1.0, 0.0), (1.5, 0.0), (1e300, 0.0), (-1e300, 1.0)])
def test_thresholds_outside_zero_to_one(threshold, expected):
    cam = torch.tensor([[0.5, 0.0, 1.0]])
    mask = wk.box_mask(cam, threshold)
    assert torch.equal(mask, wk.box_mask(cam, threshold, backend="reference"))
    assert mask.tolist() == [[1, 0, 1] if expected is None else [expected] * 3]


def test_autocast_decides_on_the_map_as_given():
    cam = torch.rand(4, 28, 28, generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mask = wk.box_mask(cam, 0.6)
    assert mask.dtype == torch.bfloat16 and torch.equal(mask.float(), wk.box_mask(cam, 0.6))
