"""What is measured, in which order, and the floor of each measurement."""

from __future__ import annotations

from typing import NamedTuple

# Up to here a linear is bound by its weight's bytes, above by the base GEMM's FLOPs.
DECODE_MAX_ROWS = 64

# (model, layers of one shape, K, N)
LLAMA = "Llama-3.1-8B"
QWEN = "Qwen3-0.6B"
TINY = "tiny"
LLAMA_LAYERS = (("q/o", 4096, 4096), ("gate/up", 4096, 14336), ("down", 14336, 4096))
LLAMA_NARROW = (("k/v", 4096, 1024),)
QWEN_LAYERS = (("q", 1024, 2048), ("gate/up", 1024, 3072), ("down", 3072, 1024))
QWEN_NARROW = (("o", 2048, 1024), ("k/v", 1024, 1024))
ROWS = (1, 64, 2048, 16, 8192)
TRAIN_ROWS = (2048, 8192)
RANKS = (16, 64)


class Point(NamedTuple):
    """One problem, which every contender solves in the same process.

    Attributes:
        mode: ``"forward"`` or ``"train"`` (forward and backward).
        model: Where the shape comes from.
        layer: Which of its linears have it.
        m: Rows of x.
        k: Input features.
        n: Output features.
        r: Rank.
    """

    mode: str
    model: str
    layer: str
    m: int
    k: int
    n: int
    r: int

    def __str__(self) -> str:
        return f"{self.mode} {self.model} {self.layer} M={self.m} K={self.k} N={self.n} r={self.r}"


class Roofs(NamedTuple):
    """What the card was measured to do: bytes a second (read + written), FLOP a second."""

    bytes_per_s: float
    flop_per_s: float


def _forward(model: str, layer: tuple[str, int, int], r: int) -> list[Point]:
    name, k, n = layer
    return [Point("forward", model, name, m, k, n, r) for m in ROWS]


def _train(model: str, layer: tuple[str, int, int], r: int) -> list[Point]:
    name, k, n = layer
    return [Point("train", model, name, m, k, n, r) for m in TRAIN_ROWS]


def all_points() -> list[Point]:
    """Returns every point, the most telling first: the end may fall behind the deadline."""
    points: list[Point] = []
    for r in RANKS:
        first, *others = LLAMA_LAYERS
        points += _forward(LLAMA, first, r) + _train(LLAMA, first, r)
        points += _forward(QWEN, QWEN_LAYERS[0], r)
        for layer in others:
            points += _forward(LLAMA, layer, r)
        for layer in others:
            points += _train(LLAMA, layer, r)
        for layer in QWEN_LAYERS[1:]:
            points += _forward(QWEN, layer, r)
        for layer in LLAMA_NARROW:
            points += _forward(LLAMA, layer, r)
        for layer in QWEN_NARROW:
            points += _forward(QWEN, layer, r)
        points += _train(QWEN, QWEN_LAYERS[0], r)
    return points


def tiny_points() -> list[Point]:
    """Returns the points of a dry run: off the tiles, and small enough for any machine."""
    return [
        Point("forward", TINY, "a", 3, 48, 40, 4),
        Point("forward", TINY, "b", 80, 40, 72, 3),
        Point("train", TINY, "a", 17, 48, 40, 4),
    ]


def distinct_problems(points: list[Point]) -> list[Point]:
    """Returns one point for each problem, whatever layers have it: what must be compiled."""
    seen: dict[tuple[str, int, int, int, int], Point] = {}
    for point in points:
        seen.setdefault((point.mode, point.m, point.k, point.n, point.r), point)
    return list(seen.values())


def floor_us(kind: str, point: Point, element: int, roofs: Roofs) -> float:
    """Returns the time that no version of ``kind`` beats by much, in microseconds.

    The larger of bytes over measured bandwidth and FLOPs over the measured GEMM rate.

    Args:
        kind: ``"base"`` (no adapter), ``"full"`` (base and adapter), ``"part"`` (the adapter's
            term added to a given y), each for a forward; ``"train_base"`` and ``"train"`` for
            forward and backward.
        point: The problem.
        element: Bytes of an element of x.
        roofs: What this card was measured to do.
    """
    _, _, _, m, k, n, r = point
    factors = r * (k + n)
    # Above the decode sizes the shrink and the GEMM each read x from memory.
    x_reads = 1 if m <= DECODE_MAX_ROWS else 2
    elements, flop = {
        "base": (n * k + m * (k + n), 2 * m * n * k),
        "full": (n * k + m * (x_reads * k + n) + factors + 2 * m * r, 2 * m * n * k),
        # x and s read, y read and written, s written
        "part": (m * (k + 2 * n) + factors + 2 * m * r, 2 * m * r * (k + n)),
        # forward, then dx: the weight and dy read, dx written
        "train_base": (2 * n * k + 2 * m * (k + n), 4 * m * n * k),
        # the same with x read for shrink, GEMM and d_lora_a, dy for ds and dx, factors read in
        # both passes and their gradients written, s and ds written and read
        "train": (2 * n * k + m * (4 * k + 3 * n) + 3 * factors + 4 * m * r, 4 * m * n * k),
    }[kind]
    return 1e6 * max(element * elements / roofs.bytes_per_s, flop / roofs.flop_per_s)
