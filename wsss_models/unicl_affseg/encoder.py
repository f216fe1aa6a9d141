"""The frozen UniCL: Swin image encoder (timm), CLIP-like text encoder (transformers), two projections, a scale."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import CLIPTextConfig, CLIPTextModel

from ..engine import load_weights
from ..errors import UsageError
from .checkpoint import convert
from .config import Encoder
from .tokenizer import LENGTH


@dataclass
class Features:
    """What the image encoder gives for a batch.

    Args:
        blocks: of every block of every stage, `Tensor[B, C_s, h_s, w_s]`, in their order.
        last: the input of the last block, `Tensor[B, h, w, C]`.
    """

    blocks: list[list[Tensor]]
    last: Tensor


def wide(x: Tensor) -> Tensor:
    """In float32 at least, whatever autocast made of it."""
    return x if x.dtype == torch.float64 else x.float()


class UniCL(nn.Module):
    """Images and texts as unit vectors of one space. Set up for 224 pixels, as published; other sizes are padded to whole windows.

    Args:
        config: sizes.
        vocabulary: number of tokens (49408 of the published encoders).
    """

    def __init__(self, config: Encoder, vocabulary: int = 49408):
        super().__init__()
        self.image_encoder = SwinTransformer(
            img_size=224,
            embed_dim=config.embed_dim,
            depths=config.depths,
            num_heads=config.heads,
            num_classes=0,
            strict_img_size=False,
        )
        text = CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=config.text_width,
            intermediate_size=4 * config.text_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.text_heads,
            max_position_embeddings=LENGTH,
            hidden_act="quick_gelu",
            layer_norm_eps=1e-12,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
        self.text_encoder = CLIPTextModel(text)
        self.image_projection = nn.Parameter(
            self.image_encoder.num_features**-0.5 * torch.randn(self.image_encoder.num_features, config.projection)
        )
        self.text_projection = nn.Parameter(config.text_width**-0.5 * torch.randn(config.text_width, config.projection))
        self.logit_scale = nn.Parameter(torch.tensor(100.0).log())
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> UniCL:
        """Stays in eval mode: it is frozen."""
        return super().train(False)

    @torch.no_grad()
    def features(self, image: Tensor) -> Features:
        """`image` `Tensor[B, 3, H, W]`, normalised, sides of at least 32 pixels."""
        swin = self.image_encoder
        x, blocks = swin.patch_embed(image), []
        for stage in swin.layers:
            x = stage.downsample(x)
            own = []
            for block in stage.blocks:
                before = x
                x = block(x)
                own.append(x.permute(0, 3, 1, 2))
            blocks.append(own)
        return Features(blocks, before)

    def embed(self, tokens: Tensor) -> Tensor:
        """Unit vectors `Tensor[B, D]` of the last block's output `Tensor[B, h, w, C]`."""
        return normalize(self.image_encoder.norm(tokens).mean(dim=(1, 2)) @ self.image_projection, dim=1)

    @torch.no_grad()
    def embed_text(self, ids: Tensor) -> Tensor:
        """Unit vectors `Tensor[N, D]` of token ids `Tensor[N, 77]`, at the first end token."""
        return normalize(self.text_encoder(input_ids=ids).pooler_output @ self.text_projection, dim=1)


def load_unicl(config: Encoder, vocabulary: int) -> UniCL:
    """The encoder with the weights that the configuration names.

    Raises:
        UsageError: no weights are named, or the file holds another model.
    """
    if not config.weights:
        raise UsageError(
            "encoder.weights: expected the path of UniCL's Swin-B, such as in21k_yfcc14m_swin_base.pth (release v1.0 of microsoft/UniCL), "
            "or random to try the method out"
        )
    model = UniCL(config, vocabulary)
    if config.weights != "random":
        found, wanted = convert(load_weights(Path(config.weights))), model.state_dict()
        wrong = [name for name, tensor in wanted.items() if name not in found or found[name].shape != tensor.shape]
        if wrong:
            raise UsageError(
                f"encoder.weights {config.weights}: expected UniCL's {len(wanted)} tensors in the configured sizes; {len(wrong)} are missing or "
                f"of another shape, such as {wrong[0]}"
            )
        model.load_state_dict({name: found[name] for name in wanted})
    return model
