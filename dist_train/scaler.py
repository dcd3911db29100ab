"""The loss scale of fp16 (Micikevicius et al. 2018), kept on the device so that no step waits for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_START, _SMALLEST = 2.0**16, 1.0
# Steps without an overflow after which the scale is doubled; as in torch.amp.GradScaler.
_GROWTH_STEPS = 2000


class LossScaler:
    """Halved when a gradient overflows, doubled after a long time without."""

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), _START, device=device)
        self._good_steps = torch.zeros((), device=device)

    def update(self, nonfinite: Tensor) -> None:
        """nonfinite: 1.0 when this step's gradient was not finite, else 0.0."""
        bad = nonfinite > 0
        grown = self._good_steps + 1 >= _GROWTH_STEPS
        self._good_steps = torch.where(bad | grown, torch.zeros_like(self._good_steps), self._good_steps + 1)
        after_good = torch.where(grown, self.scale * 2.0, self.scale)
        self.scale = torch.where(bad, (self.scale * 0.5).clamp(min=_SMALLEST), after_good)

    def at_bottom(self) -> Tensor:
        """1.0 when the scale can fall no further."""
        return (self.scale <= _SMALLEST).double()

    def state_dict(self) -> dict[str, Any]:
        return {"scale": float(self.scale), "growth_tracker": float(self._good_steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale.fill_(state["scale"])
        self._good_steps.fill_(state["growth_tracker"])
