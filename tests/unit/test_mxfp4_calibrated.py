"""Calibrated rounding: bounds on the error of outputs, and the compiled sweep against the reference."""

import pytest
import torch

from gptoss_ft.kernels import cpu_rounding, reference
from gptoss_ft.kernels.codec import quantize_mxfp4
from gptoss_ft.mxfp4.calibrated import DAMPINGS, MIN_FITTED, MIN_INPUTS, CalibratedRounding, trial_rows
from gptoss_ft.mxfp4.round import round_merged
from gptoss_ft.mxfp4.sweeps import LEAST_DAMPING, MAX_PASSES, Sweeps

O, K, RANK = 64, 288, 4


def problem(relative_update, *, correlated, aligned, num_inputs=2048, seed=0):
    """A base on the grid, an update of the given size, and inputs to calibrate and to test on.

    Args:
        correlated: half the exponent by which the spectrum of the inputs falls.
    """
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, K + 1).float() ** (-2.0 * correlated)
    mixing = torch.linalg.qr(torch.randn(K, K, generator=generator))[0] * (spectrum / spectrum.mean()).sqrt()
    inputs = torch.randn(num_inputs + 1024, K, generator=generator) @ mixing.T
    blocks, scales = quantize_mxfp4(torch.randn(O, K, generator=generator) * K**-0.5)
    base = reference.dequantize_mxfp4(blocks, scales, torch.float32)
    A = torch.randn(RANK, K, generator=generator)
    update = torch.randn(O, RANK, generator=generator) @ (A @ mixing.T if aligned else A)
    update *= relative_update * base.norm() / update.norm()
    return base, update, blocks, scales, inputs[:num_inputs], inputs[num_inputs:]


def rounding_of(inputs, base, update, blocks, scales):
    return CalibratedRounding(inputs, (base + update, blocks, scales))


def output_error(blocks, scales, base, update, inputs):
    written = reference.dequantize_mxfp4(blocks, scales, torch.float32)
    return float(((written - base - update) @ inputs.T).norm() / (update @ inputs.T).norm())


@pytest.mark.parametrize(("relative_update", "bound"), [(0.002, 0.66), (0.01, 0.4), (0.05, 0.2)])
def test_updates_that_nearest_rounding_loses_survive_along_correlated_inputs(relative_update, bound):
    base, update, blocks, scales, seen, unseen = problem(relative_update, correlated=True, aligned=True)
    nearest_blocks, nearest_scales, _ = round_merged(base + update, blocks, scales)
    assert output_error(nearest_blocks, nearest_scales, base, update, unseen) > 1.5 * bound
    got = rounding_of(seen, base, update, blocks, scales).round(base + update, blocks, scales)
    assert output_error(*got, base, update, unseen) < bound


@pytest.mark.parametrize("relative_update", [0.001, 0.01, 0.05, 0.2])
@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize("num_inputs", [MIN_INPUTS, 300, 2048])
def test_the_result_is_never_worse_than_the_base(relative_update, correlated, num_inputs):
    base, update, blocks, scales, seen, unseen = problem(
        relative_update, correlated=correlated, aligned=False, num_inputs=num_inputs
    )
    got = rounding_of(seen, base, update, blocks, scales).round(base + update, blocks, scales)
    assert output_error(*got, base, update, unseen) <= 1


def test_rows_that_do_not_win_keep_the_bytes_of_the_base():
    base, update, blocks, scales, seen, _ = problem(0.001, correlated=False, aligned=False)
    blocks = blocks | (blocks == 0).to(torch.uint8) * 8  # negative zeros, which rounding anew would not write
    got_blocks, got_scales = rounding_of(seen, base, update, blocks, scales).round(base + update, blocks, scales)
    assert torch.equal(got_blocks, blocks) and torch.equal(got_scales, scales)


def test_few_inputs_are_enough_where_an_update_follows_them():
    base, update, blocks, scales, seen, unseen = problem(0.05, correlated=0.5, aligned=True, num_inputs=MIN_INPUTS)
    target = base + update
    rounding = rounding_of(seen, base, update, blocks, scales)
    got = rounding.round(target, blocks, scales)
    assert output_error(*got, base, update, unseen) < 0.38
    # All of them were fitted, those of the trial too.
    moment = (seen.T @ seen / len(seen))[rounding.order][:, rounding.order]
    torch.testing.assert_close(rounding.sweeps.H, Sweeps(moment, rounding.sweeps.damping).H)


def test_coarse_scales_of_a_base_become_finer():
    base, update, _, even, seen, unseen = problem(0.01, correlated=0.5, aligned=True)
    # Twice the steps of the "even" rule, as other rules make them; many blocks have room for half of them.
    coarse = quantize_mxfp4(base, even + 1)
    base = reference.dequantize_mxfp4(*coarse, torch.float32)
    fine = quantize_mxfp4(base)
    assert torch.equal(reference.dequantize_mxfp4(*fine, torch.float32), base)
    assert (coarse[1] != fine[1]).float().mean() > 0.2
    errors = [
        output_error(*rounding_of(seen, base, update, *packed).round(base + update, *packed), base, update, unseen)
        for packed in (coarse, fine)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=0.03)


def test_rows_take_the_best_of_base_nearest_and_calibrated():
    base, update, blocks, scales, seen, unseen = problem(0.05, correlated=False, aligned=False)
    got = rounding_of(seen, base, update, blocks, scales).round(base + update, blocks, scales)
    nearest_blocks, nearest_scales, _ = round_merged(base + update, blocks, scales)
    nearest = output_error(nearest_blocks, nearest_scales, base, update, unseen)
    assert nearest < 0.97
    assert output_error(*got, base, update, unseen) < nearest + 0.01
    # By rows, since neither is the best for all of them.
    assert 0.05 < (got[0] == nearest_blocks).flatten(1).all(1).float().mean() < 1


def test_rows_do_not_depend_on_the_rows_beside_them():
    base, update, blocks, scales, seen, _ = problem(0.02, correlated=True, aligned=True)
    rounding = rounding_of(seen, base, update, blocks, scales)
    whole = rounding.round(base + update, blocks, scales)[0]
    part = rounding.round((base + update)[10:20], blocks[10:20], scales[10:20])[0]
    # Products of other shapes may differ in the last bit, and a tie may then fall to the other side.
    assert (part != whole[10:20]).float().mean() < 0.01


def test_inputs_of_zeros_and_too_few_inputs():
    base, update, blocks, scales, *_ = problem(0.05, correlated=False, aligned=False)
    got_blocks, _ = rounding_of(torch.zeros(MIN_INPUTS, K), base, update, blocks, scales).round(
        base + update, blocks, scales
    )
    assert torch.equal(got_blocks, blocks)
    with pytest.raises(ValueError, match="too few"):
        rounding_of(torch.zeros(MIN_FITTED - 1, K), base, update, blocks, scales)


def test_nearest_element_is_the_nearest_of_all():
    values = torch.linspace(-8, 8, 4001)
    elements = torch.tensor(reference.ELEMENTS)
    distance = (values[:, None] - elements).abs()
    assert torch.equal((values - reference.nearest_element(values)).abs(), distance.min(1).values)


@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize("columns", [1, 31, 128])
def test_the_compiled_sweep_is_the_reference(isa, rows, columns):
    generator = torch.Generator().manual_seed(rows * columns)
    # Columns of larger matrices, as callers have them.
    wanted = torch.randn(rows, columns + 9, generator=generator)[:, 4 : 4 + columns]
    target = torch.randn(rows, columns + 3, generator=generator)[:, 1 : 1 + columns]
    steps = 2.0 ** torch.randint(-3, 1, (rows, columns + 5), generator=generator)[:, 2 : 2 + columns]
    spread = torch.randn(columns, columns, generator=generator) * 0.05
    kept = wanted.clone()
    for got, expected in zip(
        cpu_rounding.round_columns(wanted, target, steps, spread),
        reference.round_columns(wanted, target, steps, spread),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)
    assert torch.equal(wanted, kept)


def descent(rows, columns, seed=0):
    """Numbers of the grid that are not the best ones, what is wanted, and the other operands of a descent."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    moment = inputs.T @ inputs / inputs.square().mean() / len(inputs) + 0.1 * torch.eye(columns)
    # Columns of larger matrices, as callers may have them.
    steps = 2.0 ** torch.randint(-3, 1, (rows, columns + 5), generator=generator)[:, 2 : 2 + columns]
    target = torch.randn(rows, columns, generator=generator)
    rounded = torch.zeros(rows, columns + 3)[:, 1 : 1 + columns].copy_(
        reference.nearest_element(target / steps) * steps
    )
    return target, rounded, (rounded - target) @ moment, steps, moment


@pytest.mark.parametrize("rows", [1, 7, 140])
@pytest.mark.parametrize("columns", [1, 31, 200])
@pytest.mark.parametrize("passes", [1, 50])
def test_the_compiled_descent_is_the_reference(isa, rows, columns, passes):
    target, rounded, gradient, steps, moment = descent(rows, columns)
    before = ((rounded - target) @ moment * (rounded - target)).sum(1)
    expected, _ = reference.descend_(rounded.clone(), gradient.clone(), steps, moment, passes)
    got, got_gradient = cpu_rounding.descend_(rounded, gradient, steps, moment, passes)
    assert got is rounded and got_gradient is gradient
    # fp32 decides a tie the other way now and then, and what follows in that row with it.
    assert (got != expected).float().mean() < 0.002
    torch.testing.assert_close(gradient, (rounded - target) @ moment, rtol=1e-4, atol=1e-4)
    assert torch.equal(reference.nearest_element(rounded / steps) * steps, rounded)
    after = ((rounded - target) @ moment * (rounded - target)).sum(1)
    assert (after <= before * (1 + 1e-5) + 1e-6).all()
    if passes == 50 and columns > 1:
        assert after.sum() < 0.7 * before.sum()
        # Nothing is left to gain, so another descent changes nothing.
        settled = rounded.clone()
        cpu_rounding.descend_(rounded, gradient, steps, moment, 1)
        assert torch.equal(rounded, settled)


def test_a_descent_does_not_depend_on_the_number_of_threads(isa):
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        _, rounded, gradient, steps, moment = descent(150, 96)
        results.append(cpu_rounding.descend_(rounded, gradient, steps, moment, 9))
    torch.set_num_threads(before)
    for rounded, gradient in results[1:]:
        assert torch.equal(rounded, results[0][0]) and torch.equal(gradient, results[0][1])


def rounded_one_column_at_a_time(target, steps, moment):
    """The methods as they are written down, in fp64: GPTQ with the inverse of H, then coordinate descent."""
    diagonal = moment.double().diagonal()
    H = moment.double() + torch.diag(0.1 * diagonal + LEAST_DAMPING * diagonal.mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    target, steps = target.double(), steps.double()
    remaining, rounded = target.clone(), torch.empty_like(target)
    for k in range(K):
        rounded[:, k] = reference.nearest_element(remaining[:, k] / steps[:, k]) * steps[:, k]
        remaining -= torch.outer((remaining[:, k] - rounded[:, k]) / upper[k, k], upper[k])
    for _ in range(MAX_PASSES):
        for k in range(K):
            best = rounded[:, k] - (rounded - target) @ H[k] / H[k, k]
            rounded[:, k] = reference.nearest_element(best / steps[:, k]) * steps[:, k]
    return rounded


@pytest.mark.parametrize("num_inputs", [100, 2048])
def test_the_sweeps_are_gptq_and_coordinate_descent(num_inputs):
    base, update, _, scales, seen, unseen = problem(0.02, correlated=True, aligned=True, num_inputs=num_inputs)
    steps = reference.scale_values(scales, torch.float32).repeat_interleave(32, 1)
    target, moment = base + update, seen.T @ seen / num_inputs
    got, cost = Sweeps(moment, 0.1).round(target, steps)
    expected = rounded_one_column_at_a_time(target, steps, moment).float()
    errors = [float(((found - target) @ unseen.T).norm()) for found in (got, expected)]
    # fp32 decides some ties the other way, and what follows in that row with them.
    assert (got != expected).float().mean() < 0.01
    assert errors[0] == pytest.approx(errors[1], rel=0.01)
    H = moment + torch.diag(0.1 * moment.diagonal() + LEAST_DAMPING * moment.diagonal().mean())
    torch.testing.assert_close(cost, ((got - target) @ H * (got - target)).sum(1), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("exponent", "expected"), [(0.5, 0.3), (3.0, 0.01)])
def test_the_damping_fits_the_inputs(exponent, expected):
    base, update, blocks, scales, seen, unseen = problem(0.05, correlated=exponent, aligned=True, num_inputs=600)
    assert rounding_of(seen, base, update, blocks, scales).sweeps.damping == expected
    steps = reference.scale_values(scales, torch.float32).repeat_interleave(32, 1)
    moment, target = seen.T @ seen / 600, base + update
    errors = {d: ((Sweeps(moment, d).round(target, steps)[0] - target) @ unseen.T).norm() for d in DAMPINGS}
    assert min(errors, key=errors.get) == expected


def test_trial_rows_are_spread_over_all():
    assert trial_rows(3).tolist() == [0, 1, 2]
    rows = trial_rows(5760)
    assert len(set(rows.tolist())) == 128 and rows[0] == 0 and rows[-1] == 5759
