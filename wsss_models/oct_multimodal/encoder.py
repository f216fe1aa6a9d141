"""MiT encoders run stage by stage, and the weights of their original files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from transformers import SegformerConfig, SegformerModel

from ..engine import load_weights
from ..errors import UsageError

SIZES: dict[str, tuple[list[int], list[int], list[int]]] = {
    "mit_b0": ([2, 2, 2, 2], [32, 64, 160, 256], [1, 2, 5, 8]),
    "mit_b1": ([2, 2, 2, 2], [64, 128, 320, 512], [1, 2, 5, 8]),
    "mit_b2": ([3, 4, 6, 3], [64, 128, 320, 512], [1, 2, 5, 8]),
    "mit_b3": ([3, 4, 18, 3], [64, 128, 320, 512], [1, 2, 5, 8]),
    "mit_b4": ([3, 8, 27, 3], [64, 128, 320, 512], [1, 2, 5, 8]),
    "mit_b5": ([3, 6, 40, 3], [64, 128, 320, 512], [1, 2, 5, 8]),
    "mit_tiny": ([1, 1, 1, 1], [16, 32, 80, 128], [1, 2, 5, 8]),
}
"""(blocks, channels, heads) of the four stages; mit_tiny is this project's, for small runs from scratch."""


def mit_config(size: str, drop_path: float = 0.1, **more) -> SegformerConfig:
    depths, widths, heads = SIZES[size]
    return SegformerConfig(depths=depths, hidden_sizes=widths, num_attention_heads=heads, drop_path_rate=drop_path, **more)


def make_encoder(size: str, drop_path: float, weights: str | None) -> SegformerModel:
    """A MiT of four stages, each `Tensor[B, C, H, W]` → `Tensor[B, C', H', W']` at strides 4, 2, 2, 2."""
    model = SegformerModel(mit_config(size, drop_path))
    if weights is not None:
        load_mit(model, weights)
    return model


_BLOCK = (
    ("norm1", "layernorm_before"),
    ("norm2", "layernorm_after"),
    ("attn.q", "attention.q_proj"),
    ("attn.proj", "attention.o_proj"),
    ("attn.sr", "attention.sequence_reduction.sequence_reduction"),
    ("attn.norm", "attention.sequence_reduction.layer_norm"),
    ("mlp.fc1", "mlp.fc1"),
    ("mlp.fc2", "mlp.fc2"),
    ("mlp.dwconv.dwconv", "mlp.dwconv.dwconv"),
)
_OLD_BLOCK = (
    ("layer_norm_1", "layernorm_before"),
    ("layer_norm_2", "layernorm_after"),
    ("attention.self.query", "attention.q_proj"),
    ("attention.self.key", "attention.k_proj"),
    ("attention.self.value", "attention.v_proj"),
    ("attention.self.sr", "attention.sequence_reduction.sequence_reduction"),
    ("attention.self.layer_norm", "attention.sequence_reduction.layer_norm"),
    ("attention.output.dense", "attention.o_proj"),
    ("mlp.dense1", "mlp.fc1"),
    ("mlp.dense2", "mlp.fc2"),
    ("mlp.dwconv.dwconv", "mlp.dwconv.dwconv"),
)


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of `mit_b2.pth` → transformers'. `attn.kv` is divided into keys and values; the head is left out."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"patch_embed(\d)\.(proj|norm)\.(\w+)", name):
            part = {"proj": "proj", "norm": "layer_norm"}[match[2]]
            found[f"stages.{int(match[1]) - 1}.patch_embeddings.{part}.{match[3]}"] = tensor
        elif match := re.fullmatch(r"norm(\d)\.(\w+)", name):
            found[f"stages.{int(match[1]) - 1}.layer_norm.{match[2]}"] = tensor
        elif match := re.fullmatch(r"block(\d)\.(\d+)\.(.+)\.(\w+)", name):
            home = f"stages.{int(match[1]) - 1}.blocks.{match[2]}"
            if match[3] == "attn.kv":
                key, value = tensor.chunk(2)
                found[f"{home}.attention.k_proj.{match[4]}"], found[f"{home}.attention.v_proj.{match[4]}"] = key.clone(), value.clone()
            elif match[3] in dict(_BLOCK):
                found[f"{home}.{dict(_BLOCK)[match[3]]}.{match[4]}"] = tensor
    return found


def from_old_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names that files on the hub have (`segformer.encoder.block.0.0…`) → those of transformers 5."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = name.removeprefix("segformer.").removeprefix("encoder.")
        if match := re.fullmatch(r"patch_embeddings\.(\d)\.(.+)", name):
            found[f"stages.{match[1]}.patch_embeddings.{match[2]}"] = tensor
        elif match := re.fullmatch(r"layer_norm\.(\d)\.(\w+)", name):
            found[f"stages.{match[1]}.layer_norm.{match[2]}"] = tensor
        elif (match := re.fullmatch(r"block\.(\d)\.(\d+)\.(.+)\.(\w+)", name)) and match[3] in dict(_OLD_BLOCK):
            found[f"stages.{match[1]}.blocks.{match[2]}.{dict(_OLD_BLOCK)[match[3]]}.{match[4]}"] = tensor
        elif name.startswith("stages."):
            found[name] = tensor
    return found


def load_mit(model: SegformerModel, weights: str) -> None:
    """Loads `mit_b2.pth`, or `model.safetensors` or `pytorch_model.bin` of transformers (the file, or its folder).

    Raises:
        UsageError: no such file, or weights of another encoder.
    """
    path = Path(weights)
    if path.is_dir():
        path = next((p for n in ("model.safetensors", "pytorch_model.bin") if (p := path / n).is_file()), path / "model.safetensors")
    state = load_weights(path)
    converted = from_original(state) if any(name.startswith("patch_embed1.") for name in state) else from_old_names(state)
    own = model.state_dict()
    missing = sorted(set(own) - set(converted))
    if missing:
        raise UsageError(f"{path}: expected the weights of this MiT; it lacks {len(missing)} of {len(own)}, such as {missing[0]}")
    try:
        model.load_state_dict(converted)
    except RuntimeError as error:
        raise UsageError(f"{path}: holds another encoder ({str(error).rpartition(chr(10))[2].strip()})") from None


def freeze(encoder: SegformerModel, stages: int) -> list[nn.Module]:
    """Freezes all patch embeddings, and blocks and norms of the first stages; returns what is frozen.

    0 stages freeze nothing at all.
    """
    if not stages:
        return []
    frozen: list[nn.Module] = [stage.patch_embeddings for stage in encoder.stages]
    for stage in encoder.stages[:stages]:
        frozen += [stage.blocks, stage.layer_norm]
    for module in frozen:
        module.requires_grad_(False)
    return frozen
