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
        for parameter in members:
            state = self.state[parameter]
            if not state:
                state["step"] = 0
                state["first"] = torch.zeros_like(parameter)
                state["second"] = torch.zeros_like(parameter)
                state["rms"] = self._rms(parameter)
                state["scale_second"] = parameter.new_zeros(())
        clip = self._clip(group, members)
        first_decay, second_decay = group["betas"]
        grads = torch._foreach_mul(
            [parameter.grad for parameter in members if parameter.grad is not None], clip
        )
        firsts = [self.state[parameter]["first"] for parameter in members]
        seconds = [self.state[parameter]["second"] for parameter in members]
        torch._foreach_lerp_(firsts, grads, 1 - first_decay)
        torch._foreach_mul_(seconds, second_decay)
        torch._foreach_addcmul_(seconds, grads, grads, 1 - second_decay)
        for parameter, grad, first, second in zip(members, grads, firsts, seconds, strict=True):
            state = self.state[parameter]
            state["step"] += 1
            first_bias = 1 - first_decay ** state["step"]
            second_bias = 1 - second_decay ** state["step"]
            denominator = (second / second_bias).sqrt_().add_(group["eps"])
            direction = first / first_bias / denominator
            if parameter.numel() == 1:
                parameter.sub_(direction, alpha=group["lr"] * group["scalar_lr_scale"])
                parameter.clamp_(-10.0, 10.0)
                continue
            state["rms"] = self._rms(parameter)
            # The gradient with respect to the logarithm of the tensor's size.
            scale_grad = (parameter * grad).sum()
            state["scale_second"].mul_(second_decay).addcmul_(scale_grad, scale_grad, value=1 - second_decay)
            scale_step = scale_grad / ((state["scale_second"] / second_bias).sqrt() + group["eps"])
            allowed = state["rms"].clamp(group["min_rms"], group["max_rms"])
            shrink = group["lr"] * group["scalar_lr_scale"] * scale_step
            # A tensor may not grow beyond max_rms nor vanish below min_rms.
            shrink = torch.where(state["rms"] >= group["max_rms"], shrink.clamp(min=0), shrink)
            shrink = torch.where(state["rms"] <= group["min_rms"], shrink.clamp(max=0), shrink)
            parameter.mul_(1 - shrink).addcmul_(direction, allowed.expand_as(direction), value=-group["lr"])

    def _clip(self, group: dict[str, Any], members: list[Tensor]) -> float:
        """Factor ≤ 1 for this step's gradients, from the median norm of the recent steps."""
        norms = torch.stack(
            [
                torch.linalg.vector_norm(p.grad) * (self.state[p]["rms"] if p.numel() > 1 else 1.0)  # type: ignore[arg-type]
                for p in members
            ]
        )
        norm = float(torch.linalg.vector_norm(norms))
        holder = self.state[members[0]]
        recent: list[float] = holder.setdefault("recent_norms", [])
        factor = 1.0
        if len(recent) >= 10:
            limit = group["clipping_scale"] * sorted(recent)[len(recent) // 2]
            factor = min(1.0, limit / (norm + 1e-20))
        recent.append(norm * factor)
        del recent[: -group["clipping_period"]]
        return factor

    @staticmethod
    def _rms(parameter: Tensor) -> Tensor:
        return parameter.square().mean().sqrt()


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
