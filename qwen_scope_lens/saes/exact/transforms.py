"""Whether autograd, forward mode or functorch is differentiating or transforming a computation.

Under `torch.func.grad`, `vmap` and `jvp`, a tensor may be a wrapper that hides its numbers, and the
results of operations on it hide theirs as well. This file has all the code that needs torch's
internals to deal with that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

__all__ = ["hidden", "outside", "shown", "transformed", "untracked"]


def transformed() -> bool:
    """Whether a functorch transform is active."""
    return bool(torch._C._are_functorch_transforms_active())


def untracked(*tensors: torch.Tensor) -> bool:
    """Whether no derivative of a result of these tensors is needed."""
    return not (
        (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        or transformed()
        or forward_ad._current_level >= 0
    )


def hidden(*tensors: torch.Tensor) -> bool:
    """Whether functorch has wrapped one of these tensors."""
    if torch.compiler.is_compiling() or not transformed():
        return False
    return any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors)


def shown(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor inside functorch's wrappers."""
    while hidden(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """Suspend the active transforms, to make tensors that are kept after them."""
    if not transformed():
        yield
        return
    with temporarily_clear_interpreter_stack():
        yield
