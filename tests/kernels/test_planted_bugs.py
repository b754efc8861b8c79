"""Bugs planted in a kernel's source must fail the budgets, in every dtype: else the suite would not see real ones."""

import importlib
import inspect

import pytest
import torch

from ditfast.kernels import OPS, _activations, _gemm, _heads, _norm, _rows, parity
from ditfast.kernels.qk_norm_rope import head, width

# op -> (kernel, what is wrong, the right text, the wrong one, and the case that shows it where the default ones do not)
BUGS = {
    "adaln_modulate": (
        ("norm_fwd", "forgotten mean", "x = x - mean[:, None]", "x = x - 0.0 * mean[:, None]"),
        ("norm_fwd", "eps 1e-2", "square / D + eps", "square / D + 1e-2"),
        ("norm_fwd", "sample 0 for all", "shift_ptr, sample * stride_shift", "shift_ptr, 0 * stride_shift"),
        ("norm_fwd", "sample by row", "(pid // chunks)", "(pid // chunks // (chunks * ROWS // T + 1))"),
        ("norm_fwd", "unwritten tail", "y, mask=tail_live", "y, mask=tail_live & (tail_cols < D - 1)[None, :]"),
        ("norm_fwd", "unwritten last row", " y, mask=live[:, None]", " y, mask=(row < T - 1)[:, None]"),
        ("norm_fwd", "eps outside the root", "tl.sqrt(square / D + eps)", "(tl.sqrt(square / D) + eps)", "rms_weight"),
        ("norm_fwd", "mean subtracted in rms", "square = tl.sum(x * x, 1)",
         "x -= (total / D)[:, None]; square = tl.sum(x * x, 1)", "rms_weight", "rms", "rms_mixed_strided"),
        ("factor", "scale x 0.99", "inside, 0.0) + 1.0", "inside, 0.0) * 0.99 + 1.0"),
        ("factor", "forgotten weight", " * _vector(weight_ptr, 0, cols, inside, 1.0)", "", "rms_weight", "weight",
         "rms_no_modulation"),
        ("norm_bwd", "scale of sample 0", "= _factor(scale_ptr, sample *", "= _factor(scale_ptr, 0 *"),
        ("norm_bwd", "forgotten mean of g", " g = g - g_mean", " g = g"),
        ("norm_bwd", "forgotten mean of g n", "(g - n * gn_mean)", "g"),
        ("norm_bwd", "mean of g in rms", "(g - n * gn_mean)", "(g - g_mean - n * gn_mean)", "rms_weight", "rms"),
        ("norm_bwd", "gradient of sample 0", "dy_ptr + sample * stride_dyb", "dy_ptr + 0 * stride_dyb"),
        ("normalized", "mean ignored in n", "n - mean[:, None]", "n"),
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
        ("stream", "gate x 0.99", "branch * gate[None, :]", "branch * 0.99 * gate[None, :]"),
        ("stream", "norm of x alone", "return x_new.to(tl.float32)", "return x"),
        ("norm_fwd", "branch of sample 0", "sample * stride_branch_b", "0 * stride_branch_b"),
        ("norm_fwd", "forgotten mean", "x = x - mean[:, None]", "x = x - 0.0 * mean[:, None]"),
        ("norm_fwd", "forgotten scale", "rstd[:, None] * factor[None, :]", "rstd[:, None]"),
        ("norm_bwd", "forgotten mean of g n", "(g - n * gn_mean)", "g"),
        ("norm_bwd", "dx_new of sample 0", "sample * stride_dx_new_b", "0 * stride_dx_new_b"),
        ("norm_bwd", "unwritten tail of dgate", "tail_dgate, mask=tail_in", "tail_dgate, mask=tail_cols < D - 1"),
        ("store_gradients", "forgotten residual gradient", "dx += tl.load", "dx += 0.0 * tl.load"),
        ("store_gradients", "dbranch without gate", "dx * gate[None, :]", "dx"),
        ("store_gradients", "dgate of the gated gradient", "branch * dx, 0", "branch * dx * gate[None, :], 0"),
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
    "q_sample": (
        ("fwd", "a of sample 0", "a_ptr + sample * stride_a", "a_ptr + 0 * stride_a", "odd", "mixed"),
        ("fwd", "noise x 0.99", "b * noise", "0.99 * b * noise", "odd", "mixed"),
        ("fwd", "x_0 of sample 0", "sample * stride_x_0", "0 * stride_x_0", "odd", "strided"),
        ("fwd", "unwritten tail", "n < N", "n < N - 1", "odd", "mixed"),
        ("bwd", "a and b swapped", "b * dx_t, mask", "a * dx_t, mask", "odd", "mixed"),
        ("bwd", "unwritten tail", "n < N", "n < N - 1", "odd", "mixed"),
    ),
    "diffusion_loss": (
        ("fwd", "mean over a tile", "tl.float64), 0) / N).to", "tl.float64), 0) / BLOCK).to", "odd", "mixed"),
        ("fwd", "last element dropped", "live = n < N", "live = n < N - 1", "odd", "mixed"),
        ("fwd", "KL in the first step", "if first != 0.0", "if first > 2.0", "odd", "mixed"),
        ("fwd", "nats for bits", "1.4426950408889634", "1.0", "odd", "mixed"),
        ("fwd", "forgotten weight", "* weight", "* 1.0", "odd"),
        ("fwd", "gap x 0.99", "gap * e", "0.99 * gap * e", "odd", "mixed"),
        ("fwd", "half of sample 0", "tl.load(row + 3)", "tl.load(bound_ptr + 3)", "odd", "mixed"),
        ("fwd", "v of the prediction", "tl.load(output + N,", "tl.load(output,", "odd", "mixed"),
        ("fwd", "KL without its -1", "- 1.0 - ratio", "- ratio", "odd", "mixed"),
        ("bwd", "dmse of sample 0", "sample * stride_dmse", "0 * stride_dmse", "odd", "mixed"),
        ("bwd", "mean not detached", "mse_scale * dmse * e,", "(mse_scale * dmse - vb_scale * dvb) * e,",
         "odd", "mixed"),
        ("bwd", "sign of the likelihood", "slope = -slope", "slope = slope", "odd", "mixed"),
        ("bwd", "forgotten half", "dvb * half * slope", "dvb * slope", "odd", "mixed"),
        ("bwd", "x_0 not read in the first step", "first = tl.load(row + 4).to(tl.float32)",
         "first = tl.load(row + 4).to(tl.float32) * (a != 0.0)", "odd", "mixed"),
        ("sum_partials", "last chunk dropped", "(chunk < chunks)", "(chunk < chunks - 1)", "xl"),
        ("bwd", "unwritten tail", "n < N", "n < N - 1", "odd", "mixed"),
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
        ("norm_pairs_backward", "forgotten mean of g", "(da - g - a * gn)", "(da - a * gn)", "odd", "width"),
        ("norm_pairs_backward", "forgotten mean of g n", "(db - g - b * gn)", "(db - g)", "mixed", "width"),
        ("bwd", "dweight after the weight", "tl.sum(da * a, 0)", "tl.sum(da * weight_a * a, 0)", "odd"),
        ("bwd", "sums of k over those of q", "section == 0, q_partial_ptr", "section < 2, q_partial_ptr", "odd"),
        ("norm_pairs", "eps forgotten", "+ eps)", ")", "strided", "width_strided"),
        ("norm_pairs", "forgotten mean", "a - mean,", "a,", "odd", "width"),
        ("width_fwd", "k over q's channels", "(N, HEADS, KV_HEADS,", "(N, HEADS, HEADS,", "width"),
        ("width_fwd", "k with q's weight", "k_weight_ptr, k_bias_ptr, cos_ptr",
         "q_weight_ptr, k_bias_ptr, cos_ptr", "width"),
        ("width_fwd", "v normed too", "(N, HEADS + KV_HEADS, KV_HEADS, KV_TILE, HALF, PAIRS, \"none\"",
         "(N, HEADS + KV_HEADS, KV_HEADS, KV_TILE, HALF, PAIRS, NORM", "width"),
        ("width_bwd", "sums of k over those of q", "dx_ptr, k_partial_ptr", "dx_ptr, q_partial_ptr", "width"),
        ("forward_heads", "statistics over one head", "HEADS * 2 * HALF, True)", "2 * HALF, False)", "width"),
        ("forward_heads", "sample 0 for all", "sample * stride_xb", "0 * stride_xb", "width"),
        ("forward_heads", "angles of token 0", "cos_ptr, token, stride_cos", "cos_ptr, token, 0", "width"),
        ("forward_heads", "unwritten last token", "tl.minimum(first + ROWS, T)", "tl.minimum(first + ROWS, T - 1)",
         "width"),
        ("backward_heads", "missing gradient of the bias", "dbias_b += db", "dbias_b += 0.0 * db", "width"),
        ("backward_heads", "dweight after the weight", "dweight_a += da * a", "dweight_a += da * a * weight_a",
         "width"),
        ("backward_heads", "rotated forwards", "da * cos + db * sin, db * cos - da * sin",
         "da * cos - db * sin, da * sin + db * cos", "width"),
        ("backward_heads", "sums of the first chunk", "(chunk * (2 * HEADS) + head)", "(0 * chunk + head)", "width"),
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
        ("multiply", "K's last element dropped", "k < K - k0", "k < K - k0 - 1", "odd", "xl"),
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
BELOW_A_ROUNDING = ("exact GELU",)  # of 16 bits
SPECS = {spec.name: spec for spec in OPS}
# The jit functions of several ops, by the names that BUGS has for them.
SHARED = {
    function.removeprefix("_").removesuffix("_kernel"): (module, function)
    for module in (_rows, _norm, _gemm, _activations, _heads, head, width)
    for function, value in vars(module).items()
    if isinstance(value, type(_norm._norm_fwd_kernel)) and inspect.unwrap(value.fn).__module__ == module.__name__
}


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
            or (case.name == "width" and dtype == torch.float32)
            else [],
        )
        for name, bugs in BUGS.items()
        for which, bug, right, wrong, *only in bugs
        for case in cases_of(name, *only)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        if not (case.mixed and dtype == torch.float32) and (dtype == torch.float32 or bug not in BELOW_A_ROUNDING)
    ],
)
def test_planted_bug_is_rejected(name, which, right, wrong, case, dtype, device, generator, plant):
    spec = SPECS[name]
    own = importlib.import_module(spec.fn.__module__)
    default = (own, f"_{name}_{which}_kernel" if which else f"_{name}_kernel")
    module, function = SHARED.get(which) or SHARED.get(f"{name}_{which}", default)
    if not function.endswith("_kernel") and device == "cuda":
        pytest.skip("what calls it is compiled already")
    plant([module], function, right, wrong, users=(own, _gemm, head, width))
    verdicts = parity.check(spec, spec.make_inputs(case, dtype, device, generator), "triton", generator)
    assert not all(verdict.ok for verdict in verdicts), verdicts
