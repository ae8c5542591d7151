"""Every measure against the naive loops of tests/reference.py, and what its docstring promises.

A measure that takes no labels is tested as it is and with each of its options, against the loop of its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regularizers import MEASURES, measures, primitives
from regularizers.measures import OPTIONS

SEED = 11  # of CNO's probes


@dataclass(frozen=True)
class Case:
    """A measure with some of its arguments, and the loop it must equal."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.arguments.items())])

    @property
    def count(self) -> int:
        """How many sets it takes."""
        return 2 if MEASURES[self.name].takes == "pair" else 1

    def __call__(self, *sets: Tensor) -> Tensor:
        torch.manual_seed(SEED)
        return MEASURES[self.name].function(*sets, **self.arguments)

    def loops(self, *sets: Tensor, probes_like: Tensor | None = None) -> float:
        """The naive value; CNO's probes are drawn in `probes_like`'s dtype."""
        return reference.mean_over_leading(self.naive(sets[0], probes_like), *sets)

    def loops_gradients(self, *sets: Tensor) -> list[Tensor]:
        """The naive value's gradients."""
        return reference.gradients_of_mean(self.naive(sets[0]), *sets)

    def naive(self, x: Tensor, probes_like: Tensor | None = None) -> Callable[..., reference.Number]:
        """The loop over one set of rows; CNO's is to be called for the sets of x in turn."""
        if self.name == "cno":
            return cno_loops(x, x if probes_like is None else probes_like, **self.arguments)
        return partial(getattr(reference, self.name), **self.arguments)


def draw_one_by_one(lead: Sequence[int], n: int, distribution: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """CNO's probes [M, n, 1] in the documented order: 'uniform' vector by vector, 'normal' in two batches."""
    if distribution == "normal":
        first, second = (torch.randn(*lead, n, 1, dtype=dtype) for _ in range(2))
        return first.reshape(-1, n, 1), second.reshape(-1, n, 1)
    vectors = [torch.rand(n, 1, dtype=dtype) for _ in range(2 * math.prod(lead))]
    return torch.stack(vectors[0::2]), torch.stack(vectors[1::2])


def cno_loops(
    x: Tensor,
    probes_like: Tensor,
    normalize: bool = False,
    inverse: bool = False,
    distribution: str = "normal",
    eps: float = 1e-6,
) -> Callable[[reference.Rows], reference.Number]:
    torch.manual_seed(SEED)
    n = x.shape[-1 if inverse else -2]
    probes = zip(*draw_one_by_one(x.shape[:-2], n, distribution, probes_like.dtype), strict=True)

    def of_the_next_set(rows: reference.Rows) -> reference.Number:
        return reference.cno(reference.gram(rows, normalize, inverse), *next(probes), eps)

    return of_the_next_set


def with_each_option(name: str) -> list[Case]:
    """A measure as it is, and with each option that changes something; a number is one that its range allows."""
    measure = MEASURES[name]
    cases = [Case(name)]
    for option in map(OPTIONS.get, measure.options):
        assert option is not None
        value = max(option.above, 0.0) + 0.5 if option.value is None else option.value
        if measure.defaults[option.argument] != value:
            cases.append(Case(name, {option.argument: value}))
    return cases


CASES = [
    *(case for name, measure in MEASURES.items() if measure.takes != "labels" for case in with_each_option(name)),
    Case("cno", {"distribution": "uniform", "eps": 0.0}),
    Case("cno", {"distribution": "uniform", "eps": 0.0, "inverse": True, "normalize": True}),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
LEADS: list[tuple[int, ...]] = [(), (1,), (3,), (2, 3)]


def sets(count: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]
    return [x.requires_grad_() for x in drawn]


def named(name: str) -> list[Case]:
    return [case for case in CASES if case.name == name]


@pytest.mark.parametrize("name", [name for name, measure in MEASURES.items() if measure.takes != "labels"])
def test_every_measure_has_a_loop(name: str) -> None:
    assert hasattr(reference, name), f"write the naive form of {name} in tests/reference.py, under this name"


def test_every_option_has_a_case() -> None:
    """Those of the measures that are here today, by hand: what makes the cases is tested too."""
    assert {str(case) for case in CASES} >= {
        *("cosine", "cosine-absolute=True", "cosine_cross-absolute=True", "pairwise_cosine", "mhs", "mgd"),
        *("contrastive", "contrastive-tau=0.5", "so", "so-normalize=True", "gradient_diversity"),
        *("cno", "cno-normalize=True", "cno-inverse=True", "context"),
    }


# ------------------------------------------------------------------------------------------------------------
# Values


@contextmanager
def chunks_of(max_elements: int) -> Iterator[None]:
    """Lets the tensors inside a measure that goes in chunks have that many elements."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(primitives, "MAX_ELEMENTS", max_elements)
        yield


def test_chunks_have_their_devices_size() -> None:
    """Small on a CPU; large where launching a kernel costs more. Rows alike, the last chunk with what is left."""
    for device, rows in (("cpu", primitives.MAX_ELEMENTS // 64), ("meta", primitives.MAX_ELEMENTS_ON_DEVICE // 64)):
        x, y = torch.empty(2 * rows + 3, 8, 8, device=device), torch.empty(2 * rows + 3, device=device)
        for tensor in primitives.in_chunks(x, y):
            assert [len(chunk) for chunk in tensor] == [rows, rows, 3]
        assert [len(chunk) for chunk in primitives.in_chunks(x, each=rows * 64)[0][:2]] == [1, 1]


@dataclass(frozen=True)
class Problem:
    """A shape, what is special about the items, MAX_ELEMENTS, and a seed."""

    shape: tuple[int, ...]
    kind: str
    max_elements: int
    seed: int

    def sets(self, count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        return [
            special(x, self.kind).requires_grad_() for x in sets(count, *self.shape, seed=self.seed, dtype=dtype)
        ]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Shapes down to a single item of a single number; chunks of one set, of a few sets and of all."""
    lead = draw(st.sampled_from(LEADS))
    shape = (*lead, draw(st.integers(1, 6)), draw(st.integers(1, 6)))
    kind = draw(st.sampled_from(["random", "zero", "one wide", "shifted", "identical"]))
    return Problem(shape, kind, draw(st.sampled_from([1, 80, 2**22])), draw(st.integers(0, 10**6)))


def special(x: Tensor, kind: str) -> Tensor:
    x = x.detach().clone()
    if kind == "zero":
        x[..., 0, :] = 0  # the first item of every set
    elif kind == "one wide":
        x[..., -1, :] *= 1e3
    elif kind == "shifted":
        x += 2  # items that resemble each other
    elif kind == "identical":
        x[:] = x[..., :1, :].clone()
    return x


def is_a_matter_of_rounding(case: Case, problem: Problem) -> bool:
    """Whether rounding decides the value, or whether there is none."""
    n, d = problem.shape[-2:]
    if case.name == "gradient_diversity":
        return n == 1 and problem.kind == "zero"  # 0 / 0; see test_gradient_diversity_without_gradients
    if case.name == "mhs":  # on a line, and among equal items, all distances are nearly 0 or nearly 4: which tie?
        return n > 2 and (d == 1 or problem.kind == "identical")
    return False


@every_case
@settings(max_examples=40, deadline=None, derandomize=True)
@given(problem=problems())
def test_value_is_the_loops(case: Case, problem: Problem) -> None:
    if is_a_matter_of_rounding(case, problem):
        return
    inputs = problem.sets(case.count)
    with chunks_of(problem.max_elements):
        value = case(*inputs)
    assert value.shape == () and value.dtype == torch.float64
    assert value.item() == pytest.approx(case.loops(*inputs), rel=1e-9, abs=1e-12)


@every_case
@settings(max_examples=25, deadline=None, derandomize=True)
@given(problem=problems())
def test_gradient_is_the_loops(case: Case, problem: Problem) -> None:
    """Autograd through the loops, number by number, finds the same gradient."""
    if is_a_matter_of_rounding(case, problem):
        return
    n, d = problem.shape[-2:]
    if case.name == "cno" and (d if case.arguments.get("inverse") else n) == 1:
        return  # the only eigenvalue minus itself: the probe that is left is rounding alone
    if case.name == "mgd" and n > 1 and (d == 1 or problem.kind == "identical"):
        return  # equal items: the kernel's inverse multiplies rounding by 1e6
    inputs = problem.sets(case.count)
    with chunks_of(problem.max_elements):
        gradients = torch.autograd.grad(case(*inputs), inputs)
    for gradient, expected in zip(gradients, case.loops_gradients(*inputs), strict=True):
        if case.name == "cno" and case.arguments.get("normalize") and problem.kind == "zero":
            # at the zero vector 1e8 times a difference of nearly equal numbers
            gradient, expected = gradient[..., 1:, :], expected[..., 1:, :]
        there = expected.isfinite()
        assert there.all() or problem.kind == "zero"  # where a loop takes the root of 0, it has no gradient
        gradient, expected = gradient[there], expected[there]
        rounding = 1e-8 if case.name == "mgd" else 1e-12  # its kernel's condition number is up to 1e7
        largest = max([1.0, *expected.abs().flatten().tolist()])
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=rounding * largest)


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(problem=problems())
def test_half_precision_is_the_float32_computation(case: Case, dtype: torch.dtype, problem: Problem) -> None:
    """Of the same rounded numbers: the same value, and the same gradient, rounded once more at the end."""
    narrow = problem.sets(case.count, dtype=dtype)
    wide = [x.detach().float().requires_grad_() for x in narrow]
    with chunks_of(problem.max_elements):
        value, expected = case(*narrow), case(*wide)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    # MGD's gradient comes from float64: rounding it by way of float32 may go the other way in the last place
    rtol = torch.finfo(dtype).eps if case.name == "mgd" else 0
    for mine, theirs in zip(torch.autograd.grad(value, narrow), torch.autograd.grad(expected, wide), strict=True):
        torch.testing.assert_close(mine, theirs.to(dtype), rtol=rtol, atol=torch.finfo(dtype).tiny * rtol)


@every_case
def test_gradcheck(case: Case) -> None:
    inputs = sets(case.count, 2, 4, 3, seed=3)
    assert torch.autograd.gradcheck(case, inputs)


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_float32(case: Case, dtype: torch.dtype) -> None:
    """Close to the float64 value of the rounded input, and the gradient comes back in the input's dtype."""
    inputs = sets(case.count, 2, 5, 8, seed=1, dtype=dtype)
    value = case(*inputs)
    assert value.dtype == torch.float32
    exact = case.loops(*inputs, probes_like=torch.empty(0, dtype=torch.float32))
    assert value.item() == pytest.approx(exact, rel=2e-5, abs=2e-6)
    for gradient in torch.autograd.grad(value, inputs):
        assert gradient.dtype == dtype and gradient.isfinite().all()


# ------------------------------------------------------------------------------------------------------------
# The contract of the registry


@every_case
@pytest.mark.parametrize("shape", [(1, 4, 3), (3, 5, 2), (2, 3, 4, 8), (5, 7), (1, 1, 4), (2, 3, 1), (1, 197, 16)])
def test_contract(case: Case, shape: tuple[int, ...]) -> None:
    """Any size: a finite scalar, and a finite gradient at every input (not all 0, unless nothing can change)."""
    inputs = sets(case.count, *shape, seed=2, dtype=torch.float32)
    value = case(*inputs)
    assert value.shape == () and value.isfinite()
    gradients = torch.autograd.grad(value, inputs)
    assert all(gradient.isfinite().all() for gradient in gradients)
    if shape[-2] > 1 and shape[-1] > 1:
        assert all(gradient.count_nonzero() > 0 for gradient in gradients)


@pytest.mark.parametrize("case", [c for c in CASES if c.name != "cno"], ids=str)
@pytest.mark.parametrize("lead", [(3,), (2, 3)])
def test_mean_over_leading_dimensions(case: Case, lead: tuple[int, ...]) -> None:
    """Not CNO, whose probes differ from set to set; test_value_is_the_loops covers it."""
    inputs = sets(case.count, *lead, 4, 3)
    one_by_one = [case(*items) for items in zip(*(x.flatten(0, -3) for x in inputs), strict=True)]
    torch.testing.assert_close(case(*inputs), torch.stack(one_by_one).mean(), rtol=1e-12, atol=0)


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["one zero", "all zero", "identical", "two identical", "opposite"])
def test_degenerate_items(case: Case, kind: str, dtype: torch.dtype) -> None:
    """Zero, equal and opposite items leave value and gradient finite."""
    inputs = []
    for x in sets(case.count, 2, 4, 3, seed=4, dtype=dtype):
        x = x.detach().clone()
        if kind == "one zero":
            x[:, 1] = 0
        elif kind == "all zero":
            x[:] = 0
        elif kind == "identical":
            x[:] = x[:, :1]
        elif kind == "two identical":
            x[:, 2] = x[:, 0]
        elif kind == "opposite" and case.name != "gradient_diversity":  # whose value is then infinite
            x[:, 2:] = -x[:, :2]
        inputs.append(x.requires_grad_())
    value = case(*inputs)
    assert value.isfinite()
    if kind != "all zero" or case.name != "gradient_diversity":
        expected = case.loops(*inputs, probes_like=torch.empty(0, dtype=value.dtype))
        tolerance = 1e-6 if dtype == torch.float64 else 1e-4
        if (
            case.name != "mhs" or kind == "one zero"
        ):  # else which of its distances are equal is a matter of rounding
            assert value.item() == pytest.approx(expected, rel=tolerance, abs=tolerance)
    wide = [x.detach().to(value.dtype).requires_grad_() for x in inputs]
    for gradient, same in zip(
        torch.autograd.grad(value, inputs), torch.autograd.grad(case(*wide), wide), strict=True
    ):
        assert same.isfinite().all()
        assert torch.equal(gradient, same.to(dtype))  # at a zero vector about 1e8, beyond float16


# ------------------------------------------------------------------------------------------------------------
# What measures are made of: their gradients are written out, not autograd's

PARTS: dict[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] = {
    primitives.unit: lambda x: F.normalize(x, dim=-1, eps=1e-8),
    primitives.mean_direction: lambda x: F.normalize(x, dim=-1, eps=1e-8).mean(dim=-2, keepdim=True),
    primitives.gram: lambda x: x @ x.mT,
}
every_part = pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)


@every_part
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1), (5, 3), (2, 3, 4, 6)])
@pytest.mark.parametrize("length", [0, 1e-12, 0.9e-8, 1.1e-8, 1e-3, 1, 1e6])
def test_part_is_the_textbook_form(part: Callable[[Tensor], Tensor], shape: tuple[int, ...], length: float) -> None:
    """Value and gradient, also where an item is as good as zero."""
    x = F.normalize(sets(1, *shape)[0].detach(), dim=-1)
    x[..., 0, :] *= length
    x.requires_grad_()
    value, expected = part(x), PARTS[part](x)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-15)
    (weights,) = sets(1, *value.shape, seed=1)
    gradients = (torch.autograd.grad((of * weights.detach()).sum(), x)[0] for of in (value, expected))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10 / max(length, 1e-8))


@pytest.mark.parametrize("tau", [1.0, 0.1])
@pytest.mark.parametrize("shape", [(2, 1), (5, 3), (2, 3, 4, 6)])
@pytest.mark.parametrize("length", [0, 1e-12, 0.9e-8, 1.1e-8, 1e-3, 1, 1e6])
def test_contrastive_is_the_textbook_form(shape: tuple[int, ...], length: float, tau: float) -> None:
    """Value and gradients, also where an item of either layer is as good as zero."""
    inputs = [F.normalize(x.detach(), dim=-1) for x in sets(2, *shape)]
    for i, x in enumerate(inputs):
        x[..., i, :] *= length
        x.requires_grad_()
    u, v = (PARTS[primitives.unit](x) for x in inputs)
    similarity = u @ v.mT / tau  # [..., n, n]
    own = similarity.diagonal(dim1=-2, dim2=-1)
    others = (similarity.sum(dim=-1) - own) / (shape[-2] - 1)
    expected = -(own.exp() / (own.exp() + others.exp())).log().mean()
    value = measures.contrastive(*inputs, tau=tau)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(of, inputs) for of in (value, expected))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12 / max(min(length, 1), 1e-8) / tau)


def test_contrastive_at_temperature_1_is_the_papers_form_bit_for_bit() -> None:
    """Dividing by (n - 1) tau, with tau = 1, rounds nothing that dividing by n - 1 does not."""
    for dtype in (torch.float32, torch.float64):
        inputs = sets(2, 3, 7, 5, dtype=dtype)
        *_, numerator = primitives.Contrast.similarities(*inputs)
        value = measures.contrastive(*inputs)
        assert torch.equal(value, F.softplus(numerator / 6).mean(dim=(-2, -1)).mean())
        same = measures.contrastive(*inputs, tau=1.0)
        for mine, theirs in zip(*(torch.autograd.grad(of, inputs) for of in (value, same)), strict=True):
            assert torch.equal(mine, theirs)


@every_part
def test_part_can_be_differentiated_twice(part: Callable[[Tensor], Tensor]) -> None:
    (x,) = sets(1, 2, 4, 3)
    assert torch.autograd.gradcheck(part, x) and torch.autograd.gradgradcheck(part, x)


@every_part
def test_part_keeps_nothing_but_its_input(part: Callable[[Tensor], Tensor]) -> None:
    (x,) = sets(1, 4, 3)
    assert kept_for_backward(lambda: part(x).sum(), [x]) == []


# ------------------------------------------------------------------------------------------------------------
# Invariances


NORMALISING = ("cosine", "pairwise_cosine", "cosine_cross", "contrastive", "mhs", "mgd", "gradient_diversity")
SCALE_FREE = [case for case in CASES if case.name in NORMALISING or case.arguments.get("normalize")]


@pytest.mark.parametrize("case", SCALE_FREE, ids=str)
@pytest.mark.parametrize("scale", [1e-2, 1e4])
def test_scale_does_not_matter(case: Case, scale: float) -> None:
    inputs = [10 * x for x in sets(case.count, 2, 4, 3)]
    # MHS and MGD add 1e-8 to |x|^2, which at |x| ~ 0.1 shifts their values by about 1e-6
    tolerance = 1e-5 if case.name in ("mhs", "mgd") else 1e-10
    torch.testing.assert_close(case(*(scale * x for x in inputs)), case(*inputs), rtol=tolerance, atol=1e-12)


@pytest.mark.parametrize("case", [c for c in SCALE_FREE if c.name != "gradient_diversity"], ids=str)
def test_each_item_has_its_own_scale(case: Case) -> None:
    """Where items are normalised, even their lengths relative to each other do not matter."""
    inputs = sets(case.count, 2, 4, 3)
    lengths = torch.tensor([1.0, 20.0, 300.0, 4000.0], dtype=torch.float64)[:, None]
    tolerance = 1e-6 if case.name in ("mhs", "mgd") else 1e-10
    torch.testing.assert_close(case(*(lengths * x for x in inputs)), case(*inputs), rtol=tolerance, atol=1e-12)


@every_case
def test_order_of_items_does_not_matter(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    order = torch.tensor([2, 0, 3, 1])
    inputs = sets(case.count, 2, 4, 3)
    shuffled = [x[:, order] for x in inputs]
    if case.name == "cno":  # the probes follow the items; the columns keep their order
        n = 3 if case.arguments.get("inverse") else 4
        probes = torch.rand(2, 2, n, 1, dtype=torch.float64).unbind(0)
        monkeypatch.setattr(measures, "draw_probes", lambda x, distribution: probes)
        before = case(*inputs)
        if n == 4:
            monkeypatch.setattr(
                measures, "draw_probes", lambda x, distribution: tuple(probe[:, order] for probe in probes)
            )
    else:
        before = case(*inputs)
    torch.testing.assert_close(case(*shuffled), before, rtol=1e-10, atol=1e-12)


ROTATING = [c for c in CASES if c.name in (*NORMALISING, "so", "cno") and not c.arguments.get("inverse")]


@pytest.mark.parametrize("case", ROTATING, ids=str)
def test_rotation_does_not_matter(case: Case) -> None:
    """These measures see the items' scalar products alone."""
    inputs = sets(case.count, 2, 4, 3)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    torch.testing.assert_close(case(*(x @ rotation for x in inputs)), case(*inputs), rtol=1e-9, atol=1e-12)


def test_contrastive_pairs_items_and_cosine_cross_does_not() -> None:
    x, y = sets(2, 2, 4, 3)
    order = torch.tensor([1, 2, 3, 0])
    torch.testing.assert_close(measures.cosine_cross(x, y[:, order]), measures.cosine_cross(x, y))
    assert abs(measures.contrastive(x, y[:, order]) - measures.contrastive(x, y)) > 1e-3


# ------------------------------------------------------------------------------------------------------------
# Ranges and closed forms

RANGES = {
    "cosine": (0.0, 1.0),
    "cosine-absolute=True": (0.0, 1.0),
    "pairwise_cosine": (0.0, 1.0),
    "cosine_cross": (-1.0, 1.0),
    "cosine_cross-absolute=True": (0.0, 1.0),
    "contrastive": (math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))),
    "contrastive-tau=0.5": (math.log(1 + math.exp(-4)), math.log(1 + math.exp(4))),
    "context": (-math.log(1 + 1e-8), -math.log(1e-8)),
    "mgd": (0.0, math.inf),
    "so": (0.0, math.inf),
    "cno": (0.0, math.inf),
}


@pytest.mark.parametrize("case", [c for c in CASES if str(c) in RANGES], ids=str)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(problem=problems())
def test_range(case: Case, problem: Problem) -> None:
    low, high = RANGES[str(case)]
    if case.name == "contrastive" and problem.shape[-2] == 1:
        low = 0.0  # nothing to contrast with
    if case.name == "mgd":
        low = -problem.shape[-2] * math.log(1 + 1e-6)  # Hadamard's bound: the diagonal is 1 + 1e-6
    value = case(*problem.sets(case.count)).item()
    assert low - 1e-12 <= value <= high + 1e-12


@settings(max_examples=25, deadline=None, derandomize=True)
@given(problem=problems())
def test_range_of_gradient_diversity(problem: Problem) -> None:
    n = problem.shape[-2]
    if n > 1:
        value = measures.gradient_diversity(*problem.sets(1))
        assert value.item() <= -1 / n + 1e-12


def orthonormal(n: int, d: int) -> Tensor:
    return torch.eye(d, dtype=torch.float64)[:n].requires_grad_()


@pytest.mark.parametrize(("n", "d"), [(1, 1), (2, 2), (3, 5), (6, 6)])
def test_orthonormal_items(n: int, d: int) -> None:
    x = orthonormal(n, d)
    assert measures.cosine(x).item() == pytest.approx(1 / n)
    assert measures.cosine(x, absolute=True).item() == pytest.approx(1 / n)
    assert measures.pairwise_cosine(x).item() == pytest.approx(0, abs=1e-15)
    assert measures.so(x).item() == 0
    assert measures.so(3 * x).item() == pytest.approx(64 * n)
    assert measures.so(3 * x, normalize=True).item() == pytest.approx(0, abs=1e-15)
    assert measures.cno(x, eps=0.0).item() == pytest.approx(0, abs=1e-12)
    assert measures.mhs(x).item() == -2 * n * (n - 1) / 2  # all pairs attain the smallest distance, 2
    assert measures.gradient_diversity(x).item() == pytest.approx(-1)
    if n > 1:
        assert measures.contrastive(x, x).item() == pytest.approx(math.log(1 + math.exp(-1)))
        kernel = torch.full((n, n), math.exp(-2), dtype=torch.float64).fill_diagonal_(1)
        assert measures.mgd(x).item() == pytest.approx(-torch.linalg.slogdet(kernel).logabsdet.item(), abs=1e-5)


@pytest.mark.parametrize("n", [2, 5])
def test_identical_items(n: int) -> None:
    x = torch.tensor([3.0, -4.0], dtype=torch.float64).expand(2, n, 2)
    for function in (measures.cosine, measures.pairwise_cosine):
        assert function(x).item() == pytest.approx(1)
    assert measures.contrastive(x, x).item() == pytest.approx(math.log(2))
    assert measures.gradient_diversity(x).item() == pytest.approx(-1 / n)
    assert measures.so(x, normalize=True).item() == pytest.approx(n * (n - 1))
    # the distance is 0, but for the 1e-8 that the normalisation adds; rounding decides how many pairs attain it
    assert measures.mhs(x[:, :2]).item() == pytest.approx(-2e-8, rel=1e-5)
    assert -n * (n - 1) / 2 * 2.1e-8 <= measures.mhs(x).item() <= -1.9e-8
    # one eigenvalue of the kernel is n + 1e-6, the others 1e-6
    assert measures.mgd(x).item() == pytest.approx(-math.log(n) - (n - 1) * math.log(1e-6), rel=1e-2)


def test_contrastive_reaches_both_ends_of_its_range() -> None:
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert measures.contrastive(x, x).item() == pytest.approx(math.log(1 + math.exp(-2)))
    assert measures.contrastive(x, -x).item() == pytest.approx(math.log(1 + math.exp(2)))
    assert measures.contrastive(x, -x, tau=0.1).item() == pytest.approx(20)  # log(1 + e^20)


def test_contrastive_of_a_single_item_is_zero_with_zero_gradient() -> None:
    inputs = sets(2, 3, 1, 4)
    value = measures.contrastive(*inputs)
    assert value.item() == 0
    for gradient in torch.autograd.grad(value, inputs):
        assert (gradient == 0).all()


def test_contrastive_gradient_reaches_the_first_layer() -> None:
    """The first layer is not detached, unlike in Patch Diversification."""
    first, last = sets(2, 2, 4, 3)
    assert torch.autograd.grad(measures.contrastive(first, last), first)[0].abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------------------
# Context


@pytest.mark.parametrize("grid", [None, (9, 10), (10, 9), (6, 15), (1, 90)])
def test_context_takes_its_neighbours_from_the_grid(grid: tuple[int, int] | None) -> None:
    """Larger than the window in one direction or in both: value and gradients, number by number."""
    x, y = inputs = sets(2, 2, 90, 3)
    value = measures.context(x, y, grid=grid)
    naive = partial(reference.context, grid=grid)
    assert value.item() == pytest.approx(reference.mean_over_leading(naive, *inputs), rel=1e-12)
    gradients = torch.autograd.grad(value, inputs)
    for gradient, expected in zip(gradients, reference.gradients_of_mean(naive, *inputs), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_context_sees_the_picture_and_not_the_order_of_its_patches() -> None:
    """The transposed picture has the same value, in its own grid alone; None is nearest to a square."""
    x, y = (tensor.detach() for tensor in sets(2, 2, 90, 3))
    value = measures.context(x, y, grid=(9, 10))
    turned = [tensor.unflatten(1, (9, 10)).transpose(1, 2).flatten(1, 2) for tensor in (x, y)]
    torch.testing.assert_close(measures.context(*turned, grid=(10, 9)), value, rtol=1e-12, atol=0)
    assert measures.context(x, y) == value
    for other in ((10, 9), (6, 15)):
        assert abs(measures.context(x, y, grid=other) - value) > 1e-4


def test_context_of_patches_that_are_all_alike() -> None:
    """Far from the border the three products are equal, log 3; near it that with the neighbours is smaller."""
    x = torch.full((1, 49 * 49, 2), 0.1, dtype=torch.float64)
    alike = measures.context(x, x, grid=(49, 49)).item()
    assert math.log(3) - 1e-2 < alike < math.log(3)
    assert measures.context(x[:, :1], x[:, :1]).item() == 0  # one patch: nothing to contrast with


# ------------------------------------------------------------------------------------------------------------
# Hyperspherical separation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mhs_without_a_pair_at_a_distance_is_zero(dtype: torch.dtype) -> None:
    for x in sets(1, 2, 1, 4, dtype=dtype):  # one item: no pairs
        value = measures.mhs(x)
        assert value.item() == 0
        assert (torch.autograd.grad(value, x)[0] == 0).all()


def test_mhs_skips_distances_that_are_exactly_zero() -> None:
    """In float32 1 - 1e-8 is 1: equal axis vectors are at distance 0, and the next nearest pair counts."""
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]], requires_grad=True)
    value = measures.mhs(x)
    assert value.item() == pytest.approx(-4)  # two pairs at squared distance 2
    assert torch.autograd.grad(value, x)[0].isfinite().all()
    assert measures.mhs(x[:, :2]).item() == 0


def test_mhs_moves_only_the_nearest_pair() -> None:
    x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    gradient = torch.autograd.grad(measures.mhs(x), x)[0]
    assert (gradient[:2].abs().sum(dim=1) > 0).all()
    assert (gradient[2:] == 0).all()


def test_mhs_takes_the_nearest_pair_of_each_set() -> None:
    (x,) = sets(1, 3, 4, 3)
    each = [-min(reference.squared_distances(rows)) for rows in x.tolist()]
    assert measures.mhs(x).item() == pytest.approx(sum(each) / 3)


# ------------------------------------------------------------------------------------------------------------
# Gram determinant


def test_mgd_of_nearly_equal_items_needs_more_than_float32() -> None:
    """Float32 input, but float64 inside: the kernel's small eigenvalues are below float32's rounding."""
    (noise,) = sets(1, 2, 12, 6, dtype=torch.float32)
    x = (1 + 1e-3 * noise).detach().requires_grad_()
    value = measures.mgd(x)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(reference.mean_over_leading(reference.mgd, x), rel=1e-5)
    assert torch.autograd.grad(value, x)[0].isfinite().all()


def test_mgd_of_196_nearly_equal_float32_items() -> None:
    """The patches of a collapsed layer: all but equal, yet value and gradient are those of float64."""
    (noise,) = sets(1, 196, 16, dtype=torch.float32)
    x = (1 + 1e-4 * noise).detach().requires_grad_()
    wide = x.detach().double().requires_grad_()
    value, expected = measures.mgd(x), measures.mgd(wide)
    assert value.dtype == torch.float32 and value.isfinite()
    assert torch.equal(value, expected.float())
    assert value.item() == pytest.approx(float(reference.mgd(x.tolist())), rel=1e-6)
    (gradient,), (same,) = torch.autograd.grad(value, x), torch.autograd.grad(expected, wide)
    assert gradient.isfinite().all() and gradient.count_nonzero() > 0
    torch.testing.assert_close(gradient.double(), same, rtol=1e-6, atol=0)


def test_mgd_of_196_equal_float32_items_is_finite() -> None:
    x = torch.full((196, 16), 0.3, requires_grad=True)
    value = measures.mgd(x)
    assert value.item() == pytest.approx(-math.log(196) - 195 * math.log(1e-6), rel=1e-6)
    assert torch.autograd.grad(value, x)[0].isfinite().all()


# ------------------------------------------------------------------------------------------------------------
# Conditional-number orthogonality


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 24, 197])
@pytest.mark.parametrize("lead", LEADS)
def test_uniform_probes_in_one_draw_equal_drawing_one_by_one(
    lead: tuple[int, ...], n: int, dtype: torch.dtype
) -> None:
    x = torch.empty(*lead, n, 3, dtype=dtype)
    torch.manual_seed(SEED)
    drawn = measures.draw_probes(x, "uniform")
    after = torch.rand(1)
    torch.manual_seed(SEED)
    expected = draw_one_by_one(lead, n, "uniform", dtype)
    assert torch.equal(after, torch.rand(1))  # and leaves the generator where they would
    for mine, theirs in zip(drawn, expected, strict=True):
        assert mine.shape == (*lead, n, 1) and mine.dtype == dtype
        assert torch.equal(mine.reshape(-1, n, 1), theirs)
        assert mine.min() >= 0 and mine.max() < 1


@pytest.mark.parametrize("lead", LEADS)
def test_normal_probes_are_all_first_then_all_second(lead: tuple[int, ...]) -> None:
    torch.manual_seed(SEED)
    first, second = measures.draw_probes(torch.empty(*lead, 5, 3), "normal")
    torch.manual_seed(SEED)
    assert torch.equal(first, torch.randn(*lead, 5, 1))
    assert torch.equal(second, torch.randn(*lead, 5, 1))
    assert (torch.randn(4000, 1).mean().abs() < 0.1) and first.shape == (*lead, 5, 1)


@pytest.mark.parametrize("inverse", [False, True])
def test_cno_is_exact_when_the_probes_are_eigenvectors(inverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the dominant eigenvectors of G and of G - lambda_max I, one step gives the true eigenvalues."""
    (x,) = sets(1, 4, 4)
    dense = reference.gram(x.tolist(), inverse=inverse)
    values, vectors = torch.linalg.eigh(dense)  # ascending
    monkeypatch.setattr(measures, "draw_probes", lambda *_: (vectors[:, -1:], vectors[:, :1]))
    expected = (values[-1] - values[0]) ** 2
    torch.testing.assert_close(measures.cno(x, inverse=inverse, eps=0.0), expected, rtol=1e-10, atol=0)


def test_cno_never_exceeds_the_true_spread() -> None:
    """A Rayleigh quotient lies between the extreme eigenvalues, so lambda_max - lambda_min <= lambda_max."""
    (x,) = sets(1, 6, 8)
    values = torch.linalg.eigvalsh(reference.gram(x.tolist()))
    for seed in range(50):
        torch.manual_seed(seed)
        assert measures.cno(x, distribution="uniform", eps=0.0) <= (values[-1] * (1 + 1e-12)) ** 2


def test_cno_forms_no_gram_matrix() -> None:
    """n = 30,000 items: the Gram matrix would take 3.6 GB."""
    x = torch.ones(30_000, 2, requires_grad=True)
    largest = max_elements(lambda: measures.cno(x).backward())
    assert largest <= 6 * len(x)  # vectors side by side


def as_in_the_equations(
    x: Tensor, probes: tuple[Tensor, Tensor], normalize: bool, inverse: bool, eps: float
) -> Tensor:
    """CNO of x [..., n, d] through the Gram matrix, which autograd differentiates."""
    u = x / x.norm(dim=-1, keepdim=True) if normalize else x
    g = u.mT @ u if inverse else u @ u.mT

    def dominant(matrix: Tensor, probe: Tensor) -> Tensor:
        y = matrix @ probe
        return (y.mT @ matrix @ y) / (y.mT @ y + eps)  # [..., 1, 1]

    largest = dominant(g, probes[0])
    smallest = largest + dominant(g - largest * torch.eye(g.shape[-1], dtype=g.dtype), probes[1])
    return (largest - smallest).square().mean()


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5])
@pytest.mark.parametrize("arguments", [{}, {"normalize": True}, {"inverse": True}], ids=str)
@pytest.mark.parametrize("shape", [(2, 2), (9, 4), (4, 9), (5, 6, 6), (2, 3, 4, 40)])
def test_cno_and_its_gradients_are_the_equations(
    shape: tuple[int, ...], arguments: dict[str, bool], eps: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First and second derivatives; the backward pass is written out, not autograd's."""
    (x,) = sets(1, *shape, seed=7)
    n = shape[-1 if arguments.get("inverse") else -2]
    probes = draw_one_by_one(shape[:-2], n, "normal", x.dtype)
    probes = tuple(probe.view(*shape[:-2], n, 1) for probe in probes)
    monkeypatch.setattr(measures, "draw_probes", lambda x, distribution: probes)
    value = measures.cno(x, eps=eps, **arguments)
    expected = as_in_the_equations(x, probes, eps=eps, **{"normalize": False, "inverse": False, **arguments})
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)

    first, same = (torch.autograd.grad(of, x, create_graph=True)[0] for of in (value, expected))
    torch.testing.assert_close(first, same, rtol=1e-8, atol=1e-10)
    plain = torch.autograd.grad(measures.cno(x, eps=eps, **arguments), x)[0]
    assert torch.equal(plain, first.detach())  # from what the forward pass kept, and from the input again
    (direction,) = sets(1, *shape, seed=8)
    second, same = (torch.autograd.grad((g * direction.detach()).sum(), x)[0] for g in (first, same))
    torch.testing.assert_close(second, same, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("case", named("cno"), ids=str)
def test_cno_under_double_backward(case: Case) -> None:
    assert torch.autograd.gradgradcheck(case, sets(1, 2, 4, 3, seed=3))


@pytest.mark.parametrize("case", named("cno"), ids=str)
def test_cno_compiles_whole(case: Case) -> None:
    (x,) = sets(1, 3, 6, 5)
    probes = draw_one_by_one((3,), 5 if case.arguments.get("inverse") else 6, "normal", x.dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "draw_probes", lambda x, distribution: probes)
        function = partial(measures.cno, **case.arguments)
        torch.compiler.reset()
        value, expected = torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(of, x)[0] for of in (value, expected))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_cno_makes_one_matrix_of_gradients() -> None:
    """Not one for each product with X, to be added up."""
    (x,) = sets(1, 40, 30)
    shapes = [made.shape for made in results_of(lambda: torch.autograd.grad(measures.cno(x), x))]
    assert shapes.count(x.shape) == 1


@pytest.mark.parametrize("name", ["cosine", "cosine_cross", "contrastive", "context", "gradient_diversity"])
def test_linear_measures_form_no_n_by_n_matrix(name: str) -> None:
    (case,) = (case for case in named(name) if not case.arguments)
    inputs = sets(case.count, 300, 4)
    assert max_elements(lambda: case(*inputs).backward()) <= 300 * 4


def results_of(function: Callable[[], object]) -> list[Tensor]:
    """What all operations return while `function` runs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.results: list[Tensor] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            self.results += [
                x for x in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(x, Tensor)
            ]
            return out

    with Watch() as watch:
        function()
    return watch.results


def max_elements(function: Callable[[], object], but: int | None = None) -> int:
    """The size of the largest tensor, `but` that size, that any operation returns while `function` runs."""
    return max(result.numel() for result in results_of(function) if result.numel() != but)


# ------------------------------------------------------------------------------------------------------------
# Memory

# A measure that goes through `mean_over_sets` promises this; pairwise_cosine does so in its second function.
CHUNKS = {"mean_over_sets", "pairwise_cosines"}
IN_CHUNKS = [case for case in CASES if CHUNKS.intersection(MEASURES[case.name].function.__code__.co_names)]
every_case_in_chunks = pytest.mark.parametrize("case", IN_CHUNKS, ids=str)
SHAPE = (7, 6, 5)  # with MAX_ELEMENTS 80: chunks of 2, 2, 2 and 1 sets


def kept_for_backward(function: Callable[[], Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """What `function` keeps for its backward pass, beside its inputs."""
    own = {x.untyped_storage().data_ptr() for x in inputs}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        value = function()
    value.backward()
    return [x for x in kept if x.untyped_storage().data_ptr() not in own]


def test_these_measures_go_in_chunks() -> None:
    assert {case.name for case in IN_CHUNKS} >= {*NORMALISING, "so"} - {"gradient_diversity"}


@every_case_in_chunks
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [1, 80, 2**22])
def test_nothing_but_the_input_is_kept(case: Case, dtype: torch.dtype, budget: int) -> None:
    """No n x n matrix, no normalised or float32 copy of the input, however many chunks there are."""
    inputs = sets(case.count, *SHAPE, dtype=dtype)
    with chunks_of(budget):
        assert kept_for_backward(lambda: case(*inputs), inputs) == []
    assert all(x.grad is not None for x in inputs)


def test_what_is_kept_is_seen() -> None:
    """The n x n matrix of the textbook form does not escape the test above."""
    (x,) = sets(1, *SHAPE)
    assert (7, 6, 6) in [y.shape for y in kept_for_backward(lambda: (x @ x.mT).square().sum(), [x])]


@every_case_in_chunks
@pytest.mark.parametrize(("n", "d"), [(24, 4), (8, 24)])
def test_tensors_in_flight_are_bounded(case: Case, n: int, d: int) -> None:
    """Forward and backward, whatever the batch: a few sets at a time, and at the end the input's gradient."""
    budget, inputs = 3 * n * max(n, d), sets(case.count, 64, n, d, dtype=torch.float32)
    with chunks_of(budget):
        largest = max_elements(lambda: case(*inputs).backward(), but=64 * n * d)
    assert n * d <= largest <= budget


@pytest.mark.parametrize("normalize", [False, True])
def test_so_takes_the_smaller_gram_matrix(normalize: bool) -> None:
    (x,) = sets(1, 300, 4)
    assert max_elements(lambda: measures.so(x, normalize=normalize).backward()) <= 300 * 4


@every_case_in_chunks
def test_chunks_without_gradients(case: Case) -> None:
    """Under no_grad and for inputs that want none, the same value and no graph; one input may want one alone."""
    inputs = sets(case.count, *SHAPE)
    with chunks_of(80):
        value = case(*inputs)
        with torch.no_grad():
            assert torch.equal(case(*inputs), value.detach())
        constant = case(*(x.detach() for x in inputs))
        assert torch.equal(constant, value.detach()) and not constant.requires_grad
        gradient = torch.autograd.grad(value, inputs[-1])[0]
        alone = inputs[-1].detach().requires_grad_()
        others = [x.detach() for x in inputs[:-1]]
        assert torch.equal(torch.autograd.grad(case(*others, alone), alone)[0], gradient)


@every_case_in_chunks
def test_chunks_take_strided_items_and_no_sets(case: Case) -> None:
    """Items behind a class token, windows that are views, and an empty batch."""
    tokens = sets(case.count, 4, 7, 5)
    torch.testing.assert_close(
        case(*(x[:, 1:] for x in tokens)), case(*(x[:, 1:].contiguous() for x in tokens)), rtol=1e-12, atol=0
    )
    windows = [x.transpose(0, 1) for x in sets(case.count, 3, 2, 4, 5)]
    torch.testing.assert_close(case(*windows), case(*(x.contiguous() for x in windows)), rtol=1e-12, atol=0)
    assert case(*sets(case.count, 0, 4, 5)).shape == ()


@every_case_in_chunks
def test_chunks_under_double_backward(case: Case) -> None:
    with chunks_of(20):
        assert torch.autograd.gradgradcheck(case, sets(case.count, 2, 4, 3, seed=3))


@every_case_in_chunks
def test_chunks_compile_whole(case: Case) -> None:
    """Without a graph break, chunk by chunk."""
    function = partial(MEASURES[case.name].function, **case.arguments)
    inputs = sets(case.count, *SHAPE)
    with chunks_of(80):
        torch.compiler.reset()
        value = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
        gradients, expected = torch.autograd.grad(value, inputs), function(*inputs)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    for mine, theirs in zip(gradients, torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------
# Gradient diversity


def test_gradient_diversity_under_double_backward() -> None:
    """Its gradient through the gradient of a loss, against finite differences in the weights of that loss."""
    (x,) = sets(1, 2, 4, 3, seed=5)
    (weights,) = sets(1, 3, 3, seed=6)

    def through_the_gradient(w: Tensor) -> Tensor:
        loss = torch.tanh(x @ w).square().sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        return measures.gradient_diversity(gradient)

    assert torch.autograd.gradcheck(through_the_gradient, [weights])
    assert torch.autograd.gradgradcheck(measures.gradient_diversity, [x])


def test_gradient_diversity_without_gradients() -> None:
    """No gradient anywhere: 0, not a division by 0."""
    g = torch.zeros(2, 4, 3, requires_grad=True)
    value = measures.gradient_diversity(g)
    assert value.item() == 0
    assert (torch.autograd.grad(value, g)[0] == 0).all()


@pytest.mark.parametrize("scale", [1e-15, 1e-8, 1e8, 1e15])
def test_gradient_diversity_does_not_change_when_the_loss_is_scaled(scale: float) -> None:
    (g,) = sets(1, 2, 4, 3, dtype=torch.float32)
    torch.testing.assert_close(measures.gradient_diversity(scale * g), measures.gradient_diversity(g))
