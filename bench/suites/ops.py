"""Every op, forward and backward: ditfast against eager, torch.compile, the op's other backends and libraries."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from bench.contest import Contest
from bench.limits import DTYPES
from bench.rows import COMPILE, DITFAST, EAGER
from bench.suites import Options
from bench.timing import Prepared, Run, Timing
from ditfast.kernels import OPS, BackendError, OpSpec, backend_of, parity
from ditfast.kernels.peers import PeerError, as_backend, judge_peer, peers_of
from ditfast.kernels.spec import Case
from ditfast.kernels.tune import resize

log = logging.getLogger("bench")

# Of an op over the weights of a model, parity is shown on these many: float64 copies of all would not fit beside them.
CHECKED_TENSORS = 20


def contests(options: Options, specs: tuple[OpSpec, ...] | None = None) -> Iterator[Contest]:
    """A contest of every op's forward and, where it has one, backward, for each case and dtype of the scale.

    The first case of every op comes before the others.
    """
    cases = [(i, spec, case) for spec in specs or OPS for i, case in enumerate(options.scale.ops(spec))]
    for _, spec, case in sorted(cases, key=lambda each: each[0]):
        for dtype in options.scale.dtypes:
            yield from Match(spec, case, dtype, options).contests()
            if options.scale.compile:
                # The next match is compiled anew: the compiler gives up a function at its eighth set of shapes.
                torch.compiler.reset()


class Match:
    """An op in one case and dtype: the inputs and who does it; its contests share them.

    Inputs are drawn when first needed. The forward is that of a training step where the op has a derivative: it saves
    what its backward needs.
    """

    def __init__(self, spec: OpSpec, case: Case, dtype: str, options: Options) -> None:
        self.spec, self.case, self.dtype, self.device = spec, case, DTYPES[dtype], options.device
        self.dtype_name = dtype
        self.functions = entrants(spec, self.dtype, options)
        self.verdicts: dict[str, str | Exception | None] = {}
        self._inputs: dict[str, Any] | None = None
        self._truth: parity.Truth | None = None

    def contests(self) -> Iterator[Contest]:
        """Forward and backward."""
        meta = self.spec.make_inputs(self.case, self.dtype, "meta")
        flops = self.spec.flops(meta) if self.spec.flops else 0
        sizes = ", ".join(f"{name} {size}" for name, size in self.case.sizes.items())
        for stage, moved in self.spec.bytes_min(meta).items():
            yield Contest(
                *("ops", f"{self.spec.name} {stage}", self.dtype_name, f"{self.case.name}: {sizes}"),
                entrants={provider: self.run(stage, fn) for provider, fn in self.functions.items()},
                check=self.check,
                bytes=moved,
                flops=flops * (2 if stage == "bwd" else 1),
                extra={"pass": stage, "op": self.spec.name, "case": self.case.name},
                details=self.details,
            )

    def inputs(self) -> dict[str, Any]:
        """The inputs, those that the op has a gradient of being leaves that want it."""
        if self._inputs is None:
            self._inputs = self.draw(self.case)
            for tensor in self.spec.graded(self._inputs).values() if self.spec.op.differentiable else ():
                tensor.requires_grad_()
        return self._inputs

    def draw(self, case: Case, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Random inputs, always the same."""
        generator = torch.Generator(self.device).manual_seed(0)
        return self.spec.make_inputs(case, dtype or self.dtype, self.device, generator)

    def run(self, stage: str, fn: Callable[..., Any]) -> Run:
        """What is timed of a provider's function."""
        if self.spec.mutates:
            return Prepared(self.fresh, lambda inputs: fn(**inputs))
        if stage == "fwd":
            return lambda: fn(**self.inputs())
        return Prepared(partial(self.before_backward, fn), lambda given: torch.autograd.grad(*given))

    def fresh(self) -> dict[str, Any]:
        """The inputs of an op in place, with what it writes as it was."""
        inputs = self.inputs()
        written = {name: inputs[name] for name in (*self.spec.mutates, *self.spec.overwrites)}
        return {**inputs, **tree_map_only(torch.Tensor, torch.clone, written)}

    def before_backward(self, fn: Callable[..., Any]) -> tuple[list[torch.Tensor], ...]:
        """(outputs, leaves, gradients of the outputs) for torch.autograd.grad."""
        inputs = self.inputs()
        outputs = [out for out in tree_leaves(fn(**inputs)) if isinstance(out, torch.Tensor) and out.requires_grad]
        leaves = [value for value in inputs.values() if isinstance(value, torch.Tensor) and value.requires_grad]
        generator = torch.Generator(self.device).manual_seed(1)
        named = {str(i): out for i, out in enumerate(outputs)}
        return outputs, leaves, parity.random_douts(named, generator)

    def check(self, provider: str) -> str | None:
        """What is wrong with a provider's outputs or gradients; None: nothing."""
        if provider not in self.verdicts:
            try:
                self.verdicts[provider] = self.judge(provider)
            except Exception as error:
                self.verdicts[provider] = error.with_traceback(None)  # whose frames would hold tensors
            if len(self.verdicts) == len(self.functions):
                self._truth = None
        if isinstance(found := self.verdicts[provider], Exception):
            raise found
        return found

    def judge(self, provider: str) -> str | None:
        """Parity of a provider on the inputs that are timed; of other people's also in float32.

        Ours have to stay within the budgets of the tests. Others round and add up in their own places, so judge_peer
        is for theirs; that they do the same job shows in float32, where they have it.
        """
        if self._truth is None:
            few = {"N": CHECKED_TENSORS} if self.spec.mutates and "N" in self.case.sizes else {}
            inputs = self.draw(resize(self.case, few)) if few else self.inputs()
            self._truth = parity.truth(self.spec, inputs, torch.Generator(self.device).manual_seed(1))
        if provider == DITFAST:
            timed = as_backend(self.spec, self.functions[provider])
            return wrong(replace(self._truth, spec=timed).judge(self.backend()))
        if provider not in (EAGER, COMPILE) and not self.spec.mutates:
            case = (self.spec.resize or resize)(self.case, {"B": 2}) if "B" in self.case.sizes else self.case
            truth = parity.truth(self.spec, self.draw(case, torch.float32), torch.Generator(self.device).manual_seed(1))
            try:
                if found := wrong(judge_peer(truth, self.functions[provider])):
                    return f"in float32: {found}"
            except (PeerError, BackendError) as error:
                log.debug("%s of %s is not judged in float32: %s", provider, self.spec.name, error)
        return wrong(judge_peer(self._truth, self.functions[provider]))

    def backend(self) -> str:
        """The backend that ditfast takes."""
        return backend_of(self.spec.name, self.device, self.dtype)

    def details(self, provider: str, timing: Timing) -> dict[str, Any]:
        """Which backend ditfast took."""
        return {"backend": self.backend()} if provider == DITFAST else {}


def entrants(spec: OpSpec, dtype: torch.dtype, options: Options) -> dict[str, Callable[..., Any]]:
    """Who does an op, by the provider's name: ditfast as it is used, its peers, its other backends."""
    taken = backend_of(spec.name, options.device, dtype)
    left_out = {taken, "reference"} | ({"triton"} if options.device.type == "cpu" else set())  # an interpreter there
    others = {name: partial(spec.fn, backend=name) for name in spec.op.backends if name not in left_out}
    found = {DITFAST: spec.fn} | others | peers_of(spec)
    return {name: fn for name, fn in found.items() if name != COMPILE or options.scale.compile}


def wrong(verdicts: list[parity.Verdict]) -> str | None:
    """The verdicts that are red, in a line."""
    red = [v for v in verdicts if not v.ok]
    return (
        ", ".join(
            f"{v.name}: max error {v.max_error:.2g} of {v.max_allowed:.2g} allowed, "
            f"RMS {v.rms_error:.2g} of {v.rms_allowed:.2g}"
            for v in red
        )
        or None
    )
