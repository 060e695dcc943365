"""Attach SAEs to a bridge at hook points, for one run or until they are reset.

As in SAELens, a wrapper takes the place of the hook point in the module tree. Unlike in SAELens,
the wrapper keeps that hook point and runs it, so hooks at it keep firing, also after a reset. Names
and plain hooks are in `hook_names.py`.
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
from qwen_scope_lens.models.architecture import describe
from qwen_scope_lens.models.backbone import check_backbone
from qwen_scope_lens.models.hook_names import NamedHooks

__all__ = ["AttachedSAE", "AttachesSAEs"]


class AttachedSAE(_SAEWrapper):
    """SAELens's wrapper with error term and inner hooks. It computes in the SAE's dtype and device.

    The residual goes on in its own dtype, so a float32 SAE can be attached to a bfloat16 model.
    """

    def __init__(self, sae: SAE[Any], use_error_term: bool, special: Tensor | None) -> None:
        super().__init__(sae, use_error_term=use_error_term)
        self.special = special  # ids of tokens that bypass the SAE, or None
        self.handles: list[RemovableHandle] = []
        # The module whose place this takes. Not a submodule, so that its name stays the same.
        self.__dict__["point"] = None

    def __getattr__(self, name: str) -> Any:
        """Attributes of a hook point (`add_hook`, `ctx`, ...) come from the point that is kept."""
        point = self.__dict__.get("point")
        if point is None or name in self.__dict__.get("_modules", {}):
            return super().__getattr__(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(point, name)

    def forward(self, original_output: Tensor) -> Tensor:
        """Reconstruct a residual, and run the hooks here. `[..., d_in] -> [..., d_in]`"""
        weight = self.sae.W_dec
        replaced = super().forward(original_output.to(weight.device, weight.dtype))
        replaced = replaced.to(original_output.device, original_output.dtype)
        point = self.__dict__["point"]
        return replaced if point is None else point(replaced)

    def attach(
        self, holder: nn.Module, key: str, embed: nn.Module, input_at: HookPoint | None
    ) -> None:
        """Take the place of hook point `key` of `holder`. Its hooks then see the reconstruction.

        `input_at` is the hook point that a transcoder reads, or None for an SAE, which reads and
        writes at the same point.
        """
        self.__dict__["point"] = holder._modules[key]
        self.__dict__["place"] = (holder, key)
        holder._modules[key] = self
        if input_at is not None:
            self.handles.append(input_at.register_forward_hook(self._keep_input))
        if self.special is not None:
            self.handles.append(embed.register_forward_pre_hook(self._find_special))

    def detach(self) -> None:
        """Put the hook point back, also when another SAE was attached on top of this one."""
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
        """The hook points of this SAE: `hook_sae_input`, `hook_sae_acts_post` and so on."""
        return {name: hook for name, hook in self.named_modules() if isinstance(hook, HookPoint)}

    def _keep_input(self, module: nn.Module, args: Any, output: Tensor) -> None:
        weight = self.sae.W_dec
        self.capture_input(output.to(weight.device, weight.dtype))

    def _find_special(self, module: nn.Module, args: Any) -> None:
        ids = args[0]
        assert self.special is not None
        mask = torch.isin(ids, self.special.to(ids.device))
        self.set_token_mask(mask.to(self.sae.W_dec.device))


class AttachesSAEs(NamedHooks):
    """SAELens's methods for attaching SAEs, with hook points that keep working."""

    def add_sae(
        self,
        sae: SAE[Any],
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
        allow_other_model: bool = False,
    ) -> None:
        """Attach an SAE at its hook until `reset_saes`. It replaces an SAE that is already there.

        Hooks at that point then see the SAE's reconstruction, which flows on; the SAE's own
        `hook_sae_input` sees the residual that came in. With the error term and no edit, the two
        are the same. `use_error_term=None` keeps the SAE's own setting; `exclude_special_tokens` is
        True for all special tokens, or a list of token ids.

        An SAE of a known group is refused on a model that is known to be another one, unless
        `allow_other_model` is set (`WrongModel`). If its metadata name no group, nothing is
        checked, as in SAELens.
        """
        if not isinstance(sae, SAE):
            raise WrongModel(
                f"expected an SAE with SAELens's hook points, found {type(sae).__name__}: load it"
                " with load_sae()"
            )
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
        """Detach the SAE at a hook, and attach a previous one again."""
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
                allow_other_model=True,  # this was checked when it was first attached
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
        """Attach SAEs while a `with` block runs. SAEs that they replaced come back afterwards."""
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

    def run_with_saes(
        self, *args: Any, saes: SAE[Any] | Sequence[SAE[Any]] = (), **kwargs: Any
    ) -> Any:
        """`forward` with SAEs attached. It also takes the options of `saes`."""
        with self.saes(saes, **_sae_options(kwargs)):
            return self(*args, **kwargs)

    def run_with_cache_with_saes(
        self, *args: Any, saes: SAE[Any] | Sequence[SAE[Any]] = (), **kwargs: Any
    ) -> Any:
        """`run_with_cache` with SAEs attached."""
        with self.saes(saes, **_sae_options(kwargs)):
            return self.run_with_cache(*args, **kwargs)

    def run_with_hooks_with_saes(
        self, *args: Any, saes: SAE[Any] | Sequence[SAE[Any]] = (), **kwargs: Any
    ) -> Any:
        """`run_with_hooks` with SAEs attached."""
        with self.saes(saes, **_sae_options(kwargs)):
            return self.run_with_hooks(*args, **kwargs)


def _group_of(sae: SAE[Any]) -> Group | None:
    """The group that an SAE's own metadata name, or None if they name none that is known here."""
    said = getattr(sae.cfg.metadata, "qwen_scope_ref", None)
    if not isinstance(said, str):
        return None
    try:
        return LayerRef.parse(said).row
    except ScopeError:  # the user's own group, whose folder is not in QWEN_SCOPE_HOME
        return None


def _sae_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take the options of `saes` out of the arguments of a run."""
    names = ("reset_saes_end", "use_error_term", "exclude_special_tokens", "allow_other_model")
    return {name: kwargs.pop(name) for name in names if name in kwargs}
