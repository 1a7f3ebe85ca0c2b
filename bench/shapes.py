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
# The linears of a decoder layer, in the order of their calls: (K, N).
DECODERS = {
    LLAMA: {
        "q_proj": (4096, 4096),
        "k_proj": (4096, 1024),
        "v_proj": (4096, 1024),
        "o_proj": (4096, 4096),
        "gate_proj": (4096, 14336),
        "up_proj": (4096, 14336),
        "down_proj": (14336, 4096),
    },
    QWEN: {
        "q_proj": (1024, 2048),
        "k_proj": (1024, 1024),
        "v_proj": (1024, 1024),
        "o_proj": (2048, 1024),
        "gate_proj": (1024, 3072),
        "up_proj": (1024, 3072),
        "down_proj": (3072, 1024),
    },
}
ROWS = (1, 64, 2048, 16, 8192)
# 64 sequences: a token of each, and 32.
MIXED_ROWS = (64, 2048)
MIXED_SEQUENCES = 64
MIXED_ADAPTERS = (64, 1, 16, 4)
# What `bench/tune.py` measures, the most telling first: rows of decode and of prefill or training.
TUNE_DECODE = (64, 1, 16, 32, 24, 48)
TUNE_MANY = (2048, 8192, 512, 128, 256)
TUNE_ADAPTERS = (16, 64, 1, 4)
TRAIN_ROWS = (2048, 8192)
_MIXED_TRAINING = ((4, 1, 16), TRAIN_ROWS)  # adapters, rows
RANKS = (16, 64)


class Point(NamedTuple):
    """One problem, which every contender solves in the same process.

    Attributes:
        mode: ``"forward"``, ``"train"`` (forward and backward), or for rows that belong to several
            adapters ``"mixed"`` (a forward) and ``"mixed_train"``.
        model: Where the shape comes from.
        layer: Which of its linears have it.
        m: Rows of x.
        k: Input features.
        n: Output features.
        r: Rank; of a mixed batch the largest.
        adapters: Of a mixed batch, 0 elsewhere.
        ranks: Of a mixed batch's adapters, which take them in turn, as in ``"8+16+64"``.
    """

    mode: str
    model: str
    layer: str
    m: int
    k: int
    n: int
    r: int
    adapters: int = 0
    ranks: str = ""

    def __str__(self) -> str:
        text = f"{self.mode} {self.model} {self.layer} M={self.m} K={self.k} N={self.n} "
        if self.adapters:
            return text + f"r={self.ranks} of {self.adapters} adapters"
        return text + f"r={self.r}"

    @property
    def ranks_of_adapters(self) -> list[int]:
        """The rank of each adapter; of the only one without a mixed batch."""
        ranks = [int(word) for word in self.ranks.split("+")] if self.ranks else [self.r]
        return [ranks[i % len(ranks)] for i in range(max(self.adapters, 1))]


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


def _mixed(mode: str, model: str, layer: tuple[str, int, int], ranks: str) -> list[Point]:
    name, k, n = layer
    largest = max(map(int, ranks.split("+")))
    counts, rows = (MIXED_ADAPTERS, MIXED_ROWS) if mode == "mixed" else _MIXED_TRAINING
    return [
        Point(mode, model, name, m, k, n, largest, adapters, ranks)
        for adapters in counts
        if adapters > 1 or "+" not in ranks  # one adapter has one rank
        for m in rows
    ]


def mixed_points() -> list[Point]:
    """Returns every point of mixed batches, the most telling first."""
    points: list[Point] = []
    for layers in ([(LLAMA, LLAMA_LAYERS[0])], [(LLAMA, LLAMA_LAYERS[1]), (QWEN, QWEN_LAYERS[0])]):
        for ranks in ("16", "8+16+64"):
            for model, layer in layers:
                for mode in ("mixed", "mixed_train"):
                    points += _mixed(mode, model, layer, ranks)
    return points


def tiny_mixed_points() -> list[Point]:
    """Returns the points of mixed batches of a dry run."""
    return [
        Point("mixed", TINY, "a", 6, 48, 40, 8, 3, "3+8"),
        Point("mixed_train", TINY, "a", 7, 48, 40, 8, 3, "3+8"),
        Point("mixed", TINY, "b", 128, 40, 72, 4, 5, "4"),
    ]


def tune_points() -> list[Point]:
    """Returns the problems whose tiles and plans are tuned, the most telling first."""
    points = []
    for r in RANKS:
        for rows in (TUNE_DECODE, TUNE_MANY):
            for m in rows:
                for name, k, n in (*LLAMA_LAYERS, *LLAMA_NARROW):
                    points.append(Point("forward", LLAMA, name, m, k, n, r))
                    if m in TRAIN_ROWS:
                        points.append(Point("train", LLAMA, name, m, k, n, r))
                    for adapters in TUNE_ADAPTERS:
                        mixed = m, k, n, r, adapters, str(r)
                        points.append(Point("mixed", LLAMA, name, *mixed))
                        if m in TRAIN_ROWS and adapters in _MIXED_TRAINING[0]:
                            points.append(Point("mixed_train", LLAMA, name, *mixed))
    return points


def tiny_tune_points() -> list[Point]:
    """Returns the problem of a tuner's dry run."""
    return [Point("forward", TINY, "a", 40, 32, 48, 4)]


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
        kind: As in `least_work`.
        point: The problem.
        element: Bytes of an element of x.
        roofs: What this card was measured to do.
    """
    elements, flop = least_work(kind, point)
    return 1e6 * max(element * elements / roofs.bytes_per_s, flop / roofs.flop_per_s)


def least_work(kind: str, point: Point) -> tuple[float, float]:
    """Returns the elements that must move, and the FLOPs, of a problem.

    Args:
        kind: ``"base"`` (no adapter), ``"full"`` (base and adapter), ``"part"`` (the adapter's
            term added to a given y), ``"mixed"`` (base and every row's own adapter), each for a
            forward; ``"train_base"``, ``"train"`` and ``"mixed_train"`` for forward and backward.
        point: The problem.
    """
    m, k, n, r = point.m, point.k, point.n, point.r
    ranks = point.ranks_of_adapters
    factors, mean = sum(ranks) * (k + n), sum(ranks) / len(ranks)
    # Above the decode sizes the shrink and the GEMM each read x from memory.
    x_reads = 1 if m <= DECODE_MAX_ROWS else 2
    # forward and backward: x read for shrink, GEMM and d_lora_a, dy for ds and dx, y and dx
    # written; factors read in both passes, their gradients written; s and ds written and read
    train = 2 * n * k + m * (4 * k + 3 * n) + 3 * factors + 4 * m * mean, 4 * m * n * k
    return {
        "base": (n * k + m * (k + n), 2 * m * n * k),
        "full": (n * k + m * (x_reads * k + n) + factors + 2 * m * r, 2 * m * n * k),
        # x and s read, y read and written, s written
        "part": (m * (k + 2 * n) + factors + 2 * m * r, 2 * m * r * (k + n)),
        # every adapter's factors once, and of s what the rows have
        "mixed": (
            n * k + m * (x_reads * k + n) + factors + 2 * m * mean,
            2 * m * n * k,
        ),
        # forward, then dx: the weight and dy read, dx written
        "train_base": (2 * n * k + 2 * m * (k + n), 4 * m * n * k),
        "train": train,
        "mixed_train": train,
    }[kind]
