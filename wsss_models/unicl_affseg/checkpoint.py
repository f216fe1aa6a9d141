"""UniCL's published checkpoints in the names of timm and transformers, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_IMAGE = ("image_encoder.", "visual.")
_TEXT = ("text_encoder.", "lang_encoder.", "text.")
_DROPPED = re.compile(r"(relative_position_index|attn_mask|^head\.)")
_TEXT_NAMES = (
    (r"^token_embedding\.weight$", "embeddings.token_embedding.weight"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^(?:transformer\.)?resblocks\.(\d+)\.attn\.out_proj\.(.+)$", r"encoder.layers.\1.self_attn.out_proj.\2"),
    (r"^(?:transformer\.)?resblocks\.(\d+)\.ln_([12])\.(.+)$", r"encoder.layers.\1.layer_norm\2.\3"),
    (r"^(?:transformer\.)?resblocks\.(\d+)\.mlp\.c_fc\.(.+)$", r"encoder.layers.\1.mlp.fc1.\2"),
    (r"^(?:transformer\.)?resblocks\.(\d+)\.mlp\.c_proj\.(.+)$", r"encoder.layers.\1.mlp.fc2.\2"),
    (r"^ln_final\.(.+)$", r"final_layer_norm.\1"),
)
_JOINT = re.compile(r"^(?:transformer\.)?resblocks\.(\d+)\.attn\.in_proj_(weight|bias)$")


def _stripped(name: str, prefixes: tuple[str, ...]) -> str | None:
    return next((name.removeprefix(p) for p in prefixes if name.startswith(p)), None)


def image_name(name: str) -> str | None:
    """timm's name of a Swin tensor; `None` if timm computes it itself. The downsampling belongs to the next stage there."""
    if _DROPPED.search(name):
        return None
    return re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample.", name)


def _text_tensors(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A text tensor under the names of transformers, the joint projections split; empty if the encoder has no such tensor."""
    joint = _JOINT.match(name)
    if joint:
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {f"encoder.layers.{joint[1]}.self_attn.{p}_proj.{joint[2]}": part.contiguous() for p, part in parts}
    for pattern, target in _TEXT_NAMES:
        if re.match(pattern, name):
            return {re.sub(pattern, target, name): tensor}
    return {}


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published checkpoint's tensors under the names of `encoder.UniCL`.

    What UniCL does not have is left out, as its own loader does; what is missing, `load_state_dict` finds.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        image, text = _stripped(name, _IMAGE), _stripped(name, _TEXT)
        if image is not None:
            target = image_name(image)
            if target is not None:
                found[f"image_encoder.{target}"] = tensor
        elif text is not None:
            found |= {f"text_encoder.{target}": t for target, t in _text_tensors(text, tensor).items()}
        elif name in ("image_projection", "vision_projection"):
            found["image_projection"] = tensor
        elif name == "text_projection":
            found[name] = tensor
        elif name == "logit_scale":
            found[name] = tensor.squeeze()
    return found
