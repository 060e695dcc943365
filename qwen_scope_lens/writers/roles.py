"""Generators by their text form: `openai:URL#MODEL`, `hf:MODEL` or `steer:MODEL`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qwen_scope_lens.address import FeatureRef
from qwen_scope_lens.errors import UnknownName
from qwen_scope_lens.writers.endpoint import Endpoint
from qwen_scope_lens.writers.generator import Generator

if TYPE_CHECKING:
    from qwen_scope_lens.steering.readers import SAEs

__all__ = ["Roles"]

FORMS = "openai:URL#MODEL, hf:MODEL or steer:MODEL"


@dataclass
class Roles:
    """Opens the generators of a run, with the settings that they share.

    `load` opens a model by name, and should keep it for the next call.
    """

    load: Callable[[str], Any]
    model_name: str = ""  # the model of endpoints whose address has no #MODEL
    strength: float = 8.0  # of steering, in multiples of a feature's typical activation
    typical: Mapping[FeatureRef, float] = field(default_factory=dict)
    saes: SAEs = None  # SAEs that are loaded already
    batch: int = 16
    endpoint: Mapping[str, Any] = field(default_factory=dict)  # settings of `Endpoint`

    def open(self, spec: str) -> Generator:
        kind, _, rest = spec.partition(":")
        if kind not in ("openai", "hf", "steer") or not rest:
            raise UnknownName(f"{spec!r} is not a generator: expected {FORMS}")
        if kind == "openai":
            url, _, model = rest.partition("#")
            if not (model or self.model_name):
                raise UnknownName(
                    f"{spec!r} does not name a model: add #MODEL, or give --model-name"
                )
            return Endpoint(url, model or self.model_name, **self.endpoint)
        from qwen_scope_lens.writers.local import Local, Push

        push = Push(self.strength, self.typical) if kind == "steer" else None
        return Local(self.load(rest), rest, push=push, saes=self.saes, batch=self.batch)
