"""Grad-CAM of the last block of UniCL's image encoder, for all present classes of a batch at once (§3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from .encoder import Features, UniCL, wide


def grad_cam(model: UniCL, features: Features, text: Tensor, present: Tensor) -> Tensor:
    """CAMs of the classes that an image shows; zeros for the others.

    The score of a class is its softmax probability among the image's classes and all background words (CLIP-ES), so that
    what explains the background does not light up. Activations are those of the last block's first LayerNorm, weights the
    spatial means of their gradients, the sum is rectified.

    Args:
        features: of B images.
        text: `Tensor[20 + backgrounds, D]`, unit vectors of the classes, then of the background words.
        present: `Tensor[B, 20]` bool.

    Returns:
        `Tensor[B, 20, h, w]`, ≥ 0, not normalised; the grid of the last stage.
    """
    images, classes = present.nonzero(as_tuple=True)
    tokens = wide(features.last)
    cams = tokens.new_zeros(*present.shape, *tokens.shape[1:3])
    if len(images) == 0:
        return cams
    with torch.enable_grad(), torch.autocast(tokens.device.type, enabled=False):
        block, kept = model.image_encoder.layers[-1].blocks[-1], []
        hook = block.norm1.register_forward_hook(lambda module, given, made: kept.append(made))
        try:
            # One copy of an image's tokens for each of its classes: one backward pass gives all gradients.
            embedding = model.embed(block(tokens[images].requires_grad_()))
        finally:
            hook.remove()
        logits = model.logit_scale.exp() * embedding @ text.T
        words = torch.ones(len(images), text.shape[0] - present.shape[1], dtype=torch.bool, device=text.device)
        allowed = torch.cat((present[images], words), dim=1)
        score = logits.masked_fill(~allowed, -torch.inf).softmax(dim=1).gather(1, classes[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, kept)
    weight = gradient.mean(dim=(1, 2), keepdim=True)
    cams[images, classes] = (weight * kept[0].detach()).sum(dim=3).relu()
    return cams
