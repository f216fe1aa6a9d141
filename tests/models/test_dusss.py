"""M1: parameter counts, weights of BERT and DeiT, uncertainty, contrastive and grounding losses, mean teacher."""

import math

import pytest
import torch
from torch import nn

import wsss_kernels as wk
from wsss_models.dusss import encoders, grounding, unet, vlm
from wsss_models.dusss.config import DusssConfig, Grounding, Image, Semi, Text, Vlm
from wsss_models.engine import config as configs
from wsss_models.errors import UsageError

from .parity import assert_steps_agree

TINY_VLM = Vlm(width=8, hidden=16, distribution=16, heads=2, dropout=0.0)
TINY = (Image(encoder="tiny"), Text(encoder="tiny", tokenizer="words", length=8))


def millions(module: nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


def test_parameter_counts():
    with torch.device("meta"):
        assert round(millions(unet.UNet(64)), 2) == 14.75
        assert round(millions(grounding.GroundingDecoder(128, Grounding())), 3) == 0.295
        assert round(millions(encoders.text_encoder(Text())), 1) == 65.2
        assert round(millions(encoders.image_encoder(Image(), 224)), 1) == 85.8


def test_shapes_of_the_paper():
    with torch.device("meta"):
        tokens = encoders.image_encoder(Image(), 224).forward_features(torch.empty(1, 3, 224, 224))
        assert tokens.shape == (1, 197, 768)
        decoder = grounding.GroundingDecoder(128, Grounding())
        assert decoder(torch.empty(1, 196, 128)).shape == (1, 128, 56, 56)
        assert unet.UNet(64)(torch.empty(1, 3, 224, 224)).shape == (1, 224, 224)


def test_deit_weights_round_trip(tmp_path):
    config = Image(encoder="vit_tiny_patch16_224")
    source = encoders.image_encoder(config, 64)
    state = {**source.state_dict(), "head.weight": torch.zeros(1000, 192), "head.bias": torch.zeros(1000)}
    torch.save({"model": state}, tmp_path / "deit.pth")
    loaded = encoders.image_encoder(Image(encoder=config.encoder, weights=str(tmp_path / "deit.pth")), 64)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), loaded.parameters(), strict=True))
    larger = encoders.image_encoder(Image(encoder=config.encoder, weights=str(tmp_path / "deit.pth")), 96)
    assert larger.pos_embed.shape[1] == 1 + 36 and torch.equal(larger.pos_embed[:, 0], source.pos_embed[:, 0])
    del state["blocks.3.attn.qkv.weight"]
    torch.save({"model": state}, tmp_path / "bad.pth")
    with pytest.raises(UsageError, match="lacks 1, such as blocks.3.attn.qkv.weight"):
        encoders.image_encoder(Image(encoder=config.encoder, weights=str(tmp_path / "bad.pth")), 64)
    for name, message in (("nothing", "image.encoder nothing"), ("resnet18", "expected a Vision Transformer|image.encoder resnet18")):
        with pytest.raises(UsageError, match=message):
            encoders.image_encoder(Image(encoder=name), 64)


def test_bert_weights_round_trip(tmp_path):
    """A pre-training checkpoint of twelve layers with heads, pooler and the oldest names of LayerNorm."""
    tiny = encoders.text_encoder(Text(encoder="tiny"))
    state = {f"bert.{name}": t for name, t in tiny.state_dict().items()}
    state |= {name.replace("layer.1.", "layer.7."): t for name, t in state.items() if "layer.1." in name}
    state |= {"bert.pooler.dense.weight": torch.zeros(64, 64), "cls.predictions.bias": torch.zeros(9)}
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t for n, t in state.items()}
    torch.save(old, tmp_path / "pytorch_model.bin")
    loaded = encoders.text_encoder(Text(encoder="tiny", weights=str(tmp_path / "pytorch_model.bin")))
    assert all(torch.equal(a, b) for a, b in zip(tiny.parameters(), loaded.parameters(), strict=True))
    with torch.device("meta"):
        names = set(encoders.text_encoder(Text()).state_dict())
    published = {"bert.embeddings.word_embeddings.weight", "bert.encoder.layer.5.attention.self.query.weight"}
    published |= {"bert.encoder.layer.0.attention.output.LayerNorm.weight", "bert.encoder.layer.3.output.dense.bias"}
    assert {n.removeprefix("bert.") for n in published} <= names and not any("layer.6" in n or "pooler" in n for n in names)


def test_tokens(tmp_path):
    hashed = encoders.Tokenizer(Text(tokenizer="words", length=6))(["The nuclei are, evenly", "one two three four five six"])
    assert hashed.ids.shape == (2, 6) and hashed.mask.tolist() == [[1] * 6, [1] * 6] and hashed.word[0].tolist() == [-1, 0, 1, 2, 3, -1]
    again = encoders.Tokenizer(Text(tokenizer="words", length=6))(["the NUCLEI"])
    assert again.ids[0, 1:3].tolist() == hashed.ids[0, 1:3].tolist() and again.mask[0].tolist() == [1, 1, 1, 1, 0, 0]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "nu", "##clei", "dense"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    bert = encoders.Tokenizer(Text(tokenizer=str(tmp_path), length=6))(["nuclei dense"])
    assert bert.ids[0].tolist() == [2, 5, 6, 7, 3, 0] and bert.word[0].tolist() == [-1, 0, 0, 1, -1, -1]
    with pytest.raises(UsageError, match="text.tokenizer: .* cannot be loaded"):
        encoders.Tokenizer(Text(tokenizer=str(tmp_path / "nowhere")))


def test_pieces_of_a_word_are_summed():
    tokens = torch.arange(6.0).reshape(1, 6, 1) + 1
    found = encoders.sum_pieces(tokens, torch.tensor([[-1, 0, 0, 1, -1, -1]]))
    assert found.flatten().tolist() == [1, 5, 0, 4, 5, 6]


def batch_of(n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = encoders.Tokenizer(TINY[1])([f"sentence number {i % 4}" for i in range(n)])
    return torch.randn(n, 3, 16, 16, generator=generator), torch.randn(n, 3, 16, 16, generator=generator), tokens


@pytest.mark.parametrize("keys", [True, False])
def test_vision_language_model(keys):
    torch.manual_seed(0)
    config = Vlm(**{**vars(TINY_VLM), "ema_keys": keys})
    model = vlm.VisionLanguage(*TINY, config, 16)
    found = model(*batch_of())
    image, text, image2, _, temperature = found
    assert image.semantic.shape == (6, 8) and image.mu.shape == (6, 16) and image.local.shape == (6, 4, 8) and text.local.shape == (6, 8, 8)
    assert (image.sigma > 0).all() and float(temperature.detach()) == pytest.approx(0.07)
    assert image2.mu.requires_grad is not keys
    losses = vlm.vlm_loss(found, config)
    losses["loss"].backward()
    total = losses["cross"] + losses["intra"] + 0.2 * losses["local"]
    torch.testing.assert_close(losses["loss"], total)
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    with torch.no_grad():
        model.log_temperature.fill_(-20)
    assert float(model.temperature.detach()) == pytest.approx(0.01)
    assert text.valid[0].tolist() == [0, 1, 1, 1, 0, 0, 0, 0]


def test_losses_are_those_of_the_equations():
    torch.manual_seed(0)
    embeddings = [
        vlm.Embedding(torch.randn(5, 4), torch.randn(5, 3), torch.rand(5, 3), torch.zeros(5, 2, 4), torch.ones(5, 2)) for _ in range(4)
    ]
    config = Vlm(local=0.0)
    found = vlm.vlm_loss((*embeddings, torch.tensor(0.5)), config)

    def contrast(x, y):
        s, r = nn.functional.normalize(x.semantic, dim=1), nn.functional.normalize(y.semantic, dim=1)
        w2 = torch.cdist(x.mu, y.mu) ** 2 + torch.cdist(x.sigma, y.sigma) ** 2
        sim = 1 - (1 - s @ r.T) * torch.exp(-0.2 * (w2 / 200 + 4) / torch.cdist(s, r).clamp(min=1e-6))
        target = torch.arange(5)
        return (nn.functional.cross_entropy(sim / 0.5, target) + nn.functional.cross_entropy(sim.T / 0.5, target)) / 2

    i, t, i2, t2 = embeddings
    torch.testing.assert_close(found["cross"], contrast(i, t), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["intra"], (contrast(i, i2) + contrast(t, t2)) / 2, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("cosine", "expected"), [(0.9, 0.995), (0.5, 0.865), (0.0, 0.605), (-0.5, 0.297)])
def test_similarity_at_the_constants_of_the_code(cosine, expected):
    """At W2 = 512, as the specification tabulates it."""
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[cosine, math.sqrt(1 - cosine**2)]])
    mu = torch.zeros(1, 2)
    far = torch.tensor([[math.sqrt(512.0), 0.0]])
    found = wk.uncertainty_similarity(x, mu, mu, y, far, mu)
    assert float(found) == pytest.approx(expected, abs=6e-4)


def test_limits_of_the_similarity():
    x, mu = torch.nn.functional.normalize(torch.randn(1, 4), dim=1), torch.zeros(1, 3)
    assert float(wk.uncertainty_similarity(x, mu, mu, x, mu, mu)) == pytest.approx(1)
    y = torch.nn.functional.normalize(torch.randn(1, 4), dim=1)
    assert float(wk.uncertainty_similarity(x, mu, mu, y, mu, mu, a=0.0, b=0.0)) == pytest.approx(float((x * y).sum()), abs=1e-6)


def test_keys_follow():
    model = vlm.VisionLanguage(*TINY, Vlm(**{**vars(TINY_VLM), "momentum": 0.5}), 16)
    model.follow()
    before = [p.clone() for p in model.keys.module.parameters()]
    with torch.no_grad():
        for p in model.encoders.parameters():
            p.add_(1.0)
    model.follow()
    for a, b in zip(model.keys.module.parameters(), before, strict=True):
        torch.testing.assert_close(a, b + 0.5)


def test_vlm_steps_fused_and_reference():
    torch.manual_seed(1)
    model = vlm.VisionLanguage(Image("tiny"), Text("tiny", tokenizer="words", length=8), Vlm(**{**vars(TINY_VLM), "ema_keys": False}), 16)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batches = []
    for i in range(20):
        image, second, tokens = batch_of(5, i)
        batches.append((image, second, tokens.ids, tokens.mask, tokens.word))

    def loss(m, b):
        return vlm.vlm_loss(m(b[0], b[1], encoders.Tokens(*b[2:])), m.config)["loss"]

    assert_steps_agree(model, loss, batches, lr=0.005)


def test_grounding():
    torch.manual_seed(0)
    decoder = grounding.GroundingDecoder(6, Grounding())
    patches, text = torch.randn(3, 4, 6), torch.randn(3, 6)
    pixels = decoder(patches)
    assert torch.equal(pixels[:, :, :4, :4], patches[:, 0, :, None, None].expand(-1, -1, 4, 4))  # closed gates: the nearest patch
    logits = decoder.logits(pixels, text)
    cosine = torch.einsum("ndhw,kd->nkhw", nn.functional.normalize(pixels, dim=1), nn.functional.normalize(text, dim=1))
    torch.testing.assert_close(logits, 10 * cosine - 2.5)
    torch.testing.assert_close(decoder.own_logits(pixels, text), logits[torch.arange(3), torch.arange(3)])
    plain = grounding.GroundingDecoder(6, Grounding(affine=False))
    torch.testing.assert_close(plain.logits(pixels, text), cosine)
    assert not plain.scale.requires_grad
    optimizer = torch.optim.Adam(decoder.parameters(), 1e-2)
    first = float(grounding.text_guided_loss(decoder, patches, text).detach())
    for _ in range(40):
        optimizer.zero_grad()
        loss = grounding.text_guided_loss(decoder, patches, text)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < first - 0.3


def test_text_guided_loss_of_a_case_worked_out():
    """Two images, each all of one direction: pooled features are these directions, whatever the masks."""
    decoder = grounding.GroundingDecoder(2, Grounding(), temperature=0.5)
    patches = torch.tensor([[[2.0, 0.0]], [[0.0, 3.0]]])
    found = float(grounding.text_guided_loss(decoder, patches, torch.eye(2)).detach())
    assert found == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-5)


def test_grounding_steps_fused_and_reference():
    torch.manual_seed(0)
    decoder = grounding.GroundingDecoder(6, Grounding())
    batches = [(torch.randn(3, 4, 6), torch.randn(3, 6)) for _ in range(20)]
    assert_steps_agree(decoder, lambda m, b: grounding.text_guided_loss(m, *b), batches, lr=0.005)


def test_the_teacher_follows():
    """α = min(1 − 1 / (step + 1), 0.99): the first average is the mean of the start and the first step."""
    model = unet.MeanTeacher(Semi(width=4))
    model.follow()  # the first call copies
    start = [p.clone() for p in model.teacher.parameters()]
    for step in range(1, 4):
        with torch.no_grad():
            for p in model.student.parameters():
                p.add_(1.0)
        model.follow()
        alpha = 1 - 1 / (step + 1)
        start = [alpha * a + (1 - alpha) * b for a, b in zip(start, model.student.parameters(), strict=True)]
        for a, b in zip(model.teacher.parameters(), start, strict=True):
            torch.testing.assert_close(a, b)
    assert not any(p.requires_grad for p in model.teacher.parameters())


def test_pixel_losses():
    logit, target = torch.tensor([[0.0, 0.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    assert float(unet.pixel_loss(logit, target, "bce")) == pytest.approx(math.log(2))
    dice = 1 - 2 * 0.5 / (2 + 1)
    assert float(unet.pixel_loss(logit, target, "balanced")) == pytest.approx(0.5 * dice + 0.5 * math.log(2), rel=1e-4)
    confident = torch.tensor([[20.0, -20.0, -20.0, -20.0]])
    assert float(unet.pixel_loss(confident, target, "balanced")) < 1e-4
    assert torch.isfinite(unet.pixel_loss(logit, torch.zeros(1, 4), "balanced"))


def test_where_the_losses_of_a_soft_target_are_least():
    target = torch.full((1, 100), 0.2)
    levels = torch.linspace(0.05, 0.95, 19)
    best = {}
    for kind in ("bce", "balanced"):
        losses = [float(unet.pixel_loss(torch.full((1, 100), float(torch.logit(p))), target, kind)) for p in levels]
        best[kind] = float(levels[losses.index(min(losses))])
    assert best["bce"] == pytest.approx(0.2) and best["balanced"] > 0.4


def test_targets_on_unlabelled_images():
    teacher, text = torch.tensor([-4.0, 4.0]), torch.tensor([-2.0, 1.0])
    torch.testing.assert_close(unet.merged_target(teacher, text, literal=False), torch.tensor([-6.0, 5.0]).sigmoid())
    literal = unet.merged_target(teacher, text, literal=True)
    assert (literal >= 0.5).all() and (literal <= 0.89).all()  # no background at all
    student = torch.randn(1, 6, requires_grad=True)
    t, g = torch.randn(1, 6, requires_grad=True), torch.randn(1, 6, requires_grad=True)
    loss = unet.semi_loss(student, t, g, Semi())
    expected = (unet.pixel_loss(student, (t + g).sigmoid(), "balanced") + unet.pixel_loss(student, g.sigmoid(), "balanced")) / 2
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert student.grad is not None and t.grad is None and g.grad is None
    plain = unet.semi_loss(student, t, None, Semi(soft_loss="bce"))
    torch.testing.assert_close(plain, nn.functional.binary_cross_entropy_with_logits(student, t.sigmoid()))
    torch.testing.assert_close(unet.semi_loss(student, t, None, Semi()), unet.pixel_loss(student, t.sigmoid(), "balanced"))


def test_defaults_of_the_paper():
    paper, small = configs.load(DusssConfig), configs.load(DusssConfig, "configs/dusss_small.yaml")
    assert (paper.vlm.a, paper.vlm.b, paper.vlm.lam, paper.vlm.temperature) == (1 / 200, 4.0, 0.2, 0.07)
    assert paper.vlm.batch_size == 32 and paper.vlm.width == 128 and paper.seed == 666 and paper.semi.patience == 20
    assert small.semi.steps >= 450 and small.data.labelled == 0.25 and small.image.encoder == "tiny"
