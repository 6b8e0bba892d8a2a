"""The profile of a step: what it says of work that is known, and that training goes on as if it was not there."""

import gzip
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import gelu
from torch.profiler import record_function

from pipeline.config import Config, load_config
from pipeline.errors import InputError
from pipeline.train.op_kinds import kind_of_kernel, kind_of_operator
from pipeline.train.profile import PHASES, STEP, Profiler, summarise
from pipeline.train.schedule import Schedule
from pipeline.world import World
from tests.conftest import run_ranks, write_config
from tests.workers.legs import digest


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "profile.json").read_text())


BATCH, MICRO_BATCH = 24, 6


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=[pytest.mark.gpu, pytest.mark.slow]), 2])
def test_profiling_does_not_change_training(digits: Path, tmp_path: Path, ranks: int) -> None:
    (tmp_path / "runs" / "in-the-way").mkdir(parents=True)
    (tmp_path / "runs" / "in-the-way" / "profile").write_text("a file in the folder's place")
    size = f"train.global_batch_size={BATCH},train.micro_batch_size={MICRO_BATCH}"
    plain = f"train.length=8 steps,{size},train.ema_decay=0.9,data.val=null"
    profiled = f"{plain},profile.at=3 steps,profile.steps=2"
    jobs = [f"run.name=plain,{plain}", f"run.name=profiled,{profiled}", f"run.name=in-the-way,{profiled}"]
    resumed = f"run.name=profiled,{profiled},train.length=10 steps"  # from step 8 on, which is past the profile
    run_ranks(ranks, "faulty", write_config(digits, tmp_path), "{}", *jobs, resumed)
    runs = {name: tmp_path / "runs" / name for name in ("plain", "profiled", "in-the-way")}
    losses = {
        name: [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for name, run in runs.items()
    }
    weights = {name: digest(run / "checkpoints" / "step-00000008") for name, run in runs.items()}
    assert len(losses["plain"]) == 8
    assert losses["profiled"][:8] == losses["in-the-way"] == losses["plain"]
    assert weights["profiled"] == weights["in-the-way"] == weights["plain"]
    assert not (runs["plain"] / "profile").exists()

    folder = runs["profiled"] / "profile"
    assert sorted(each.name for each in folder.iterdir()) == ["profile.json", "summary.md", "trace.json.gz"]
    found = read(folder)
    assert (found["first_step"], found["last_step"], found["num_steps"]) == (5, 6, 2)
    assert list(found["phases"]) == [*(name for name in PHASES if name != "replay check"), "the rest"]
    assert sum(found["phases"].values()) == pytest.approx(found["step_ms"])
    assert sum(found["kinds"].values()) == pytest.approx(found["step_ms"])
    assert min(*found["phases"].values(), *found["kinds"].values()) >= 0
    assert {"matrix products", "normalisation", "optimiser"} < found["kinds"].keys()
    assert ("communication" in found["kinds"]) == (ranks > 1)
    on = "1 rank" if ranks == 1 else f"{ranks} ranks"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU with "
    assert found["headline"].startswith(f"pvt_pico, {BATCH} images on {on}, fp32, {device}")
    micro_batches = BATCH // MICRO_BATCH // ranks
    events = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    ranges = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert [ranges.count(name) for name in (STEP, "forward", "exchange of losses", "backward")] == [
        *(2, 2 * micro_batches, 2, 2 * micro_batches)
    ]
    summary = (folder / "summary.md").read_text()
    assert found["headline"] in summary
    assert f"| backward | {found['phases']['backward']:.2f} |" in summary
    assert len(losses["profiled"]) == 10
    before = runs["profiled"] / "checkpoints" / "step-00000008" / "COMMIT.json"
    assert (folder / "profile.json").stat().st_mtime_ns < before.stat().st_mtime_ns


def test_profiler_accounts_for_known_work(
    make_config: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profiler = Profiler(tmp_path / "profile", make_config("profile.steps=2"), World(), at=1)
    a, inner, outer = torch.randn(64, 64), list[float](), list[float]()
    with ThreadPoolExecutor(1) as feed:
        for step in range(6):
            began = time.perf_counter()
            profiler.begin(step)
            inside = time.perf_counter()
            beside = feed.submit(torch.sort, torch.randn(10_000))
            with record_function("waiting for data"):
                time.sleep(0.02)
            with record_function("forward"):
                for _ in range(step):
                    gelu(a @ a)
            beside.result()
            inner.append(time.perf_counter() - inside)
            profiler.end()
            outer.append(time.perf_counter() - began)
    found = read(tmp_path / "profile")
    assert (found["first_step"], found["last_step"], found["on_device"]) == (3, 4, False)
    assert 500 * sum(inner[2:4]) <= found["step_ms"] <= 500 * sum(outer[2:4])
    assert list(found["phases"]) == ["waiting for data", "forward", "the rest"]
    assert found["phases"]["waiting for data"] >= 20
    assert sum(found["phases"].values()) == pytest.approx(found["step_ms"])
    assert sum(found["kinds"].values()) == pytest.approx(found["step_ms"])
    assert list(found["kinds"])[-1] == "Python and waiting"
    assert found["kinds"]["Python and waiting"] >= 20
    works = {work["name"]: work for work in found["longest"]}
    assert "aten::sort" not in works
    assert [(works[name]["kind"], works[name]["calls"]) for name in ("aten::mm", "aten::gelu")] == [
        ("matrix products", 2.5),  # of steps that two and three were taken before
        ("activation", 2.5),
    ]
    told = capsys.readouterr().err
    assert f"profile of steps 3 to 4: {found['headline']}" in told
    assert f"profile: waiting for data {found['phases']['waiting for data'] / found['step_ms']:.0%}, forward" in told


def test_profiler_errors_are_reported_and_next_profile_works(
    make_config: Callable[..., Config],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def profile(name: str, steps: int = 2) -> Profiler:
        profiler = Profiler(tmp_path / name, make_config("profile.steps=1"), World(), at=0)
        for step in range(steps):
            profiler.begin(step)
            torch.ones(3).sum()
            profiler.end()
        return profiler

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for target in ("pipeline.files.write", "torch.profiler.profile.start", "torch.profiler.profile.step"):
        with monkeypatch.context() as patch:
            patch.setattr(target, full)
            profile("full")
        told = capsys.readouterr().err
        assert told.count("full: no profile: OSError(28, 'No space left on device')") == 1, target
        assert not list(tmp_path.glob("full/*")), target
    profile("stopped", steps=1).close()
    assert not (tmp_path / "stopped").exists()
    profile("whole")
    assert read(tmp_path / "whole")["num_steps"] == 1
    assert "profile of step 2: pvt_pico" in capsys.readouterr().err


def test_summary_counts_overlapping_kernels_once() -> None:
    def event(cat: str, name: str, start: float, end: float, tid: int = 1) -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start, "tid": tid}

    gemm, all_reduce = "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT", "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclWork)"
    costs = summarise(
        [
            {"ph": "M", "name": "process_name", "ts": 0},
            event("user_annotation", STEP, 0, 1000),
            event("gpu_user_annotation", STEP, 0, 1000, tid=7),
            event("user_annotation", "forward", 100, 300),
            event("user_annotation", "forward", 100, 900, tid=2),  # another thread's
            event("cpu_op", "aten::addmm", 100, 200),
            event("kernel", gemm, 100, 400, tid=7),
            event("kernel", "softmax_warp_forward", 350, 450, tid=8),  # at once with the end of another
            event("kernel", all_reduce, 300, 600, tid=20),
            event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 600, 650, tid=7),
            event("kernel", gemm, 1400, 1600, tid=7),  # between steps
            event("user_annotation", STEP, 2000, 3000),
            event("user_annotation", "forward", 2000, 2100),
            event("kernel", gemm, 2950, 3100, tid=7),
        ]
    )
    assert (costs.num_steps, costs.step_ms, costs.on_device) == (2, 1.0, True)
    assert costs.phases == pytest.approx({"forward": 0.15, "the rest": 0.85})
    expected = {
        "matrix products": (250 + 50) / 2000,
        "softmax": 100 / 2000,
        "communication": 150 / 2000,
        "copies and casts": 50 / 2000,
        "the device is idle": (450 + 950) / 2000,
    }
    assert costs.kinds == pytest.approx(expected)
    assert [(work.name, work.calls) for work in costs.longest[:2]] == [(gemm, 1), (all_reduce, 0.5)]


KERNELS = """
matrix products: nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT
matrix products: void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x256_32x3_tn_align8>(...)
matrix products: ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn
matrix products: sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize64x64x32_stage4_warpsize2x2x1_tensor16x8x8_kernel
matrix products: void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, false>(...)
matrix products: triton_tem_fused_addmm_3
attention: void pytorch_flash::flash_bwd_dot_do_o_kernel<false, Traits<128, 64, cutlass::bfloat16_t>>(...)
attention: fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>::Params)
attention: cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_cga1x1x1_kernel0_0
convolutions: sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x32_stage4_kernel
convolutions: void at::native::(anonymous namespace)::conv_depthwise2d_forward_kernel<3, c10::BFloat16, int>(...)
normalisation: void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float, true>(...)
normalisation: void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float, float, 32u>(...)
normalisation: void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, int, 512, true, 1, true>(...)
softmax: void (anonymous namespace)::softmax_warp_forward<c10::BFloat16, c10::BFloat16, float, 11, false, true, 32>(...)
softmax: void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, c10::BFloat16, float, float, Epilogue>(...)
activation: void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(at::TensorIteratorBase&)>
element-wise: void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>(...)
element-wise: triton_poi_fused__to_copy_convolution_gelu_7
reductions: void at::native::reduce_kernel<512, 1, ReduceOp<float, at::native::NormTwoOps<float, float>>>(...)
reductions: triton_per_fused_add_native_layer_norm_12
copies and casts: void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(...)::{lambda()#3}>
copies and casts: void at::native::(anonymous namespace)::CatArrayBatchedCopy_vectorized<OpaqueType<4u>>(...)
copies and casts: Memcpy HtoD (Pageable -> Device)
copies and casts: Memset (Device)
optimiser: void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>(...)
communication: ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)
decoding of images: void dali::kernels::BatchedSeparableResampleKernel<2, float, unsigned char>(...)
other operators: void at::native::triu_tril_kernel<float, int, false, 1, true>(...)
"""

OPERATORS = {
    "matrix products": "aten::addmm aten::mm aten::bmm aten::baddbmm aten::linear aten::mkldnn_linear",
    "convolutions": "aten::mkldnn_convolution aten::convolution_backward aten::_slow_conv2d_forward",
    "attention": "aten::_scaled_dot_product_flash_attention_for_cpu aten::_efficient_attention_backward",
    "normalisation": "aten::native_layer_norm aten::native_layer_norm_backward aten::native_batch_norm",
    "softmax": "aten::_softmax aten::_log_softmax_backward_data",
    "activation": "aten::gelu aten::gelu_backward aten::relu_ aten::threshold_backward",
    "element-wise": "aten::add aten::add_ aten::mul aten::addcmul aten::where aten::bitwise_and aten::rsub",
    "reductions": "aten::sum aten::mean aten::linalg_vector_norm aten::any aten::argmax aten::amax",
    "copies and casts": "aten::copy_ aten::_to_copy aten::to aten::cat aten::clone aten::fill_ aten::index_select",
    "optimiser": "aten::_fused_adamw_ aten::_foreach_lerp_",
    "communication": "c10d::allreduce_ c10d::_allgather_base_ gloo:all_reduce",
    "compiled kernels": "##_Call_CompiledFxGraph_f3ncb66qyk6yzuxxefjhfrtu3pkprsh67n6hlh4ri4lmwtpkpvpw_##",
    "other operators": "aten::view aten::transpose aten::as_strided aten::empty aten::item",
}


@pytest.mark.parametrize("line", KERNELS.strip().splitlines())
def test_kernels_are_classified_by_kind(line: str) -> None:
    kind, _, name = line.partition(": ")
    assert kind_of_kernel(name) == kind


@pytest.mark.parametrize(("kind", "names"), OPERATORS.items())
def test_operators_are_classified_by_kind(kind: str, names: str) -> None:
    assert {name: kind_of_operator(name) for name in names.split()} == dict.fromkeys(names.split(), kind)


def test_profile_settings_are_validated(make_config: Callable[..., Config], digits: Path, tmp_path: Path) -> None:
    def at(*overrides: str) -> int | None:
        return Schedule.of(make_config(*overrides), steps_per_epoch=25).profile_at  # of 20 steps

    assert at() is None
    assert at("profile.at=0 steps") == 0
    assert at("profile.at=50 %", "profile.steps=9") == 10
    for text, steps in (("50 %", 10), ("18 steps", 2), ("300 epochs", 3)):
        with pytest.raises(
            InputError, match=f"profile.at {text}: .* profile.steps {steps} .* but the run has 20: begin"
        ):
            at(f"profile.at={text}", f"profile.steps={steps}")
    for override, rule in (("profile.at=soon", "a number and a unit"), ("profile.steps=0", "more than 0")):
        with pytest.raises(InputError, match=rule):
            make_config(override)
    with pytest.raises(InputError, match=r"profile\.step: no such setting; did you mean profile\.steps\?"):
        load_config(write_config(digits, tmp_path), ["profile.step=3"])
    assert make_config("profile.at=5 steps").identity() == make_config().identity()
