"""The released way to normalise: the whole matrix is divided by its sums."""

import torch


def eager(matrix, num_iter=3):
    for _ in range(num_iter):
        matrix = matrix / matrix.sum(-2, keepdim=True)
        matrix = matrix / matrix.sum(-1, keepdim=True)
    return matrix


def eager_scaling(matrix, num_iter=3):
    """The vectors alone, by matrix-vector products of PyTorch."""
    row = matrix.new_ones(matrix.shape[:-1])
    col = row
    for _ in range(num_iter):
        col = 1 / torch.einsum("...ij,...i->...j", matrix, row)
        row = 1 / torch.einsum("...ij,...j->...i", matrix, col)
    return row, col
