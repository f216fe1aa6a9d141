"""Label prompts and captions as CLIP vectors, computed once and kept on disk (section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import UsageError


def _load(cls: Any, name: str, key: str) -> Any:
    try:
        return cls.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"{key}: {name} cannot be loaded ({reason}). Expected a folder, or a name on the hub that this machine can reach"
        ) from None


class ClipText:
    """CLIP's text encoder: texts → the state of the end token, not projected, not normalised."""

    def __init__(self, name: str, key: str, device: torch.device):
        from transformers import AutoTokenizer, CLIPTextModel

        self.tokenizer, self.device = _load(AutoTokenizer, name, key), device
        self.model = _load(CLIPTextModel, name, key).to(device).eval()

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """`Tensor[N, width]` float32, on the CPU."""
        longest = self.model.config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding="max_length", max_length=longest, truncation=True, return_tensors="pt")
        ids, mask = tokens["input_ids"].to(self.device), tokens["attention_mask"].to(self.device)
        return self.model(input_ids=ids, attention_mask=mask).pooler_output.float().cpu()


class Captioner:
    """BLIP: images → captions without the prompt, greedy."""

    def __init__(self, name: str, prompt: str, new_tokens: int, device: torch.device):
        from transformers import BlipForConditionalGeneration, BlipProcessor

        self.processor, self.prompt, self.new_tokens, self.device = _load(BlipProcessor, name, "text.captions"), prompt, new_tokens, device
        self.model = _load(BlipForConditionalGeneration, name, "text.captions").to(device).eval()

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> str:
        """`[H, W, 3]` uint8 → a caption."""
        given = self.processor(images=Image.fromarray(image), text=self.prompt, return_tensors="pt").to(self.device)
        ids = self.model.generate(
            pixel_values=given["pixel_values"], input_ids=given["input_ids"], max_new_tokens=self.new_tokens, num_beams=1, do_sample=False
        )
        text = self.processor.decode(ids[0], skip_special_tokens=True).strip()
        return text.removeprefix(self.prompt).strip()


def random_vectors(count: int, width: int, seed: int) -> Tensor:
    """Fixed random label vectors (an ablation of the paper) with the length of CLIP's: about 1 a channel."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
