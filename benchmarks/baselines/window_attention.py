"""Shifted-window attention as Swin's released code writes it (pad, roll, partition, attend, reverse), with its own or with
PyTorch's attention inside."""

import functools

import torch
import torch.nn.functional as F


def _partition(x, window):
    b, h, w, c = x.shape
    x = x.view(b, h // window, window, w // window, window, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, window * window, c)


def _reverse(x, window, b, h, w):
    x = x.view(b, h // window, w // window, window, window, -1)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, -1)


@functools.cache  # the released code makes it once, too
def _shift_mask(h, w, window, shift, device):
    regions = torch.zeros(1, h, w, 1, device=device)
    count = 0
    for rows in (slice(0, -window), slice(-window, -shift), slice(-shift, None)):
        for columns in (slice(0, -window), slice(-window, -shift), slice(-shift, None)):
            regions[:, rows, columns] = count
            count += 1
    regions = _partition(regions, window).squeeze(-1)
    return torch.zeros(len(regions), window**2, window**2, device=device).masked_fill(regions[:, None] != regions[:, :, None], -100.0)


@functools.cache
def _relative_position(window, device):
    side = torch.arange(window, device=device)
    grid = torch.stack(torch.meshgrid(side, side, indexing="ij")).flatten(1)
    offset = (grid[:, :, None] - grid[:, None]) + window - 1
    return offset[0] * (2 * window - 1) + offset[1]


def _windows(query, key, value, num_heads, window_size, shift, bias, attend):
    b, h, w, c = query.shape
    pad_h, pad_w = -h % window_size, -w % window_size
    maps = [torch.roll(F.pad(t, (0, 0, 0, pad_w, 0, pad_h)), (-shift, -shift), (1, 2)) for t in (query, key, value)]
    q, k, v = (_partition(t, window_size).view(-1, window_size**2, num_heads, c // num_heads).transpose(1, 2) for t in maps)
    added = bias[_relative_position(window_size, query.device).flatten()].view(window_size**2, window_size**2, -1).permute(2, 0, 1)[None]
    if shift:
        mask = _shift_mask(h + pad_h, w + pad_w, window_size, shift, query.device)
        added = (added + mask[:, None]).repeat(b, 1, 1, 1)
    out = attend(q, k, v, added, (c // num_heads) ** -0.5)
    out = _reverse(out.transpose(1, 2).reshape(-1, window_size**2, c), window_size, b, h + pad_h, w + pad_w)
    return torch.roll(out, (shift, shift), (1, 2))[:, :h, :w]


def _plain(q, k, v, added, scale):
    return ((q * scale) @ k.transpose(-2, -1) + added).softmax(-1) @ v


def _library(q, k, v, added, scale):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added.expand(len(q), -1, -1, -1), scale=scale)


def eager(query, key, value, *, num_heads, window_size, shift=0, bias=None):
    return _windows(query, key, value, num_heads, window_size, shift, bias, _plain)


def sdpa(query, key, value, *, num_heads, window_size, shift=0, bias=None):
    return _windows(query, key, value, num_heads, window_size, shift, bias, _library)


def eager_exchange(primary, structural, **options):
    return eager(structural[0], *primary[1:], **options), eager(primary[0], *structural[1:], **options)
