"""Prompts as token ids of CLIP's byte-pair vocabulary."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from ..errors import UsageError

LENGTH = 77


def _alphabet() -> list[str]:
    """The 256 characters that stand for the bytes in GPT-2's and CLIP's vocabularies: printable ones for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(shifted)) for byte in range(256)]


def byte_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with its alphabet alone: every byte is a token. Its ids are not those of the published text encoders."""
    letters = _alphabet()
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary.write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
        merges.write_text("#version: 0.2\n", encoding="utf-8")
        return CLIPTokenizer(str(vocabulary), str(merges))


def load_tokenizer(name: str) -> CLIPTokenizer:
    """
    Raises:
        UsageError: it is neither a folder, nor in the local cache, nor to be had from the hub.
    """
    if name == "bytes":
        return byte_tokenizer()
    try:
        return CLIPTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"encoder.tokenizer: {name} cannot be loaded ({reason}). Expected a folder with CLIP's vocab.json and merges.txt, or a name on "
            "the hub that this machine can reach; with encoder.weights=random use bytes"
        ) from None


def token_ids(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """`Tensor[N, 77]` int64, cut or padded with the end token."""
    found = tokenizer(list(texts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    return torch.as_tensor(found["input_ids"])
