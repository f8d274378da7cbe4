"""Optimizers: AdamW (PyTorch's, fused) and ScaledAdam.

Source of ScaledAdam: Zipformer (arXiv 2310.11230, section 3.3): Adam whose step is relative to the size of each
parameter tensor, which also learns that size, with gradients clipped relative to their recent median norm.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from valle.config import TrainConfig

NamedParameters = list[tuple[str, nn.Parameter]]


class ScaledAdam(torch.optim.Optimizer):
    """Adam relative to the root-mean-square of each tensor.

    Args:
        params: parameters, or groups of them.
        lr: step relative to a parameter's root-mean-square; 0.05 is usual.
        betas: decay of the moving averages of gradient and squared gradient.
        scalar_lr_scale: learning rate of scalars and of each tensor's size, relative to `lr`.
        eps: added to the root of the squared gradient's average.
        min_rms, max_rms: bounds on the root-mean-square that steps are relative to.
        clipping_scale: gradients beyond this multiple of the median norm of recent steps are scaled down.
        clipping_period: recent steps that the median is taken over.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.98),
        scalar_lr_scale: float = 0.1,
        eps: float = 1e-8,
        min_rms: float = 1e-5,
        max_rms: float = 3.0,
        clipping_scale: float = 2.0,
        clipping_period: int = 100,
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, scalar_lr_scale=scalar_lr_scale, eps=eps, min_rms=min_rms, max_rms=max_rms,
            clipping_scale=clipping_scale, clipping_period=clipping_period,
        )  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            members = [parameter for parameter in group["params"] if parameter.grad is not None]
            if members:
                self._step_group(group, members)

    def _step_group(self, group: dict[str, Any], members: list[Tensor]) -> None:
        """One pass over the weights for their sizes, one with the gradients for the sizes' gradients, one for Adam.

        Adam's step relative to a tensor's size is Adam with the learning rate times that size: PyTorch's fused kernel
        does it. All that is one number a tensor is done for all tensors at once.
        """
        for parameter in members:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["first"] = torch.zeros_like(parameter)
                state["second"] = torch.zeros_like(parameter)
                state["scale_second"] = parameter.new_zeros(())
        states = [self.state[parameter] for parameter in members]
        grads = [parameter.grad for parameter in members if parameter.grad is not None]
        lr: float = group["lr"]
        first_decay, second_decay = group["betas"]
        count = torch.tensor([float(parameter.numel()) for parameter in members], device=members[0].device)
        scalar = count == 1
        size = torch.stack(torch._foreach_norm(members)) / count.sqrt()
        clip = self._clip(group, states[0], torch.stack(torch._foreach_norm(grads)), size, scalar)

        # The gradient with respect to the logarithm of each tensor's size.
        products = zip(members, grads, strict=True)
        slope = torch.stack([torch.dot(p.flatten(), grad.flatten()) for p, grad in products]) * clip
        torch._foreach_add_([state["step"] for state in states], 1)
        step = torch.stack([state["step"] for state in states])
        second = torch.stack([state["scale_second"] for state in states])
        second.mul_(second_decay).addcmul_(slope, slope, value=1 - second_decay)
        for state, value in zip(states, second.unbind(), strict=True):
            state["scale_second"] = value.clone()
        slope = slope / ((second / (1 - second_decay**step)).sqrt() + group["eps"])
        shrink = lr * group["scalar_lr_scale"] * slope
        # A tensor may not grow beyond max_rms nor vanish below min_rms.
        shrink = torch.where(size >= group["max_rms"], shrink.clamp(min=0), shrink)
        shrink = torch.where(size <= group["min_rms"], shrink.clamp(max=0), shrink)
        shrink = shrink.masked_fill(scalar, 0.0)
        rates = lr * size.clamp(group["min_rms"], group["max_rms"])
        rates = rates.masked_fill(scalar, lr * group["scalar_lr_scale"])

        torch._foreach_mul_(members, list((1 - shrink).unbind()))
        scale = torch.tensor(1 / clip, device=count.device) if clip < 1 else None
        for parameter, grad, state, rate in zip(members, grads, states, rates.unbind(), strict=True):
            torch._fused_adam_(
                [parameter], [grad], [state["first"]], [state["second"]], [], [state["step"]],
                lr=rate, beta1=first_decay, beta2=second_decay, weight_decay=0.0, eps=group["eps"],
                amsgrad=False, maximize=False, grad_scale=scale, found_inf=None,
            )  # fmt: skip
            if parameter.numel() == 1:
                parameter.clamp_(-10.0, 10.0)

    def _clip(
        self, group: dict[str, Any], holder: dict[str, Any], norms: Tensor, size: Tensor, scalar: Tensor
    ) -> float:
        """Factor ≤ 1 for this step's gradients, from the median norm of the recent steps.

        Args:
            holder: state in which the recent norms are kept.
            norms, size, scalar: of each tensor: its gradient's norm, its root-mean-square, whether it is one number.
        """
        norm = float(torch.linalg.vector_norm(norms * size.masked_fill(scalar, 1.0)))
        recent: list[float] = holder.setdefault("recent_norms", [])
        factor = 1.0
        if len(recent) >= 10:
            limit = group["clipping_scale"] * sorted(recent)[len(recent) // 2]
            factor = min(1.0, limit / (norm + 1e-20))
        recent.append(norm * factor)
        del recent[: -group["clipping_period"]]
        return factor


def _scaled_adam(named: NamedParameters, config: TrainConfig) -> torch.optim.Optimizer:
    return ScaledAdam([parameter for _, parameter in named], lr=config.base_lr)


def _adamw(named: NamedParameters, config: TrainConfig) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for _, p in named if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.base_lr, betas=(0.9, 0.98), fused=True)


OPTIMIZERS: dict[str, Callable[[NamedParameters, TrainConfig], torch.optim.Optimizer]] = {
    "ScaledAdam": _scaled_adam,
    "AdamW": _adamw,
}
