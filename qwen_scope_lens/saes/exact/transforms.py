"""What differentiates or transforms a computation: autograd, forward mode, functorch.

Under `torch.func.grad`, `vmap` and `jvp` a tensor may hide its numbers, and whatever an operation
returns hides them too. Everything here that leans on torch's internals for that stands in this
file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

__all__ = ["hidden", "outside", "shown", "transformed", "untracked"]


def transformed() -> bool:
    """Whether functorch is at work."""
    return bool(torch._C._are_functorch_transforms_active())


def untracked(*tensors: torch.Tensor) -> bool:
    """Whether nobody wants a derivative of what is made from these."""
    return not (
        (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        or transformed()
        or forward_ad._current_level >= 0
    )


def hidden(*tensors: torch.Tensor) -> bool:
    """Whether functorch has put something else in the place of one of these."""
    if torch.compiler.is_compiling() or not transformed():
        return False
    return any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors)


def shown(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers behind what functorch shows."""
    while hidden(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """No transform at work inside: for what is kept and belongs to no transform."""
    if not transformed():
        yield
        return
    with temporarily_clear_interpreter_stack():
        yield
