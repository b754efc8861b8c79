"""A norm's parameters; the fused ops read them, and the module is called where something hangs on it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditfast.layers.architecture import NormForm


class Norm(nn.Module):
    """LayerNorm or RMSNorm of the last dim, `width` wide, with the parameters that its form names; x's dtype."""

    def __init__(self, width: int, form: NormForm):
        super().__init__()
        self.width, self.form = width, form
        self.weight = nn.Parameter(torch.ones(width)) if form.weight else None
        self.bias = nn.Parameter(torch.zeros(width)) if form.bias else None

    def forward(self, x: Tensor) -> Tensor:
        wide, shape = x if self.weight is None else x.to(torch.promote_types(x.dtype, self.weight.dtype)), (self.width,)
        if self.form.kind == "rms":
            return F.rms_norm(wide, shape, self.weight, self.form.eps).to(x.dtype)
        return F.layer_norm(wide, shape, self.weight, self.bias, self.form.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.width}, {self.form}"
