"""The random walk as CLIP-ES and WeCLIP release it: transition matrix formed, squared, and applied class by class.

`reordered` is the best rewrite we know: the scaled matrix is never formed, all classes take its passes as one product.
"""

import torch

from .affinity import eager_refining_map
from .sinkhorn import eager as sinkhorn, eager_scaling


def eager(affinity, cam, mask=None, *, sinkhorn_iter=3, power=2, mask_side="source"):
    normalised = sinkhorn(affinity, sinkhorn_iter)
    step = (normalised + normalised.transpose(-1, -2)) / 2
    transition = step
    for _ in range(power - 1):
        transition = torch.matmul(transition, step)
    height, width = cam.shape[-2:]
    refined = []
    for image, matrix in enumerate(transition):
        for k in range(cam.shape[1]):
            # The mask is 1×hw: it cuts columns of a copy of the transition matrix.
            weights = matrix if mask is None else matrix * mask[image, k].reshape(1, -1)
            refined.append(torch.matmul(weights, cam[image, k].reshape(-1, 1)).reshape(height, width))
    return torch.stack(refined).reshape(cam.shape)


def eager_with_map(cam, decoder_feature, encoder, mask=None, *, encoder_is="feature", clamp_min=0.0, streaming=None):
    matrix = eager_refining_map(decoder_feature, encoder, encoder_is=encoder_is, clamp_min=clamp_min)[0]
    return eager(matrix, cam, mask)


def reordered(affinity, cam, mask=None, *, sinkhorn_iter=3, power=2):
    row, col = (scale.unsqueeze(-2) for scale in eager_scaling(affinity, sinkhorn_iter))
    walked = (cam if mask is None else cam * mask).flatten(-2)
    for _ in range(power):
        walked = (torch.matmul(walked * col, affinity.transpose(-1, -2)) * row + torch.matmul(walked * row, affinity) * col) / 2
    return walked.reshape(cam.shape)


def reordered_with_map(cam, decoder_feature, encoder, mask=None, *, encoder_is="feature", clamp_min=0.0, streaming=None):
    matrix = eager_refining_map(decoder_feature, encoder, encoder_is=encoder_is, clamp_min=clamp_min)[0]
    return reordered(matrix, cam, mask)
