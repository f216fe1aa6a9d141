"""Wasserstein similarity as the released code computes it (four stacked N×N×d tensors), and with matrix products.

The constants and the power of D_s are the paper's, so that the results can be compared; the memory pattern is the release's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def distance_eager(mu_x, sigma_x, mu_y, sigma_y):
    rows, columns = len(mu_x), len(mu_y)
    mu_1, sigma_1 = (torch.stack([t] * columns, dim=1) for t in (mu_x, sigma_x))
    mu_2, sigma_2 = (torch.stack([t] * rows, dim=0) for t in (mu_y, sigma_y))
    return ((mu_1 - mu_2) ** 2).sum(dim=-1) + ((sigma_1 - sigma_2) ** 2).sum(dim=-1)


def distance_product(mu_x, sigma_x, mu_y, sigma_y):
    def squares(x, y):
        return (x * x).sum(dim=1, keepdim=True) + (y * y).sum(dim=1) - 2 * x @ y.T

    return squares(mu_x, mu_y) + squares(sigma_x, sigma_y)


def _similarity(distance, semantic, a, b, lam):
    cosine, far = semantic
    return 1 - (1 - cosine) * torch.exp(-lam * (a * distance + b) / far)


def similarity_eager(sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y, *, a=1 / 200, b=4.0, lam=0.2):
    x, y = F.normalize(sem_x, dim=1), F.normalize(sem_y, dim=1)
    far = (x[:, None] - y[None]).norm(dim=-1).clamp_min(1e-6)
    return _similarity(distance_eager(mu_x, sigma_x, mu_y, sigma_y), (x @ y.T, far), a, b, lam)


def similarity_product(sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y, *, a=1 / 200, b=4.0, lam=0.2):
    cosine = F.normalize(sem_x, dim=1) @ F.normalize(sem_y, dim=1).T
    far = (2 - 2 * cosine).clamp_min(1e-12).sqrt()
    return _similarity(distance_product(mu_x, sigma_x, mu_y, sigma_y), (cosine, far), a, b, lam)


def _loss(similarity, temperature):
    logits = similarity / temperature
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def eager(sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y, temperature, *, a=1 / 200, b=4.0, lam=0.2):
    return _loss(similarity_eager(sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y, a=a, b=b, lam=lam), temperature)


def matrix_product(sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y, temperature, *, a=1 / 200, b=4.0, lam=0.2):
    return _loss(similarity_product(sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y, a=a, b=b, lam=lam), temperature)
