"""The adapters of other people's attention, over stand-ins that check what they are given and compute the truth."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from ditfast.kernels import BackendError, attention, attention_qkvpacked, backend_of
from ditfast.kernels.attention import dispatch, libraries
from ditfast.kernels.attention.reference import attention_ref

GPU = torch.device("cuda", 0)
SCALE = 0.3
HEADS, KV_HEADS = 6, 2


def truth(q, k, v, scale, kv_heads=KV_HEADS):
    """kv_heads: how few heads of k the library takes."""
    assert scale == SCALE
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        assert tensor.dtype == torch.bfloat16 and tensor.stride(-1) == 1, name
        assert tensor.shape[0] == 2 and tensor.shape[3] == 72, f"{name} is not (B, T, H, head_dim)"
    assert q.shape[2] == HEADS and k.shape[2] == v.shape[2] and k.shape[2] in (HEADS, kv_heads)
    assert q.shape[1] in (5, 7) and k.shape[1] == v.shape[1] == 7
    return attention_ref(q, k, v, scale)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    assert not dropout_p and causal is False
    return truth(q, k, v, softmax_scale)


def flash_attn_qkvpacked_func(qkv, dropout_p=0.0, softmax_scale=None, causal=False):
    assert not dropout_p and causal is False
    return truth(*qkv.unbind(2), softmax_scale)


def flash_attn_func_3(q, k, v, softmax_scale=None, causal=False):
    assert causal is False
    return truth(q, k, v, softmax_scale)


def flash_attn_func_4(q, k, v, softmax_scale=None, causal=False):
    assert causal is False
    return truth(q, k, v, softmax_scale), torch.zeros(2, HEADS, 5)


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
    assert attn_bias is None and not p
    return truth(query, key, value, scale, HEADS)


STAND_INS = {
    "flash-attn-2": {"flash_attn": (flash_attn_func, flash_attn_qkvpacked_func)},
    "flash-attn-3": {"flash_attn_interface": (flash_attn_func_3,)},
    "flash-attn-4": {"flash_attn": (), "flash_attn.cute": (flash_attn_func_4,)},
    "xformers": {"xformers": (), "xformers.ops": (memory_efficient_attention,)},
}


@pytest.fixture(autouse=True)
def fresh():
    """Nothing remembered of packages that other tests put in place."""
    caches = (libraries.look_for, libraries.launch_tiny)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def installed(monkeypatch):
    """installed(name, version): from now on the library is there, by its stand-in, on a Hopper GPU."""

    def put(name: str, version: str = "9.9", capability: int = 90) -> None:
        for module_name, functions in STAND_INS.get(name, {}).items():
            module = ModuleType(module_name)
            module.__spec__, module.__path__ = ModuleSpec(module_name, None), []
            for function in functions:
                setattr(module, function.__name__.removesuffix("_3").removesuffix("_4"), function)
            monkeypatch.setitem(sys.modules, module_name, module)
        monkeypatch.setattr(libraries.importlib.metadata, "version", lambda distribution: version)
        monkeypatch.setattr(libraries, "capability", lambda device: capability)
        monkeypatch.setattr(libraries, "launch_tiny", lambda *args: None)

    return put


def tensors(lengths=(5, 7, 7), kv_heads=HEADS):
    generator, sizes = torch.Generator().manual_seed(0), zip(lengths, (HEADS, kv_heads, kv_heads), strict=True)
    return [torch.randn(2, T, H, 72, generator=generator).bfloat16().requires_grad_() for T, H in sizes]


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("kv_heads", (HEADS, KV_HEADS))
def test_adapter_gives_layout_dtype_and_scale_and_returns_the_output(name, kv_heads, installed):
    installed(name)
    leaves = tensors(kv_heads=kv_heads)
    out = libraries.LIBRARIES[name].run(*leaves, SCALE)
    expected = attention_ref(*leaves, SCALE)
    assert torch.equal(out, expected)
    douts = torch.ones_like(out)
    for grad, truth in zip(
        torch.autograd.grad(out, leaves, douts), torch.autograd.grad(expected, leaves, douts), strict=True
    ):
        assert torch.equal(grad, truth)


@pytest.mark.parametrize("name", STAND_INS)
def test_packed_adapter_reads_views_of_qkv(name, installed):
    installed(name)
    qkv = torch.stack(tensors((7, 7, 7)), 2)
    out = libraries.PACKED_FUNCTIONS[name](qkv, HEADS, SCALE)
    assert torch.equal(out, attention_ref(*qkv.unbind(2), SCALE))
    q, k, v = tensors((7, 7, 7), KV_HEADS)
    out = libraries.PACKED_FUNCTIONS[name](torch.cat((q, k, v), 2), HEADS, SCALE)
    assert torch.equal(out, attention_ref(q, k, v, SCALE))


@pytest.mark.parametrize("name", ("flash-attn-2", "flash-attn-3", "flash-attn-4"))
def test_flash_attn_gets_the_few_heads_themselves(name, installed, monkeypatch):
    installed(name)
    module, given = sys.modules[libraries.LIBRARIES[name].module], []
    monkeypatch.setattr(module, "flash_attn_func", lambda *tensors, **_: given.extend(tensors))
    leaves = tensors(kv_heads=KV_HEADS)
    libraries.LIBRARIES[name].run(*leaves, SCALE)
    assert [id(tensor) for tensor in given] == [id(tensor) for tensor in leaves]


@pytest.mark.parametrize(
    ("dtype", "capability", "head_dim", "heads"),
    (
        (torch.bfloat16, 90, 72, KV_HEADS),
        (torch.float16, 80, 256, KV_HEADS),
        (torch.float16, 75, 72, HEADS),
        (torch.float32, 90, 72, HEADS),
        (torch.bfloat16, 90, 264, HEADS),
    ),
)
def test_sdpa_on_a_gpu_gets_few_heads_where_a_fused_kernel_takes_them(
    dtype, capability, head_dim, heads, installed, monkeypatch
):
    installed("cudnn", capability=capability)
    given, sdpa = [], F.scaled_dot_product_attention

    def noted(q, k, v, **options):
        given.append((k.shape[1], v.shape[1], options["enable_gqa"]))
        return sdpa(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    q, k, v = (tensor.detach().to(dtype).repeat(1, 1, 1, 4)[..., :head_dim] for tensor in tensors(kv_heads=KV_HEADS))
    out = libraries.sdpa(q, k, v, SCALE)
    assert given == [(heads, heads, heads == KV_HEADS)]
    torch.testing.assert_close(
        out.double(), attention_ref(q.double(), k.double(), v.double(), SCALE), atol=0.02, rtol=0
    )


def test_flash_attn_2_gets_the_packed_tensor_itself(installed, monkeypatch):
    installed("flash-attn-2")
    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_qkvpacked_func", lambda qkv, **_: qkv)
    qkv = torch.zeros(2, 7, 3, HEADS, 72)
    assert libraries.PACKED_FUNCTIONS["flash-attn-2"](qkv, HEADS, SCALE) is qkv


def test_cudnn_forces_its_kernel_over_heads_first(installed, monkeypatch):
    installed("cudnn")
    allowed = {}

    def fused(q, k, v, scale, enable_gqa):
        assert enable_gqa is (k.shape[1] < HEADS)
        allowed.update(
            {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in ("cudnn", "flash", "math")}
        )
        return truth(*(tensor.transpose(1, 2) for tensor in (q, k, v)), scale).transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    for kv_heads in (HEADS, KV_HEADS):
        q, k, v = tensors(kv_heads=kv_heads)
        assert torch.equal(libraries.LIBRARIES["cudnn"].run(q, k, v, SCALE), attention_ref(q, k, v, SCALE))
    assert allowed == {"cudnn": True, "flash": False, "math": False}


@pytest.mark.parametrize(
    ("name", "change", "says"),
    (
        ("flash-attn-2", {}, None),
        ("cudnn", {}, None),
        ("flash-attn-2", {"head_dim": 36}, "multiples of 8 up to 256, not 36; use backend='sdpa'"),
        ("flash-attn-4", {"head_dim": 192}, "up to 128, not 192"),
        ("flash-attn-2", {"dtype": torch.float32}, r"takes torch.bfloat16, torch.float16, not torch.float32; convert"),
        ("xformers", {"dtype": torch.float32}, None),
        ("xformers", {"dtype": torch.float64}, "not torch.float64"),
        ("flash-attn-3", {"capability": 100}, "for GPUs of sm_90 to sm_90, this one is sm_100"),
        ("flash-attn-4", {"capability": 80}, "for GPUs of sm_90 to sm_109, this one is sm_80"),
        ("flash-attn-2", {"device": torch.device("cpu")}, "needs tensors on a GPU, these are on cpu; move them"),
        ("flash-attn-2", {"version": "2.3.1"}, "flash-attn 2.3.1 is older than 2.8; pip install flash-attn"),
    ),
)
def test_what_a_library_takes_and_why_not(name, change, says, installed):
    installed(name, change.get("version", "9.9"), change.get("capability", 90))
    why = libraries.refusal(
        name, change.get("device", GPU), change.get("dtype", torch.bfloat16), change.get("head_dim", 72)
    )
    assert why is None if says is None else says in why


@pytest.mark.parametrize("name", STAND_INS)
def test_what_is_not_installed_is_refused_with_the_command(name, monkeypatch):
    monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda module: None)
    library = libraries.LIBRARIES[name]
    why = libraries.refusal(name, GPU, torch.bfloat16, 72)
    assert why.startswith(f"{library.distribution} is not installed")
    assert library.install in why and "backend='sdpa'" in why
    for op in ("attention", "attention_qkvpacked"):
        with pytest.raises(BackendError) as refused:
            backend_of(op, GPU, torch.bfloat16, name)
        assert str(refused.value) == f"{op}: backend {name!r} cannot run: {why}"


def test_a_package_whose_parent_breaks_is_refused_with_the_cause(monkeypatch):
    def broken(module):
        raise ImportError("libcudart.so.12: cannot open")

    monkeypatch.setattr(libraries.importlib.util, "find_spec", broken)
    why = libraries.refusal("flash-attn-4", GPU, torch.bfloat16, 72)
    assert "libcudart.so.12: cannot open" in why and "pip install flash-attn-4==4.0.0b36" in why


def test_a_package_that_fails_on_a_tiny_input_is_refused_with_cause_versions_and_command_once(installed, monkeypatch):
    probe, tries = libraries.launch_tiny, []
    installed("flash-attn-2", "2.8.3")

    def broken(*args, **kwargs):
        tries.append(args)
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_func", broken)
    monkeypatch.setattr(libraries, "launch_tiny", probe)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *a, device, **k: ones(*a, **k))
    for _ in range(2):
        why = libraries.refusal("flash-attn-2", GPU, torch.bfloat16, 72)
        assert "ImportError: undefined symbol: _ZN3c10" in why and "pip install flash-attn" in why
        assert f"(flash-attn 2.8.3 under PyTorch {torch.__version__}" in why
    assert len(tries) == 1 and tries[0][0].shape[-1] == 72


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "takes"),
    (
        (90, torch.bfloat16, 72, "cudnn"),
        (100, torch.float16, 128, "cudnn"),
        (90, torch.bfloat16, 36, "sdpa"),
        (90, torch.float32, 72, "sdpa"),
        (90, torch.float64, 72, "sdpa"),
        (80, torch.bfloat16, 72, "sdpa"),
    ),
)
def test_auto_on_a_gpu_follows_the_rules(capability, dtype, head_dim, takes, installed):
    installed("cudnn", capability=capability)
    assert dispatch.auto(GPU, dtype, [torch.empty(1, 1, 1, head_dim, device="meta")]) == takes


def test_auto_passes_by_what_cannot_run_and_backend_of_says_so(installed, monkeypatch):
    installed("cudnn")
    assert backend_of("attention", "cuda", torch.bfloat16) == "cudnn"
    monkeypatch.setattr(libraries, "launch_tiny", lambda *args: "RuntimeError: cuDNN is too old")
    assert backend_of("attention", "cuda", torch.bfloat16) == "sdpa"
    with pytest.raises(BackendError, match="cuDNN is too old"):
        backend_of("attention", "cuda", torch.bfloat16, "cudnn")


def test_few_heads_of_k_are_tried_on_their_own(installed, monkeypatch):
    installed("cudnn")
    monkeypatch.setattr(libraries, "launch_tiny", lambda *args: "RuntimeError: no plan" if args[-1] else None)
    q, k, v = (torch.empty(1, 7, H, 72, device="meta") for H in (HEADS, KV_HEADS, KV_HEADS))
    packed, even = (
        torch.empty(1, 7, HEADS + 2 * KV_HEADS, 72, device="meta"),
        torch.empty(1, 7, 3, HEADS, 72, device="meta"),
    )
    for inputs in ((q, k, v), (packed,)):
        assert dispatch.auto(GPU, torch.bfloat16, inputs) == "sdpa"
        why = dispatch.refusal("cudnn", GPU, torch.bfloat16, inputs)
        assert why.startswith("it failed on a tiny input with 2 heads of q to one of k: RuntimeError: no plan; ")
    for inputs in ((q, q, q), (even,)):
        assert dispatch.auto(GPU, torch.bfloat16, inputs) == "cudnn"


@pytest.mark.parametrize("grouped", (False, True))
def test_the_tiny_input_has_grouped_heads_where_they_are_asked_for(grouped, installed, monkeypatch):
    probe, given = libraries.launch_tiny, []
    installed("flash-attn-2")
    monkeypatch.setattr(
        sys.modules["flash_attn"], "flash_attn_func", lambda *x, **_: given.extend(t.shape[2] for t in x) or sum(x)
    )
    assert probe("flash-attn-2", torch.device("cpu"), torch.bfloat16, 72, grouped) is None
    assert given == [1 + grouped, 1, 1]


@pytest.mark.parametrize("device", ("cpu", "meta"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_auto_elsewhere_is_pytorch(device, dtype):
    assert backend_of("attention_qkvpacked", device, dtype) == "sdpa"


@pytest.mark.parametrize("head_dim", (24, 36, 136))
def test_triton_refuses_a_head_dim_that_it_has_no_kernel_for(head_dim):
    q = torch.zeros(1, 2, 1, head_dim)
    with pytest.raises(BackendError, match=f"multiples of 8 from 32 to 128, not {head_dim}; use backend='sdpa'"):
        attention(q, q, q, backend="triton")


@pytest.mark.parametrize(
    ("change", "says"),
    (
        ({"scale": 0.0}, "scale is 0.0, expected a positive number"),
        ({"scale": -1.0}, "scale is -1.0, expected"),
        ({"k": torch.zeros(1, 0, 1, 8), "v": torch.zeros(1, 0, 1, 8)}, "at least one key"),
        ({"v": torch.zeros(1, 2, 1, 8).half()}, "v has dtype torch.float16, expected q's, torch.float32"),
    ),
)
def test_wrong_arguments_are_named(change, says):
    inputs = dict.fromkeys("qkv", torch.zeros(1, 2, 1, 8)) | change
    with pytest.raises(ValueError, match=says):
        attention(**inputs)


def test_the_choice_and_the_adapter_compile_without_graph_breaks(installed, monkeypatch):
    """Looking for a package is nothing that dynamo could trace; the stand-in is."""
    installed("xformers")
    torch._dynamo.reset()
    monkeypatch.setattr(dispatch, "RULES", ((0, 8, ("flash-attn-3", "xformers")),))
    q, k, v = tensors()

    def chosen_and_run(q, k, v):
        name = dispatch.auto(GPU, q.dtype, [q])
        return libraries.LIBRARIES[name].run(q, k, v, SCALE), name

    out, name = torch.compile(chosen_and_run, fullgraph=True, dynamic=True, backend="eager")(q, k, v)
    assert name == "xformers" and torch.equal(out, attention_ref(q, k, v, SCALE))


@pytest.mark.parametrize("kv_heads", (HEADS, KV_HEADS))
def test_grouped_heads_are_told_under_dynamic_compile(kv_heads, installed, monkeypatch):
    installed("xformers")
    torch._dynamo.reset()
    tried = []
    monkeypatch.setattr(libraries, "launch_tiny", lambda *args: tried.append(args[-1]))

    def refusal(q, k, v):
        return q + 1, dispatch.refusal("xformers", GPU, q.dtype, [q, k, v])

    _, why = torch.compile(refusal, fullgraph=True, dynamic=True, backend="eager")(*tensors(kv_heads=kv_heads))
    assert why is None and tried == [kv_heads < HEADS]


@pytest.mark.parametrize("fn", (attention, attention_qkvpacked))
def test_sdpa_compiles_with_a_dynamic_number_of_heads(fn):
    """Of one graph after another, its numbers of heads first static, then of any."""
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for kv_heads, times in ((HEADS, 1), (HEADS, 2), (KV_HEADS, 1), (KV_HEADS, 2)):
        q, k, v = (tensor.detach().float().repeat(1, 1, times, 1) for tensor in tensors((7, 7, 7), kv_heads))
        if fn is attention:
            inputs, options = (q, k, v), {}
        elif kv_heads == HEADS:
            inputs, options = (torch.stack((q, k, v), 2),), {}
        else:
            inputs, options = (torch.cat((q, k, v), 2),), {"num_heads": q.shape[2]}
        leaves = [tensor.requires_grad_() for tensor in inputs]
        results = []
        for call in (compiled, fn):
            out = call(*leaves, backend="sdpa", **options)
            results.append((out, *torch.autograd.grad(out.sum(), leaves)))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("shape", "options"), (((2, 5, 3, 4, 32), {}), ((2, 5, 8, 32), {"num_heads": 4})))
def test_packed_sdpa_compiles_for_any_shape(shape, options):
    torch._dynamo.reset()
    compiled = torch.compile(attention_qkvpacked, fullgraph=True, dynamic=True, backend="aot_eager")
    qkv = torch.randn(shape)
    expected = attention_qkvpacked(qkv, backend="sdpa", **options)
    torch.testing.assert_close(compiled(qkv, backend="sdpa", **options), expected)
