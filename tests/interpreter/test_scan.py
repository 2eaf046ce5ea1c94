"""Values and gradients of the scans against float64, over shapes, variants, launches and dtypes."""

import dataclasses

import pytest
import torch

from tests.interpreter import harness
from tests.scan_cases import (
    LAUNCHES,
    assert_close,
    assert_within,
    compute,
    error,
    make_case,
    make_plan,
    run,
)
from tests.tolerances import INTERPRETER_TOLERANCE
from triton_gru.kernels import backward, step

# H around the padding of 16 and the tiles of 16, 32 and 64 columns; B around the tile of 16 rows.
SHAPES = [(5, 3, 17), (1, 1, 33), (2, 17, 18), (2, 3, 65), (1, 3, 130)]
both_variants = pytest.mark.parametrize("reset_after", [True, False], ids=["after", "before"])
every_launch = pytest.mark.parametrize("launch", LAUNCHES)


@both_variants
@every_launch
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, launch, reset_after):
    T, B, H = shape
    if launch == "single" and H > 65:
        pytest.skip("beyond what one program holds in float32")
    case = make_case(T, B, H, reset_after=reset_after, seed=T * B * H)
    with harness.interleaving(H):
        assert_close(case, launch, INTERPRETER_TOLERANCE[torch.float32])


@both_variants
@pytest.mark.parametrize("launch", LAUNCHES[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_last_chunk_narrower_than_the_others(dtype, launch, reset_after):
    case = make_case(3, 2, 130, reset_after=reset_after, dtype=dtype)
    plans = {scan: make_plan(case, scan, launch, warps=4) for scan in ("forward", "backward")}
    for plan in plans.values():
        assert plan.k_blocks > 1 and plan.tail < plan.block_k, plan
    with harness.interleaving(4):
        assert_within(INTERPRETER_TOLERANCE[dtype], case, compute(case, plans))


@both_variants
@pytest.mark.parametrize("launch", LAUNCHES[1:])
@pytest.mark.parametrize("in_registers", [1, 2])
def test_weights_held_in_registers(in_registers, launch, reset_after):
    """How such chunks are loaded; that they stay in registers is the static report's to show."""
    case = make_case(2, 3, 130, reset_after=reset_after)
    wanted = {"block_n": 16, "warps": 4}
    plans = {
        scan: dataclasses.replace(
            make_plan(case, scan, launch, **wanted), in_registers=in_registers
        )
        for scan in ("forward", "backward")
    }
    assert_within(INTERPRETER_TOLERANCE[torch.float32], case, compute(case, plans))


@both_variants
def test_one_column_of_state(reset_after):
    case = make_case(5, 3, 1, reset_after=reset_after)
    assert_close(case, "single", INTERPRETER_TOLERANCE[torch.float32])


@both_variants
@every_launch
def test_two_directions_in_one_launch(launch, reset_after):
    case = make_case(3, 2, 17, 2, reset_after=reset_after)
    with harness.interleaving(3):
        assert_close(case, launch, INTERPRETER_TOLERANCE[torch.float32])


@both_variants
@every_launch
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(dtype, launch, reset_after):
    case = make_case(4, 3, 34, reset_after=reset_after, dtype=dtype)
    with harness.interleaving(5):
        assert_close(case, launch, INTERPRETER_TOLERANCE[dtype])


@every_launch
def test_tf32_where_torch_allows_it(launch, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    case = make_case(3, 3, 34, reset_after=True)
    assert_close(case, launch, INTERPRETER_TOLERANCE["tf32"])
    y, _ = run(case, launch)
    assert error(y, case.exact()[0]) > INTERPRETER_TOLERANCE[torch.float32], (
        "the products were not tf32"
    )


@both_variants
@every_launch
def test_without_bias(launch, reset_after):
    assert_close(
        make_case(2, 3, 20, reset_after=reset_after, bias=False),
        launch,
        INTERPRETER_TOLERANCE[torch.float32],
    )


@both_variants
@pytest.mark.parametrize("launch", LAUNCHES[:2])
def test_saved_gates_give_the_gradients_of_recomputed_ones(launch, reset_after):
    case = make_case(3, 3, 20, reset_after=reset_after)
    assert_close(case, launch, INTERPRETER_TOLERANCE[torch.float32], save_gates=True)


@both_variants
def test_gradients_received_one_gate_after_the_other(reset_after):
    case = make_case(3, 3, 34, 2, reset_after=reset_after, lengths=True)
    for seed in range(3):
        with harness.interleaving(seed):
            assert_close(case, "sentinel", INTERPRETER_TOLERANCE[torch.float32], by_block=True)


@both_variants
@every_launch
@pytest.mark.parametrize("directions", [1, 2])
def test_lengths(directions, launch, reset_after):
    case = make_case(4, 5, 18, directions, reset_after=reset_after, lengths=True)
    assert case.options["lengths"].min() < 4
    with harness.interleaving(7):
        assert_close(case, launch, INTERPRETER_TOLERANCE[torch.float32])


@both_variants
@every_launch
@pytest.mark.parametrize("lengths", [False, True])
def test_resets(lengths, launch, reset_after):
    case = make_case(4, 5, 18, 2, reset_after=reset_after, resets=True, lengths=lengths)
    with harness.interleaving(9):
        assert_close(case, launch, INTERPRETER_TOLERANCE[torch.float32])


def test_garbage_past_a_rows_end_reaches_nothing():
    case = make_case(4, 3, 18, reset_after=True, lengths=True)
    case.options["lengths"] = torch.tensor([4, 2, 0])
    exact_y, exact = case.exact()
    case.arguments[0][2:, 1], case.arguments[0][:, 2] = float("nan"), float("nan")
    y, grads = run(case, "sentinel")
    assert error(y, exact_y) < INTERPRETER_TOLERANCE[torch.float32]
    for name, grad in exact.items():
        assert error(grads[name], grad) < INTERPRETER_TOLERANCE[torch.float32], name


@both_variants
@every_launch
@pytest.mark.parametrize(
    "shape, options",
    [
        ((3, 3, 18), {}),
        ((3, 4, 20, 2), {"lengths": True, "resets": "row", "seed": 2}),
        ((4, 3, 32), {"resets": "zero"}),
        ((3, 3, 18), {"dtype": torch.float16, "lengths": True}),
    ],
    ids=str,
)
def test_nan_and_infinity_stand_where_float64_has_them(shape, options, launch, reset_after):
    """Cell by cell in y and every gradient, and nobody waits for a NaN of any pattern."""
    case = make_case(*shape, reset_after=reset_after, not_finite=True, **options)
    y, grads = case.exact()
    for exact in (y, grads["gates_x"]):
        assert exact.isnan().any() and exact.isinf().any() and exact.isfinite().any()
    with harness.interleaving(4):
        assert_close(case, launch, INTERPRETER_TOLERANCE[options.get("dtype", torch.float32)])


@pytest.mark.parametrize("exact", [0.0, 1.0, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("result", [0.0, 1.0, torch.inf, -torch.inf, torch.nan])
def test_only_the_same_value_has_no_error(result, exact):
    values = [torch.tensor([1.0, v]) for v in (result, exact)]
    same = torch.equal(*(v.nan_to_num(3.0) for v in values))
    assert (error(*values) == 0) == same


def test_z_of_one_copies_the_state_and_z_of_zero_forgets_it():
    case = make_case(3, 2, 18, reset_after=True)
    H, (gates_x, h0, _, bias) = 18, case.arguments
    gates_x[..., H : 2 * H] = torch.inf
    y, _ = run(case, "sentinel")
    assert error(y, h0.transpose(0, 1).expand_as(y)) < INTERPRETER_TOLERANCE[torch.float32]
    gates_x[..., H : 2 * H] = -torch.inf
    gates_x[..., :H] = -torch.inf  # r = 0 too: nothing of the state is left
    y, _ = run(case, "sentinel")
    assert error(y, torch.tanh(gates_x[..., 2 * H :].double())) < 1e-6
    del bias


@every_launch
def test_non_contiguous_arguments(launch):
    case = make_case(3, 4, 18, reset_after=True)
    gates_x, h0, weight, bias = case.arguments
    turned = gates_x.transpose(0, 1).contiguous().transpose(0, 1)
    case.arguments = [turned, h0.mT.contiguous().mT, weight.mT.contiguous().mT, bias]
    case.dy = case.dy[:1, :1].expand_as(case.dy)
    exact_y, exact = case.exact()
    assert not case.arguments[0].is_contiguous()
    y, grads = run(case, launch)
    assert error(y, exact_y) < INTERPRETER_TOLERANCE[torch.float32]
    assert all(error(grads[n], exact[n]) < INTERPRETER_TOLERANCE[torch.float32] for n in exact)


@both_variants
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (17, 130), (2, 65)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_step(dtype, shape, reset_after):
    B, H = shape
    case = make_case(1, B, H, reset_after=reset_after, dtype=dtype, seed=H)
    gates_x, h0, weight, bias = case.arguments
    out = step.step(gates_x[0, :, 0], h0[0], weight[0], bias[0], reset_after=reset_after)
    assert error(out, case.exact()[0][0, :, 0]) < INTERPRETER_TOLERANCE[dtype]


@both_variants
@every_launch
@pytest.mark.parametrize("resets", [False, True])
def test_the_backward_in_pieces_of_time(resets, launch, reset_after, monkeypatch):
    case = make_case(5, 3, 18, reset_after=reset_after, resets=resets, lengths=resets)
    monkeypatch.setattr(backward, "PIECE_STEPS", 2)
    with harness.interleaving(2) as runs:
        assert_close(case, launch, INTERPRETER_TOLERANCE[torch.float32], save_gates=resets is None)
    assert len(runs) == 1 + 3


def test_two_directions_are_one_piece_of_time(monkeypatch):
    monkeypatch.setattr(backward, "PIECE_STEPS", 2)
    case = make_case(5, 3, 18, 2, reset_after=True)
    with harness.interleaving(2) as runs:
        assert_close(case, "sentinel", INTERPRETER_TOLERANCE[torch.float32])
    assert len(runs) == 2


def test_pieces_of_sixteen_bits(monkeypatch):
    monkeypatch.setattr(backward, "PIECE_STEPS", 2)
    case = make_case(5, 3, 34, reset_after=True, dtype=torch.bfloat16)
    assert_close(case, "sentinel", INTERPRETER_TOLERANCE[torch.bfloat16])
