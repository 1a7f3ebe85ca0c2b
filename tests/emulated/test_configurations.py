"""Every config that `choose` returns for the layers of Llama 3.1 8B, forced, in three orders.

The list comes from `choose` for an A100 where ``$EMULATE`` is sm_80, for an H100 where it is sm_90.
`make emulate` runs all of them.
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from tests.emulated.configurations import CARDS, Configuration, case_of, configurations
from tests.emulated.orders import check_orders
from tests.emulator.driver import Emulation

CARD = CARDS.get(os.environ.get("EMULATE", ""))


@pytest.mark.drawn(0.02)
@pytest.mark.parametrize("given", configurations(CARD) if CARD else (), ids=str)
def test_values_and_bits(emulation: Emulation, given: Configuration) -> None:
    check_orders(emulation, case_of(given))


@pytest.mark.skipif(CARD is None, reason="configs are listed for sm_80 and sm_90")
def test_no_two_have_the_same_name() -> None:
    """Names tell them apart in the log of `make emulate`."""
    names = [str(given) for given in configurations(CARD)]
    assert len(names) == len(set(names)) > 100
