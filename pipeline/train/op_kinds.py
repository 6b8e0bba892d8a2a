"""The kind of work that an operator of PyTorch or a kernel of a GPU does, by its name."""

import functools
import re

MATRIX, CONVOLUTION, ATTENTION = "matrix products", "convolutions", "attention"
NORM, SOFTMAX, ACTIVATION = "normalisation", "softmax", "activation"
ELEMENTWISE, REDUCTION, COPY = "element-wise", "reductions", "copies and casts"
OPTIMISER, COMMUNICATION, DECODING = "optimiser", "communication", "decoding of images"
COMPILED, OTHER = "compiled kernels", "other operators"

# The first pattern that is found in a name gives its kind.
_OPERATORS = [
    (COMMUNICATION, r"^(c10d|gloo|nccl|mpi)"),
    (COMPILED, r"CompiledFxGraph"),
    (OPTIMISER, r"_fused_adam|_foreach_"),
    (ATTENTION, r"attention"),
    (CONVOLUTION, r"conv"),
    (MATRIX, r"::_?(addmm|mm|bmm|baddbmm|addbmm|matmul|linear|addmv|mv|dot|mkldnn_linear)(_out|_backward)?$"),
    (NORM, r"(layer|batch|group|rms|instance)_norm"),
    (SOFTMAX, r"softmax"),
    (ACTIVATION, r"gelu|relu|silu|sigmoid|tanh|hardswish|threshold"),
    (COPY, r"::_?(copy_|to_copy|to|clone|contiguous|cat|stack|fill_|zero_|flip|roll|pad|constant_pad_nd|repeat)$"),
    (COPY, r"index|gather|scatter|masked_select|_pad\d"),
    (REDUCTION, r"::_?(linalg_vector_)?(sum|mean|prod|max|min|amax|amin|norm|any|all|argmax|argmin|std|var|cumsum)$"),
    (
        ELEMENTWISE,
        r"::_?(add|sub|rsub|mul|div|addcmul|addcdiv|lerp|neg|abs|pow|sqrt|rsqrt|reciprocal|exp|log|sin|cos|erf|floor"
        r"|round|sign|clamp\w*|where|masked_fill|maximum|minimum|eq|ne|lt|le|gt|ge|isfinite|isinf|isnan|bernoulli"
        r"|native_dropout|bitwise_\w+|logical_\w+)_?(_backward)?$",
    ),
]
_KERNELS = [
    (COMMUNICATION, r"nccl|all_?reduce"),
    (DECODING, r"dali|nvjpeg|nvimgcodec"),
    (MATRIX, r"^triton_(tem|mm)"),
    (REDUCTION, r"^triton_(red|per)"),
    (ELEMENTWISE, r"^triton_poi"),
    (OPTIMISER, r"multi_tensor|adam"),
    (ATTENTION, r"flash|fmha|sdpa|attention"),
    (CONVOLUTION, r"conv(?!ert)|fprop|dgrad|wgrad|winograd"),
    (MATRIX, r"gemm|gemv|cutlass|nvjet|xmma|splitK|cublas"),
    (NORM, r"(layer|batch|group|rms)_?norm|GammaBeta|RowwiseMoments|bn_[fb]w"),
    (SOFTMAX, r"softmax"),
    (ACTIVATION, r"gelu|relu|silu|sigmoid|tanh|hardswish|threshold"),
    (COPY, r"memcpy|memset|copy|CatArray|FillFunctor|index|gather|scatter|flip|nchwToNhwc|nhwcToNchw"),
    (REDUCTION, r"reduce|cub::Device"),
    (ELEMENTWISE, r"elementwise|vectorized|dropout"),
]


@functools.cache
def kind_of_operator(name: str) -> str:
    """Returns the kind of an operator: MATRIX for "aten::addmm"."""
    return _find_kind(_OPERATORS, name)


@functools.cache
def kind_of_kernel(name: str) -> str:
    """Returns the kind of a kernel, a copy ("Memcpy HtoD …") or a memset, by the name that the profiler gives it."""
    return _find_kind(_KERNELS, name)


def _find_kind(patterns: list[tuple[str, str]], name: str) -> str:
    for kind, pattern in patterns:
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return OTHER
