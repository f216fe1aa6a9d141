"""Features without a network: local colour, texture and the paths between tokens, on a grid of tokens.

This is the fallback of `wsss refine` for images that come without feature maps. Two layers of features are made, and
the affinity operators compare them as they compare a network's: by the cosine.

- Layer 0, appearance: φ_k(x) = exp(−‖z(x) − z(k)‖²) with z = colour, contrast and position over their scales, for each of
  M landmark tokens k. Landmarks are the tokens farthest from each other in z, so rare colours have theirs.
- Layer 1, paths: φ_k(x) = exp(−(g(x, k) / scale)²), g = length of the shortest path between token and landmark on the
  grid, where a step costs its length and the colour difference across it: the walk spreads within an object, and an
  edge that surrounds it is a detour for everybody outside.

All values are in 0…1, so the cosine is non-negative, as Sinkhorn needs it. Everything is computed with NumPy and SciPy
in one thread, so the features do not depend on the number of threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import dijkstra
from skimage.color import rgb2lab

from .settings import Settings

_LIGHTNESS = 0.7  # lightness counts less than hue: shading is not an edge
_STEPS = ((0, 1), (1, 0), (1, 1), (1, -1))


@dataclass(frozen=True)
class TokenGrid:
    """Statistics of an image on a grid of h×w tokens.

    Args:
        colour: `[h, w, 3]`, mean CIELAB colour with lightness × 0.7.
        contrast: `[h, w]`, standard deviation of the lightness within a token.
    """

    colour: np.ndarray
    contrast: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        return self.contrast.shape


def grid_size(height: int, width: int, settings: Settings) -> tuple[int, int]:
    """(h, w): tokens of `token_size` pixels, larger ones where there would be more than `max_tokens`."""
    side = max(settings.token_size, math.sqrt(height * width / settings.max_tokens))
    rows, columns = max(1, int(height / side + 0.5)), max(1, int(width / side + 0.5))
    while rows * columns > settings.max_tokens:  # what rounding has added
        rows, columns = (rows - 1, columns) if rows > columns else (rows, columns - 1)
    return rows, columns


def cell_sums(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """`[H, W, …]` → sums over the cells of an h×w grid, `[h, w, …]`."""
    height, width = values.shape[:2]
    down = np.add.reduceat(values, np.arange(rows) * height // rows, axis=0)
    return np.add.reduceat(down, np.arange(columns) * width // columns, axis=1)


def cell_means(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    area = cell_sums(np.ones(values.shape[:2] + (1,) * (values.ndim - 2)), rows, columns)
    return cell_sums(values, rows, columns) / area


def token_grid(image: np.ndarray, rows: int, columns: int) -> TokenGrid:
    """Statistics of `image` (H×W×3 uint8) on rows×columns tokens, at most one per pixel."""
    lab = rgb2lab(image)
    mean = cell_means(lab, rows, columns)
    square = cell_means(lab[..., 0] ** 2, rows, columns)
    contrast = np.sqrt(np.maximum(square - mean[..., 0] ** 2, 0))
    return TokenGrid(mean * (_LIGHTNESS, 1, 1), contrast)


def path_lengths(grid: TokenGrid, sources: np.ndarray, edge_weight: float) -> np.ndarray:
    """`[S, h, w]`: length of the shortest path from each source token (flat index), in units of the longer side.

    A step to one of the 8 neighbours costs its length plus `edge_weight` · colour difference / 100.
    """
    rows, columns = grid.size
    index = np.arange(rows * columns).reshape(rows, columns)
    start, end, cost = [], [], []
    for dy, dx in _STEPS:
        a = index[: rows - dy, max(0, -dx) : columns - max(0, dx)]
        b = index[dy:, max(0, dx) : columns - max(0, -dx)]
        step = np.linalg.norm(grid.colour.reshape(-1, 3)[a] - grid.colour.reshape(-1, 3)[b], axis=-1)
        start.append(a.ravel())
        end.append(b.ravel())
        cost.append(math.hypot(dy, dx) / max(rows, columns) + edge_weight / 100 * step.ravel())
    graph = csr_matrix((np.concatenate(cost), (np.concatenate(start), np.concatenate(end))), shape=(index.size, index.size))
    return dijkstra(graph, directed=False, indices=sources).reshape(-1, rows, columns)


def _farthest(points: np.ndarray, count: int) -> np.ndarray:
    """Indices of `count` points, each the farthest from those before it."""
    chosen = [0]
    distance = ((points - points[0]) ** 2).sum(axis=1)
    while len(chosen) < min(count, len(points)) and distance.max() > 0:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
    return np.array(chosen)


def features(grid: TokenGrid, settings: Settings) -> np.ndarray:
    """`[2, M, h, w]` float32 in 0…1: the layers "appearance" and "paths", for M ≤ `landmarks` landmark tokens."""
    rows, columns = grid.size
    y, x = np.meshgrid((np.arange(rows) + 0.5) / max(rows, columns), (np.arange(columns) + 0.5) / max(rows, columns), indexing="ij")
    place = np.stack([y, x], axis=-1) / settings.position_scale
    z = np.concatenate([grid.colour / settings.colour_scale, grid.contrast[..., None] / settings.texture_scale, place], axis=-1).reshape(
        rows * columns, -1
    )
    chosen = _farthest(z, settings.landmarks)
    appearance = np.stack([np.exp(-((z - z[k]) ** 2).sum(axis=1)) for k in chosen]).reshape(-1, rows, columns)
    paths = np.exp(-((path_lengths(grid, chosen, settings.edge_weight) / settings.path_scale) ** 2))
    return np.stack([appearance, paths]).astype(np.float32)
