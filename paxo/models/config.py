"""The shape of a Llama-family decoder and of its adapters, checked when it is built."""

import dataclasses
import math
import typing
from typing import Literal

Remat = Literal["none", "full", "dots"]
Float = Literal["float32", "bfloat16"]
Attention = Literal["auto", "dense", "blocks", "splash", "cudnn"]
Projection = Literal["qkv", "out", "gate_up", "down"]
PROJECTIONS: tuple[Projection, ...] = typing.get_args(Projection)

# With few layers a loop over them runs faster than a scan and compiles quickly enough.
UNROLL_AT_MOST = 8


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of the rotary frequencies for contexts longer than the trained one.

    Attributes:
        factor: how far low frequencies are slowed down.
        low_freq_factor: wavelengths above `original_max_positions / low_freq_factor` are slowed.
        high_freq_factor: wavelengths below `original_max_positions / high_freq_factor` stay.
        original_max_positions: context length of the pre-training, tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self):
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope_scaling.high_freq_factor must exceed low_freq_factor; got "
                f"{self.high_freq_factor} and {self.low_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama-family decoder.

    Attributes:
        vocab_size: V, tokens.
        hidden_size: D, width of the residual stream.
        num_layers: N.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides `num_heads` (grouped-query attention).
        head_dim: width of a head, even (rotary pairs).
        intermediate_size: width of the SwiGLU.
        max_positions: longest sequence, tokens.
        norm_eps: epsilon of RMSNorm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: Llama 3's scaling, or None.
        tie_embeddings: whether the head is the transposed embedding.
        attention_bias: biases on query, key and value projections (Qwen2, some Llamas).
        attention_out_bias: bias on the attention's output projection.
        mlp_bias: biases in the SwiGLU.
        initializer_range: standard deviation of the initial weights.
        param_dtype: dtype in which parameters are kept.
        compute_dtype: dtype of activations and matrix products; norms and softmax use float32.
        remat: what is computed again in the backward pass: nothing, all of a layer ("full"), or
            all but the matrix products without a batch axis ("dots").
        unroll: whether the scan over layers is unrolled; None unrolls up to 8 layers. Unrolling is
            about 20 % faster for small models on CPU, a rolled scan compiles in constant time and
            is what rematerialisation needs in order to save memory.
        attention: how attention over packed rows is computed: all scores at once ("dense"), pairs
            of blocks that hold any ("blocks"), by the kernels of TPUs ("splash") or of GPUs
            ("cudnn"); "auto" chooses by size, dtype and the devices that the program is for.

    Raises:
        ValueError: if sizes do not fit one another.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = True
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    param_dtype: Float = "float32"
    compute_dtype: Float = "float32"
    remat: Remat = "none"
    unroll: bool | None = None
    attention: Attention = "auto"

    def __post_init__(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "max_positions",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1; got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_kv_heads must divide num_heads; got {self.num_kv_heads} and "
                f"{self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim must be even for rotary pairs; got {self.head_dim}")
        for name, choices in (
            ("param_dtype", ("float32", "bfloat16")),
            ("compute_dtype", ("float32", "bfloat16")),
            ("remat", ("none", "full", "dots")),
            ("attention", typing.get_args(Attention)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"model.{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}"
                )

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one key and value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def unrolled(self) -> bool:
        """Whether the scan over layers is unrolled."""
        return self.num_layers <= UNROLL_AT_MOST if self.unroll is None else self.unroll


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters on the projections of a frozen decoder (Hu et al. 2021, arXiv:2106.09685).

    A projection's output `x W` becomes `x W + scale * (x A) B`, where only A and B are trained.

    Attributes:
        rank: r, the width between A and B.
        alpha: `scale` is `alpha / rank`.
        rank_stabilized: `scale` is `alpha / sqrt(rank)` instead (Kalajdzievski 2023,
            arXiv:2312.03732), so that updates do not shrink as the rank grows.
        targets: projections with adapters. Query, key and value come from one product and share
            one A, gate and up likewise.
        base_dtype: dtype in which the frozen weights are kept.

    Raises:
        ValueError: for values out of range.

    >>> LoraSettings(rank=16, alpha=32).scale
    2.0
    """

    rank: int = 16
    alpha: float = 32.0
    rank_stabilized: bool = False
    targets: tuple[Projection, ...] = PROJECTIONS
    base_dtype: Float = "bfloat16"

    def __post_init__(self):
        # Lists come from files; the record is a static argument and has to be hashable.
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1:
            raise ValueError(f"lora.rank must be at least 1; got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha must be above 0; got {self.alpha}")
        unknown = sorted(set(self.targets) - set(PROJECTIONS))
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f"lora.targets are some of {', '.join(PROJECTIONS)}, each once; got {self.targets}"
            )
        if self.base_dtype not in typing.get_args(Float):
            raise ValueError(
                f"lora.base_dtype must be float32 or bfloat16; got {self.base_dtype!r}"
            )

    @property
    def scale(self) -> float:
        """Factor of the adapters' output."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)
