"""Readers of data sets as they lie on disk, one module per format; `files` and `sliding` are what they share."""

from .files import Item, inside, read_image, read_lines, read_mask, read_table, split
from .sliding import overlap_add, starts, windows

__all__ = ["Item", "inside", "overlap_add", "read_image", "read_lines", "read_mask", "read_table", "split", "starts", "windows"]
