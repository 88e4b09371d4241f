"""The C++ for small products, built alone: with stand-ins for what a compiled step brings."""

import ctypes
import shutil
import subprocess
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from manual_bp.training_step import _lowering

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")

STAND_INS = """
#include <cstdint>
struct Tensor { void* start; int32_t dtype; int64_t dims; int64_t *sizes, *strides; };
typedef Tensor* AtenTensorHandle;
typedef int AOTITorchError;
enum { AOTI_TORCH_SUCCESS, LEFT_TO_THE_LIBRARY };
void aoti_torch_get_data_ptr(Tensor* t, void** to) { *to = t->start; }
void aoti_torch_get_dtype(Tensor* t, int32_t* to) { *to = t->dtype; }
void aoti_torch_get_dim(Tensor* t, int64_t* to) { *to = t->dims; }
void aoti_torch_get_sizes(Tensor* t, int64_t** to) { *to = t->sizes; }
void aoti_torch_get_strides(Tensor* t, int64_t** to) { *to = t->strides; }
int32_t aoti_torch_dtype_float32() { return 6; }
int32_t aoti_torch_dtype_float64() { return 7; }
int aoti_torch_cpu_addmm_out(Tensor*, Tensor*, Tensor*, Tensor*, double, double) {
  return LEFT_TO_THE_LIBRARY;
}
"""
CALL = """
extern "C" int call(Tensor* out, Tensor* c, Tensor* a, Tensor* b, double beta, double alpha) {
  return manual_bp::addmm_out(out, c, a, b, beta, alpha);
}
"""


class Handle(ctypes.Structure):
    """The stand-in for a tensor."""

    _fields_ = (
        ("start", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("dims", ctypes.c_int64),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
    )


def handle(t: Tensor) -> Handle:
    numbers = ctypes.c_int64 * t.ndim
    dtype = {torch.float32: 6, torch.float64: 7}.get(t.dtype, 15)
    return Handle(t.data_ptr(), dtype, t.ndim, numbers(*t.shape), numbers(*t.stride()))


@pytest.fixture(scope="module", params=["-march=native", "-mno-avx", "-mavx -mno-avx512f"])
def multiply(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The function, for the registers of several processors; it says whether it has done it."""
    if "avx" in request.param and "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("for processors with AVX")
    folder = tmp_path_factory.mktemp("small products")
    source, library = folder / "test.cpp", folder / "test.so"
    source.write_text(STAND_INS + _lowering.SOURCE.read_text() + CALL)
    options = ["-O1", "-std=c++20", "-shared", "-fPIC", "-ffp-contract=off", *request.param.split()]
    subprocess.run(["g++", *options, str(source), "-o", str(library)], check=True)
    call = ctypes.CDLL(str(library)).call
    call.argtypes = [ctypes.POINTER(Handle)] * 4 + [ctypes.c_double] * 2

    def run(out: Tensor, c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> bool:
        return not call(*map(handle, (out, c, a, b)), beta, alpha)

    return run


def expected(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    product = alpha * (a.double() @ b.double())
    return product if beta == 0 else beta * c.double() + product


def assert_right(out: Tensor, c: Tensor, a: Tensor, b: Tensor, right: Tensor) -> None:
    size = a.double().abs() @ b.double().abs() + c.double().abs().nan_to_num()
    error = (out.double() - right).abs()
    assert (error <= 8 * torch.finfo(out.dtype).eps * size + 1e-300).all()


SIZES = st.integers(1, 40)
FACTORS = st.sampled_from([0.0, 1.0, 0.9, -2.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=SIZES, columns=SIZES, depth=SIZES, beta=FACTORS, alpha=FACTORS, seed=st.integers(0, 99))
def test_forward(
    multiply: Any,
    dtype: torch.dtype,
    rows: int,
    columns: int,
    depth: int,
    beta: float,
    alpha: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    a, w = torch.randn(rows, depth, dtype=dtype), torch.randn(columns, depth, dtype=dtype)
    bias, z = torch.randn(columns, dtype=dtype), torch.full((rows, columns), torch.nan, dtype=dtype)
    assert multiply(z, bias, a, w.mT, beta, alpha)
    assert_right(z, bias, a, w.mT, expected(bias, a, w.mT, beta, alpha))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=SIZES, columns=SIZES, depth=SIZES, beta=FACTORS, alpha=FACTORS, seed=st.integers(0, 99))
def test_bp2_and_bp4(
    multiply: Any,
    dtype: torch.dtype,
    rows: int,
    columns: int,
    depth: int,
    beta: float,
    alpha: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    delta, w = torch.randn(rows, depth, dtype=dtype), torch.randn(depth, columns, dtype=dtype)
    below = torch.full((rows, columns), torch.nan, dtype=dtype)
    assert multiply(below, below, delta, w, 0.0, alpha)
    assert_right(below, torch.zeros_like(below), delta, w, expected(below, delta, w, 0.0, alpha))
    # In BP4 δ is transposed, and the result is added to memory with more rows around it.
    delta, memory = delta.mT.contiguous(), torch.randn(rows + 2, columns, dtype=dtype)
    old, updated = memory.clone(), memory[1:-1]
    assert multiply(updated, updated, delta.mT, w, beta, alpha)
    assert_right(updated, old[1:-1], delta.mT, w, expected(old[1:-1], delta.mT, w, beta, alpha))
    assert torch.equal(memory[0], old[0])
    assert torch.equal(memory[-1], old[-1])


def test_nan_is_not_hidden_and_not_spread(multiply: Any) -> None:
    """The last elements of a row are read together with some that were read before."""
    a, w = torch.ones(1, 19), torch.ones(2, 19)
    w[0, 1], a[0, 18] = torch.inf, 2.0
    z, zero = torch.empty(1, 2), torch.zeros(2)
    assert multiply(z, zero, a, w.mT, 1.0, 1.0)
    assert z.tolist() == [[torch.inf, 20.0]]
    w[0, 18] = torch.nan
    assert multiply(z, zero, a, w.mT, 1.0, 1.0)
    assert z.isnan().tolist() == [[True, False]]


@pytest.mark.parametrize(
    "tensors",
    {
        "large": (torch.zeros(100, 100), torch.ones(100, 50), torch.ones(50, 100)),
        "bfloat16": [torch.zeros(shape).bfloat16() for shape in ((3, 5), (3, 4), (4, 5))],
        "b in steps": (torch.zeros(3, 5), torch.ones(3, 4), torch.ones(4, 10)[:, ::2]),
        "out in steps": (torch.zeros(3, 10)[:, ::2], torch.ones(3, 4), torch.ones(5, 4).mT),
    }.items(),
    ids=lambda item: item[0],
)
def test_other_products_are_left_to_the_library(multiply: Any, tensors: Any) -> None:
    out, a, b = tensors[1]
    assert not multiply(out, out, a, b, 1.0, 1.0)
    assert not out.any()


def test_c_may_lie_otherwise_than_out(multiply: Any) -> None:
    a, w, wide = torch.randn(7, 20), torch.randn(9, 20), torch.randn(7, 18)
    for c in (wide[:, :9], wide[:, ::2], wide[0, :9], wide[:1, :9], wide[:, :1], wide[:1, :1]):
        for b in (w.mT, w.mT.contiguous()):
            z = torch.full((7, 9), torch.nan)
            if multiply(z, c, a, b, 0.5, 1.0):
                assert_right(z, c, a, b, expected(c, a, b, 0.5, 1.0))
            else:
                assert c.shape[-1] == 1 or c.stride(-1) == 2
                assert b.stride(1) == 1


def test_the_stride_of_a_single_row_or_column_means_nothing(multiply: Any) -> None:
    z = torch.zeros(3, 1)
    a, b = torch.ones(3, 1).as_strided((3, 1), (1, 7)), torch.ones(1).as_strided((1, 1), (5, 3))
    assert multiply(z, z, a, b, 1.0, 1.0)
    assert z.flatten().tolist() == [1.0, 1.0, 1.0]


def test_both_sides_agree_on_what_is_small() -> None:
    assert f"MOST = {_lowering.MOST_SMALL}" in _lowering.SOURCE.read_text()
