"""The comparisons of `bench/assumptions.py` compute what they say."""

from __future__ import annotations

import torch

from tests.support.kernels.lab import Lab


def test_every_program_reads_all_of_x(lab: Lab) -> None:
    """The bytes that the L2 cache delivers are counted as programs times the size of x."""
    from fastlora.bench import assumptions

    x = torch.arange(assumptions.BLOCK * assumptions.UNROLL + 5, device=lab.device).float() % 7
    out = torch.full((3,), float("nan"), device=lab.device)
    assumptions.reread(out, x)
    assert torch.equal(out, x.sum().expand(3))


def test_both_ways_to_sum_planes_write_the_same(lab: Lab) -> None:
    from fastlora.bench import assumptions

    (comparison,) = assumptions.planes(torch.device(lab.device), torch.float32, True)
    operands = comparison.draw()
    modules, s = operands.tensors
    found = []
    for run in comparison.runs.values():
        for module in modules:
            module.y.fill_(float("nan"))
        run(operands)
        torch.testing.assert_close(s, operands.x.sum(0))
        found.append([module.y.clone() for module in modules])
    ranks = s.split([module.lora_b.shape[1] for module in modules], dim=1)
    for y, other, module, own in zip(*found, modules, ranks, strict=True):
        torch.testing.assert_close(y, own @ module.lora_b.t())
        torch.testing.assert_close(y, other)
