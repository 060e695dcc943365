"""What a run cached: each tensor listed once, and found by every name of its hook point.

The unfiltered cache lists a point of the model under TransformerLens's name (`hook_resid_post`) and
one inside an SAE under the name that `get_sae_hook_name` gives. Norms are applied whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformer_lens.ActivationCache import ActivationCache

from qwen_scope_lens.errors import UnknownHook

__all__ = ["CachedByName", "ScopeCache"]


class CachedByName(dict[str, Tensor]):
    """A cache as a dictionary: iteration gives each tensor once, look-ups know the other names."""

    def __init__(self, cached: Mapping[str, Tensor], listed_as: Mapping[str, str]) -> None:
        super().__init__(cached)
        self.listed_as = listed_as  # a name of a hook point -> the one under which it is listed

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or super().__contains__(self._listed(name))

    def __missing__(self, name: str) -> Tensor:
        if super().__contains__(listed := self._listed(name)):
            return self[listed]
        raise KeyError(name)

    def get(self, name: str, default: Any = None) -> Any:
        """The tensor by any name of its hook point, else the default."""
        try:
            return self[name]
        except KeyError:
            return default

    def _listed(self, name: object) -> str:
        name = str(name)
        suffix = "_grad" if name.endswith("_grad") else ""
        return self.listed_as.get(name.removesuffix("_grad"), "") + suffix


class ScopeCache(ActivationCache):
    """TransformerLens's cache of an unprocessed model, whose norms have a gain."""

    def __init__(self, cached: CachedByName, model: Any, has_batch_dim: bool = True) -> None:
        super().__init__(cached, model, has_batch_dim=has_batch_dim)
        self._listed_as = cached.listed_as

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "cache_dict" and "_listed_as" in vars(self):  # upstream rebuilds it in `to`, ...
            value = CachedByName(value, self._listed_as)
        super().__setattr__(name, value)

    def __contains__(self, name: object) -> bool:
        return name in self.cache_dict

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
