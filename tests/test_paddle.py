"""PaddleMIX's DiT_Llama parameters, as arrays, to LargeDiT's and back."""

import numpy as np
import pytest
import torch

from ditfast import reference
from ditfast.convert import ConvertError
from ditfast.layers import LargeDiT
from ditfast.paddle import from_dit_llama, to_dit_llama

SMALL = {"input_size": 8, "hidden_size": 48, "depth": 2, "num_heads": 4, "num_kv_heads": 2, "multiple_of": 16}


def large(**options) -> LargeDiT:
    """A model none of whose weights is zero."""
    torch.manual_seed(0)
    model = LargeDiT(**SMALL | {"num_classes": 7} | options).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    return to_dit_llama(large())


def test_names_and_layouts_are_paddles(arrays):
    outer = {
        "x_embedder.weight": (16, 48), "x_embedder.bias": (48,),
        "t_embedder.mlp.0.weight": (256, 48), "t_embedder.mlp.0.bias": (48,),
        "t_embedder.mlp.2.weight": (48, 48), "t_embedder.mlp.2.bias": (48,),
        "y_embedder.embedding_table.weight": (8, 48),
        "final_layer.linear.weight": (48, 32), "final_layer.linear.bias": (32,),
        "final_layer.adaLN_modulation.1.weight": (48, 96), "final_layer.adaLN_modulation.1.bias": (96,),
    }  # fmt: skip
    layer = {
        "attention.wq.weight": (48, 48), "attention.wk.weight": (48, 24), "attention.wv.weight": (48, 24),
        "attention.wo.weight": (48, 48),
        "attention.q_norm.weight": (48,), "attention.q_norm.bias": (48,),
        "attention.k_norm.weight": (24,), "attention.k_norm.bias": (24,),
        "feed_forward.w1.weight": (48, 128), "feed_forward.w2.weight": (128, 48), "feed_forward.w3.weight": (48, 128),
        "attention_norm.weight": (48,), "ffn_norm.weight": (48,),
        "adaLN_modulation.1.weight": (48, 288), "adaLN_modulation.1.bias": (288,),
    }  # fmt: skip
    expected = outer | {f"layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    assert {name: value.shape for name, value in arrays.items()} == expected


def test_there_and_back_is_the_same(arrays):
    model = large()
    with torch.device("meta"):
        empty = LargeDiT(**SMALL, num_classes=7)
    back = from_dit_llama(arrays, empty)
    assert list(back) == list(model.state_dict())
    assert all(torch.equal(value, back[name]) for name, value in model.state_dict().items())


def test_converted_parameters_compute_what_the_oracle_does(arrays):
    oracle = reference.LargeDiT(**SMALL, num_classes=7).double().eval()
    turned = {n: torch.as_tensor(v.T if v.ndim == 2 and "table" not in n else v) for n, v in arrays.items()}
    oracle.load_state_dict(turned)
    model = LargeDiT(**SMALL, num_classes=7).double().eval()
    model.load_state_dict(from_dit_llama(arrays, model))
    x, t, y = torch.randn(3, 4, 8, 8).double(), torch.tensor([0, 500, 999]), torch.tensor([0, 3, 7])
    torch.testing.assert_close(model(x, t, y), oracle(x, t, y), rtol=0, atol=1e-11)


def test_parameters_keep_their_dtype(arrays):
    state = from_dit_llama({name: value.astype(np.float16) for name, value in arrays.items()}, large())
    assert {value.dtype for value in state.values()} == {torch.float16}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.pop("layers.1.attention.wk.weight"), r"layers.1.attention.wk.weight missing \(1\)"),
        (lambda a: a.update({"pos_embed": np.zeros(3)}), r"it has no pos_embed \(1\)"),
        (lambda a: a.update({"x_embedder.weight": np.zeros((12, 48))}), r"x_embedder.weight makes .* \(48, 12\)"),
        (
            lambda a: a.update({"layers.0.feed_forward.w1.weight": np.zeros((48, 112), np.float32)}),
            r"w1.weight \| layers.0.feed_forward.w3.weight makes blocks.0.mlp.w12.weight \(240, 48\).* has \(256, 48\)",
        ),
        (
            lambda a: a.update({"layers.0.attention.wk.weight": np.zeros((40, 24), np.float32)}),
            r"attn.qkv.weight is made of weights .* of one width, got .*wk.weight \(24, 40\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, message, arrays):
    change(arrays)
    with pytest.raises(ConvertError, match=message):
        from_dit_llama(arrays, large())


def test_qk_norms_are_those_of_the_model(arrays):
    with pytest.raises(ConvertError, match="it has no layers.0.attention.k_norm.bias"):
        from_dit_llama(arrays, large(qk_norm=False))
