"""ExpertBank against plain autograd: both activations, both kernels, every awkward count; initial values; new layouts."""

import math
from collections.abc import Sequence
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossdock.errors import BadConfig, BadData
from crossdock.runtime.dispatch.layout import ExpertLayout
from crossdock.runtime.experts import grouped_mlp as grouped_mlp_module
from crossdock.runtime.experts.expert_bank import ExpertBank, choose_kernel
from crossdock.runtime.experts.grouped_mlp import ACTIVATIONS, ROW_MULTIPLE, Recompute, grouped_mlp

COUNTS = [
    (8, 8, 8),
    (5, 0, 11),  # an empty slot in the middle
    (0, 0, 7),
    (9, 3, 0),  # the last one empty
    (1, 1, 1),
    (0, 0, 0),
    (17, 2, 300),  # the last slot's rows are enough to be split
]
FLOAT32_TOLERANCE = 2e-6  # relative to the largest value: 512 terms a sum, in another order
BFLOAT16_TOLERANCE = 2e-2  # two roundings to 8 bits of mantissa on the way, compared with none


def layout_of(local_experts: Sequence[int], layer: int = 0) -> ExpertLayout:
    num_experts = max((*local_experts, 0)) + 1
    return ExpertLayout(layer, torch.zeros(num_experts, dtype=torch.int64), tuple(local_experts), len(local_experts), 1)


def bank_of(activation: str, dtype: torch.dtype = torch.float64, num_slots: int = 3, **options: object) -> ExpertBank:
    bank = ExpertBank(layout_of(range(num_slots)), 16, 24, activation, dtype, **options)  # type: ignore[arg-type]
    bank.reset_parameters(seed=1, std=0.3)
    return bank


def naive(rows_MD: Tensor, counts: Sequence[int], bank: ExpertBank) -> Tensor:
    """What the bank must equal, left to autograd."""
    parts = []
    for slot, rows_ND in enumerate(rows_MD.split(list(counts))):
        pre_NP = rows_ND @ bank.inner[slot].t()
        if bank.activation.name == "gelu":
            hidden_NF = F.gelu(pre_NP)
        else:
            gate_NF, up_NF = pre_NP.chunk(2, dim=1)
            hidden_NF = F.silu(gate_NF) * up_NF
        parts.append(hidden_NF @ bank.outer[slot])
    return torch.cat(parts)


def results(y_MD: Tensor, gradient_MD: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [y_MD, *torch.autograd.grad(y_MD, inputs, gradient_MD)]


def largest_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Relative to the largest value of each expected tensor."""
    ratios = [0.0]
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert torch.isfinite(a).all()
        if b.numel():
            a, b = a.detach().double(), b.detach().double()
            ratios.append(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)))
    return max(ratios)


@pytest.mark.parametrize("recompute", ["none", "activation", "all"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_loop_equals_autograd_in_float64(counts: tuple[int, ...], activation: str, recompute: str) -> None:
    bank = bank_of(activation, recompute=recompute)
    rows_MD = torch.randn(sum(counts), 16, dtype=torch.float64, requires_grad=True)
    gradient_MD = torch.randn(sum(counts), 16, dtype=torch.float64)
    inputs = [rows_MD, bank.inner, bank.outer]
    found = results(bank(rows_MD, torch.tensor(counts)), gradient_MD, inputs)
    expected = results(naive(rows_MD, counts, bank), gradient_MD, inputs)
    assert largest_difference(found, expected) < 1e-13


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation: str) -> None:
    bank = ExpertBank(layout_of(range(3)), 3, 4, activation, torch.float64)
    bank.reset_parameters(seed=2, std=0.5)
    rows_MD = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    count_S = torch.tensor([5, 0, 4])

    def call(rows: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
        return grouped_mlp(rows, inner, outer, count_S, bank.activation, "loop", "none")

    assert torch.autograd.gradcheck(call, (rows_MD, bank.inner, bank.outer))


@pytest.mark.parametrize("kernel", ["loop", "grouped"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_recomputing_changes_no_bit(counts: tuple[int, ...], activation: str, kernel: str) -> None:
    rows_MD = torch.randn(sum(counts), 16, requires_grad=True)
    gradient_MD = torch.randn(sum(counts), 16)
    found = {}
    for recompute in get_args(Recompute):
        bank = bank_of(activation, torch.float32, kernel=kernel, recompute=recompute)
        found[recompute] = results(bank(rows_MD, torch.tensor(counts)), gradient_MD, [rows_MD, bank.inner, bank.outer])
    for recompute in ("activation", "all"):
        assert all(map(torch.equal, found[recompute], found["none"]))


@pytest.mark.parametrize("kernel", ["loop", "grouped"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_recomputing_keeps_as_much_less_as_promised(activation: str, kernel: str) -> None:
    """Per row, beside the row itself: P + F values, P, or none."""
    counts = (16, 0, 24)
    rows_MD = torch.randn(sum(counts), 16, requires_grad=True)
    kept = {}
    for recompute in get_args(Recompute):
        bank = bank_of(activation, torch.float32, kernel=kernel, recompute=recompute)
        given = {tensor.data_ptr() for tensor in (rows_MD, bank.inner, bank.outer)}
        saved: list[Tensor] = []

        def pack(tensor: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            bank(rows_MD, torch.tensor(counts))
        new = [tensor for tensor in saved if tensor.data_ptr() not in given and tensor.is_floating_point()]
        kept[recompute] = sum(tensor.numel() for tensor in new) / sum(counts)
    width = ACTIVATIONS[activation].num_inputs * 24
    assert kept == {"none": width + 24, "activation": width, "all": 0}


def test_an_unknown_recompute_is_refused() -> None:
    with pytest.raises(BadConfig, match="unknown expert recompute 'some'; choose from none, activation, all"):
        bank_of("gelu", recompute="some")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FLOAT32_TOLERANCE), (torch.bfloat16, BFLOAT16_TOLERANCE)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_grouped_equals_loop(counts: tuple[int, ...], activation: str, dtype: torch.dtype, tolerance: float) -> None:
    loop, grouped = bank_of(activation, dtype, kernel="loop"), bank_of(activation, dtype, kernel="grouped", recompute="activation")
    rows_MD = torch.randn(sum(counts), 16).to(dtype).requires_grad_()
    gradient_MD = torch.randn(sum(counts), 16).to(dtype)
    found = results(grouped(rows_MD, torch.tensor(counts)), gradient_MD, [rows_MD, grouped.inner, grouped.outer])
    expected = results(loop(rows_MD, torch.tensor(counts)), gradient_MD, [rows_MD, loop.inner, loop.outer])
    assert largest_difference(found, expected) < tolerance


def test_no_kernel_is_asked_for_matrices_without_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_matrices: Tensor, **_options: Tensor) -> Tensor:
        raise AssertionError("CUDA kernels need not take empty matrices")

    monkeypatch.setattr(grouped_mlp_module, "_grouped_mm", refuses)
    bank = bank_of("swiglu", torch.float32, kernel="grouped")
    rows_MD = torch.zeros(0, 16, requires_grad=True)
    y_MD = bank(rows_MD, torch.zeros(bank.layout.num_slots, dtype=torch.int64))
    y_MD.sum().backward()
    assert y_MD.shape == (0, 16)
    assert rows_MD.grad is not None
    for weight in (bank.inner, bank.outer):
        assert weight.grad is not None
        assert not weight.grad.any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FLOAT32_TOLERANCE), (torch.bfloat16, BFLOAT16_TOLERANCE)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_low_precision_stays_near_float64(activation: str, dtype: torch.dtype, tolerance: float) -> None:
    low = bank_of(activation, dtype)
    high = bank_of(activation)
    with torch.no_grad():
        high.inner.copy_(low.inner)
        high.outer.copy_(low.outer)
    counts = (40, 3, 21)
    rows_MD = torch.randn(64, 16).to(dtype).requires_grad_()
    gradient_MD = torch.randn(64, 16).to(dtype)
    high_rows_MD = rows_MD.detach().double().requires_grad_()
    found = results(low(rows_MD, torch.tensor(counts)), gradient_MD, [rows_MD, low.inner, low.outer])
    expected = results(naive(high_rows_MD, counts, high), gradient_MD.double(), [high_rows_MD, high.inner, high.outer])
    assert all(tensor.dtype == dtype for tensor in found)
    assert largest_difference(found, expected) < tolerance


@pytest.mark.parametrize("kernel", ["loop", "grouped"])
def test_only_the_gradients_that_are_asked_for(kernel: str) -> None:
    bank = bank_of("swiglu", torch.float32, kernel=kernel)
    counts = (4, 0, 9)
    rows_MD = torch.randn(13, 16)
    all_inputs = [rows_MD.requires_grad_(), bank.inner, bank.outer]
    gradient_MD = torch.randn(13, 16)
    expected = results(bank(rows_MD, torch.tensor(counts)), gradient_MD, all_inputs)
    for wanted in range(3):
        for number, tensor in enumerate(all_inputs):
            tensor.requires_grad_(number == wanted)
        y_MD = bank(rows_MD, torch.tensor(counts))
        found = results(y_MD, gradient_MD, [all_inputs[wanted]])
        assert torch.equal(found[1], expected[wanted + 1])
    with torch.no_grad():
        assert not bank(rows_MD, torch.tensor(counts)).requires_grad


def test_backward_twice_over_a_kept_graph() -> None:
    bank = bank_of("gelu")
    rows_MD = torch.randn(12, 16, dtype=torch.float64, requires_grad=True)
    y_MD = bank(rows_MD, torch.tensor([5, 4, 3]))
    gradient_MD = torch.randn_like(y_MD)
    inputs = [rows_MD, bank.inner, bank.outer]
    first = torch.autograd.grad(y_MD, inputs, gradient_MD, retain_graph=True)
    second = torch.autograd.grad(y_MD, inputs, gradient_MD)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_rows_of_other_slots_and_their_order_do_not_matter() -> None:
    """Products run on into the next slot's rows: what stands there, be it NaN, must not show."""
    bank = bank_of("gelu")
    rows_MD = torch.randn(ROW_MULTIPLE + 1 + 6, 16, dtype=torch.float64)
    spoilt_MD = rows_MD.clone()
    spoilt_MD[ROW_MULTIPLE + 1 :] = math.nan
    count_S = torch.tensor([ROW_MULTIPLE + 1, 6, 0])
    assert torch.equal(bank(rows_MD, count_S)[: ROW_MULTIPLE + 1], bank(spoilt_MD, count_S)[: ROW_MULTIPLE + 1])


def test_counts_must_fit_the_rows() -> None:
    bank = bank_of("gelu")
    with pytest.raises(AssertionError, match="5 rows for counts"):
        bank(torch.zeros(5, 16, dtype=torch.float64), torch.tensor([1, 2, 3]))
    with pytest.raises(AssertionError, match="3 slots"):
        bank(torch.zeros(5, 16, dtype=torch.float64), torch.tensor([5]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_initial_values_belong_to_the_logical_expert(activation: str) -> None:
    whole = ExpertBank(layout_of(range(6)), 16, 24, activation)
    whole.reset_parameters(seed=3)
    elsewhere = ExpertBank(layout_of([4, 1, 4]), 16, 24, activation)
    elsewhere.reset_parameters(seed=3)
    for name, tensor in elsewhere.expert_tensors().items():
        for slot, expert in enumerate(elsewhere.layout.local_experts):
            assert torch.equal(tensor[slot], whole.expert_tensors()[name][expert])
    values = whole.inner.detach()
    assert not torch.equal(values[0], values[1])
    for other in (ExpertBank(layout_of(range(6), layer=1), 16, 24, activation), ExpertBank(layout_of(range(6)), 16, 24, activation)):
        other.reset_parameters(seed=3 + (other.layout.layer == 0))
        assert not torch.equal(other.inner[0], whole.inner[0])


def test_initial_values_have_the_asked_spread() -> None:
    bank = ExpertBank(layout_of(range(4)), 64, 256, "swiglu")
    bank.reset_parameters(seed=0, std=0.02, output_scale=1 / math.sqrt(2 * 8))
    assert bank.inner.std().item() == pytest.approx(0.02, rel=0.02)
    assert bank.outer.std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert abs(bank.inner.mean().item()) < 1e-3


def test_bf16_bank_holds_the_rounded_values_and_uses_them_as_they_are() -> None:
    low, high = bank_of("gelu", torch.bfloat16), bank_of("gelu", torch.float32)
    assert low.inner.dtype == torch.bfloat16
    assert torch.equal(low.inner, high.inner.to(torch.bfloat16))


@pytest.mark.parametrize("local_experts", [(2, 0, 1), (5, 3), ()])
def test_replace_layout_keeps_the_parameters_and_computes_with_the_new_values(local_experts: tuple[int, ...]) -> None:
    bank = bank_of("swiglu")
    parameters = bank.expert_tensors()
    bank(torch.randn(6, 16, dtype=torch.float64), torch.tensor([1, 2, 3])).sum().backward()
    new = ExpertBank(layout_of(local_experts), 16, 24, "swiglu", torch.float64)
    new.reset_parameters(seed=1, std=0.3)
    given = {name: tensor.detach().clone() for name, tensor in new.expert_tensors().items()}
    bank.replace_layout(new.layout, given)
    assert bank.layout is new.layout
    assert all(bank.expert_tensors()[name] is parameters[name] and parameters[name].grad is None for name in parameters)
    count_S = torch.tensor([3, 2, 0][: len(local_experts)], dtype=torch.int64)
    rows_MD = torch.randn(int(count_S.sum()), 16, dtype=torch.float64)
    expected = new(rows_MD, count_S)
    assert torch.equal(bank(rows_MD, count_S), expected)


def test_replace_layout_refuses_what_does_not_fit() -> None:
    bank = bank_of("gelu")
    shapes = bank.shapes(layout_of([0, 1]))
    with pytest.raises(BadData, match=r"\['inner'\] given where \['inner', 'outer'\]"):
        bank.replace_layout(layout_of([0, 1]), {"inner": torch.zeros(shapes["inner"])})
    with pytest.raises(BadData, match=r"'outer' has shape \(3, 24, 16\); the new layout needs \(2, 24, 16\)"):
        bank.replace_layout(layout_of([0, 1]), {"inner": torch.zeros(shapes["inner"]), "outer": bank.outer})


def test_bad_options_are_named() -> None:
    with pytest.raises(BadConfig, match="'relu'; choose from gelu, swiglu"):
        bank_of("relu")
    with pytest.raises(BadConfig, match="no float64"):
        bank_of("gelu", torch.float64, kernel="grouped")
    with pytest.raises(BadConfig, match="width 0"):
        ExpertBank(layout_of([0]), 8, 0)


def test_state_dict_round_trip() -> None:
    bank, other = bank_of("gelu"), ExpertBank(layout_of(range(3)), 16, 24, "gelu", torch.float64)
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.outer, bank.outer)


def test_cpu_takes_the_loop() -> None:
    assert choose_kernel(torch.zeros(1, 8, 8), torch.zeros(1, 8, 8)) == "loop"
    assert choose_kernel(torch.zeros(1, 8, 8).bfloat16(), torch.zeros(1, 8, 8).bfloat16()) == "loop"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_cuda_grouped_equals_loop_in_bf16(counts: tuple[int, ...], activation: str) -> None:
    loop = bank_of(activation, torch.bfloat16, device="cuda", kernel="loop")
    grouped = bank_of(activation, torch.bfloat16, device="cuda")
    assert grouped.kernel == "grouped"
    rows_MD = torch.randn(sum(counts), 16).to("cuda", torch.bfloat16).requires_grad_()
    gradient_MD = torch.randn(sum(counts), 16).to("cuda", torch.bfloat16)
    found = results(grouped(rows_MD, torch.tensor(counts)), gradient_MD, [rows_MD, grouped.inner, grouped.outer])
    expected = results(loop(rows_MD, torch.tensor(counts)), gradient_MD, [rows_MD, loop.inner, loop.outer])
    assert largest_difference([t.cpu() for t in found], [t.cpu() for t in expected]) < BFLOAT16_TOLERANCE
