"""Bugs planted in a kernel's source must fail the budgets, in every dtype: else the suite would not see real ones."""

import importlib
import importlib.util
import inspect

import pytest
import torch

from ditfast.kernels import OPS, _activations, _gemm, _heads, _rows, parity

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
    "qk_norm_rope": (
        ("fwd", "sign of the sine", "a * cos - b * sin", "a * cos + b * sin", "odd"),
        ("fwd", "k with q's weight", "load_parameter(k_weight_ptr", "load_parameter(q_weight_ptr", "odd"),
        ("fwd", "k without its bias", "load_parameter(k_bias_ptr", "load_parameter(None", "odd"),
        ("fwd", "angles of token 0", "cos_ptr, token, stride_cos", "cos_ptr, token, 0", "odd"),
        ("fwd", "sample 0 for all", "sample * stride_xb", "0 * stride_xb", "odd"),
        ("fwd", "the other kind of pairs", "load_pairs(x_row, live, HALF, PAIRS, INTERLEAVED)",
         "load_pairs(x_row, live, HALF, PAIRS, not INTERLEAVED)", "odd", "rope_only"),
        ("fwd", "v normed too", "if section < 2:", "if section < 3:", "odd"),
        ("fwd", "unwritten last token", "live = token < T", "live = token < T - 1", "odd"),
        ("bwd", "rotated forwards", "da * cos + db * sin, db * cos - da * sin",
         "da * cos - db * sin, da * sin + db * cos", "odd"),
        ("bwd", "forgotten mean of g", "(da - g - a * gn)", "(da - a * gn)", "odd"),
        ("bwd", "forgotten mean of g n", "(db - g - b * gn)", "(db - g)", "mixed"),
        ("bwd", "dweight after the weight", "tl.sum(da * a, 0)", "tl.sum(da * weight_a * a, 0)", "odd"),
        ("bwd", "sums of k over those of q", "row = section *", "row = 0 *", "odd"),
        ("norm_pairs", "eps forgotten", "+ eps)", ")", "strided"),
        ("norm_pairs", "forgotten mean", "a - mean,", "a,", "odd"),
    ),
    "gelu_mlp": (
        ("fwd", "missing bias", "+ bias[None, :]", "+ 0.0 * bias[None, :]", "odd"),
        ("fwd", "exact GELU", "gelu(pre), mask", "pre * 0.5 * (1.0 + tl.erf(pre * 0.7071067811865476)), mask", "odd"),
        ("fwd", "unwritten last column", "gelu(pre), mask=live", "gelu(pre), mask=live & (n < N - 1)[None, :]", "odd"),
        ("fwd", "halves swapped", "left if half == 0", "left if half == 1", "odd"),
        ("bwd", "gradient without the slope", "else right) * slope", "else right)", "odd"),
        ("gelu_and_slope", "slope of another cube", "0.134145", "0.044715", "odd"),
        ("bwd", "db1 of the tile above", "(m0 // BLOCK_M)", "(m0 // BLOCK_M // 2)", "tiles"),
        ("bwd", "unwritten last row", "dpre, mask=live", "dpre, mask=live & (m < M - 1)[:, None]", "odd"),
        ("gemm", "missing bias", "mask=n < N, other=0.0).to(tl.float32)[None, :]",
         "mask=n < N, other=0.0).to(tl.float32)[None, :] * 0.0", "odd"),
        ("multiply", "K's last element dropped", "k < K - k0", "k < K - k0 - 1", "odd"),
        ("multiply", "first part of K forgotten", "b_tile, acc,", "b_tile, acc * 0.0,", "tiles"),
        ("tile_at", "first row of a group only", "(first + within % size)", "first", "tiles"),
        ("column_sums", "last row dropped", "(row < T)", "(row < T - 1)", "odd"),
        ("sum_partials", "last chunk dropped", "(chunk < chunks)", "(chunk < chunks - 1)", "odd"),
    ),
    "gelu_backward": (
        ("", "forgotten slope", "* slope", "* 1.0"),
        ("", "act of the slope", "act_ptr + at, act", "act_ptr + at, slope"),
        ("", "dbias before the slope", "dbias += tl.sum(grad, 0)",
         "dbias += tl.sum(tl.load(grad_ptr + at, mask=live, other=0.0).to(tl.float32), 0)"),
        ("", "unwritten last row", "grad, mask=live", "grad, mask=live & (row < T - 1)[:, None]"),
        ("sum_partials", "last chunk dropped", "(chunk < chunks)", "(chunk < chunks - 1)"),
    ),
    "swiglu_mlp": (
        ("fwd", "missing bias of the gate", "gate += bias1", "gate += 0.0 * bias1", "odd"),
        ("fwd", "gate and up swapped", "gate * tl.sigmoid(gate) * up", "up * tl.sigmoid(up) * gate", "odd"),
        ("fwd", "gate without its sigmoid", "gate * tl.sigmoid(gate) * up", "gate * up", "odd"),
        ("fwd", "both of w1", "(ups, a, b3,", "(ups, a, b1,", "odd"),
        ("bwd", "dgate without the slope", "dact * up * slope", "dact * up", "odd"),
        ("bwd", "dup of the gate", "dact * act", "dact * slope", "odd"),
        ("bwd", "act without up", "act * up, mask", "act, mask", "odd"),
        ("bwd", "db3 of dgate", "tl.sum(dup, 0)", "tl.sum(dgate, 0)", "odd"),
        ("gemm", "dh of w1 alone", "a2 is not None", "M < 0", "odd"),
        ("silu_and_slope", "slope without its second term", "s + x * slope", "s", "odd"),
    ),
    "swiglu_backward": (
        ("", "dgate without up", "grad * up * slope", "grad * slope"),
        ("", "act left as the gradient", "grad_ptr + at, act * up", "grad_ptr + at, grad"),
        ("", "sums swapped", "dbias1 += tl.sum(dgate, 0)", "dbias1 += tl.sum(dup, 0)"),
        ("", "unwritten last row", "dup, mask=live", "dup, mask=live & (row < T - 1)[:, None]"),
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
}  # fmt: skip
BELOW_A_ROUNDING = ("exact GELU",)  # of 16 bits
SPECS = {spec.name: spec for spec in OPS}
SHARED = {"sum_partials": _rows, "column_sums": _rows, "gemm": _gemm}
# Inlined into kernels, which a GPU has compiled by then.
INLINED = {
    **{"multiply": _gemm, "tile_at": _gemm, "gelu_and_slope": _activations, "silu_and_slope": _activations},
    "norm_pairs": _heads,
}


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
    return tuple(by_name[case] for case in only or ("odd", "mixed", "xl") if case in by_name)


@pytest.mark.parametrize(
    ("name", "which", "right", "wrong", "case", "dtype"),
    [
        pytest.param(
            *(name, which, right, wrong, case, dtype),
            id=f"{name}_{which}-{bug}-{case.name}-{str(dtype).removeprefix('torch.')}",
            marks=[pytest.mark.full]
            if (case.name == "xl" and (which, dtype) != ("fwd", torch.bfloat16))
            or (case.name == "tiles" and dtype != torch.bfloat16)
            or (name in ("gelu_mlp", "swiglu_mlp", "qk_norm_rope") and dtype == torch.float16)
            else [],
        )
        for name, bugs in BUGS.items()
        for which, bug, right, wrong, *only in bugs
        for case in cases_of(name, *only)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        if not (case.mixed and dtype == torch.float32) and (dtype == torch.float32 or bug not in BELOW_A_ROUNDING)
    ],
)
def test_planted_bug_is_rejected(name, which, right, wrong, case, dtype, device, generator, monkeypatch, tmp_path):
    spec = SPECS[name]
    own = importlib.import_module(spec.fn.__module__)
    if which in INLINED and device == "cuda":
        pytest.skip("what calls it is compiled already")
    module = (SHARED | INLINED).get(which, own)
    whole = which if which in SHARED else "_".join(filter(None, (name, which)))
    kernel_name = which if which in INLINED else f"_{whole}_kernel"
    kernel = mutated(getattr(module, kernel_name), right, wrong, tmp_path / "mutant.py")
    for user in (module, own, _gemm):
        monkeypatch.setattr(user, kernel_name, kernel, raising=False)
    verdicts = parity.check(spec, spec.make_inputs(case, dtype, device, generator), "triton", generator)
    assert not all(verdict.ok for verdict in verdicts), verdicts
