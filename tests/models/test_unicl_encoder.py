"""M4's frozen encoder: sizes, names of the published checkpoints, tokens, token grids, Grad-CAM."""

import io
import math
import re

import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention

from wsss_models.errors import UsageError
from wsss_models.unicl_affseg.cam import grad_cam
from wsss_models.unicl_affseg.checkpoint import image_name
from wsss_models.unicl_affseg.config import Decoder, Encoder, UniclConfig
from wsss_models.unicl_affseg.decoder import selected
from wsss_models.unicl_affseg.encoder import UniCL, load_unicl
from wsss_models.unicl_affseg.inference import grid_size
from wsss_models.unicl_affseg.method import make_decoder
from wsss_models.unicl_affseg.prompts import prompts
from wsss_models.unicl_affseg.tokenizer import byte_tokenizer, load_tokenizer, token_ids

SIZES = {"embed_dim": 8, "depths": (1, 2, 2, 2), "heads": (1, 2, 2, 4), "text_width": 16, "text_layers": 2, "text_heads": 2}
TINY = Encoder(weights="random", tokenizer="bytes", projection=12, **SIZES)
VOCABULARY = 514


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model = UniCL(TINY, VOCABULARY)
    for parameter in model.image_encoder.parameters():  # the initial biases and norms would hide a swap
        parameter.add_(0.3 * torch.randn_like(parameter))
    for parameter in model.text_encoder.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def published(model: UniCL, *, old: bool = False) -> dict:
    """The model's weights as UniCL's files hold them, with what its own code keeps there besides."""
    image, text = ("visual.", "text.") if old else ("image_encoder.", "text_encoder.")
    state = {"vision_projection" if old else "image_projection": model.image_projection, "text_projection": model.text_projection}
    state |= {"logit_scale": model.logit_scale, f"{image}head.weight": torch.zeros(3, 8), f"{image}head.bias": torch.zeros(3)}
    for name, tensor in model.image_encoder.state_dict().items():
        name = re.sub(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
        state[image + name] = tensor
        if name.endswith("attn.qkv.weight"):
            block = name.removesuffix("attn.qkv.weight")
            state |= {
                f"{image}{block}attn.relative_position_index": torch.zeros(49, 49),
                f"{image}{block}attn_mask": torch.zeros(4, 49, 49),
            }
    encoder = model.text_encoder.state_dict()
    state[f"{text}token_embedding.weight"] = encoder["embeddings.token_embedding.weight"]
    state[f"{text}positional_embedding"] = encoder["embeddings.position_embedding.weight"]
    for i in range(len(model.text_encoder.encoder.layers)):
        ours, theirs = f"encoder.layers.{i}.", f"{text}resblocks.{i}."
        for kind in ("weight", "bias"):
            state[f"{theirs}attn.in_proj_{kind}"] = torch.cat([encoder[f"{ours}self_attn.{p}_proj.{kind}"] for p in "qkv"])
            pairs = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
            for one, other in (pairs | {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}).items():
                state[f"{theirs}{one}.{kind}"] = encoder[f"{ours}{other}.{kind}"]
    for kind in ("weight", "bias"):
        state[f"{text}ln_final.{kind}"] = encoder[f"final_layer_norm.{kind}"]
    return {"model": {name: tensor.detach().clone() for name, tensor in state.items()}}


def test_parameter_counts():
    with torch.device("meta"):
        model, decoder, every = UniCL(Encoder()), make_decoder(UniclConfig()), make_decoder(UniclConfig(decoder=Decoder(blocks="all")))
    assert count(decoder) == 18 * (512 * 256 + 256 * 256 + 512) + 4608 * 256 + 256 + 3 * 789760 + 21 * 257 == 7102741
    assert round(count(model.image_encoder) / 1e6, 2) == 86.74
    assert count(model.text_encoder) == 49408 * 512 + 77 * 512 + 12 * (12 * 512 * 512 + 13 * 512) + 2 * 512
    assert model.image_projection.shape == (1024, 512) and model.text_projection.shape == (512, 512)
    assert [mlp[0].in_features for mlp in every.mlps] == [128] * 2 + [256] * 2 + [512] * 18 + [1024] * 2
    assert not any(p.requires_grad for p in model.parameters()) and not model.train().training


def test_names_of_the_published_swin():
    """timm's keys are the targets; Swin's own code has the downsampling a stage earlier and three kinds of tensors more."""
    with torch.device("meta"):
        ours, timms = UniCL(Encoder()).image_encoder, timm.create_model("swin_base_patch4_window7_224", num_classes=0)
    shapes = {name: tuple(t.shape) for name, t in ours.state_dict().items()}
    assert shapes == {name: tuple(t.shape) for name, t in timms.state_dict().items()}
    assert shapes[image_name("layers.0.downsample.reduction.weight")] == (256, 512)
    assert shapes[image_name("layers.2.blocks.17.attn.relative_position_bias_table")] == (169, 16)
    assert shapes[image_name("patch_embed.proj.weight")] == (128, 3, 4, 4) and image_name("norm.bias") == "norm.bias"
    assert image_name("head.weight") is None and image_name("layers.0.blocks.1.attn_mask") is None
    assert image_name("layers.3.blocks.0.attn.relative_position_index") is None


@pytest.mark.parametrize("old", [False, True])
def test_checkpoint_round_trip(tiny, tmp_path, old):
    file = tmp_path / "unicl.pth"
    torch.save(published(tiny, old=old), file)
    torch.manual_seed(7)
    loaded = load_unicl(Encoder(**{**vars(TINY), "weights": str(file)}), VOCABULARY)
    image, ids = torch.randn(2, 3, 64, 64), token_ids(byte_tokenizer(), prompts()[:3])
    assert torch.equal(loaded.embed_text(ids), tiny.embed_text(ids)) and torch.equal(loaded.logit_scale, tiny.logit_scale)
    ours, theirs = loaded.features(image), tiny.features(image)
    assert all(torch.equal(a, b) for s, t in zip(ours.blocks, theirs.blocks, strict=True) for a, b in zip(s, t, strict=True))
    assert torch.equal(loaded.embed(ours.last), tiny.embed(theirs.last))


def test_text_encoder_computes_what_the_published_tensors_mean(tiny):
    """Attention with one joint projection, a causal mask and QuickGELU, written out."""
    state = {k.removeprefix("text_encoder."): v for k, v in published(tiny)["model"].items() if k.startswith("text_encoder.")}
    ids = token_ids(byte_tokenizer(), ["a clean origami cat.", "sky"])
    x = state["token_embedding.weight"][ids] + state["positional_embedding"]
    for i in range(2):
        own = {k.removeprefix(f"resblocks.{i}."): v for k, v in state.items()}
        y = layer_norm(x, (16,), own["ln_1.weight"], own["ln_1.bias"], 1e-12)
        q, k, v = linear(y, own["attn.in_proj_weight"], own["attn.in_proj_bias"]).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        y = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + linear(y, own["attn.out_proj.weight"], own["attn.out_proj.bias"])
        y = layer_norm(x, (16,), own["ln_2.weight"], own["ln_2.bias"], 1e-12)
        y = linear(y, own["mlp.c_fc.weight"], own["mlp.c_fc.bias"])
        x = x + linear(y * torch.sigmoid(1.702 * y), own["mlp.c_proj.weight"], own["mlp.c_proj.bias"])
    x = layer_norm(x, (16,), state["ln_final.weight"], state["ln_final.bias"], 1e-12)
    first_end = [row.index(VOCABULARY - 1) for row in ids.tolist()]
    expected = x[torch.arange(2), first_end] @ tiny.text_projection
    torch.testing.assert_close(tiny.embed_text(ids), expected / expected.norm(dim=1, keepdim=True), atol=1e-5, rtol=1e-5)


class Hostile:
    def __reduce__(self):
        return (print, ("run",))


def test_checkpoints_that_are_refused(tiny, tmp_path, capsys):
    def load(content, **sizes):
        file = tmp_path / "bad.pth"
        file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
        load_unicl(Encoder(**{**vars(TINY), "weights": str(file), **sizes}), VOCABULARY)

    missing = published(tiny)
    del missing["model"]["image_encoder.layers.1.downsample.norm.bias"]
    with pytest.raises(UsageError, match="1 are missing or of another shape, such as image_encoder.layers.2.downsample.norm.bias"):
        load(missing)
    changed = published(tiny)
    changed["model"]["text_projection"] = torch.zeros(3, 3)
    with pytest.raises(UsageError, match="such as text_projection"):
        load(changed)
    with pytest.raises(UsageError, match="missing or of another shape"):
        load(published(tiny), embed_dim=16)
    with pytest.raises(UsageError, match="holds more than tensors"):
        load({"model": {"image_projection": Hostile()}})
    with pytest.raises(UsageError, match="damaged or not a checkpoint"):
        whole = io.BytesIO()
        torch.save(published(tiny), whole)
        load(whole.getvalue()[:2000])
    assert "run" not in capsys.readouterr().out
    with pytest.raises(UsageError, match="there is no such file"):
        load_unicl(Encoder(weights=str(tmp_path / "none.pth")), VOCABULARY)
    with pytest.raises(UsageError, match="expected the path of UniCL's Swin-B"):
        load_unicl(Encoder(), VOCABULARY)


def test_tokenizer(tmp_path):
    tokenizer = byte_tokenizer()
    ids = token_ids(tokenizer, ["a B", "x" * 200])
    letters = [tokenizer.convert_tokens_to_ids(t) for t in ("a</w>", "b</w>")]
    assert ids.shape == (2, 77) and ids[0].tolist() == [512, *letters, *[513] * 74]
    assert ids[1, 0] == 512 and ids[1, -1] == 513 and (ids[1, 1:-1] < 512).all()
    tokenizer.save_pretrained(tmp_path / "clip")
    assert torch.equal(token_ids(load_tokenizer(str(tmp_path / "clip")), ["a B"]), ids[:1])
    with pytest.raises(UsageError, match="encoder.tokenizer: .* cannot be loaded"):
        load_tokenizer(str(tmp_path / "none"))
    assert len(prompts()) == 45 and prompts()[14] == "a clean origami person with clothes,people,human."


@pytest.mark.parametrize("size", [(64, 96), (224, 224)])
def test_token_grids(tiny, size):
    image = torch.randn(1, 3, *size)
    found = tiny.features(image)
    grids = [[tuple(f.shape[1:]) for f in stage] for stage in found.blocks]
    assert grids == [[(8 * 2**s, size[0] // 4 // 2**s, size[1] // 4 // 2**s)] * n for s, n in enumerate(SIZES["depths"])]
    everything, stage3 = selected(found.blocks, "all"), selected(found.blocks, "stage3")
    assert len(everything) == 7 and len(stage3) == 2 and {f.shape[2:] for f in everything} == {stage3[0].shape[2:]}
    with torch.no_grad():
        torch.testing.assert_close(
            tiny.image_encoder.norm(found.blocks[3][1].permute(0, 2, 3, 1)), tiny.image_encoder.forward_features(image)
        )


def test_sizes_at_inference():
    assert grid_size(375, 500, 512) == (384, 512) and grid_size(500, 375, 512, 0.75) == (384, 288) and grid_size(10, 500, 224) == (32, 224)


def one_cam(model: UniCL, tokens, text, present, k):
    """Grad-CAM of class k of one image by an ordinary backward pass."""
    block, kept = model.image_encoder.layers[-1].blocks[-1], []
    with block.norm1.register_forward_hook(lambda module, given, made: kept.append(made)):
        embedding = model.embed(block(tokens[None].clone().requires_grad_()))[0]
    kept[0].retain_grad()
    words = [*present.nonzero()[:, 0].tolist(), *range(20, len(text))]
    (model.logit_scale.exp() * text[words] @ embedding).softmax(0)[words.index(k)].backward()
    weight = kept[0].grad.mean((1, 2))[0]
    return (kept[0].detach()[0] @ weight).relu()


def test_grad_cam_of_a_batch_is_that_of_each_class(tiny):
    text = tiny.embed_text(token_ids(byte_tokenizer(), prompts()))
    present = torch.zeros(3, 20, dtype=torch.bool)
    present[0, [2, 14]] = present[2, [0, 2, 19]] = True
    features = tiny.features(torch.randn(3, 3, 96, 128))
    found = grad_cam(tiny, features, text, present)
    assert found.shape == (3, 20, 3, 4) and found.min() >= 0 and not found.requires_grad
    assert (found[~present] == 0).all() and (found[present].amax((1, 2)) > 0).any()
    for b, k in present.nonzero().tolist():
        expected = one_cam(tiny, features.last[b], text, present[b], k)
        torch.testing.assert_close(found[b, k], expected, atol=1e-6 * float(expected.max()), rtol=1e-4)
    assert (grad_cam(tiny, features, text, torch.zeros_like(present)) == 0).all()
    assert math.isclose(float(tiny.logit_scale.exp()), 100, rel_tol=1e-5)
