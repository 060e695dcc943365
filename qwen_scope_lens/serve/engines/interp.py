"""interp-engine as the engine: its models in memory, vLLM among them, behind one interface.

Its vLLM back ends decode requests together; its eager one has its hooks on the model itself, so
there one reply is written after the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, nullcontext
from typing import Any

from qwen_scope_lens.errors import BadPlan, EngineFailed, WrongModel
from qwen_scope_lens.extras import require
from qwen_scope_lens.models.checkpoint import Tokenizer
from qwen_scope_lens.saes.layer_sae import LayerSAE
from qwen_scope_lens.serve.engines.abilities import INTERP, WAY_OUT
from qwen_scope_lens.serve.engines.outside import Outside
from qwen_scope_lens.serve.rows import Reason, Wanted
from qwen_scope_lens.steering.plan import Plan
from qwen_scope_lens.steering.runtimes.interp_engine import check_plan, steer_engine

__all__ = ["InterpEngine", "load"]


def load(name: str, backend: str, device: str | None, dtype: str | None) -> Any:
    """A model of interp-engine: `auto`, `eager`, `vllm` or `vllm-static`."""
    engine = require("interp_engine", "interp")
    try:
        return engine.load_model(name, backend=backend, device=device, dtype=dtype or "auto")
    except (RuntimeError, ValueError) as error:
        raise EngineFailed(f"interp-engine cannot load {name}: {error}") from error


class InterpEngine(Outside):
    """Replies from a model of interp-engine."""

    abilities = INTERP

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        ends: frozenset[int],
        context: int,
        d_model: int,
        sae_of: Callable[[str], LayerSAE],
        *,
        allow_other_model: bool = False,
        **limits: Any,
    ) -> None:
        if model.d_model != d_model:
            raise WrongModel(
                f"interp-engine runs a model of width {model.d_model}; the SAEs expect {d_model}"
            )
        self._model, self._sae_of, self._allow = model, sae_of, allow_other_model
        self._said = model.describe()
        super().__init__(tokenizer, ends, context, **limits)
        self._alone = asyncio.Lock() if self._said.backend == "eager" else None
        warmup = getattr(model, "warmup", None)
        if warmup is not None:
            self.waited(warmup())

    def check_places(self, plan: Plan) -> None:
        check_plan(plan)
        if not self._said.hooks_available and not self._said.static_writes:
            raise BadPlan(
                f"the back end {self._said.backend} of interp-engine steers nothing: choose another"
                f" (--engine interp-engine=vllm), or {WAY_OUT}"
            )

    async def shut(self) -> None:
        shutdown = getattr(self._model, "shutdown", None)
        if shutdown is not None:
            await shutdown()

    async def tokens(self, wanted: Wanted) -> AsyncGenerator[int | Reason, None]:
        plan, ids = wanted.plan, list(wanted.prompt)
        steering: Any = nullcontext()
        if plan is not None:
            saes = {str(ref.sae): self._sae_of(str(ref.sae)) for ref in plan.refs}
            steering = steer_engine(self._model, plan, ids, saes, allow_other_model=self._allow)
        async with self._alone or nullcontext():
            with steering:
                steps = self._model.generate_steps(
                    ids,
                    max_tokens=wanted.new_tokens,
                    temperature=wanted.temperature,
                    top_k=0,
                    top_p=wanted.top_p,
                    presence_penalty=0.0,
                    seed=wanted.seed % 2**63,
                )
                async with aclosing(steps):
                    async for step in steps:
                        yield int(step.token_id)
                        await asyncio.sleep(0)  # the eager back end never waits by itself
        yield "stop"  # an end token of its own
