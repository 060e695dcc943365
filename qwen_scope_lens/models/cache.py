"""What a run cached: each tensor listed once, and found by every name of its hook point.

The unfiltered cache lists a point of the model under TransformerLens's name (`hook_resid_post`) and
one inside an SAE under the name that `get_sae_hook_name` gives. Norms are applied whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformer_lens.ActivationCache import ActivationCache
from transformer_lens.utils import get_act_name

from qwen_scope_lens.errors import UnknownHook

__all__ = ["CachedByName", "ScopeCache"]


class CachedByName(dict[str, Tensor]):
    """A cache as a dictionary: iteration gives each tensor once, look-ups know the other names."""

    def __init__(self, cached: Mapping[str, Tensor], listed_as: Mapping[str, str]) -> None:
        super().__init__(cached)
        self.listed_as = listed_as  # a name of a hook point -> the one under which it is listed

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or super().__contains__(_listed(name, self.listed_as))

    def __missing__(self, name: str) -> Tensor:
        listed = _listed(name, self.listed_as)
        if listed == name or not super().__contains__(listed):
            raise KeyError(name)
        return self[listed]

    def get(self, name: str, default: Any = None) -> Any:
        """The tensor by any name of its hook point, else the default."""
        try:
            return self[name]
        except KeyError:
            return default


def _listed(name: object, listed_as: Mapping[str, str]) -> str:
    """The name under which a point's tensor, or its gradient, is listed."""
    point = str(name).removesuffix("_grad")
    return listed_as.get(point, point) + str(name)[len(point) :]


class ScopeCache(ActivationCache):
    """TransformerLens's cache of an unprocessed model, whose norms have a gain."""

    def __init__(
        self,
        cached: dict[str, Tensor],
        listed_as: Mapping[str, str],
        model: Any,
        has_batch_dim: bool = True,
    ) -> None:
        # The dictionary itself, no copy: with `reset_hooks_end=False` later runs write into it.
        super().__init__(cached, model, has_batch_dim=has_batch_dim)
        self.listed_as = listed_as

    def __contains__(self, name: object) -> bool:
        return name in self.cache_dict or _listed(name, self.listed_as) in self.cache_dict

    def __getitem__(self, key: Any) -> Tensor:
        try:
            found: Tensor = super().__getitem__(key)
        except KeyError:
            name = key if isinstance(key, str) else get_act_name(*key)
            listed = _listed(name, self.listed_as)
            if listed not in self.cache_dict:
                raise
            found = self.cache_dict[listed]
        return found

    def apply_ln_to_stack(
        self,
        residual_stack: Tensor,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Tensor:
        """`[components, ..., d_model]` -> what each gives to the norm's output, gain included.

        Upstream divides by the scale alone: right once the gain is folded into the weights, which
        a model that SAEs read must not be. The parts sum up to the norm's output.
        """
        if self._norm(layer, mlp_input) is None:
            raise UnknownHook(
                "the thin adapter has no hooks at norms, so their scales are not in the cache:"
                " load_model(full_hooks=True) has them"
            )
        normed: Tensor = super().apply_ln_to_stack(
            residual_stack,
            layer,
            mlp_input,
            pos_slice,
            batch_slice,
            has_batch_dim,
            recompute_ln,
        )
        if recompute_ln and self._is_final(layer):  # upstream runs the norm itself
            return normed
        return normed * self._gain(layer, mlp_input)

    def _stack_neuron_results_apply_ln_projected(
        self, layer: int, pos_slice: Any, neuron_slice: Any, project_2d: Tensor
    ) -> Tensor:
        projected: Tensor = super()._stack_neuron_results_apply_ln_projected(
            layer, pos_slice, neuron_slice, project_2d * self._gain(layer, False)[:, None]
        )
        return projected

    def _is_final(self, layer: int | None) -> bool:
        return layer is None or layer in (-1, self.model.cfg.n_layers)

    def _norm(self, layer: int | None, mlp_input: bool) -> Any:
        if self._is_final(layer):
            return self.model._modules.get("ln_final")
        return self.model.blocks[layer]._modules.get("ln2" if mlp_input else "ln1")

    def _gain(self, layer: int | None, mlp_input: bool) -> Tensor:
        norm = self._norm(layer, mlp_input)
        weight: Tensor = norm.original_component.weight
        # Of Qwen3.5: the norms of the residual multiply by 1 + weight.
        return 1.0 + weight if norm.config.rmsnorm_uses_offset else weight
