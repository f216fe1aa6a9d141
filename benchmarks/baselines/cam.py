"""Min–max normalisation of class activation maps as eager PyTorch code writes it."""

from torch import Tensor


def eager(cam: Tensor, *, eps: float = 1e-7) -> Tensor:
    cam = cam.relu()
    low, high = cam.amin((-2, -1), keepdim=True), cam.amax((-2, -1), keepdim=True)
    return (cam - low) / (high - low).clamp_min(eps)
