"""The problems that are measured, in order, and the floor of each measurement."""

from __future__ import annotations

from typing import NamedTuple

# Up to this many rows, the weight's bytes limit a linear layer; beyond, the base GEMM's FLOPs do.
DECODE_MAX_ROWS = 64

# (model, layers of one shape, K, N)
LLAMA = "Llama-3.1-8B"
QWEN = "Qwen3-0.6B"
TINY = "tiny"
LLAMA_LAYERS = (("q/o", 4096, 4096), ("gate/up", 4096, 14336), ("down", 14336, 4096))
LLAMA_NARROW = (("k/v", 4096, 1024),)
QWEN_LAYERS = (("q", 1024, 2048), ("gate/up", 1024, 3072), ("down", 3072, 1024))
QWEN_NARROW = (("o", 2048, 1024), ("k/v", 1024, 1024))
# The linear layers of a decoder layer as (K, N), in the order of their calls.
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
# The linear layers of a decoder layer that receive the same x.
SHARED_INPUTS = (
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj",),
    ("gate_proj", "up_proj"),
    ("down_proj",),
)
ROWS = (1, 64, 2048, 16, 8192)
# 64 sequences, with one token each, and with 32 tokens each.
MIXED_ROWS = (64, 2048)
MIXED_SEQUENCES = 64
MIXED_ADAPTERS = (64, 1, 16, 4)
# The layers that `bench/tune.py` tunes together. In some models, only k and v have adapters.
TUNE_GROUPS = (*SHARED_INPUTS, ("k_proj", "v_proj"))
# Under dropout, every layer has launches of its own in training.
TUNE_ALONE = ("k_proj", "gate_proj")
TUNE_DECODE = (64, 1, 16, 24, 48)
TUNE_PREFILL = 2048
# Mixed batches of few adapters use one GEMM. Those of many add an expand to the library's GEMM.
TUNE_ADAPTERS = (4, 64)
TRAIN_ROWS = (2048, 8192)
_MIXED_TRAINING = ((4, 1, 16), TRAIN_ROWS)  # adapters, rows
RANKS = (16, 64)


class Point(NamedTuple):
    """One problem, which all contenders solve in the same process.

    Attributes:
        mode: ``"forward"`` or ``"train"`` (forward and backward). If rows belong to several
            adapters, ``"mixed"`` (forward) or ``"mixed_train"``.
        model: The model that has this shape.
        layer: The model's linear layer that has this shape.
        m: Rows of x.
        k: Input features.
        n: Output features.
        r: Rank, or the largest rank in a mixed batch.
        adapters: Number of adapters in a mixed batch, otherwise 0.
        ranks: Ranks in a mixed batch, such as ``"8+16+64"``. Adapters have them in turn.
        outputs: If several layers receive the same x, the output features of each, such as
            ``"4096+1024+1024"``. Their sum is ``n``.
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
    outputs: str = ""

    def __str__(self) -> str:
        text = f"{self.mode} {self.model} {self.layer} M={self.m} K={self.k} N={self.n} "
        if self.adapters:
            return text + f"r={self.ranks} of {self.adapters} adapters"
        return text + f"r={self.r}"

    @property
    def ranks_of_adapters(self) -> list[int]:
        """The rank of each adapter. Outside of a mixed batch, there is one."""
        ranks = [int(word) for word in self.ranks.split("+")] if self.ranks else [self.r]
        return [ranks[i % len(ranks)] for i in range(max(self.adapters, 1))]

    @property
    def outputs_of_layers(self) -> list[int]:
        """The output features of each layer that receives x."""
        return [int(word) for word in self.outputs.split("+")] if self.outputs else [self.n]


class Roofs(NamedTuple):
    """Measured peak rates of the card: bytes per second (read + written) and FLOP per second."""

    bytes_per_s: float
    flop_per_s: float


def _forward(model: str, layer: tuple[str, int, int], r: int) -> list[Point]:
    name, k, n = layer
    return [Point("forward", model, name, m, k, n, r) for m in ROWS]


def _train(model: str, layer: tuple[str, int, int], r: int) -> list[Point]:
    name, k, n = layer
    return [Point("train", model, name, m, k, n, r) for m in TRAIN_ROWS]


def all_points() -> list[Point]:
    """Return every point, the most informative first, because the deadline may cut off the end."""
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
    """Return every point of mixed batches, the most informative first."""
    points: list[Point] = []
    for layers in ([(LLAMA, LLAMA_LAYERS[0])], [(LLAMA, LLAMA_LAYERS[1]), (QWEN, QWEN_LAYERS[0])]):
        for ranks in ("16", "8+16+64"):
            for model, layer in layers:
                for mode in ("mixed", "mixed_train"):
                    points += _mixed(mode, model, layer, ranks)
    return points


def tiny_mixed_points() -> list[Point]:
    """Return the points of mixed batches for a dry run."""
    return [
        Point("mixed", TINY, "a", 6, 48, 40, 8, 3, "3+8"),
        Point("mixed_train", TINY, "a", 7, 48, 40, 8, 3, "3+8"),
        Point("mixed", TINY, "b", 128, 40, 72, 4, 5, "4"),
    ]


def tune_points() -> list[Point]:
    """Return the problems for which tiles and plans are tuned, in no particular order."""
    points = []
    for r in RANKS:
        for names in TUNE_GROUPS:
            points += [grouped_point("forward", names, m, r) for m in (*TUNE_DECODE, TUNE_PREFILL)]
            points += [grouped_point("train", names, m, r) for m in TRAIN_ROWS]
            for m in (*TUNE_DECODE, TUNE_PREFILL):
                for adapters in sorted({min(count, m) for count in TUNE_ADAPTERS}):
                    points.append(grouped_point("mixed", names, m, r, adapters))
            points += [
                grouped_point("mixed_train", names, m, r, TUNE_ADAPTERS[0]) for m in TRAIN_ROWS
            ]
        points += [grouped_point("train", (name,), m, r) for name in TUNE_ALONE for m in TRAIN_ROWS]
    return points


def grouped_point(mode: str, names: tuple[str, ...], m: int, r: int, adapters: int = 0) -> Point:
    """Return the problem of layers of Llama-3.1-8B that receive the same x."""
    sizes = [DECODERS[LLAMA][name] for name in names]
    outputs, layer = [n for _, n in sizes], "|".join(name.removesuffix("_proj") for name in names)
    ranks = str(r) if adapters else ""
    joined = "+".join(map(str, outputs))
    return Point(mode, LLAMA, layer, m, sizes[0][0], sum(outputs), r, adapters, ranks, joined)


def tiny_tune_points() -> list[Point]:
    """Return the problem of a tuner's dry run."""
    return [Point("forward", TINY, "a", 40, 32, 48, 4, outputs="32+16")]


def tiny_points() -> list[Point]:
    """Return the points of a dry run, which no tile divides and which are small enough anywhere."""
    return [
        Point("forward", TINY, "a", 3, 48, 40, 4),
        Point("forward", TINY, "b", 80, 40, 72, 3),
        Point("train", TINY, "a", 17, 48, 40, 4),
    ]


def distinct_problems(points: list[Point]) -> list[Point]:
    """Return one point for each distinct problem that must be compiled, whatever its layer."""
    seen: dict[tuple[str, int, int, int, int], Point] = {}
    for point in points:
        seen.setdefault((point.mode, point.m, point.k, point.n, point.r), point)
    return list(seen.values())


def floor_us(kind: str, point: Point, element: int, roofs: Roofs) -> float:
    """Return the time that no implementation of ``kind`` can beat by much, in microseconds.

    It is the larger of two times: bytes at the measured bandwidth, and FLOPs at the measured GEMM
    rate.

    Args:
        kind: As in `least_work`.
        point: The problem.
        element: Bytes per element of x.
        roofs: Measured peak rates of this card.
    """
    elements, flop = least_work(kind, point)
    return 1e6 * max(element * elements / roofs.bytes_per_s, flop / roofs.flop_per_s)


def least_work(kind: str, point: Point) -> tuple[float, float]:
    """Return the number of elements that must move, and the FLOPs, of a problem.

    Args:
        kind: For a forward pass, ``"base"`` (no adapter), ``"full"`` (base and adapter), ``"part"``
            (the adapter's term added to a given y), or ``"mixed"`` (base and each row's own
            adapter). For forward and backward, ``"train_base"``, ``"train"``, or ``"mixed_train"``.
        point: The problem.
    """
    m, k, n, r = point.m, point.k, point.n, point.r
    ranks = point.ranks_of_adapters
    factors = sum(ranks) * (len(point.outputs_of_layers) * k + n)
    mean = sum(ranks) / len(ranks)
    # With more rows than in a decode, the shrink and the GEMM each read x from memory.
    x_reads = 1 if m <= DECODE_MAX_ROWS else 2
    # Forward and backward: x is read for shrink, GEMM, and d_lora_a; dy for ds and dx; y and dx are
    # written. Factors are read in both passes, and their gradients written. s and ds are written
    # and read.
    train = 2 * n * k + m * (4 * k + 3 * n) + 3 * factors + 4 * m * mean, 4 * m * n * k
    return {
        "base": (n * k + m * (k + n), 2 * m * n * k),
        "full": (n * k + m * (x_reads * k + n) + factors + 2 * m * r, 2 * m * n * k),
        # x and s are read, y is read and written, and s is written.
        "part": (m * (k + 2 * n) + factors + 2 * m * r, 2 * m * r * (k + n)),
        # Every adapter's factors are read once. s counts only the columns of each row's adapter.
        "mixed": (
            n * k + m * (x_reads * k + n) + factors + 2 * m * mean,
            2 * m * n * k,
        ),
        # Forward, then dx: the weight and dy are read, and dx is written.
        "train_base": (2 * n * k + 2 * m * (k + n), 4 * m * n * k),
        "train": train,
        "mixed_train": train,
    }[kind]
