"""A case in three orders of warps and programs."""

from __future__ import annotations

import torch

from tests.emulated.cases import Case
from tests.emulator.driver import Emulation
from tests.emulator.execute import ORDERS
from tests.support.kernels.lab import Lab


def check_orders(emulation: Emulation, case: Case) -> None:
    """Raises unless the case's values are right, with the same bits in every order."""
    first = None
    for emulation.order in ORDERS:
        torch.manual_seed(0)
        found = case(Lab())
        bits = {key: t.contiguous().view(torch.uint8) for key, t in found.items() if t.numel()}
        first = first or bits
        assert bits.keys() == first.keys()
        for key, own in bits.items():
            assert torch.equal(own, first[key]), f"{key} differs in order {emulation.order}"
