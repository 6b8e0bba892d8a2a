"""Compiled blocks compute what plain ones do, in training alone, and on any size where sizes vary."""

import importlib.util
import os
import re
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from pipeline import files
from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.job import start_checks
from pipeline.train.compile import blocks, compile_blocks, require_compiler
from pipeline.world import World
from pvt.model import Block, Grid
from tests.conftest import run_ranks, write_config
from tests.tolerances import of_sums

# torch looks at what it compiles, and hides the warnings of that unless warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def kernels(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "kernels"))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


class Blocks(nn.Module):
    """One block with a spatial reduction, as PVT's are in all stages but the last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(16, num_heads=2, mlp_ratio=2, sr_ratio=2, drop_path=0.2)])

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        scales = torch.tensor([[1.25, 0.0, 1.25], [0.0, 1.25, 1.25]])
        return self.blocks[0](x, grid, scales)


def gradients(network: nn.Module, tokens: Tensor, precision: torch.dtype) -> dict[str, Tensor]:
    with torch.autocast(tokens.device.type, precision, enabled=precision != torch.float32):
        output = network(tokens, (4, 6))
    names, parameters = zip(*network.named_parameters(), strict=True)
    found = torch.autograd.grad((output.float() ** 2).sum(), parameters)
    return {"output": output.detach().float(), **dict(zip(names, found, strict=True))}


@pytest.mark.slow
@pytest.mark.gpu
def test_compiled_blocks_match_eager() -> None:
    plain, compiled = Blocks(), Blocks()
    compile_blocks(compiled, deterministic=True)
    tokens = torch.randn(3, 24, 16)
    for precision in (torch.float32, torch.bfloat16):
        expected, actual = gradients(plain, tokens, precision), gradients(compiled, tokens, precision)
        for name in expected:
            # The first half of attn.kv.bias, that of keys, has no gradient but rounding.
            first = len(expected[name]) // 2 if name.endswith("kv.bias") else 0
            wanted, found = expected[name][first:], actual[name][first:]
            if precision == torch.float32:
                assert (found - wanted).abs().max() <= of_sums(1e-5) * max(1, wanted.abs().max()), name
            assert nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.995, name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # a precision each: it really was compiled


@pytest.mark.slow
def test_varying_sizes_compile_few_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compile_module(self, backend="eager", **options))
    plain, compiled = Blocks(), Blocks()
    compile_blocks(compiled, sizes_vary=True)
    for height, width in ((4, 6), (6, 6), (2, 8), (10, 12)):
        tokens = torch.randn(3, height * width, 16)
        torch.testing.assert_close(compiled(tokens, (height, width)), plain(tokens, (height, width)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # of four sizes


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [("pvt_tiny", "Block", 8), ("resnet50", "Bottleneck", 16), ("vit_tiny_patch16_224", "Block", 12)],
)
def test_blocks_are_repeated_modules(name: str, kind: str, count: int) -> None:
    with torch.device("meta"):
        found = list(blocks(timm.create_model(name)))
    assert [type(block).__name__ for block in found] == [kind] * count


def test_network_without_blocks_is_rejected() -> None:
    with pytest.raises(InputError, match=r"engine\.compile: Linear is not made of lists of blocks"):
        compile_blocks(nn.Linear(2, 2))


def put_on_path(folder: Path, programs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else is on it."""
    for program in programs:
        (folder / program).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(folder))
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize(
    ("device", "programs", "lacks"),
    [
        ("cpu", ["gcc"], r"g\+\+ or clang\+\+ on the PATH, or in CXX: install g\+\+ \("),
        ("cuda", ["g++"], r"gcc or clang on the PATH, or in CC: install gcc \("),
    ],
)
def test_missing_compiler_is_reported(
    device: str, programs: list[str], lacks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_on_path(tmp_path, programs, monkeypatch)
    with pytest.raises(InputError, match=rf"^engine\.compile: torch\.compile for {device} needs .* lacks: {lacks}"):
        require_compiler(device, "engine.compile")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_missing_python_headers_are_reported(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_on_path(tmp_path, ["gcc", "g++"], monkeypatch)
    require_compiler(device, "engine.compile")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    dev = f"python3.{sys.version_info.minor}-dev"
    with pytest.raises(InputError, match=rf" lacks: {tmp_path}/include/Python\.h: install {re.escape(dev)} \("):
        require_compiler(device, "engine.compile")


def test_missing_triton_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_on_path(tmp_path, ["gcc"], monkeypatch)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r" lacks: Python's package triton: install triton"):
        require_compiler("cuda", "engine.compile")


def test_run_without_compiler_is_rejected_before_start(
    make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_on_path(tmp_path, [], monkeypatch)
    cpu, gpu = World(), World(device=torch.device("cuda", 0))
    start_checks.check_machine(make_config(), gpu)
    for world in (cpu, gpu):
        with pytest.raises(InputError, match=rf"^engine\.compile: torch\.compile for {world.device.type} "):
            start_checks.check_machine(make_config("engine.compile=true"), world)
    mask_rcnn = make_config("task.name=mask_rcnn", "mix={}", "augment={}")
    start_checks.check_machine(mask_rcnn, cpu)
    with pytest.raises(InputError, match=r"^train\.deterministic of a mask_rcnn: torch\.compile for cuda "):
        start_checks.check_machine(mask_rcnn, gpu)


def test_kernel_cache_folder_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    compile_blocks(nn.ModuleList([nn.Sequential(nn.Linear(2, 2))]))
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folder == tmp_path / f"pvt-kernels-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    with pytest.raises(InputError, match="cannot be trusted"):
        compile_blocks(nn.ModuleList([nn.Sequential(nn.Linear(2, 2))]))


def test_compile_with_zero_3_is_rejected(make_config: Callable[..., Config]) -> None:
    with pytest.raises(InputError, match=r"engine: compile true with zero_stage 3.*choose zero_stage 0, 1 or 2"):
        make_config("engine.compile=true", "engine.zero_stage=3")


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=[pytest.mark.gpu, pytest.mark.slow]), 2])
def test_engine_trains_compiled_and_evaluates_eager(digits: Path, tmp_path: Path, ranks: int) -> None:
    (report,) = run_ranks(ranks, "compiled", write_config(digits, tmp_path))
    assert report["losses"][1] == report["losses"][0]
    assert report["compiled_calls"][0] == 0
    assert report["compiled_calls"][1] >= 3 * 4  # steps, blocks
    assert report["compiled_calls_beside_training"] == 0
