"""The kernels against references written here in fp64. Run by test_kernels.py in a process of its own: whether Triton
compiles a kernel for a GPU or interprets it on a CPU is settled where it is imported."""

import math
import os

import pytest
import torch
from torch import Tensor

from poweropd.objectives import kernels
from poweropd.objectives.kernels import LogitMap, RowStatistics, reverse_kl_rows, softmax_rows

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
REAL_V = 151_936
TOKENS = 151_669  # of them mean something: rows of an odd number, which no vector of loads fits
BLOCK = 64
SIZES = [1, 37, 2 * BLOCK, 200]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = [(torch.float32, kind) for kind in ("plain", "bias", "scale", "softcap")]
KINDS += [(dtype, "everything") for dtype in DTYPES]


@pytest.fixture(autouse=True)
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones, so that a row has many and the interpreter little to do, but for the real vocabulary."""
    if "real" not in request.function.__name__:
        monkeypatch.setattr(kernels, "BLOCK", BLOCK)


def make_map(kind: str, size: int) -> LogitMap:
    return LogitMap(
        bias=torch.randn(size, device=DEVICE) if kind in ("bias", "everything") else None,
        scale=0.3 if kind in ("scale", "everything") else 1.0,
        softcap=5.0 if kind in ("softcap", "everything") else None,
    )


def make_products(rows: int, size: int, dtype: torch.dtype, spread: float = 5.0) -> Tensor:
    return (spread * torch.randn(rows, size, device=DEVICE)).to(dtype)


def logits_of(products: Tensor, map_: LogitMap) -> Tensor:
    """By the definition, in the precision of `products`."""
    logits = products
    if map_.bias is not None:
        logits = logits + map_.bias.to(products.dtype)
    logits = logits * map_.scale
    return logits if map_.softcap is None else map_.softcap * torch.tanh(logits / map_.softcap)


def logprobs_of(logits: Tensor, end_ids: list[int]) -> Tensor:
    """Of the outcomes; where there are ends, of the others and, last, of the union of the ends."""
    if not end_ids:
        return logits.log_softmax(1)
    others = [column for column in range(logits.shape[1]) if column not in end_ids]
    return torch.cat([logits[:, others], logits[:, end_ids].logsumexp(1, keepdim=True)], dim=1).log_softmax(1)


def exact_entropies(logits: Tensor) -> Tensor:
    logprobs = logits.log_softmax(1)
    return -(logprobs.exp() * logprobs).sum(1)


def check_statistics(found: RowStatistics, logits: Tensor) -> None:
    assert [column.dtype for column in found] == 3 * [torch.float32] + [torch.int64]
    torch.testing.assert_close(found.normalisers.double(), logits.logsumexp(1), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found.entropies.double(), exact_entropies(logits), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.largest.double(), logits.amax(1), rtol=1e-6, atol=1e-6)
    there = logits.gather(1, found.top1_ids[:, None])[:, 0]  # which of almost equal logits leads, rounding says
    torch.testing.assert_close(there, logits.amax(1), rtol=1e-6, atol=1e-6)


def check_gradient(found: Tensor, exact: Tensor, obvious: Tensor, logprobs: Tensor, terms: Tensor) -> None:
    """No entry is off by more than its last bit, which the interpreter cuts off where a GPU rounds, and some bits of
    fp32, of an exponential of `logprobs` and of `terms`, whose difference it is; nor the whole more than the obvious."""
    eps = torch.finfo(found.dtype).eps
    least = 2.0**-24 if found.dtype == torch.float16 else 1e-37  # what is smaller may become 0
    error, of_obvious = found.double() - exact, obvious.double() - exact
    bound = eps * exact.abs() + 1e-6 * ((1 - logprobs) * exact.abs() + terms) + least
    assert bool((error.abs() <= bound).all()), f"{(error.abs() / bound).max():.2f} times what is allowed"
    assert error.norm() <= 1.1 * of_obvious.norm() + eps * exact.norm() + 4e-7 * terms.norm()


def check_softmax(products: Tensor, map_: LogitMap) -> None:
    given = products.clone()

    def gradient(dtype: torch.dtype) -> Tensor:
        leaf = given.to(dtype).requires_grad_()
        return torch.autograd.grad(logits_of(leaf, map_).logsumexp(1).sum(), leaf)[0]

    logits = logits_of(given.double(), map_)
    logprobs = logits.log_softmax(1)
    check_statistics(softmax_rows(products, **map_._asdict(), gradient=False), logits)
    assert torch.equal(products, given)
    check_statistics(softmax_rows(products, **map_._asdict(), gradient=True), logits)
    obvious = gradient(torch.float32).to(products.dtype)
    check_gradient(products, gradient(torch.float64), obvious, logprobs, map_.scale * logprobs.exp())


def check_reverse_kl(
    student: Tensor, teacher: Tensor, student_map: LogitMap, teacher_map: LogitMap, end_ids: list[int]
) -> None:
    given, teacher_given = student.clone(), teacher.clone()

    def values(leaf: Tensor) -> Tensor:
        teacher_logits = logits_of(teacher_given.to(leaf.dtype), teacher_map)
        q, p = (logprobs_of(logits, end_ids) for logits in (logits_of(leaf, student_map), teacher_logits))
        return (q.exp() * (q - p)).sum(1)

    def gradient(dtype: torch.dtype) -> Tensor:
        leaf = given.to(dtype).requires_grad_()
        return torch.autograd.grad(values(leaf).sum(), leaf)[0]

    logits, teacher_logits = logits_of(given.double(), student_map), logits_of(teacher.double(), teacher_map)
    exact = values(given.double())
    q, p = logits.log_softmax(1), teacher_logits.log_softmax(1)
    ends = torch.tensor(end_ids, device=DEVICE) if end_ids else None
    maps = {"student_map": student_map, "teacher_map": teacher_map, "end_ids": ends}
    for is_gradient in (False, True):
        assert torch.equal(student, given)
        found = reverse_kl_rows(student, teacher, **maps, gradient=is_gradient)
        torch.testing.assert_close(found.values.double(), exact, rtol=2e-6, atol=1e-5)
        check_statistics(found.student, logits)
        check_statistics(found.teacher, teacher_logits)
        there = logits.gather(1, found.teacher.top1_ids[:, None])[:, 0]
        torch.testing.assert_close(found.student_at_teachers_top1.double(), there, rtol=1e-6, atol=1e-6)
    terms = student_map.scale * q.exp() * (q.abs() + p.abs() + exact[:, None])
    check_gradient(student, gradient(torch.float64), gradient(torch.float32).to(student.dtype), q, terms)
    assert torch.equal(teacher, teacher_given)


@pytest.mark.parametrize(("dtype", "kind"), KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_softmax(size: int, dtype: torch.dtype, kind: str) -> None:
    check_softmax(make_products(3, size, dtype), make_map(kind, size))


@pytest.mark.parametrize(("dtype", "kind"), KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_reverse_kl(size: int, dtype: torch.dtype, kind: str) -> None:
    student, teacher = make_products(3, size, dtype), make_products(3, size, torch.bfloat16)
    end_ids = [9, 4, 30] if size > 30 else [1, 0] if size > 1 else []
    check_reverse_kl(student.clone(), teacher, make_map(kind, size), make_map("everything", size), [])
    check_reverse_kl(student, teacher, make_map("everything", size), make_map(kind, size), end_ids)


def test_a_real_vocabulary() -> None:
    check_softmax(make_products(2, REAL_V, torch.bfloat16), LogitMap())
    student, teacher = make_products(1, TOKENS, torch.bfloat16), make_products(1, TOKENS, torch.bfloat16)
    check_reverse_kl(student, teacher, LogitMap(), LogitMap(), [TOKENS - 1, 7])


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows: int) -> None:
    products = make_products(rows, 37, torch.float32)
    found = softmax_rows(products, bias=None, scale=1.0, softcap=None, gradient=True)
    assert [column.shape for column in found] == [(rows,)] * 4
    found = reverse_kl_rows(products, products.clone(), student_map=LogitMap(), teacher_map=LogitMap(), gradient=True)
    assert found.values.shape == (rows,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_with_a_stride(dtype: torch.dtype) -> None:
    buffer = make_products(5, 3 * BLOCK, dtype)
    beyond = buffer[:, 100:].clone()
    check_softmax(buffer[:3, :100], make_map("bias", 100))
    check_reverse_kl(buffer[3:, :100], make_products(2, 101, dtype)[:, :100], LogitMap(), LogitMap(), [3, 99])
    assert torch.equal(buffer[:, 100:], beyond)


def test_rows_more_than_2_31_elements_apart() -> None:
    """Only what is touched of the four gigabytes takes memory."""
    buffer = torch.empty(2**31 + 37, dtype=torch.bfloat16, device=DEVICE)
    products = buffer.as_strided((3, 37), (2**30, 1))
    products.copy_(make_products(3, 37, torch.bfloat16))
    check_softmax(products, LogitMap())
    products.copy_(make_products(3, 37, torch.bfloat16))
    check_reverse_kl(products, make_products(3, 37, torch.bfloat16), LogitMap(), LogitMap(), [])


@pytest.mark.parametrize("level", [-1e4, 1e4])
def test_large_logits_cost_no_digits(level: float) -> None:
    products = level + make_products(2, 3 * BLOCK, torch.float32, spread=2.0).round(decimals=2)
    products[:, 5] = level + 4.0
    check_softmax(products.clone(), LogitMap())
    check_reverse_kl(products, -products + 7.0, LogitMap(), LogitMap(), [5, 6])
    even = torch.full((1, 1000), level, device=DEVICE)
    entropies = softmax_rows(even, bias=None, scale=1.0, softcap=None, gradient=False).entropies
    assert entropies.item() == pytest.approx(math.log(1000), abs=1e-6)


@pytest.mark.parametrize("place", [0, BLOCK - 1, 2 * BLOCK + 5])
@pytest.mark.parametrize("height", [30.0, 1e4])
def test_a_certain_token(place: int, height: float) -> None:
    """Wherever it is met: before it the sums are those of other rows, so to speak."""
    student, teacher = make_products(2, 3 * BLOCK, torch.float32), make_products(2, 3 * BLOCK, torch.float32)
    student[:, place] = height
    check_softmax(student.clone(), LogitMap())
    check_reverse_kl(student.clone(), teacher, LogitMap(), LogitMap(), [])
    check_reverse_kl(teacher, student, LogitMap(), LogitMap(), [place, 3])


def test_logits_that_rise_and_fall() -> None:
    """A larger one in every block, or in none but the first."""
    rising = torch.linspace(-20, 20, 4 * BLOCK + 3, device=DEVICE)[None]
    for student, teacher in ((rising, rising.flip(1)), (rising.flip(1), rising), (rising, 2 * rising)):
        check_softmax(student.clone(), LogitMap())
        check_reverse_kl(student.clone(), teacher.contiguous(), LogitMap(), LogitMap(), [])


def test_the_first_of_equals_is_the_likeliest() -> None:
    products = torch.zeros(4, 3 * BLOCK, device=DEVICE)
    products[1, [BLOCK + 7, BLOCK + 9, 5, 2 * BLOCK]] = 1.0
    products[2, [BLOCK + 7, BLOCK + 9, 2 * BLOCK]] = 1.0
    products[3] = torch.arange(3 * BLOCK, device=DEVICE)
    found = softmax_rows(products, bias=None, scale=1.0, softcap=None, gradient=False)
    assert found.top1_ids.tolist() == [0, 5, BLOCK + 7, 3 * BLOCK - 1]


@pytest.mark.parametrize("ends", [[], [3, 17]])
def test_no_divergence_from_itself(ends: list[int]) -> None:
    student = make_products(3, 300, torch.float32)
    teacher = student + torch.tensor([[0.0], [100.0], [-1000.0]], device=DEVICE)  # the same distribution
    end_ids = torch.tensor(ends, device=DEVICE) if ends else None
    found = reverse_kl_rows(
        student, teacher, student_map=LogitMap(), teacher_map=LogitMap(), end_ids=end_ids, gradient=True
    )
    assert found.values.abs().max() <= 1e-4  # of the teacher's own rounding
    assert found.values[0].abs() <= 1e-6
    assert student[0].abs().max() <= 1e-6


def test_a_spoilt_row_is_not_finite_and_alone() -> None:
    products = make_products(3, 3 * BLOCK, torch.float32)
    products[1, BLOCK + 3] = torch.nan
    teacher, student = products.clone(), products.clone()
    found = softmax_rows(products, bias=None, scale=1.0, softcap=None, gradient=True)
    for column in (found.normalisers, found.entropies, products.sum(1)):
        assert column.isnan().tolist() == [False, True, False]
    for first, second in ((student, teacher.nan_to_num()), (teacher.nan_to_num(), teacher)):
        values = reverse_kl_rows(first, second, student_map=LogitMap(), teacher_map=LogitMap(), gradient=True).values
        assert values.isnan().tolist() == first.sum(1).isnan().tolist() == [False, True, False]


def test_other_products_are_refused() -> None:
    products = make_products(4, 8, torch.float32)
    for wrong in (products.double(), products.T):
        with pytest.raises(ValueError, match="kernels take products"):
            softmax_rows(wrong, bias=None, scale=1.0, softcap=None, gradient=False)
    with pytest.raises(ValueError, match="kernels take products"):
        reverse_kl_rows(products, products[:, :7], student_map=LogitMap(), teacher_map=LogitMap(), gradient=False)


def test_they_are_available() -> None:
    assert kernels.available(torch.device(DEVICE))
