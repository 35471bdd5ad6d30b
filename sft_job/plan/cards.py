"""GPUs: how much memory tensors can have, and what rates a training step really reaches (no data sheets)."""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from sft_job.config.fields import nearest
from sft_job.contract import ExitCode
from sft_job.errors import Problem

Curve = Sequence[tuple[int, float, float]]
"""(tokens of a document, forward TFLOP/s, forward and backward together), causal, by rising length."""

# H200, 32 query heads, 8 key/value heads, head_dim 128, bf16, measured 2026-11-22 at 4,096 (8 documents in a pack),
# 8,192, 32,768 and 131,072 tokens. Shorter ones: the same kernels' known fall towards short documents
# (flash-attention 3's published forward at 2,048: 0.87 of that at 8,192), and below that by the launch.
_FLASH4: Curve = (
    (256, 110, 100),
    (1024, 340, 320),
    (2048, 470, 450),
    (4096, 532, 528),
    (8192, 598, 552),
    (32768, 655, 619),
    (131072, 654, 623),
)
_CUDNN: Curve = ((1024, 280, 260), (4096, 480, 470), (8192, 534, 526), (32768, 591, 559), (131072, 566, 547))
_FLASH2: Curve = (
    (256, 90, 80),
    (1024, 240, 200),
    (2048, 300, 260),
    (4096, 334, 296),
    (8192, 326, 298),
    (32768, 377, 344),
    (131072, 365, 346),
)
_VARLEN: Curve = ((256, 85, 75), (1024, 220, 185), (4096, 321, 286), (8192, 299, 285), (131072, 330, 320))
_SDPA: Curve = ((256, 60, 55), (1024, 180, 170), (8192, 286, 286), (32768, 350, 327), (131072, 334, 329))
_EAGER: Curve = ((256, 20, 20), (8192, 30, 30))
CURVES: Mapping[str, Curve] = MappingProxyType(
    {
        "flash4": _FLASH4,
        "cudnn": _CUDNN,
        "flash2": _FLASH2,
        "torch_varlen": _VARLEN,
        "sdpa": _SDPA,
        "eager": _EAGER,
    }
)


@dataclass(frozen=True)
class Card:
    """One kind of GPU.

    Attributes:
        name: on the command line.
        title: for people.
        memory: GiB that a process can have for tensors: the card's less what CUDA takes for itself.
        ceiling: TFLOP/s of a long 8192^3 matrix product in bf16; what shares of the ceiling are shares of.
        bf16: TFLOP/s of the products of a training step.
        fp8: of those in fp8 (tensorwise), casts included; 0 = the card has no fp8 units.
        fp32: of those in fp32.
        bandwidth: TB/s that element-wise kernels reach, reads and writes together.
        flash: the fastest attention backend that the card can run.
        attention: its rates over those of an H200.
        link: GB/s that a GPU sends to others of its node in a large collective.
        network: GB/s that a GPU sends to other nodes.
        host: GB/s between page-locked host memory and the GPU, each way.
        measured: the rates come from runs of this job on such a card; False = from others' measurements, scaled.
    """

    name: str
    title: str
    memory: float
    ceiling: float
    bf16: float
    fp8: float
    fp32: float
    bandwidth: float
    flash: str
    attention: float
    link: float
    network: float
    host: float
    measured: bool = False

    def attention_rate(self, backend: str, length: int, *, backward: bool) -> float:
        """TFLOP/s of causal attention over documents of this length; with ``backward`` of both passes together."""
        curve = CURVES.get(backend, _SDPA)
        lengths = [point[0] for point in curve]
        rates = [point[1 + backward] for point in curve]
        after = bisect(lengths, length)
        if after == 0:
            rate = rates[0] * max(length, 16) / lengths[0]  # the launch is what counts
        elif after == len(curve):
            rate = rates[-1]
        else:
            share = (length - lengths[after - 1]) / (lengths[after] - lengths[after - 1])
            rate = rates[after - 1] + share * (rates[after] - rates[after - 1])
        return rate * self.attention


# H200: memory and rates of this job's own runs (benchmarks/results/throughput_*_h200_2026-11-23): 138.5 GiB usable,
# 690 TFLOP/s in the 8192^3 product beside the runs (power limit 700 W; another host of the kind 781), 675 for the
# products of the steps (7B, 4B), fp8 from the 7B's step with tensorwise scaling; AdamW's pass 2.7 TB/s and element-wise
# kernels 3.4 (device copy: 4.16); all-gather 278 and reduce-scatter 274 GB/s between two cards, pinned copies 55 GB/s
# (measured 2026-11-22). Between nodes nothing was measured: 400 Gbit/s for each GPU, 0.9 of it.
_H200 = Card("h200", "NVIDIA H200", 138.5, 690, 675, 1070, 45, 3.3, "flash4", 1.0, 270, 45, 50, measured=True)
# H100 SXM: the H200's die and power limit (others saw FA3 within 4 % on both), HBM3 at 3.35 instead of 4.8 TB/s.
_H100 = Card("h100", "NVIDIA H100 SXM 80GB", 78.0, 690, 675, 1070, 45, 2.4, "flash4", 1.0, 270, 45, 50)
# A100 SXM: matrix products at 0.36 and attention at 0.37 of FA3 on an H200, which is 0.62 of FA2's rates there.
_A100 = Card("a100", "NVIDIA A100 SXM 80GB", 78.2, 260, 245, 0, 17, 1.55, "flash2", 0.62, 200, 22, 22)


def _like(card: Card, **changes: object) -> Card:
    return Card(**{**card.__dict__, "measured": False, **changes})  # pyright: ignore[reportArgumentType]


# The others by their data sheets' ratios to the card they are like: never run by this job.
_ALL: tuple[Card, ...] = (
    _H200,
    _H100,
    _like(
        _H200, name="h100-nvl", title="NVIDIA H100 NVL 94GB", memory=92.0, ceiling=560, bf16=545, fp8=870, bandwidth=2.8
    ),
    _like(_H100, name="h800", title="NVIDIA H800 80GB", link=150),
    _like(
        _H200,
        name="h20",
        title="NVIDIA H20 96GB",
        memory=93.5,
        ceiling=137,
        bf16=134,
        fp8=250,
        fp32=35,
        bandwidth=2.9,
        attention=0.21,
    ),
    _like(_H200, name="gh200", title="NVIDIA GH200 96GB", memory=93.5, bandwidth=2.9, host=300),
    _like(
        _H200,
        name="b200",
        title="NVIDIA B200 180GB",
        memory=176.5,
        ceiling=1600,
        bf16=1500,
        fp8=2300,
        fp32=65,
        bandwidth=5.5,
        attention=2.4,
        link=540,
    ),
    _A100,
    _like(_A100, name="a100-40gb", title="NVIDIA A100 SXM 40GB", memory=38.6, bandwidth=1.2),
    _like(_A100, name="a800", title="NVIDIA A800 80GB", link=150),
    _like(
        _A100,
        name="l40s",
        title="NVIDIA L40S 48GB",
        memory=43.5,
        ceiling=250,
        bf16=225,
        fp8=340,
        fp32=60,
        bandwidth=0.68,
        attention=0.5,
        link=20,
    ),
    _like(
        _A100,
        name="rtx4090",
        title="NVIDIA RTX 4090 24GB",
        memory=23.0,
        ceiling=155,
        bf16=145,
        fp8=250,
        fp32=60,
        bandwidth=0.8,
        attention=0.45,
        link=18,
    ),
)
CARDS: Mapping[str, Card] = MappingProxyType({card.name: card for card in _ALL})
"""Name -> card."""


_NO_CARD = 400
"""GB that are the host's: a GH200 is called by them."""
_CUDA_SHARE = 0.96
"""Share of a card's nominal GB that tensors have as GiB: what CUDA takes for itself is off."""


def find_card(name: str) -> Card | Problem:
    """A card by its name, also as the driver writes it, or what is wrong with the name (exit 2).

    Where a name tells another memory than the card of that kind has, that counts.
    """
    plain = re.sub(r"[\s_]+", "-", name.strip().lower().removeprefix("nvidia").strip())
    short = re.sub(r"-(sxm\d?|hbm\d?e?|\d+gb?|pcie|geforce)(?=-|$)", "", plain)
    short = short.replace("geforce-", "").replace("rtx-", "rtx")
    for each in (plain, re.sub(r"-(sxm\d?|pcie)(?=-|$)", "", plain), short):
        if each in CARDS:
            return _as_named(CARDS[each], plain)
    near = nearest(plain, CARDS)
    guess = f"did you mean {near}? " if near else ""
    fix = f"{guess}one of {', '.join(CARDS)}; for another card name the most alike one and its --gpu-memory"
    return Problem(ExitCode.CONFIG, "--gpu", "there are no figures for such a card", fix, name, "command line")


def _as_named(card: Card, plain: str) -> Card:
    """With the memory that the name tells, and a PCIe card's slower memory, link and clock."""
    told = re.search(r"-(\d+)gb?(?=-|$)", plain)
    nominal = re.search(r"(\d+)GB", card.title)
    if told and nominal and told[1] != nominal[1] and int(told[1]) < _NO_CARD:
        title = card.title.replace(nominal[0], f"{told[1]}GB")
        card = _like(card, memory=round(min(float(told[1]) * _CUDA_SHARE, card.memory * 2), 1), title=title)
    if "-pcie" in plain and card.name.startswith(("h100", "a100", "h800", "a800")):
        power = 0.65 if card.name.startswith("h") else 0.85
        rates = {"ceiling": card.ceiling * power, "bf16": card.bf16 * power, "fp8": card.fp8 * power}
        slower = {"attention": card.attention * power, "bandwidth": card.bandwidth * 0.75, "link": 20.0}
        card = _like(card, title=card.title.replace("SXM", "PCIe"), **rates, **slower)
    return card


def _fit(name: str) -> tuple[int, int]:
    return -len(name.partition("-")[0]), len(name)


def card_like(name: str, memory: float | None = None) -> Card:
    """The nearest known kind to a card that is present, for whatever name its driver gives.

    Args:
        name: as the driver writes it.
        memory: GiB that it has, where somebody knows.
    """
    found = find_card(name)
    if isinstance(found, Problem):
        told = re.search(r"(\d+)\s*gb?\b", name, re.IGNORECASE)
        memory = memory or (float(told[1]) * _CUDA_SHARE if told else None)
        plain = re.sub(r"[^a-z0-9]", "", name.lower().replace("nvidia", ""))
        kinds = sorted((each for each in CARDS if plain.startswith(each.partition("-")[0])), key=_fit)
        found = CARDS[kinds[0] if kinds else "h100"]
    return _like(found, memory=memory) if memory else found
