"""The PVT v1 model against the paper's figures, Transformers' implementation and a plain one written here."""

import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PvtConfig, PvtForImageClassification

import pvt
from pvt.model import Block, set_optimised_kernels
from tests.tolerances import of_sums

pytestmark = pytest.mark.gpu

DEPTHS = {
    "pvt_tiny": (2, 2, 2, 2),
    "pvt_small": (3, 4, 6, 3),
    "pvt_medium": (3, 4, 18, 3),
    "pvt_large": (3, 8, 27, 3),
}
NUM_HEADS = {"pvt_pico": (1, 2, 3, 4), **dict.fromkeys(DEPTHS, (1, 2, 5, 8))}


def create(variant: str, **kwargs: Any) -> Any:  # to type checkers, attributes of an nn.Module are tensors
    model = timm.create_model(variant, **kwargs)
    assert isinstance(model, pvt.PyramidVisionTransformer)
    return model


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights at which every parameter and every eps shows in the output.

    As initialised, norms and biases do nothing. Here what enters a LayerNorm has a variance of some 1e-3, so
    that taking 1e-5 for an eps of 1e-6 moves its output by about 0.5 %.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, device="cpu")
        if parameter.ndim == 1:
            is_scale = "norm" in name and name.endswith("weight")
            small = name.endswith(("patch_embed.norm.weight", "proj.bias", "fc2.bias", "sr.bias"))
            noise = (1 if is_scale else 0) + 0.1 * noise
            noise *= 0.03 if small else 1
        elif parameter.ndim == 3:  # position embeddings and class token
            noise *= 0.03
        else:
            small = parameter.ndim == 4 or name.endswith(("proj.weight", "fc2.weight"))
            noise *= (0.03 if small else 1) / math.sqrt(parameter[0].numel())
        parameter.copy_(noise)


def assert_close(actual: Tensor, expected: Tensor, label: str = "", tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape, label
    error = ((actual - expected).norm() / expected.norm()).item()
    assert error <= of_sums(tolerance), f"{label}: relative error {error:.2e}"


def images(batch: int, height: int, width: int) -> Tensor:
    return drawn(torch.randn, batch, 3, height, width, seed=1)


def random_scales(model: Any, batch: int) -> Tensor:
    """Multipliers that are all different, so that no two rows or columns can be swapped unseen."""
    return 0.5 + drawn(torch.rand, len(model.drop_path_rates), batch, seed=2)


def drawn(draw: Any, *shape: int, seed: int) -> Tensor:
    """The same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return draw(*shape, generator=generator, device="cpu").to(torch.get_default_device())


# Size


@pytest.mark.parametrize(
    ("variant", "num_parameters", "gmacs"),
    [
        ("pvt_tiny", 13_229_288, 1.9),
        ("pvt_small", 24_485_864, 3.8),
        ("pvt_medium", 44_208_104, 6.7),
        ("pvt_large", 61_369_320, 9.8),
    ],
)
def test_parameter_count_and_macs_match_the_paper(variant, num_parameters, gmacs):
    with torch.device("meta"):
        model = create(variant)
        image = torch.empty(1, 3, 224, 224)
    set_optimised_kernels(model, False)  # which would skip what nobody looks at
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    # The math backend shows attention as matrix products, which the counter knows on any device.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    measured = counter.get_total_flops() / 2 / 1e9
    assert round(measured, 1) == gmacs
    assert measured == pytest.approx(gmacs, rel=0.02)


def test_pico_parameter_count():
    model = create("pvt_pico", img_size=32, num_classes=10)
    assert sum(parameter.numel() for parameter in model.parameters()) == 631_114


def test_weight_initialisation_per_layer_type():
    torch.manual_seed(0)
    model = create("pvt_pico")
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.LayerNorm):
            assert parameter.eq(1.0 if name.endswith("weight") else 0.0).all(), name
        elif isinstance(module, nn.Conv2d):  # PyTorch's default: uniform up to 1 / sqrt(fan in)
            bound = 1 / math.sqrt(module.weight[0].numel())
            assert 0.9 * bound < parameter.abs().max() <= bound, name
        elif name.endswith("bias"):
            assert parameter.eq(0).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name


def test_layer_norm_eps_per_layer():
    model = create("pvt_pico")
    eps = {name: module.eps for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    assert len(eps) == 4 + 3 + 4 * 2 + 1
    for name, value in eps.items():
        assert value == (1e-5 if name.endswith(("patch_embed.norm", "attn.norm")) else 1e-6), name


# Against Transformers


def transformers_twin(model: Any) -> Any:
    """Transformers' model with the same weights, and the public code's eps where its own are all 1e-6."""
    twin = PvtForImageClassification(PvtConfig(depths=list(model.depths), num_labels=model.num_classes))
    for name, module in twin.named_modules():
        if isinstance(module, nn.LayerNorm) and ("patch_embeddings" in name or "attention.self" in name):
            module.eps = 1e-5
    twin.load_state_dict(pvt.to_transformers(model.state_dict()))
    return twin.eval()


def maps_of(hidden_states: tuple[Tensor, ...], depths: tuple[int, ...]) -> list[Tensor]:
    """Stage maps at 224 px from the tokens after each block."""
    maps = []
    for stage in range(4):
        tokens = hidden_states[sum(depths[: stage + 1]) - 1]
        side = 56 // 2**stage
        maps.append(tokens[:, -side * side :].transpose(1, 2).reshape(len(tokens), -1, side, side))
    return maps


@pytest.mark.parametrize("variant", ["pvt_tiny", "pvt_large"])
def test_logits_and_feature_maps_match_transformers(variant):
    model = create(variant, num_classes=100).eval()
    randomise(model)
    twin = transformers_twin(model)
    image = images(1, 224, 224)
    with torch.no_grad():
        expected = twin(image, output_hidden_states=True)
        tokens, maps = model.forward_intermediates(image)
        assert_close(model(image), expected.logits, "logits")
    assert_close(tokens, expected.hidden_states[-1], "tokens")
    expected_maps = maps_of(expected.hidden_states, DEPTHS[variant])
    for stage, (actual, wanted) in enumerate(zip(maps, expected_maps, strict=True)):
        assert_close(actual, wanted, f"stage {stage}")


def test_gradients_match_transformers():
    model = create("pvt_tiny", num_classes=100)
    randomise(model)
    twin = transformers_twin(model)
    image, target = images(2, 224, 224), drawn(torch.randn, 2, 100, seed=3)
    (model(image) * target).sum().backward()
    (twin(image).logits * target).sum().backward()
    expected = pvt.from_transformers({name: parameter.grad for name, parameter in twin.named_parameters()})
    for name, parameter in model.named_parameters():
        actual, wanted = parameter.grad, expected[name]
        if name.endswith("kv.bias"):
            # A constant added to all keys does not change a softmax: their half is zero but for rounding.
            keys, actual = actual.chunk(2)
            wanted = wanted.chunk(2)[1]
            assert keys.norm() <= of_sums(1e-5) * actual.norm(), name
        assert_close(actual, wanted, name)


# Against a plain implementation, for what Transformers' cannot do


def plain_forward(
    model: Any, num_heads: tuple[int, ...], x: Tensor, scales: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Logits and stage maps of PVT v1 from the model's weights and grids alone."""
    w = model.state_dict()
    if scales is None:
        scales = torch.ones(len(model.drop_path_rates), len(x))
    branches = iter(scales)
    maps = []

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], eps)

    def linear(name, x):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def conv(name, x):
        weight = w[name + ".weight"]
        return F.conv2d(x, weight, w[name + ".bias"], stride=weight.shape[-1])

    def attention(name, x, heads, grid):
        batch, _, dim = x.shape
        q, context = linear(name + ".q", x), x
        if name + ".sr.weight" in w:
            context = x.permute(0, 2, 1).reshape(batch, dim, *grid)
            context = conv(name + ".sr", context).reshape(batch, dim, -1).permute(0, 2, 1)
            context = norm(name + ".norm", context, 1e-5)
        kv = linear(name + ".kv", context)
        outputs = []
        for head in range(heads):
            part = slice(head * dim // heads, (head + 1) * dim // heads)
            k, v = kv[..., :dim][..., part], kv[..., dim:][..., part]
            outputs.append(torch.softmax(q[..., part] @ k.mT / math.sqrt(dim // heads), -1) @ v)
        return linear(name + ".proj", torch.cat(outputs, -1))

    tokens, first_row = x, 0
    for s, depth in enumerate(model.depths):
        stage = f"stages.{s}"
        x = conv(stage + ".patch_embed.proj", x)
        grid = x.shape[-2:]
        tokens = norm(stage + ".patch_embed.norm", x.flatten(2).permute(0, 2, 1), 1e-5)
        pos_embed = w[stage + ".pos_embed"]
        learned_grid = model.stages[s].grid
        first_row = pos_embed.shape[1] - learned_grid[0] * learned_grid[1]
        learned = pos_embed[:, first_row:].permute(0, 2, 1).reshape(1, -1, *learned_grid)
        resized = F.interpolate(learned, size=grid, mode="bilinear", align_corners=False)
        tokens = tokens + resized.flatten(2).permute(0, 2, 1)
        if s == 3:
            cls_token = w[stage + ".cls_token"] + pos_embed[:, :1]
            tokens = torch.cat([cls_token.repeat(len(tokens), 1, 1), tokens], 1)
        for b in range(depth):
            block = f"{stage}.blocks.{b}"
            branch = attention(block + ".attn", norm(block + ".norm1", tokens, 1e-6), num_heads[s], grid)
            tokens = tokens + next(branches).reshape(-1, 1, 1) * branch
            branch = F.gelu(linear(block + ".mlp.fc1", norm(block + ".norm2", tokens, 1e-6)))
            tokens = tokens + next(branches).reshape(-1, 1, 1) * linear(block + ".mlp.fc2", branch)
        x = tokens[:, first_row:].permute(0, 2, 1).reshape(len(x), -1, *grid)
        maps.append(x)
    return linear("head", norm("norm", tokens, 1e-6)[:, 0]), maps


@pytest.mark.parametrize(
    ("variant", "img_size", "height", "width"),
    [
        ("pvt_tiny", 224, 224, 224),
        ("pvt_tiny", 224, 224, 320),
        ("pvt_tiny", 224, 448, 448),  # stage 1's grid is the one that stage 0 learned on
        ("pvt_tiny", (160, 224), 160, 224),
        ("pvt_tiny", (160, 224), 224, 160),  # as many tokens, another grid
        ("pvt_pico", 32, 32, 32),
        ("pvt_pico", 64, 64, 32),
        ("pvt_pico", 224, 32, 96),
    ],
)
def test_any_image_size_matches_plain_forward(variant, img_size, height, width):
    model = create(variant, img_size=img_size, num_classes=100).eval()
    randomise(model)
    image = images(2, height, width)
    with torch.no_grad():
        logits, maps = plain_forward(model, NUM_HEADS[variant], image)
        assert_close(model(image), logits, "logits")
        actual = model.forward_intermediates(image, intermediates_only=True)
    for stage, (got, wanted) in enumerate(zip(actual, maps, strict=True)):
        assert_close(got, wanted, f"stage {stage}")


@pytest.mark.parametrize(
    ("height", "width", "way_out"),
    [(225, 224, "256x224"), (32, 48, "32x64"), (8, 8, "32x32")],
)
def test_image_size_not_divisible_by_32_is_rejected(height, width, way_out):
    message = rf"{height}x{width} px: .* divisible by 32; .* {way_out}"
    with pytest.raises(ValueError, match=message):
        create("pvt_pico")(images(1, height, width))
    with pytest.raises(ValueError, match=message):
        create("pvt_pico", img_size=(height, width))


def test_spatial_reduction_in_last_stage_is_rejected():
    with pytest.raises(ValueError, match="class token"):
        create("pvt_pico", sr_ratios=(8, 4, 2, 2))


# Drop path


def test_drop_path_rates_are_linear_over_blocks():
    rates = create("pvt_large", drop_path_rate=0.3, img_size=32).drop_path_rates
    assert rates == tuple(0.3 * i / 40 for i in range(41) for _ in range(2))
    assert create("pvt_pico").drop_path_rates == (0.0,) * 8


@pytest.mark.parametrize("training", [True, False])
def test_given_drop_path_multipliers_match_plain_forward(training):
    model = create("pvt_small", img_size=64, num_classes=100, drop_path_rate=0.5).train(training)
    randomise(model)
    image, scales = images(3, 64, 64), random_scales(model, 3)
    with torch.no_grad():
        logits, maps = plain_forward(model, NUM_HEADS["pvt_small"], image, scales)
        tokens, actual = model.forward_intermediates(image, drop_path=scales)
        assert_close(model(image, drop_path=scales), logits, "logits")
        assert_close(model.forward_head(model.forward_features(image, drop_path=scales)), logits, "features")
        assert_close(model.forward_head(tokens), logits, "tokens")
        _, stopped = model.forward_intermediates(image, [1], stop_early=True, drop_path=scales)
    for stage, (got, wanted) in enumerate(zip(actual, maps, strict=True)):
        assert_close(got, wanted, f"stage {stage}")
    assert_close(stopped[0], maps[1], "stop early")


def test_dropping_every_branch_leaves_only_embeddings():
    model = create("pvt_pico", img_size=64).eval()
    randomise(model)
    image = images(2, 64, 64)
    tokens, maps = model.forward_intermediates(image, drop_path=torch.zeros(8, 2))
    x = image
    for stage, actual in zip(model.stages, maps, strict=True):
        embedded, grid = stage.patch_embed(x)
        embedded = embedded + stage.pos_embed[:, -grid[0] * grid[1] :]
        x = embedded.transpose(1, 2).reshape(2, -1, *grid)
        torch.testing.assert_close(actual, x)
    cls_token = model.stages[3].cls_token + model.stages[3].pos_embed[:, :1]
    torch.testing.assert_close(tokens[:, 0], model.norm(cls_token)[:, 0].expand(2, -1))


@pytest.mark.parametrize("shape", [(8, 3), (7, 2), (2, 8)])
def test_drop_path_of_wrong_shape_is_rejected(shape):
    model = create("pvt_pico", img_size=32)
    with pytest.raises(ValueError, match=rf"\({shape[0]}, {shape[1]}\); expected \(8, 2\)"):
        model(images(2, 32, 32), drop_path=torch.ones(shape))


def test_random_drop_path_matches_timm():
    """Without multipliers and in training mode, a branch drops images at its own rate and scales the rest."""
    batch = 2000
    model = create("pvt_pico", img_size=32, drop_path_rate=0.6)
    drops = [module for module in model.modules() if isinstance(module, DropPath)]
    factors: list[Tensor] = []

    def record(module, args, output):
        factors.append((output.flatten(1).abs().amax(1) / args[0].flatten(1).abs().amax(1)).detach())

    for module in drops:
        module.register_forward_hook(record)
    image = torch.randn(1, 3, 32, 32).expand(batch, -1, -1, -1)
    torch.manual_seed(0)
    with torch.no_grad():
        model.train()(image)
    for rate, factor in zip(model.drop_path_rates, factors, strict=True):
        kept = factor > 0
        assert torch.allclose(factor[kept], torch.tensor(1 / (1 - rate)))
        assert abs(kept.float().mean().item() - (1 - rate)) <= 4 * math.sqrt(rate * (1 - rate) / batch)
    # Branches draw independently of each other, also the two of a block.
    attention, mlp = (factors[i] > 0 for i in (6, 7))
    assert abs((attention & mlp).float().mean().item() - 0.4**2) <= 4 * math.sqrt(0.16 * 0.84 / batch)
    factors.clear()
    with torch.no_grad():
        model.eval()(image[:2])
    assert all(torch.equal(factor, torch.ones(2)) for factor in factors)


@pytest.mark.parametrize("given", [True, False])
def test_grad_checkpointing_gives_the_same_gradients(given):
    model = create("pvt_tiny", img_size=64, num_classes=10, drop_path_rate=0.5).train()
    randomise(model)
    image, scales = images(2, 64, 64), random_scales(model, 2) if given else None
    num_calls = 0

    def count(*_):
        nonlocal num_calls
        num_calls += 1

    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(count)

    def gradients(enable: bool) -> list[Tensor]:
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        model(image, drop_path=scales).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    stored = gradients(False)
    assert num_calls == 8
    recomputed = gradients(True)
    assert num_calls == 8 + 16
    assert all(torch.equal(a, b) for a, b in zip(stored, recomputed, strict=True))


# Precision and compilation


@pytest.mark.parametrize("variant", ["pvt_pico", "pvt_large"])
def test_trains_in_bf16(variant):
    """Forward and backward in bf16, with position embeddings to resize and fp32 multipliers."""
    model = create(variant, img_size=64, num_classes=10).bfloat16().train()
    image = images(2, 32, 64).bfloat16()
    scales = random_scales(model, 2)
    logits = model(image, drop_path=scales)
    assert logits.dtype == torch.bfloat16
    loss = F.cross_entropy(logits, torch.tensor([1, 2]))
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_bf16_position_embeddings_are_resized_in_fp32(monkeypatch):
    stage = create("pvt_pico").bfloat16().stages[0]
    interpolate, dtypes = F.interpolate, []

    def record(x, **kwargs):
        dtypes.append(x.dtype)
        return interpolate(x, **kwargs)

    image = images(1, 224, 320).bfloat16()
    learned = stage.pos_embed.float().transpose(1, 2).unflatten(2, (56, 56))
    resized = F.interpolate(learned, size=(56, 80), mode="bilinear", align_corners=False).bfloat16()
    monkeypatch.setattr(F, "interpolate", record)
    with torch.no_grad():
        tokens, grid = stage(image, drop_path=torch.zeros(2, 1))
        assert (grid, {*dtypes}) == ((56, 80), {torch.float32})
        assert torch.equal(tokens, stage.patch_embed(image)[0] + resized.flatten(2).transpose(1, 2))


def test_bf16_and_fp32_agree():
    model = create("pvt_tiny", img_size=64, num_classes=10).eval()
    randomise(model)
    image = images(2, 96, 64)
    with torch.no_grad():
        expected = model(image)
        assert_close(model.bfloat16()(image.bfloat16()).float(), expected, tolerance=0.03)


def gradients(model: nn.Module, image: Tensor, scales: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    with torch.autocast(image.device.type, dtype, enabled=dtype != torch.float32):
        logits = model(image, drop_path=scales)
    loss = F.cross_entropy(logits.float(), torch.arange(len(image)))
    found = torch.autograd.grad(loss, list(parameters.values()))
    return {"logits": logits.detach().float(), **dict(zip(parameters, found, strict=True))}


@pytest.mark.parametrize(
    ("variant", "side", "depths"),
    [
        ("pvt_pico", 64, (1, 1, 1, 1)),
        ("pvt_tiny", 96, (1, 1, 1, 1)),
        pytest.param("pvt_tiny", 224, DEPTHS["pvt_tiny"], marks=pytest.mark.slow),
    ],
)
def test_optimised_kernels_match_plain_operators(variant, side, depths):
    """Logits and gradients of the plain operators in fp32; in bf16 they come as near to those."""
    model = create(variant, img_size=side, num_classes=10, depths=depths).train()
    randomise(model)
    image, scales = images(2, side, side), random_scales(model, 2)
    quick = {dtype: gradients(model, image, scales, dtype) for dtype in (torch.float32, torch.bfloat16)}
    set_optimised_kernels(model, False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        plain = {dtype: gradients(model, image, scales, dtype) for dtype in (torch.float32, torch.bfloat16)}
    assert {"aten::scaled_dot_product_attention", "aten::conv2d"} <= {event.name for event in profile.events() or ()}
    for name, expected in plain[torch.float32].items():
        # The first half of attn.kv.bias, that of keys, has no gradient but rounding.
        first = len(expected) // 2 if name.endswith("kv.bias") else 0
        assert_close(quick[torch.float32][name][first:], expected[first:], name, 1e-5 if name == "logits" else 1e-4)
        quick_cosine, plain_cosine = (
            F.cosine_similarity(each[torch.bfloat16][name][first:].flatten(), expected[first:].flatten(), dim=0)
            for each in (quick, plain)
        )
        assert quick_cosine > plain_cosine - 0.005, name


@pytest.mark.parametrize("given", [True, False])
def test_model_compiles_to_one_graph(given):
    model = create("pvt_pico", img_size=32, num_classes=10, drop_path_rate=0.0)
    randomise(model)
    image, scales = images(2, 64, 32), random_scales(model, 2) if given else None
    expected = model(image, drop_path=scales)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    actual = compiled(image, drop_path=scales)
    torch.testing.assert_close(actual, expected)
    actual.sum().backward()
