from __future__ import annotations

import mmap

import pytest
import torch

from latentrevise.kernels import dispatch, mixture_embed

OP = "mixture_embed"


def make(rng, device, T, A, V, d, dtype, ids_dtype=torch.int64):
    ids = torch.randint(V, (T, A), generator=rng, device=device, dtype=ids_dtype)
    weights = torch.rand(T, A, generator=rng, device=device)
    weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-9)
    E = torch.randn(V, d, generator=rng, device=device).to(dtype)
    return ids, weights, E


def truth(ids, weights, E):
    """Sum over atoms in float64, written as a loop."""
    z = torch.zeros(ids.shape[0], E.shape[1], dtype=torch.float64)
    for t in range(ids.shape[0]):
        for i, w in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
            z[t] += w * E[i].double().cpu()
    return z


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 3, 11, 7), (4, 11, 257, 64), (3, 2, 50, 67), (2, 64, 100, 130)])
def test_values_and_gradient(backend, device, rng, shape, dtype, ids_dtype):
    ids, weights, E = make(rng, device, *shape, dtype, ids_dtype)
    weights.requires_grad_()
    z = mixture_embed(ids, weights, E, backend=backend)
    assert z.dtype == dtype
    expected = truth(ids, weights, E)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-20
    if dispatch.interpreting_triton():
        rounding *= 2  # the interpreter truncates to bfloat16 where a GPU rounds
    assert (z.detach().cpu().double() - expected).abs().max() <= rounding * expected.abs().max().clamp_min(1)

    grad = torch.randn(z.shape, generator=rng, device=device).to(dtype)
    (dw,) = torch.autograd.grad(z, weights, grad)
    rows = E[ids.long()].double()
    expected_dw = torch.einsum("td,tad->ta", grad.double(), rows)
    bound = torch.einsum("td,tad->ta", grad.double().abs(), rows.abs())  # rounding scales with this
    assert dw.dtype == torch.float32
    assert ((dw.double() - expected_dw).abs() <= 1e-5 * bound + 1e-12).all()


def test_no_rows(backend, device, rng):
    ids, weights, E = make(rng, device, 0, 3, 5, 8, torch.float32)
    weights.requires_grad_()
    z = mixture_embed(ids, weights, E, backend=backend)
    assert z.shape == (0, 8)
    z.sum().backward()
    assert weights.grad.shape == (0, 3)


def test_a_slot_of_weight_zero_contributes_nothing_but_has_a_gradient(backend, device):
    E = torch.tensor([[1.0, 2.0], [30.0, 40.0]], device=device)
    weights = torch.tensor([[1.0, 0.0]], device=device, requires_grad=True)
    z = mixture_embed(torch.tensor([[0, 1]], device=device), weights, E, backend=backend)
    assert z.tolist() == [[1.0, 2.0]]
    z.sum().backward()
    assert weights.grad.tolist() == [[3.0, 70.0]]


def test_one_atom_is_the_row_itself_bit_for_bit(backend, device, rng):
    _, _, E = make(rng, device, 1, 1, 40, 33, torch.bfloat16)
    ids = torch.arange(40, device=device)[:, None]
    assert torch.equal(mixture_embed(ids, torch.ones(40, 1, device=device), E, backend=backend), E)


def test_strided_rows_and_expanded_gradient(backend, device, rng):
    ids, weights, wide = make(rng, device, 6, 4, 20, 48, torch.float32)
    E = wide[:, :33]  # row stride 48
    weights.requires_grad_()
    z = mixture_embed(ids, weights, E, backend=backend)
    assert torch.equal(z, mixture_embed(ids, weights, E.contiguous(), backend=backend))
    z.sum().backward()  # an upstream gradient of stride 0
    assert torch.allclose(weights.grad, E[ids].sum(2), rtol=1e-5, atol=1e-5)


def test_offsets_beyond_two_to_the_31(backend, device):
    """Three rows, 2^31 elements apart, in address space that is never filled."""
    if device.type != "cpu":
        pytest.skip("needs sparse address space")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # untouched pages cost nothing
    memory = mmap.mmap(-1, 2 * (2**32 + 64), flags=flags)
    E = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((3, 16), (2**31, 1))
    E[2] = 7
    z = mixture_embed(torch.tensor([[2, 0]]), torch.tensor([[1.0, 0.0]]), E, backend=backend)
    assert z.tolist() == [[7.0] * 16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thread_count_does_not_change_a_bit(backend, device, rng, dtype):
    if device.type != "cpu" or backend == "reference":
        pytest.skip("promised by the kernels of the CPU, not by torch")
    ids, weights, E = make(rng, device, 37, 11, 101, 131, dtype)
    weights.requires_grad_()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            z = mixture_embed(ids, weights, E, backend=backend)
            (dw,) = torch.autograd.grad(z.float().square().sum(), weights)
            results.append((z.detach(), dw))
    finally:
        torch.set_num_threads(before)
    for z, dw in results[1:]:
        assert torch.equal(z, results[0][0])
        assert torch.equal(dw, results[0][1])


def test_gradcheck_of_the_reference():
    g = torch.Generator().manual_seed(0)
    E = torch.randn(6, 5, dtype=torch.float64, generator=g)
    weights = torch.rand(3, 4, dtype=torch.float64, generator=g).requires_grad_()
    ids = torch.randint(6, (3, 4), generator=g)
    assert torch.autograd.gradcheck(lambda w: mixture_embed(ids, w, E, backend="reference"), weights)


def test_a_table_that_wants_a_gradient_gets_one():
    E = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mixture_embed(torch.tensor([[1, 1, 4]]), torch.tensor([[0.2, 0.3, 0.5]]), E).sum().backward()
    assert torch.allclose(E.grad[:, 0], torch.tensor([0, 0.5, 0, 0, 0.5]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"E": torch.randn(3, 4).T}, ValueError, r"E must be laid out row by row.*E\.contiguous\(\)"),
        ({"E": torch.randn(0, 4)}, ValueError, "at least one row"),
        ({"E": torch.randn(4)}, ValueError, r"E must have shape \[\*, \*\], got \[4\]"),
        ({"E": torch.ones(4, 3, dtype=torch.int64)}, TypeError, "E must be float32"),
        ({"ids": torch.tensor([[0.0, 1.0]])}, TypeError, "ids must be int64 or int32"),
        ({"ids": torch.tensor([0, 1])}, ValueError, r"ids must have shape"),
        ({"ids": torch.tensor([[0, 4]])}, ValueError, r"ids must be in \[0, 4\), got values from 0 to 4"),
        ({"ids": torch.tensor([[-1, 0]])}, ValueError, "values from -1"),
        ({"ids": torch.zeros(1, 0, dtype=torch.int64), "weights": torch.zeros(1, 0)}, ValueError, "at least one atom"),
        ({"weights": torch.tensor([[1.0]])}, ValueError, r"weights must have shape \[1, 2\]"),
        ({"weights": torch.tensor([[1.0, 0.0]]).bfloat16()}, TypeError, "weights must be float32"),
        ({"weights": [[1.0, 0.0]]}, TypeError, "weights must be a torch.Tensor, got list"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"ids": torch.tensor([[0, 1]]), "weights": torch.tensor([[0.5, 0.5]]), "E": torch.randn(4, 3)}
    with pytest.raises(error, match=message):
        mixture_embed(**(arguments | change))


def test_the_library_checks_again_below_python():
    from latentrevise.kernels import native

    module = native.load("cpu")
    E, weights, z = torch.randn(4, 3), torch.ones(1, 1), torch.empty(1, 3)
    ids = torch.tensor([[9]])
    arguments = {
        "table": E.data_ptr(),
        "table_dtype": 0,
        "table_stride": 3,
        "vocab": 4,
        "dim": 3,
        "where": 1,
        "atoms": 1,
    }
    arguments |= {"ids": ids.data_ptr(), "ids_dtype": 4, "rows": 1, "weights": weights.data_ptr(), "z": z.data_ptr()}
    with pytest.raises(IndexError, match=r"ids\[0, 0\] = 9 is outside the table of 4 rows"):
        module.mixture_embed(**arguments)
    with pytest.raises(ValueError, match="table stride 2"):
        module.mixture_embed(**(arguments | {"table_stride": 2}))
    with pytest.raises(ValueError, match="pointer is null"):
        module.mixture_embed(**(arguments | {"weights": 0}))
    with pytest.raises(ValueError, match="no float16 kernels"):
        module.mixture_embed(**(arguments | {"table_dtype": 2}))
