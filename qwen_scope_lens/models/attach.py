"""SAEs on a bridge: attached at hook points, for one run or until they are reset.

As in SAELens, the wrapper stands in the module tree where the hook point was. Unlike there, it
holds that point and runs it, so that hooks at it keep firing, now and after a reset. Names and
plain hooks are in `names.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from sae_lens import logger
from sae_lens.analysis.hooked_sae_transformer import _SAEWrapper
from sae_lens.saes.sae import SAE
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint

from qwen_scope_lens.address import LayerRef
from qwen_scope_lens.catalog import Group
from qwen_scope_lens.errors import ScopeError, UnknownHook, WrongModel
from qwen_scope_lens.models.backbone import check_backbone
from qwen_scope_lens.models.layers import describe
from qwen_scope_lens.models.names import NamedHooks

__all__ = ["AttachedSAE", "AttachesSAEs"]


class AttachedSAE(_SAEWrapper):
    """SAELens's wrapper (error term, inner hooks), computing in the SAE's dtype and device.

    Whatever the residual's dtype is, it gets it back: a float32 SAE serves a bfloat16 model.
    """

    def __init__(self, sae: Any, use_error_term: bool, special: Tensor | None) -> None:
        super().__init__(sae, use_error_term=use_error_term)
        self.special = special  # token ids that bypass the SAE, or None
        self.handles: list[RemovableHandle] = []
        self.__dict__["point"] = None  # what stood here: not a submodule, its name stays its own

    def __getattr__(self, name: str) -> Any:
        """What a hook point has (`add_hook`, `ctx`, ...) is that of the point which stood here."""
        point = self.__dict__.get("point")
        if point is None or name in self.__dict__.get("_modules", {}):
            return super().__getattr__(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(point, name)

    def forward(self, original_output: Tensor) -> Tensor:
        """The residual `[..., d_in]` -> its reconstruction `[..., d_in]`, after the hooks here."""
        weight = self.sae.W_dec
        replaced = super().forward(original_output.to(weight.device, weight.dtype))
        replaced = replaced.to(original_output.device, original_output.dtype)
        point = self.__dict__["point"]
        return replaced if point is None else point(replaced)

    def attach(
        self, holder: nn.Module, key: str, embed: nn.Module, input_at: HookPoint | None
    ) -> None:
        """Stand where `holder` has its hook point `key`: hooks at the point see what flows on.

        `input_at` is where a transcoder reads; None when it reads where it writes.
        """
        self.__dict__["point"] = holder._modules[key]
        self.__dict__["place"] = (holder, key)
        holder._modules[key] = self
        if input_at is not None:
            self.handles.append(input_at.register_forward_hook(self._keep_input))
        if self.special is not None:
            self.handles.append(embed.register_forward_pre_hook(self._find_special))

    def detach(self) -> None:
        """Put back what stood here, also from under an SAE that was attached later."""
        while self.handles:
            self.handles.pop().remove()
        holder, key = self.__dict__["place"]
        standing = holder._modules[key]
        if standing is self:
            holder._modules[key] = self.__dict__["point"]
            return
        while isinstance(standing, AttachedSAE):
            if standing.__dict__["point"] is self:
                standing.__dict__["point"] = self.__dict__["point"]
                return
            standing = standing.__dict__["point"]

    def inner_hooks(self) -> dict[str, HookPoint]:
        """`hook_sae_input`, `hook_sae_acts_post`, ... of this SAE."""
        return {name: hook for name, hook in self.named_modules() if isinstance(hook, HookPoint)}

    def _keep_input(self, module: Any, args: Any, output: Tensor) -> None:
        weight = self.sae.W_dec
        self.capture_input(output.to(weight.device, weight.dtype))

    def _find_special(self, module: Any, args: Any) -> None:
        ids = args[0]
        assert self.special is not None
        mask = torch.isin(ids, self.special.to(ids.device))
        self.set_token_mask(mask.to(self.sae.W_dec.device))


class AttachesSAEs(NamedHooks):
    """SAELens's methods for SAEs, on hook points that stay in place."""

    def add_sae(
        self,
        sae: SAE[Any],
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
        allow_other_model: bool = False,
    ) -> None:
        """Attach an SAE at its hook until `reset_saes`; one already there is replaced.

        Hooks at that point see what flows on, the reconstruction; what came in is its
        `hook_sae_input`. With the error term and no edit, what flows on is what came in.

        An SAE of a known group is refused on a model that is known to be another, unless
        `allow_other_model`; of one whose metadata name no group nothing is known, as in SAELens.
        """
        name = sae.cfg.metadata.hook_name
        out = sae.cfg.metadata.hook_name_out or name
        hooks = {n: self.hook_dict[self.check_hook(n)] for n in (name, out)}
        if "hook_resid" in name and sae.cfg.d_in != self.cfg.d_model:
            raise WrongModel(
                f"the SAE reads d_in={sae.cfg.d_in}, the residual of {describe(self)} has d_model="
                f"{self.cfg.d_model}: it was trained on another model"
                f" ({sae.cfg.metadata.model_name})"
            )
        if getattr(sae, "hook_z_reshaping_mode", False):
            raise WrongModel("SAEs on hook_z are not supported here: use SAELens's own bridge")
        group = _group_of(sae)
        if group is not None:
            check_backbone(self, group, allow_other_model=allow_other_model)
        if name in self._acts_to_saes:
            self._reset_sae(name)
        special = None
        if exclude_special_tokens is not False:
            listed = (
                self.tokenizer.all_special_ids
                if exclude_special_tokens is True
                else list(exclude_special_tokens)
            )
            special = torch.tensor(listed, dtype=torch.long)
        error_term = sae.use_error_term if use_error_term is None else use_error_term
        wrapper = AttachedSAE(sae, error_term, special)
        for inner, hook in wrapper.inner_hooks().items():
            hook.name = f"{self._resolve_hook_name(out)}.{inner}"
        holder, _, key = self._resolve_hook_name(out).rpartition(".")
        wrapper.attach(
            self.get_submodule(holder), key, self.embed, hooks[name] if out != name else None
        )
        self._acts_to_saes[name] = wrapper

    def _reset_sae(self, act_name: str, prev_wrapper: Any = None) -> None:
        """Detach, and put a previous one back."""
        wrapper = self._acts_to_saes.pop(act_name, None)
        if wrapper is None:
            logger.warning(f"No SAE is attached to {act_name}. There's nothing to reset.")
        else:
            wrapper.detach()
        if prev_wrapper is not None:
            special = prev_wrapper.special
            self.add_sae(
                prev_wrapper.sae,
                prev_wrapper.use_error_term,
                False if special is None else special.tolist(),
                allow_other_model=True,  # which was asked when it was attached
            )

    def reset_saes(self, act_names: str | list[str] | None = None) -> None:
        """Detach all SAEs, or those at the named hooks."""
        names = [act_names] if isinstance(act_names, str) else act_names
        for name in list(self._acts_to_saes) if names is None else names:
            if name not in self._acts_to_saes:
                have = ", ".join(self._acts_to_saes) or "none"
                raise UnknownHook(f"no SAE is attached at {name}; attached: {have}")
            self._reset_sae(name)

    @contextmanager
    def saes(
        self,
        saes: SAE[Any] | Sequence[SAE[Any]] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
        allow_other_model: bool = False,
    ) -> Iterator[AttachesSAEs]:
        """SAEs for the time of a block; those that were there before come back."""
        before = dict(self._acts_to_saes)
        added: list[str] = []
        try:
            for sae in [saes] if isinstance(saes, SAE) else saes:
                self.add_sae(sae, use_error_term, exclude_special_tokens, allow_other_model)
                added.append(sae.cfg.metadata.hook_name)
            yield self
        finally:
            if reset_saes_end:
                for name in dict.fromkeys(added):
                    self._reset_sae(name, before.get(name))

    def run_with_saes(self, *args: Any, saes: Any = (), **kwargs: Any) -> Any:
        """`forward` with SAEs attached; `use_error_term` and the like as of `saes`."""
        with self.saes(saes, **_sae_options(kwargs)):
            return self(*args, **kwargs)

    def run_with_cache_with_saes(self, *args: Any, saes: Any = (), **kwargs: Any) -> Any:
        """`run_with_cache` with SAEs attached."""
        with self.saes(saes, **_sae_options(kwargs)):
            return self.run_with_cache(*args, **kwargs)

    def run_with_hooks_with_saes(self, *args: Any, saes: Any = (), **kwargs: Any) -> Any:
        """`run_with_hooks` with SAEs attached."""
        with self.saes(saes, **_sae_options(kwargs)):
            return self.run_with_hooks(*args, **kwargs)


def _group_of(sae: SAE[Any]) -> Group | None:
    """The group that an SAE's own metadata name; None where they name none that is known here."""
    said = getattr(sae.cfg.metadata, "qwen_scope_ref", None)
    if not isinstance(said, str):
        return None
    try:
        return LayerRef.parse(said).row
    except ScopeError:  # a group of one's own, whose folder is not in QWEN_SCOPE_HOME
        return None


def _sae_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take what concerns SAEs out of the arguments of a run."""
    names = ("reset_saes_end", "use_error_term", "exclude_special_tokens", "allow_other_model")
    return {name: kwargs.pop(name) for name in names if name in kwargs}
