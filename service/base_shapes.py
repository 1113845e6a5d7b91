"""The numbers of a base that its memory depends on, read off its config.json by family, for the
command line's `plan`; in its own process. Must not know torch: the answer is there at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .core import capacity
from .core.base_info import LinearKind

DTYPE_BYTES = 2  # of bfloat16, in which a GPU computes
FLOAT_BYTES = 4  # of the states of a delta rule, which are kept in float32
Config = Mapping[str, Any]
Linears = Counter[tuple[str, int, int]]  # how many there are of a name, features in and features out


@dataclass(frozen=True, slots=True)
class BaseShape:
    """`others` are the parameters of all but embeddings, head and `layer_linears`; a token has
    `kv_numbers` in all layers together, and a sequence `state_bytes` beside them.
    """

    hidden: int
    vocabulary: int
    context: int
    has_own_head: bool
    layer_linears: Linears
    others: int
    kv_numbers: int
    state_bytes: int = 0

    def linears(self) -> list[LinearKind]:
        """The layers that adapters may adapt, but for the head."""
        return [LinearKind(*shape, count) for shape, count in self.layer_linears.items()]

    @property
    def head(self) -> LinearKind:
        return LinearKind("lm_head", self.hidden, self.vocabulary, 1)

    @property
    def kv_bytes_per_token(self) -> int:
        return self.kv_numbers * DTYPE_BYTES

    def weights_bytes(self, quantization: str) -> int:
        """Quantized layers, and all others in bfloat16."""
        linear = sum(kind.in_features * kind.out_features * kind.count for kind in self.linears())
        embeddings = self.vocabulary * self.hidden * (1 + self.has_own_head)
        return capacity.weights_bytes(linear, embeddings + self.others, quantization, DTYPE_BYTES)


def shape_of(config: Config) -> BaseShape:
    """Raises KeyError for a family that has no arithmetic here or a config that lacks a number, and
    whatever a value of another type makes of it.
    """
    return FAMILIES[config["model_type"]](config)


def _make_shape(config: Config, linears: Linears, others: int, kv_numbers: int, states: int = 0) -> BaseShape:
    hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    context = int(config.get("max_position_embeddings") or 2048)
    has_own_head = not config.get("tie_word_embeddings", False)
    norms = hidden * (2 * layers + 1)
    words = int(config["vocab_size"])
    return BaseShape(hidden, words, context, has_own_head, linears, others + norms, kv_numbers, states)


def _mlp(hidden: int, inner: int, count: int) -> Linears:
    up = {("gate_proj", hidden, inner): count, ("up_proj", hidden, inner): count}
    return Counter({shape: n for shape, n in (up | {("down_proj", inner, hidden): count}).items() if n})


def _grouped_attention(config: Config, count: int, query_parts: int = 1) -> tuple[Linears, int]:
    """Of q, k, v and o in so many layers, and the numbers of a token's keys and values in them."""
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    dim = int(config.get("head_dim") or hidden // heads)
    query, key = heads * dim, int(config.get("num_key_value_heads") or heads) * dim
    shapes = {
        ("q_proj", hidden, query * query_parts): count,
        ("k_proj", hidden, key): count,
        ("v_proj", hidden, key): count,
        ("o_proj", query, hidden): count,
    }
    return Counter(shapes), 2 * key * count


def llama_shape(config: Config) -> BaseShape:
    """Layers of q, k, v, o, gate, up and down, and nothing else of weight."""
    layers, hidden = int(config["num_hidden_layers"]), int(config["hidden_size"])
    attention, kv_numbers = _grouped_attention(config, layers)
    return _make_shape(
        config, attention + _mlp(hidden, int(config["intermediate_size"]), layers), 0, kv_numbers
    )


def latent_shape(config: Config) -> BaseShape:
    """Keys and values of low rank, which are kept as the heads see them: of different width. In all
    but the first layers may be experts, which no quantization reaches.
    """
    layers, hidden = int(config["num_hidden_layers"]), int(config["hidden_size"])
    attention, norms, kv_numbers = _latent_attention(config, layers)
    experts = int(config.get("n_routed_experts") or 0)
    dense = min(layers, int(config.get("first_k_dense_replace", 0))) if experts else layers
    inner = int(config.get("moe_intermediate_size") or 0)
    shared = _mlp(hidden, inner * int(config.get("n_shared_experts") or 0), layers - dense)
    linears = attention + _mlp(hidden, int(config["intermediate_size"]), dense) + shared
    routed = (layers - dense) * experts * hidden * (3 * inner + 1)
    return _make_shape(config, linears, norms + routed, kv_numbers)


def _latent_attention(config: Config, count: int) -> tuple[Linears, int, int]:
    """The linear layers in so many layers, their norms' parameters, and the numbers of a token in them."""
    heads, hidden, rank = (int(config[f]) for f in ("num_attention_heads", "hidden_size", "kv_lora_rank"))
    rotary, plain, value = (int(config[f]) for f in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
    query, query_rank = heads * (plain + rotary), int(config.get("q_lora_rank") or 0)
    whole = {("q_proj", hidden, query): count}
    parts = {("q_a_proj", hidden, query_rank): count, ("q_b_proj", query_rank, query): count}
    others = {
        ("kv_a_proj_with_mqa", hidden, rank + rotary): count,
        ("kv_b_proj", rank, heads * (plain + value)): count,
        ("o_proj", heads * value, hidden): count,
    }
    linears = Counter((parts if query_rank else whole) | others)
    return linears, count * (rank + query_rank), count * heads * (plain + rotary + value)


def delta_shape(config: Config) -> BaseShape:
    """Most layers have a gated delta rule in place of attention, and of each sequence a state."""
    layers, hidden = int(config["num_hidden_layers"]), int(config["hidden_size"])
    attending = _count_attending(config, layers)
    attention, kv_numbers = _grouped_attention(config, attending, query_parts=2)
    delta, others, state_bytes = _delta_layers(config, layers - attending)
    linears = attention + delta + _mlp(hidden, int(config["intermediate_size"]), layers)
    return _make_shape(config, linears, others, kv_numbers, state_bytes)


def _count_attending(config: Config, layers: int) -> int:
    """The layers with keys and values: those that the config names, else every so many-th."""
    if kinds := config.get("layer_types"):
        return sum(kind == "full_attention" for kind in kinds)
    return layers // int(config.get("full_attention_interval", 4))


def _delta_layers(config: Config, count: int) -> tuple[Linears, int, int]:
    """The linear layers in so many layers, their other parameters, and the bytes of a sequence's states."""
    names = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
    key_heads, heads, key_dim, value_dim = (int(config[name]) for name in names)
    hidden, value, kernel = (
        int(config["hidden_size"]),
        heads * value_dim,
        int(config["linear_conv_kernel_dim"]),
    )
    mixed = 2 * key_heads * key_dim + value
    linears = Counter(
        {
            ("in_proj_qkv", hidden, mixed): count,
            ("in_proj_z", hidden, value): count,
            ("in_proj_a", hidden, heads): count,
            ("in_proj_b", hidden, heads): count,
            ("out_proj", value, hidden): count,
        }
    )
    states = mixed * kernel * DTYPE_BYTES + heads * key_dim * value_dim * FLOAT_BYTES
    return linears, count * (mixed * kernel + 2 * heads + value_dim), count * states


LLAMA_LIKE = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "olmo2"),
    *("smollm3", "phi3", "seed_oss", "ministral", "helium", "stablelm"),
)
FAMILIES: dict[str, Callable[[Config], BaseShape]] = {
    **dict.fromkeys(LLAMA_LIKE, llama_shape),
    **dict.fromkeys(("minicpm3", "deepseek_v2", "deepseek_v3"), latent_shape),
    "qwen3_5_text": delta_shape,
}
