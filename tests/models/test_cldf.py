"""M3: parameter counts, the mapping of guided-diffusion's weights, linearity, seeds, clustering."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import wsss_kernels as wk
from wsss_kernels.testing import peak_memory
from wsss_models.cldf import cam, classifier, decoder as pixel, diffusion, method
from wsss_models.cldf.config import Cam, Decoder, Diffusion, Features, NoisyClassifier, UNet
from wsss_models.cldf.features import Extractor, layer_names
from wsss_models.errors import InputError, UsageError

from .parity import assert_steps_agree

TINY = UNet(base=16, multipliers=(1, 2), blocks=1, attention=(8,), head=8, groups=4)


def millions(module: nn.Module) -> float:
    return round(sum(p.numel() for p in module.parameters()) / 1e6, 2)


def test_parameter_counts():
    with torch.device("meta"):
        two, three = (diffusion.make_unet(UNet(blocks=n), 256, 4, 2) for n in (2, 3))
        learned_variance = 4 * (128 * 9 + 1) / 1e6  # guided-diffusion's second half of the output
        assert millions(two) == round(124.06 - learned_variance, 2) or millions(two) == round(124.065 - learned_variance, 2)
        assert abs(millions(three) + learned_variance - 164.3) < 0.05
        assert millions(classifier.EncoderClassifier(NoisyClassifier().unet, 256, 4)) == 47.61
        extractor_layers = layer_names(two, ())
        assert extractor_layers[:2] == ["up_blocks.0.attentions.2", "up_blocks.1.attentions.2"] and len(layer_names(two, ("all",))) == 18
        net = cam.AmeCam(4, Cam())
        assert [e.in_channels for e in net.exits] == [64, 128, 256, 512]


def channels_of(unet: nn.Module, names) -> list[int]:
    """Output channels of residual and attention blocks."""
    modules = [unet.get_submodule(name) for name in names]
    return [m.conv2.out_channels if hasattr(m, "conv2") else m.to_out[0].out_features for m in modules]


def test_width_of_the_features():
    with torch.device("meta"):
        unet = diffusion.make_unet(UNet(), 256, 4, 2)
    assert channels_of(unet, layer_names(unet, ())) == [512, 512, 256, 256, 128, 128]
    assert sum(channels_of(unet, layer_names(unet, ()))) == 1792 and sum(channels_of(unet, layer_names(unet, ("all",)))) == 5376


def test_layers_are_taken_before_the_upsampler():
    unet = diffusion.make_unet(TINY, 16, 2, 2)
    extractor = Extractor(unet, diffusion.make_schedule(1000), Features(timesteps=(1, 10)), seed=0)
    maps = extractor.at(torch.zeros(1, 2, 16, 16), ["a"], torch.ones(1, dtype=torch.long), 1)
    assert [m.shape[1:] for m in maps] == [(32, 8, 8), (16, 16, 16)] and extractor.channels(16) == [32, 16]
    with pytest.raises(UsageError, match="the U-Net has no module 'up_blocks.9'; its decoder's blocks are up_blocks.0.attentions.0"):
        Extractor(unet, diffusion.make_schedule(1000), Features(layers=("up_blocks.9",)), seed=0)
    with pytest.raises(UsageError, match=r"expected numbers in 0…999, got \(1000,\)"):
        Extractor(unet, diffusion.make_schedule(1000), Features(timesteps=(1000,)), seed=0)


def test_features_are_repeatable_and_of_each_image_alone():
    torch.manual_seed(0)
    extractor = Extractor(diffusion.make_unet(TINY, 16, 2, 2), diffusion.make_schedule(1000), Features(timesteps=(1, 50)), seed=3)
    images, label = torch.randn(2, 2, 16, 16), torch.tensor([0, 1])
    both = extractor.mean(images, ["a", "b"], label)
    alone = extractor.mean(images[1:], ["b"], label[1:])
    for a, b in zip(both, alone, strict=True):
        torch.testing.assert_close(a[1:], b, atol=1e-5, rtol=1e-5)
    for mean, every in zip(both, extractor.every(images, ["a", "b"], label), strict=True):
        torch.testing.assert_close(mean, every.mean(1))
    negative = Extractor(extractor.unet, extractor.schedule, Features(timesteps=(1, 50), condition="negative"), seed=3)
    assert not torch.allclose(negative.mean(images[:1], ["a"], label[:1])[0], both[0][:1])


def test_schedule():
    schedule = diffusion.make_schedule(1000)
    assert torch.allclose(schedule.betas, torch.linspace(1e-4, 0.02, 1000)) and schedule.config.prediction_type == "epsilon"
    assert torch.allclose(diffusion.make_schedule(4000).betas[[0, -1]], torch.tensor([2.5e-5, 0.005]))


class GuidedBlock(nn.Module):
    """A residual block with guided-diffusion's names, written from its equations: scale-shift normalisation by the time embedding."""

    def __init__(self, inside, outside, embedding, groups):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(groups, inside), nn.SiLU(), nn.Conv2d(inside, outside, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * outside))
        norm = nn.GroupNorm(groups, outside)
        self.out_layers = nn.Sequential(norm, nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(outside, outside, 3, padding=1))
        self.skip_connection = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()

    def forward(self, x, embedding):
        h = self.in_layers(x)
        scale, shift = self.emb_layers(embedding)[:, :, None, None].chunk(2, 1)
        return self.skip_connection(x) + self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)


class GuidedAttention(nn.Module):
    def __init__(self, channels, head, groups):
        super().__init__()
        self.heads = channels // head
        self.norm, self.qkv, self.proj_out = (
            nn.GroupNorm(groups, channels),
            nn.Conv1d(channels, 3 * channels, 1),
            nn.Conv1d(channels, channels, 1),
        )

    def forward(self, x, embedding):
        flat = x.flatten(2)
        q, k, v = self.qkv(self.norm(flat)).unflatten(1, (self.heads, 3, -1)).unbind(2)  # legacy order: q, k, v of each head
        weight = (q.transpose(2, 3) @ k / math.sqrt(q.shape[2])).softmax(-1)
        return x + self.proj_out((v @ weight.transpose(2, 3)).flatten(1, 2)).reshape(x.shape)


class _Wrapped(nn.Module):
    def __init__(self, name, conv):
        super().__init__()
        setattr(self, name, conv)


class Down(_Wrapped):
    def forward(self, x, embedding):
        return self.op(x)


class Up(_Wrapped):
    def forward(self, x, embedding):
        return self.conv(nn.functional.interpolate(x, scale_factor=2))


class Guided(nn.Module):
    """guided-diffusion's U-Net of two levels with attention at the second, one residual block each."""

    def __init__(self, c, channels, head, groups):
        super().__init__()
        self.c, e = c, 4 * c
        block = lambda a, b: GuidedBlock(a, b, e, groups)  # noqa: E731
        attention = lambda a: GuidedAttention(a, head, groups)  # noqa: E731
        self.time_embed = nn.Sequential(nn.Linear(c, e), nn.SiLU(), nn.Linear(e, e))
        self.label_emb = nn.Embedding(2, e)
        stem, down = nn.Conv2d(channels, c, 3, padding=1), Down("op", nn.Conv2d(c, c, 3, 2, 1))
        inputs = [[stem], [block(c, c)], [down], [block(c, 2 * c), attention(2 * c)]]
        self.input_blocks = nn.ModuleList(nn.ModuleList(b) for b in inputs)
        self.middle_block = nn.ModuleList([block(2 * c, 2 * c), attention(2 * c), block(2 * c, 2 * c)])
        up = Up("conv", nn.Conv2d(2 * c, 2 * c, 3, padding=1))
        outputs = [
            [block(4 * c, 2 * c), attention(2 * c)],
            [block(3 * c, 2 * c), attention(2 * c), up],
            [block(3 * c, c)],
            [block(2 * c, c)],
        ]
        self.output_blocks = nn.ModuleList(nn.ModuleList(b) for b in outputs)
        self.out = nn.Sequential(nn.GroupNorm(groups, c), nn.SiLU(), nn.Conv2d(c, 2 * channels, 3, padding=1))

    def forward(self, x, t, y):
        frequency = torch.exp(-math.log(10000) * torch.arange(self.c // 2) / (self.c // 2))
        angle = t[:, None].float() * frequency
        embedding = self.time_embed(torch.cat([angle.cos(), angle.sin()], 1)) + self.label_emb(y)
        kept = []
        for modules in self.input_blocks:
            for module in modules:
                x = module(x) if isinstance(module, nn.Conv2d) else module(x, embedding)
            kept.append(x)
        for module in self.middle_block:
            x = module(x, embedding)
        for modules in self.output_blocks:
            x = torch.cat([x, kept.pop()], 1)
            for module in modules:
                x = module(x, embedding)
        return self.out(x)


def test_guided_diffusion_weights(tmp_path):
    """A network with guided-diffusion's names and equations gives the same noise through the mapped weights."""
    torch.manual_seed(0)
    guided = Guided(16, 2, 8, 4).eval()
    for parameter in guided.parameters():
        nn.init.normal_(parameter, std=0.1)
    torch.save(guided.state_dict(), tmp_path / "guided.pt")
    model = diffusion.DiffusionModel(Diffusion(unet=TINY, weights=str(tmp_path / "guided.pt")), 16, 2).eval()
    x, t, y = torch.randn(3, 2, 16, 16), torch.tensor([0, 7, 900]), torch.tensor([0, 1, 1])
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, y), guided(x, t, y)[:, :2], atol=1e-5, rtol=1e-4)
    torch.save(model.unet.state_dict(), tmp_path / "own.pt")
    again = diffusion.DiffusionModel(Diffusion(unet=TINY, weights=str(tmp_path / "own.pt")), 16, 2)
    assert all(torch.equal(a, b) for a, b in zip(again.unet.parameters(), model.unet.parameters(), strict=True))
    with pytest.raises(UsageError, match="has no place in this U-Net"):
        diffusion.DiffusionModel(
            Diffusion(unet=UNet(16, (1, 2), 1, attention=(), head=8, groups=4), weights=str(tmp_path / "guided.pt")), 16, 2
        )


def test_the_average_follows():
    model = diffusion.DiffusionModel(Diffusion(unet=TINY, ema=0.5), 16, 2)
    assert not any(p.requires_grad for p in model.average.parameters())
    model.follow()
    with torch.no_grad():
        for p in model.unet.parameters():
            p.add_(1.0)
    before = [p.clone() for p in model.trained.parameters()]
    model.follow()
    for a, b in zip(model.trained.parameters(), before, strict=True):
        torch.testing.assert_close(a, b + 0.5)


def test_linearity():
    """The projection at each layer's own size is the literal form, to 1e-5, in a fraction of its memory."""
    torch.manual_seed(0)
    channels, sides = [96, 64, 32], [8, 16, 32]
    maps = [torch.randn(2, 4, c, s, s) for c, s in zip(channels, sides, strict=True)]
    decoder = pixel.PixelDecoder(channels, 64, Decoder())
    mean = [m.mean(1) for m in maps]
    with torch.no_grad():
        literal, quick = decoder.literal(maps), decoder(mean)
        assert quick.shape == (2, 16, 64, 64)
        assert float((quick - literal).abs().max()) <= 1e-5 * max(1.0, float(literal.abs().max()))
        most, _ = peak_memory(lambda: decoder.literal(maps))
        least, _ = peak_memory(lambda: decoder(mean))
    assert least < most / 8


def test_seeds_and_thresholds():
    score = np.zeros((4, 4), np.float32)
    assert not cam.binarize(score, None).any()
    score[1:3, 1:3] = [[0.9, 0.8], [0.4, 0.9]]
    assert cam.binarize(score, None).sum() >= 3 and cam.binarize(score, 0.5).sum() == 3
    a, b = np.array([[True, True, False, False]]), np.array([[True, False, True, False]])
    assert cam.seeds(a, b).tolist() == [[1, 255, 255, 0]]


def test_external_maps(tmp_path):
    np.save(tmp_path / "a.npy", np.full((1, 4, 4), 0.5, np.float32))
    assert cam.read_cam(tmp_path, "a", 8).shape == (8, 8)
    np.save(tmp_path / "b.npy", np.full((4, 4), 7.0))
    for name, message in (("b", r"expected a map h×w in 0…1"), ("c", "there is no such file")):
        with pytest.raises(InputError, match=message):
            cam.read_cam(tmp_path, name, 8)


def test_layer_cam():
    """relu(relu(gradient) · activation), summed over channels: here only the channel that speaks for the object counts."""

    class Same(nn.Module):
        def forward(self, x):
            return [x * 1.0]

    model = cam.LayerCamClassifier(2, Cam(width=0.125)).eval()
    assert model(torch.randn(1, 2, 64, 64)).shape == (1, 1)
    assert model.maps(torch.randn(2, 2, 64, 64)).shape == (2, 64, 64)
    model.trunk, model.head, model.fused = Same(), nn.Linear(2, 1), [0]
    model.head.weight.data.copy_(torch.tensor([[1.0, -1.0]]))
    x = torch.randn(2, 2, 8, 8)
    found = model.maps(x)
    torch.testing.assert_close(found, classifier.min_max(x[:, 0].relu()))
    assert not found.requires_grad and not x.requires_grad


def test_ame_cam():
    torch.manual_seed(0)
    model = cam.AmeCam(2, Cam(width=0.125)).eval()
    x = torch.randn(3, 2, 64, 64)
    assert model(x).shape == (3, 4) and model.maps(x).shape == (3, 64, 64)
    attended, pixels = model.aggregate(x)
    assert attended.min() >= 0 and attended.max() <= 1 and pixels.shape[2:] == (64, 64)
    # Maps that separate two kinds of pixels contrast better than maps that do not.
    half = torch.zeros(3, 8, 8)
    half[:, :4] = 1
    kinds = torch.stack([half, 1 - half], dim=1)
    mixed = torch.full_like(half, 0.5)
    assert float(cam.foreground_contrast(half, kinds)) < float(cam.foreground_contrast(mixed, kinds)) - 1
    assert torch.isfinite(cam.foreground_contrast(half[:1], kinds[:1]))


def test_gradient_maps_find_what_the_classifier_looks_at():
    class Centre(nn.Module):
        def forward(self, x, t):
            present = x[:, :, 3:5, 3:5].sum((1, 2, 3))
            return torch.stack([torch.zeros_like(present), present], 1)

    config = NoisyClassifier(timesteps=(10, 20))
    found = classifier.gradient_maps(Centre(), diffusion.make_schedule(1000), torch.zeros(1, 2, 8, 8), ["a"], config, 0)
    assert torch.equal(found[0] > 0.5, torch.nn.functional.pad(torch.ones(2, 2), (3, 3, 3, 3)) > 0)
    assert torch.equal(classifier.min_max(torch.full((1, 2, 2), 3.0)), torch.zeros(1, 2, 2))


def planted(count=6, size=24, seed=0):
    """Features of two kinds of pixels, seeds on a part of each, and the truth."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.zeros(count, size, size, dtype=torch.uint8)
    for b in range(count):
        y, x = (int(v) for v in torch.randint(2, size - 12, (2,), generator=generator))
        truth[b, y : y + 9, x : x + 9] = 1
    direction = torch.randn(2, 12, generator=generator)
    maps = direction[truth.long()].permute(0, 3, 1, 2) + 0.3 * torch.randn(count, 12, size, size, generator=generator)
    keep = torch.rand(truth.shape, generator=generator) < 0.4
    return [maps, maps[:, :4, ::2, ::2]], torch.where(keep, truth, torch.tensor(255, dtype=torch.uint8)), truth


def test_planted_features_are_separated():
    """Decoder and k-means reach Dice > 0.9 on separable features."""
    torch.manual_seed(0)
    maps, seed, truth = planted()
    config = Decoder(background=300, foreground=300)
    decoder = pixel.PixelDecoder([12, 4], 24, config)
    optimizer = torch.optim.SGD(decoder.parameters(), config.lr)
    losses = []
    for _ in range(30):
        z, label = pixel.select(decoder(maps), seed, config)
        decoder.remember(z, label)
        loss = pixel.contrastive_loss(z, label, config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
    with torch.no_grad():
        embedding = decoder(maps)
    found = pixel.cluster(embedding, decoder.prototypes, config.kmeans_iter)
    dice = [method.dice_and_iou(m.numpy(), t.numpy())[0] for m, t in zip(found, truth, strict=True)]
    assert min(dice) > 0.9
    own = pixel.cluster(embedding, pixel.seed_prototypes(embedding, seed, decoder.prototypes), config.kmeans_iter)
    assert (own == found).float().mean() > 0.99


def test_selection():
    torch.manual_seed(0)
    z = torch.arange(2 * 3 * 4, dtype=torch.float32).reshape(2, 1, 3, 4).requires_grad_()
    seed = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0, 255, 255, 255, 255], [0] * 12], dtype=torch.uint8).reshape(2, 3, 4)
    rows, label = pixel.select(z, seed, Decoder(background=2, foreground=2))
    assert label.tolist() == [1, 1, 0, 0] and set(rows[:2, 0].tolist()) <= {0, 1, 2} and set(rows[2:, 0].tolist()) <= {3, 4, 5, 6, 7}
    none, nothing = pixel.select(z, seed[1:].expand(2, -1, -1), Decoder())
    assert none.shape == (0, 1) and len(nothing) == 0
    assert float(pixel.contrastive_loss(none, nothing, Decoder())) == 0


def test_names_of_clusters():
    mask = torch.tensor([[[1, 0], [1, 0]]], dtype=torch.uint8)
    seed = torch.tensor([[[255, 1], [0, 1]]], dtype=torch.uint8)
    assert pixel.name_clusters(mask, seed).tolist() == [[[0, 1], [0, 1]]]
    assert torch.equal(pixel.name_clusters(1 - mask, seed), 1 - mask)
    points = torch.tensor([[[1.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0, 1.0]]]).permute(1, 0, 2)[..., None]
    first = pixel.cluster(points, torch.tensor([[0.9, 0.1], [0.1, 0.9]]), 5)
    assert first.flatten().tolist() == [0, 0, 1, 1]
    assert pixel.cluster(points, torch.tensor([[0.1, 0.9], [0.9, 0.1]]), 5).flatten().tolist() == [1, 1, 0, 0]


def test_decoder_steps_fused_and_reference():
    torch.manual_seed(0)
    decoder = pixel.PixelDecoder([6, 4], 10, Decoder(width=8, layers=2))
    batches = []
    for i in range(20):
        generator = torch.Generator().manual_seed(i)
        maps = [torch.randn(2, 6, 5, 5, generator=generator), torch.randn(2, 4, 10, 10, generator=generator)]
        batches.append((*maps, torch.randint(0, 2, (2, 10, 10), generator=generator, dtype=torch.uint8)))

    def loss(model, batch):
        z = model(batch[:2]).flatten(2).transpose(1, 2).flatten(0, 1)
        return wk.supervised_contrastive_loss(z, batch[2].flatten().long(), 0.1)

    assert_steps_agree(decoder, loss, batches)


def test_dice():
    a, b = np.array([1, 1, 0, 0]), np.array([1, 0, 1, 0])
    assert method.dice_and_iou(a, b) == (0.5, 1 / 3) and method.dice_and_iou(a, a) == (1, 1)
    assert method.dice_and_iou(0 * a, 0 * a) == (1, 1) and method.dice_and_iou(a, 0 * a) == (0, 0)
