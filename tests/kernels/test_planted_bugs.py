"""Bugs planted in a kernel's source must fail the budgets, in every dtype: else the suite would not see real ones."""

import importlib
import importlib.util
import inspect

import pytest
import torch

from ditfast.kernels import OPS, _rows, parity

# op -> (kernel, what is wrong, the right text, the wrong one, and the case that shows it where the default ones do not)
BUGS = {
    "adaln_modulate": (
        ("fwd", "forgotten mean", "x = x - mean[:, None]", "x = x - 0.0 * mean[:, None]"),
        ("fwd", "eps 1e-2", "square / D + eps", "square / D + 1e-2"),
        ("fwd", "scale x 0.99", "+ cols).to(tl.float32) + 1.0", "+ cols).to(tl.float32) * 0.99 + 1.0"),
        ("fwd", "sample 0 for all", "shift_ptr + sample * stride_shift", "shift_ptr + 0 * stride_shift"),
        ("fwd", "sample by row", "sample = (pid // chunks)", "sample = (pid // chunks // (chunks * ROWS // T + 1))"),
        ("fwd", "unwritten tail", "tail_y, mask=tail_live", "tail_y, mask=tail_live & (tail_cols < D - 1)[None, :]"),
        ("fwd", "unwritten last row", "mask=live[:, None])\n        if TAIL:\n            tail_y",
         "mask=(row < T - 1)[:, None])\n        if TAIL:\n            tail_y"),
        ("bwd", "scale x 0.99", "+ cols).to(tl.float32) + 1.0", "+ cols).to(tl.float32) * 0.99 + 1.0"),
        ("bwd", "forgotten mean of g", "(g - g_mean - n", "(g - n"),
        ("bwd", "forgotten mean of g n", "g_mean - n * gn_mean) * rstd, mask=live", "g_mean) * rstd, mask=live"),
        ("bwd", "mean ignored in n", "n = (n - mean) * rstd", "n = n * rstd"),
        ("bwd", "gradient of sample 0", "dy_ptr + sample * stride_dyb", "dy_ptr + 0 * stride_dyb"),
        ("sum_partials", "last chunk dropped", "(chunk < chunks)", "(chunk < chunks - 1)"),
        ("sum_partials", "unwritten tail", "sum1, mask=inside", "sum1, mask=cols < D - 1"),
    ),
    "gate_residual": (
        ("fwd", "gate x 0.99", "branch * gate[None, :]", "branch * 0.99 * gate[None, :]"),
        ("fwd", "forgotten gate", "branch * gate[None, :]", "branch"),
        ("fwd", "gate of sample 0", "gate_ptr + sample * stride_gate", "gate_ptr + 0 * stride_gate"),
        ("fwd", "sample by row", "(chunk // chunks)", "(chunk // chunks // (chunks * ROWS // T + 1))"),
        ("fwd", "unwritten tail", "x + branch, mask=live", "x + branch, mask=live & (cols < D - 1)[None, :]"),
        ("bwd", "gate x 0.99", "dbranch * gate[None, :]", "dbranch * 0.99 * gate[None, :]"),
        ("bwd", "dgate of the gated gradient", "dbranch * branch, 0", "dbranch * gate[None, :] * branch, 0"),
        ("bwd", "branch of sample 0", "branch_ptr + sample * stride_branch_b", "branch_ptr + 0 * stride_branch_b"),
        ("bwd", "unwritten last row", "dbranch, mask=live", "dbranch, mask=live & (row < T - 1)[:, None]"),
        ("sum_partials", "last chunk dropped", "(chunk < chunks)", "(chunk < chunks - 1)"),
    ),
    "gate_residual_adaln_modulate": (
        ("fwd", "gate x 0.99", "branch * gate[None, :]", "branch * 0.99 * gate[None, :]"),
        ("fwd", "forgotten mean", "x = x - mean[:, None]", "x = x - 0.0 * mean[:, None]"),
        ("fwd", "norm of x alone", "x = x_new.to(tl.float32)", "x = x"),
        ("fwd", "forgotten scale", "rstd[:, None] * scale[None, :]", "rstd[:, None]"),
        ("fwd", "sample by row", "sample = (pid // chunks)", "sample = (pid // chunks // (chunks * ROWS // T + 1))"),
        ("fwd", "unwritten tail", "tail_y, mask=tail_live", "tail_y, mask=tail_live & (tail_cols < D - 1)[None, :]"),
        ("bwd", "forgotten residual gradient", "dx += (g - g_mean", "dx = (g - g_mean"),
        ("bwd", "forgotten mean of g n", "(g - g_mean - n * gn_mean)", "(g - g_mean)"),
        ("bwd", "dbranch without gate", "dx = dx * gate[None, :]", "dx = dx"),
        ("bwd", "dgate without the norm", "tl.sum(branch * dx, 0)", "tl.sum(branch * (dx - g * rstd), 0)"),
        ("bwd", "dx_new of sample 0", "dx_new_ptr + sample * stride_dx_new_b", "dx_new_ptr + 0 * stride_dx_new_b"),
        ("bwd", "unwritten tail of dgate", "tail_dgate, mask=tail_in", "tail_dgate, mask=tail_cols < D - 1"),
        ("sum_partials", "last chunk dropped", "(chunk < chunks)", "(chunk < chunks - 1)"),
        ("sum_partials", "unwritten tail", "sum2, mask=inside", "sum2, mask=cols < D - 1"),
    ),
    "adamw_ema": (
        ("step", "forgotten correction of m", "(1.0 - tl.exp(t * log_beta1))", "1.0"),
        ("step", "forgotten correction of v", "tl.sqrt(1.0 - tl.exp(t * log_beta2))", "1.0 + 0.0 * t"),
        ("step", "counted on found-inf", "tl.where(tl.load(found_inf_ptr) == 0.0, 1.0, 0.0)", "1.0", "found_inf"),
        ("update", "written on found-inf", "tl.load(found_inf_ptr) != 0.0", "n < 0", "found_inf"),
        ("update", "eps inside the root", "tl.sqrt(v) / root + eps", "tl.sqrt(v / (root * root) + eps)"),
        ("update", "decay coupled", "g = g * factor",
         "g = g * factor + tl.load(decays_ptr + i) * tl.load(weight_at, mask=live)"),
        ("update", "decay of the first tensor", "tl.load(decays_ptr + i)", "tl.load(decays_ptr)"),
        ("update", "forgotten factor", "g = g * factor", "g = g"),
        ("update", "EMA of the old weight", "(w - ema)", "(w + step_size * m / (tl.sqrt(v) / root + eps) - ema)"),
        ("update", "unwritten tail", "weight_at, w, mask=live", "weight_at, w, mask=at < numel - 1"),
    ),
    "timestep_embedding": (
        ("fwd", "unwritten zero column", "DIM > 2 * HALF", "DIM > 2 * HALF + 1", "odd"),
        ("fwd", "sin twice", "tl.store(e, cos.to", "tl.store(e, sin.to", "floats", "integers"),
        ("fwd", "unwritten last row", "live = row < B", "live = row < B - 1", "floats", "integers"),
        ("bwd", "sign of the sine", "dsin * cos - dcos", "dsin * cos + dcos", "floats", "floats_strided"),
        ("bwd", "frequency forgotten", "* freq[None, :]", "* 1.0", "floats", "floats_strided"),
    ),
    "patchify": (
        ("fwd", "pos_embed of token 0", "[:, None] * stride_pos", "[:, None] * 0", "odd", "mixed"),
        ("fwd", "bias forgotten", "+ bias[None, :]", "+ 0.0 * bias[None, :]", "odd", "mixed"),
        ("fwd", "columns and rows of a patch swapped", "(kk // P) % P * stride_xh + kk % P * stride_xw",
         "(kk // P) % P * stride_xw + kk % P * stride_xh", "odd", "tiles"),
        ("fwd", "sample 0 for all", "tl.cast(sample, tl.int64) * stride_xb", "0 * stride_xb", "odd", "tiles"),
        ("fwd", "last input of a patch dropped", "(k < K)[:, None]", "(k < K - 1)[:, None]", "odd", "mixed"),
        ("fwd", "first part of a wide patch dropped", "(patch, weight, y,", "(patch, weight, 0.0 * y,", "tiles"),
        ("fwd", "unwritten last column", "col < D", "col < D - 1", "odd", "tiles"),
        ("fwd", "unwritten last token", "token < T", "token < T - 1", "odd", "many_tokens"),
    ),
    "unpatchify": (
        ("fwd", "order of the patchify", "((p * P + x % P) * C + c)", "((c * P + p) * P + x % P)", "odd", "strided"),
        ("fwd", "sample 0 for all", "sample * stride_yb", "0 * stride_yb", "odd", "strided"),
        ("fwd", "unwritten last element", "element < C * P * W", "element < C * P * W - 1", "odd", "strided"),
        ("bwd", "order of the patchify", "c = element % C", "c = element // (P * P) % C", "odd", "strided"),
        ("bwd", "rows of the first patch", "(i * P + ", "(0 * P + ", "odd"),
    ),
    "guided_step": (
        ("fwd", "wrong half", "scale * (pred - uncond)", "scale * (uncond - pred)"),
        ("fwd", "conditional as the base", "uncond + scale * (pred", "pred + scale * (pred"),
        ("fwd", "scale x 0.99", "scale * (pred - uncond)", "scale * 0.99 * (pred - uncond)"),
        ("fwd", "one channel too few guided", "channel < guided", "channel < guided - 1"),
        ("fwd", "all channels guided", "channel < guided", "channel <= guided"),
        ("fwd", "coefficients of sample 0", "coefficients_ptr + sample * stride_b", "coefficients_ptr + 0 * stride_b"),
        ("fwd", "predictions of sample 0", "cond_ptr + sample * stride_cond_b", "cond_ptr + 0 * stride_cond_b"),
        ("fwd", "noise of channel 0", "channel * stride_noise_c", "0 * stride_noise_c"),
        ("fwd", "noise whatever its std", "std = tl.load(coefficient + 5 * stride_n).to(tl.float32)", "std = 1.0"),
        ("fwd", "v of the prediction", "(channel + C) * stride_cond_c", "channel * stride_cond_c"),
        ("fwd", "variance not learned", "if LEARNED:", "if False:"),
        ("fwd", "x_next without the prediction", "+ next_pred * pred", ""),
        ("fwd", "unwritten tail", "x_next, mask=live", "x_next, mask=at < positions - 1"),
        ("fwd", "forgotten clamp", "if CLIP:", "if False:", "fixed", "mixed"),
    ),
}  # fmt: skip
SPECS = {spec.name: spec for spec in OPS}


def mutated(kernel, right: str, wrong: str, path):
    """The kernel compiled from its source with `right` replaced by `wrong`."""
    source = inspect.getsource(inspect.unwrap(kernel.fn))
    assert right in source, f"{right!r} is no longer in {kernel.__name__}: bring the planted bug up to date"
    home = importlib.import_module(inspect.unwrap(kernel.fn).__module__)
    helpers = [name for name, value in vars(home).items() if isinstance(value, type(kernel)) and value is not kernel]
    imports = ["from ditfast.kernels._triton import jit, tl", *(f"from {home.__name__} import {h}" for h in helpers)]
    path.write_text("\n".join([*imports, "", "", source.replace(right, wrong)]))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, kernel.__name__)


def cases_of(name: str, *only: str):
    """The widest of the default cases too, where a maximum alone is blind; for breadth, since it is slow."""
    by_name = {case.name: case for case in SPECS[name].cases}
    return tuple(by_name[case] for case in only or ("odd", "mixed", "xl"))


@pytest.mark.parametrize(
    ("name", "which", "right", "wrong", "case", "dtype"),
    [
        pytest.param(
            *(name, which, right, wrong, case, dtype),
            id=f"{name}_{which}-{bug}-{case.name}-{str(dtype).removeprefix('torch.')}",
            marks=[pytest.mark.full] if case.name == "xl" and (which, dtype) != ("fwd", torch.bfloat16) else [],
        )
        for name, bugs in BUGS.items()
        for which, bug, right, wrong, *only in bugs
        for case in cases_of(name, *only)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        if not (case.mixed and dtype == torch.float32)
    ],
)
def test_planted_bug_is_rejected(name, which, right, wrong, case, dtype, device, generator, monkeypatch, tmp_path):
    spec = SPECS[name]
    shared = which == "sum_partials"
    module = _rows if shared else importlib.import_module(spec.fn.__module__)
    kernel_name = f"_{which}_kernel" if shared else f"_{name}_{which}_kernel"
    kernel = mutated(getattr(module, kernel_name), right, wrong, tmp_path / "mutant.py")
    monkeypatch.setattr(module, kernel_name, kernel)
    verdicts = parity.check(spec, spec.make_inputs(case, dtype, device, generator), "triton", generator)
    assert not all(verdict.ok for verdict in verdicts), verdicts
