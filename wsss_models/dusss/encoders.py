"""Image and text encoders, the formats of their published weights, and the tokens of sentences."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from ..engine import load_weights
from ..errors import UsageError
from .config import Image, Text

LAYERS = 6
_TINY_WORDS = 1000


def image_encoder(config: Image, size: int) -> VisionTransformer:
    """`forward_features`: `Tensor[N, 3, S, S]` → tokens `Tensor[N, 1 + (S/P)², C]`, [CLS] first.

    Raises:
        UsageError: a name that timm does not know, or weights that do not fit.
    """
    if config.encoder == "tiny":
        model = VisionTransformer(img_size=size, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=0)
    else:
        try:
            model = timm.create_model(config.encoder, pretrained=False, img_size=size, num_classes=0)
        except (RuntimeError, TypeError) as error:
            raise UsageError(f"image.encoder {config.encoder}: {str(error).partition(chr(10))[0]}") from None
        if not isinstance(model, VisionTransformer):
            raise UsageError(f"image.encoder: expected a Vision Transformer of timm, got {config.encoder}")
    if config.weights is not None:
        state = {name: t for name, t in load_weights(Path(config.weights)).items() if not name.startswith("head")}
        _load(model, _resized_positions(state, model), "image.weights", config.weights)
    return model


def _resized_positions(state: dict[str, Tensor], model: VisionTransformer) -> dict[str, Tensor]:
    """Position embeddings of another image size, interpolated to this one's."""
    given = state.get("pos_embed")
    if given is not None and given.shape != model.pos_embed.shape:
        from timm.layers import resample_abs_pos_embed

        state["pos_embed"] = resample_abs_pos_embed(given, model.patch_embed.grid_size, num_prefix_tokens=1)
    return state


def _load(model: nn.Module, state: Mapping[str, Tensor], key: str, file: str) -> None:
    missing = sorted(set(model.state_dict()) - set(state))
    if missing:
        raise UsageError(f"{key} {file}: expected the weights of this encoder; it lacks {len(missing)}, such as {missing[0]}")
    try:
        model.load_state_dict({name: state[name] for name in model.state_dict()})
    except RuntimeError as error:
        raise UsageError(f"{key} {file}: holds another encoder ({str(error).rpartition(chr(10))[2].strip()})") from None


def text_encoder(config: Text) -> BertModel:
    """Bio_ClinicalBERT's first six layers without pooler: 65.2 M.

    Raises:
        UsageError: weights that do not fit.
    """
    if config.encoder not in ("bert", "tiny"):
        raise UsageError(f"text.encoder: expected bert or tiny, got {config.encoder!r}")
    if config.encoder == "tiny":
        sizes = {"vocab_size": _TINY_WORDS, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
    else:
        sizes = {"vocab_size": 28996, "num_hidden_layers": LAYERS}
    model = BertModel(BertConfig(**sizes), add_pooling_layer=False)
    if config.weights is not None:
        _load(model, from_clinical_bert(load_weights(Path(config.weights)), model.config.num_hidden_layers), "text.weights", config.weights)
    return model


def from_clinical_bert(state: Mapping[str, Tensor], layers: int = LAYERS) -> dict[str, Tensor]:
    """The names of a BERT for pre-training → those of the bare encoder: without prefix, heads, pooler and later layers."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = name.removeprefix("bert.")
        layer = re.match(r"encoder\.layer\.(\d+)\.", name)
        if not name.startswith(("embeddings.", "encoder.")) or (layer and int(layer[1]) >= layers):
            continue
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
        found[re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)] = tensor
    return found


@dataclass
class Tokens:
    """Sentences as numbers, `Tensor[N, L]` each: token ids, 1 where there is a token, and the word of each token (−1: none)."""

    ids: Tensor
    mask: Tensor
    word: Tensor


class Tokenizer:
    """Sentences → `Tokens` of a fixed length.

    Raises:
        UsageError: a tokenizer that cannot be loaded.
    """

    def __init__(self, config: Text):
        self.length, self.tokenizer = config.length, None
        if config.tokenizer != "words":
            self.tokenizer = _bert_tokenizer(config.tokenizer)

    def __call__(self, texts: Sequence[str]) -> Tokens:
        if self.tokenizer is None:
            return _hashed(texts, self.length)
        found: Any = self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt")
        words = [[-1 if w is None else w for w in found.word_ids(i)] for i in range(len(texts))]
        return Tokens(found["input_ids"], found["attention_mask"], torch.tensor(words))


def _bert_tokenizer(name: str):
    from transformers import BertTokenizerFast

    try:
        return BertTokenizerFast.from_pretrained(name)
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"text.tokenizer: {name} cannot be loaded ({reason}). Expected a folder with vocab.txt, a name on the hub that this machine can "
            "reach, or words"
        ) from None


def _hashed(texts: Sequence[str], length: int) -> Tokens:
    """Each word's checksum as its number; 101 and 102 mark start and end as in BERT, 0 is padding."""
    ids, mask, words = (torch.zeros(len(texts), length, dtype=torch.long) for _ in range(3))
    words -= 1
    for row, text in enumerate(texts):
        found = [103 + zlib.crc32(w.encode()) % (_TINY_WORDS - 103) for w in re.findall(r"\w+", text.lower())][: length - 2]
        tokens = [101, *found, 102]
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
        words[row, 1 : 1 + len(found)] = torch.arange(len(found))
    return Tokens(ids, mask, words)


def sum_pieces(tokens: Tensor, word: Tensor) -> Tensor:
    """Adds the vectors of a word's pieces; the word stands where its first piece stood, the places of the others become 0.

    Args:
        tokens: `Tensor[N, L, C]`.
        word: `Tensor[N, L]`, the word of each token in ascending order, −1 for special tokens and padding.
    """
    later = (word[:, 1:] == word[:, :-1]) & (word[:, 1:] >= 0)
    first = torch.cat([torch.ones_like(later[:, :1]), ~later], dim=1)
    place = torch.arange(word.shape[1], device=word.device).expand_as(word)
    start = torch.where(first, place, 0).cummax(dim=1).values
    return torch.zeros_like(tokens).scatter_add(1, start[..., None].expand_as(tokens), tokens)
