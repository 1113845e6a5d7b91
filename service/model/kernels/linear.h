// Linear layers over packed weights, every token's own adapter added in the same pass: y = x·Wᵀ·G + bias + (x·A[own]ᵀ)·B[own].
// The weights are read once however many tokens there are; the next tile is on its way from memory while this one is computed.

#pragma once

#include <array>
#include <vector>

#include "thread_pool.h"
#include "vectors.h"
#include "weights.h"

// Tokens computed together, as many as leave registers for weights; and halves of a tile, both where the sums of one would wait for each other.
#if defined(__AVX512F__)
constexpr int kPass = 8;
#elif defined(ADAPTERD_AVX2)
constexpr int kPass = 6;
#else
constexpr int kPass = 4;
#endif
constexpr int64_t kDirect = kBytes == 64 ? kPass : 4;  // tokens up to which 4-bit values are looked up where they are multiplied
constexpr int halves_of(int tokens) { return kBytes == 64 || tokens <= 2 ? 2 : 1; }

// Consecutive tokens of one sequence, the step's `sequence`-th: one row of the step's table.
struct Span {
  int start, length, sequence, position, low, rank, gated, unused;
};

// A table is int32 [1 + spans, 8]; its first row holds the number of spans.
struct Spans {
  const Span* first;
  int count;
  explicit Spans(const at::Tensor& table)
      : first(reinterpret_cast<const Span*>(table.const_data_ptr<int32_t>()) + 1), count(table.const_data_ptr<int32_t>()[0]) {}
};

// The adapter of each token of a step.
struct TokenAdapters {
  Spans spans;
  int64_t tokens, width = 0;  // the greatest rank of the step, and room for pairs
  std::vector<const Span*> of;  // nullptr: the base

  TokenAdapters(const at::Tensor& table, int64_t tokens) : spans(table), tokens(tokens), of(tokens, nullptr) {
    for (int s = 0; s < spans.count; ++s) {
      const Span& span = spans.first[s];
      TORCH_CHECK(span.start + span.length <= tokens, "adapterd: a layer sees ", tokens, " tokens, the step has more");
      if (span.rank) width = std::max<int64_t>(width, (span.rank + 3) & ~1);
      if (span.rank) std::fill_n(of.begin() + span.start, span.length, &span);
    }
  }
};

// weights as weights.h packs them; bias bf16 [out] or empty; A bf16 [R, in]; B bf16 [out / 32, R / 2, 32, 2]; gate float32 [R, out], what a
// DoRA adapter adds to 1; ranks int32 [R], at an adapter's first pool row its rank in this layer, 0 where it leaves the layer alone.
struct Linear {
  Weights weights;
  const bf16 *bias, *a, *b;
  const float* gate;
  const int32_t* ranks;
  int64_t in, out, pool;

  Linear(const at::Tensor& packed, const at::Tensor& scales, const at::Tensor& bias, const at::Tensor& a, const at::Tensor& b,
         const at::Tensor& gate, const at::Tensor& ranks)
      : weights(packed, scales), bias(bias.numel() ? bias.const_data_ptr<bf16>() : nullptr), a(a.const_data_ptr<bf16>()),
        b(b.const_data_ptr<bf16>()), gate(gate.const_data_ptr<float>()), ranks(ranks.const_data_ptr<int32_t>()), in(packed.size(1) * 2),
        out(packed.size(0) * kTile), pool(b.size(1) * 2) {}

  // Never over the span's: that is what room was made for.
  int rank(const Span* own) const { return own ? std::min(own->rank, ranks[own->low]) : 0; }

  bool used(const TokenAdapters& adapters) const {
    return std::any_of(adapters.spans.first, adapters.spans.first + adapters.spans.count, [&](const Span& s) { return s.rank && rank(&s); });
  }
};

// place(a [r, in], b [r, out], A, B, start): pool rows [start, start + r) become the adapter's.
inline void place(const at::Tensor& a, const at::Tensor& b, at::Tensor pool_a, at::Tensor pool_b, int64_t start) {
  const int64_t rank = a.size(0), in = a.size(1), out = b.size(1), pool = pool_a.size(0);
  TORCH_CHECK(a.is_contiguous() && b.is_contiguous() && b.size(0) == rank && pool_a.size(1) == in && pool_b.size(0) * kTile == out &&
              start >= 0 && start + rank <= pool, "adapterd::place: rows of another layer, or outside the pool");
  std::memcpy(pool_a.mutable_data_ptr<bf16>() + start * in, a.const_data_ptr<bf16>(), rank * in * sizeof(bf16));
  const auto* from = reinterpret_cast<const uint16_t*>(b.const_data_ptr<bf16>());
  auto* to = reinterpret_cast<uint16_t*>(pool_b.mutable_data_ptr<bf16>());
  for (int64_t tile = 0; tile < out / kTile; ++tile)
    for (int64_t row = start; row < start + rank; ++row) {
      const uint16_t* own = from + (row - start) * out + tile * kTile;
      uint16_t* pair = to + (tile * pool_b.size(1) + row / 2) * 2 * kTile;
      if (row % 2 == 0 && row + 1 < start + rank) {
        for (int64_t i = 0; i < kTile; ++i) reinterpret_cast<uint32_t*>(pair)[i] = own[i] | uint32_t(own[out + i]) << 16;
        ++row;
      } else {
        for (int64_t i = 0; i < kTile; ++i) pair[2 * i + row % 2] = own[i];
      }
    }
}

// inner[token] = x[token] · A[low : low + rank]ᵀ, bf16 [tokens, adapters.width], from the pool row on that is even, with zeros for rows that
// are not the token's: rows of B are multiplied in pairs.
inline void shrink(const Linear& l, const TokenAdapters& adapters, const bf16* x, int64_t token, bf16* inner) {
  const Span* own = adapters.of[token];
  const int rank = l.rank(own);
  if (!rank) return;
  const bf16* a = l.a + own->low * l.in;
  float sums[4];
  inner += token * adapters.width;
  std::fill_n(inner, adapters.width, bf16(0));
  for (int r = 0; r < rank; r += 4) {
    const int many = std::min(4, rank - r);
    if (many == 4) dots<4>(x + token * l.in, a + r * l.in, l.in, l.in, sums);
    else for (int i = 0; i < many; ++i) dots<1>(x + token * l.in, a + (r + i) * l.in, l.in, l.in, sums + i);
    for (int i = 0; i < many; ++i) inner[(own->low & 1) + r + i] = bf16(sums[i]);
  }
}

// One tile of a layer's outputs, and the layer's `inner` (see shrink).
struct Tile {
  const Linear* l;
  const bf16* inner;
  int64_t at;  // tile 0 has outputs 0 to 31
  PackedTile weights() const { return l->weights.tile(at, l->in / 2); }
};

// The memory that a later operation will read, fetched while this one computes: A rows are read once, just before they are needed, and
// memory would stand idle until then.
struct PrefetchList {
  struct Range {
    const char* from;
    int64_t lines;
  };
  std::vector<Range> ranges;

  void add(const Linear& l, const TokenAdapters& adapters) {
    for (int s = 0; s < adapters.spans.count; ++s)
      if (const Span& span = adapters.spans.first[s]; span.rank && l.rank(&span))
        ranges.push_back({reinterpret_cast<const char*>(l.a + span.low * l.in), int64_t(l.rank(&span) * l.in * sizeof(bf16)) / kLine});
  }

  // The part of every range that falls to one of `items`.
  void fetch_part(int64_t item, int64_t items) const {
    for (const auto& [from, lines] : ranges)
      for (int64_t i = lines * item / items; i < lines * (item + 1) / items; ++i) prefetch(from + i * kLine);
  }
};

using Sums = std::array<Floats, 2>;

// Where an input lies, of TOKENS tokens from x on: a pair's two beside each other where an instruction takes both, else each beside that of
// the other tokens, for these are read one after the other.
template <int TOKENS>
inline const Input* input_at(const Input* x, int64_t in, int64_t pair, int i, int t) {
  return kPaired ? x + t * in + pair * 2 : x + (pair * 2 + i) * TOKENS + t;
}

inline Part multiply_add(Part sum, Factor factor, const Input* x) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(sum, factor, (__m512bh)broadcast(x).part[0]);
#else
  return sum + factor * *x;
#endif
}

// Adds to TOKENS tokens' sums for the parts of a tile from `half` on what pairs [from, to) of the weights and of the inputs make.
template <int TOKENS, int PARTS, typename Reader>
inline void multiply(const Input* x, int64_t in, const Reader& reader, int64_t from, int64_t to, int half, Part (&sums)[PARTS][TOKENS]) {
  for (int64_t k = from; k < to; k += Reader::kTogether)
    for (int j = 0; j < Reader::kTogether; ++j)
      for (int i = 0; i < kFactors; ++i) {
        Factor factors[PARTS];
        for (int p = 0; p < PARTS; ++p) factors[p] = reader.read(k, j, half + p / Floats::kParts, p % Floats::kParts, i);
        for (int t = 0; t < TOKENS; ++t)
          for (int p = 0; p < PARTS; ++p) sums[p][t] = multiply_add(sums[p][t], factors[p], input_at<TOKENS>(x, in, k + j, i, t));
      }
}

// One pass for TOKENS tokens: what `pairs` pairs make of both halves of a tile, added to `sums`.
template <int TOKENS, typename Reader>
__attribute__((noinline)) void pass(const Input* x, int64_t in, const Reader& reader, int64_t pairs, Sums* sums) {
  constexpr int kHalves = halves_of(TOKENS), kParts = kHalves * Floats::kParts;
  for (int half = 0; half < 2; half += kHalves) {
    Part own[kParts][TOKENS];  // not `sums` itself: the compiler would keep that in memory
    for (int p = 0; p < kParts; ++p)
      for (int t = 0; t < TOKENS; ++t) own[p][t] = sums[t][half + p / Floats::kParts].part[p % Floats::kParts];
    multiply(x, in, reader, 0, pairs, half, own);
    for (int p = 0; p < kParts; ++p)
      for (int t = 0; t < TOKENS; ++t) sums[t][half + p / Floats::kParts].part[p % Floats::kParts] = own[p][t];
  }
}

// The same for 4-bit values and their scales, [pairs / 32, 32]: each block of inputs that shares these is summed by itself.
template <int TOKENS, typename Reader>
__attribute__((noinline)) void pass_scaled(const Input* x, int64_t in, const Reader& reader, int64_t pairs, const float* scales, Sums* sums) {
  constexpr int kHalves = halves_of(TOKENS), kParts = kHalves * Floats::kParts;
  for (int half = 0; half < 2; half += kHalves)
    for (int64_t from = 0; from < pairs; from += kScaled) {
      Part own[kParts][TOKENS]{};
      multiply(x, in, reader, from, from + kScaled, half, own);
#pragma GCC unroll 8
      for (int p = 0; p < kParts; ++p) {
        const int h = half + p / Floats::kParts, at = p % Floats::kParts;
        Part scale;
        std::memcpy(&scale, scales + from + h * kLanes + at * kPartLanes, sizeof scale);  // kScaled equals kTile
        for (int t = 0; t < TOKENS; ++t) sums[t][h].part[at] += own[p][t] * scale;
      }
    }
}
static_assert(kScaled == kTile, "a block's scales begin where its pairs do");

// call.template operator()<many>(), for one of the numbers 1 to AT_MOST that is known here alone.
template <int AT_MOST, typename Call>
inline void call_with(int64_t many, const Call& call) {
  if (many == AT_MOST) call.template operator()<AT_MOST>();
  else if constexpr (AT_MOST > 1) call_with<AT_MOST - 1>(many, call);
}

// A step's tokens in as few passes as there can be, of nearly equal size.
struct Passes {
  int64_t tokens, count;
  explicit Passes(int64_t tokens) : tokens(tokens), count((tokens + kPass - 1) / kPass) {}
  int64_t start(int64_t pass) const { return tokens * pass / count; }
};

// call(first token, how many, is it the last of several passes)
template <typename Call>
inline void each_pass(int64_t tokens, const Call& call) {
  const Passes passes(tokens);
  for (int64_t p = 0; p < passes.count; ++p) call(passes.start(p), passes.start(p + 1) - passes.start(p), p && p == passes.count - 1);
}

// A tile of bfloat16: the first pass asks memory for what it needs itself soon, the last for `next`, a later tile.
inline void sum_wide(const Tile& tile, int64_t tokens, const Input* x, const char* next, Sums* sums) {
  const int64_t in = tile.l->in;
  const char* bytes = tile.weights().bytes;
  each_pass(tokens, [&](int64_t start, int64_t many, bool is_last) {
    const WideReader reader{bytes, is_last ? next : bytes + kAhead};
    call_with<kPass>(many, [&]<int TOKENS>() { pass<TOKENS>(x + start * in, in, reader, in / 2, sums + start); });
  });
}

// A tile of 4-bit values. Those of a block are widened once for all tokens where these take several passes; the sums are the same.
inline void sum_nf4(const Tile& tile, int64_t tokens, const Input* x, Sums* sums) {
  const int64_t in = tile.l->in;
  const PackedTile own = tile.weights();
  if (tokens <= kDirect) {
    const Nf4Reader reader{own.bytes, own.bytes + kAhead};
    return call_with<kDirect>(tokens, [&]<int TOKENS>() { pass_scaled<TOKENS>(x, in, reader, in / 2, own.scales, sums); });
  }
  alignas(64) Words::Part near[kScaled * kNear];
  for (int64_t from = 0; from < in / 2; from += kScaled) {
    const char* bytes = own.bytes + from * kTile;
    widen(Nf4Reader{bytes, bytes + kAhead}, kScaled, near);
    each_pass(tokens, [&](int64_t start, int64_t many, bool) {
      call_with<kPass>(many, [&]<int TOKENS>() {
        pass_scaled<TOKENS>(input_at<TOKENS>(x + start * in, in, from, 0, 0), in, NearReader{near}, kScaled, own.scales + from, sums + start);
      });
    });
  }
}

// A tile of 8-bit values, whose scales are the same for all inputs.
inline void sum_int8(const Tile& tile, int64_t tokens, const Input* x, Sums* sums) {
  const int64_t in = tile.l->in;
  const PackedTile own = tile.weights();
  alignas(64) Words::Part near[kPiece * kNear];
  for (int64_t from = 0; from < in / 2; from += kPiece) {
    const int64_t pairs = std::min(kPiece, in / 2 - from);
    const char* bytes = own.bytes + from * 2 * kTile;
    widen(Int8Reader{bytes, bytes + kAhead}, pairs, near);
    each_pass(tokens, [&](int64_t start, int64_t many, bool) {
      call_with<kPass>(many, [&]<int TOKENS>() {
        pass<TOKENS>(input_at<TOKENS>(x + start * in, in, from, 0, 0), in, NearReader{near}, pairs, sums + start);
      });
    });
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int half = 0; half < 2; ++half) sums[t][half] = sums[t][half] * load(own.scales + half * kLanes);
}

// The base's sums of one tile for every token, without bias; `next` is what this thread most likely computes then.
inline void sum_tile(const Tile& tile, int64_t tokens, const Input* x, const PackedTile& next, Sums* sums) {
  std::fill_n(sums, tokens, Sums{});
  switch (tile.l->weights.format) {
    case Format::bfloat16: return sum_wide(tile, tokens, x, next.bytes, sums);
    case Format::nf4: return sum_nf4(tile, tokens, x, sums);
    case Format::int8: return sum_int8(tile, tokens, x, sums);
  }
}

// The pair of rows of B at b, without what is not the token's own: that may be another adapter's, and its numbers not finite: 0 times those
// is not 0.
ADAPTERD_INLINE Words own_rows(const bf16* b, bool first, bool second) {
  if (first && second) return pairs(b);
  return pairs(b) & ((first ? 0xffffu : 0u) | (second ? 0xffff0000u : 0u));
}

// The base's sums without bias → with gate, bias and the token's own adapter.
inline Sums adapted(const Tile& tile, const TokenAdapters& adapters, int64_t token, const Sums& base) {
  const Linear& l = *tile.l;
  const int64_t out = tile.at * kTile;
  Floats first = base[0], second = base[1];
  const Span* own = adapters.of[token];
  if (const int rank = l.rank(own)) {
    const bf16* inner = tile.inner + token * adapters.width;
    const bf16* b = l.b + (tile.at * l.pool + (own->low & ~1)) * kTile;
    if (own->gated) {
      const float* gate = l.gate + own->low * l.out + out;
      first += first * load(gate);
      second += second * load(gate + kLanes);
    }
    const int from = own->low & 1, to = from + rank;
    for (int r = 0; r < to; r += 2) {
      const Words value = broadcast(inner + r);
      first = dot(first, value, own_rows(b + r * kTile, r >= from, r + 1 < to));
      second = dot(second, value, own_rows(b + r * kTile + kTile, r >= from, r + 1 < to));
    }
  }
  if (!l.bias) return {first, second};
  return {first + widen(l.bias + out), second + widen(l.bias + out + kLanes)};
}

// All tokens of one tile; `next` is the tile that this thread most likely computes next.
template <typename Emit>
inline void compute(const Tile& tile, const TokenAdapters& adapters, const Input* x, const PackedTile& next, Sums* sums, const Emit& emit) {
  sum_tile(tile, adapters.tokens, x, next, sums);
  for (int64_t t = 0; t < adapters.tokens; ++t) emit(tile, t, adapted(tile, adapters, t, sums[t]));
}

// A layer's inputs x bf16 [tokens, in] as they are multiplied, until the next are arranged: as they are, or the passes' one after the other,
// each [in, tokens of the pass] (see input_at).
inline const Input* arrange(const bf16* x, int64_t tokens, int64_t in) {
#if defined(__AVX512BF16__)
  return x;
#else
  static std::vector<Input> arranged;  // one product at a time
  if (int64_t(arranged.size()) < tokens * in) arranged.resize(tokens * in);
  const Passes passes(tokens);
  ThreadPool::shared().run(passes.count, [&](int64_t pass) {
    const int64_t start = passes.start(pass), many = passes.start(pass + 1) - start;
    Input* to = arranged.data() + start * in;
    for (int64_t k = 0; k < in; ++k)
      for (int64_t t = 0; t < many; ++t) to[k * many + t] = float(x[(start + t) * in + k]);
  });
  return arranged.data();
#endif
}

// Several layers of the same input x bf16 [tokens, in]. emit(tile, token, sums) is called once for every tile and token; for one tile index
// the layers follow each other on the same thread where `paired`.
template <size_t LAYERS, typename Emit>
inline void product(const std::array<const Linear*, LAYERS>& layers, const TokenAdapters& adapters, const bf16* x, bool paired, const PrefetchList& prefetch,
                    const Emit& emit) {
  const bool any = std::any_of(layers.begin(), layers.end(), [&](const Linear* l) { return l->used(adapters); });
  const int64_t size = any ? adapters.tokens * adapters.width : 0;
  std::vector<bf16> inner(LAYERS * size);
  ThreadPool& pool = ThreadPool::shared();
  if (size)
    pool.each(LAYERS * adapters.tokens, [&](int64_t i) { shrink(*layers[i % LAYERS], adapters, x, i / LAYERS, inner.data() + i % LAYERS * size); });
  const Input* inputs = arrange(x, adapters.tokens, layers[0]->in);
  std::vector<Tile> tiles;
  for (size_t i = 0; i < LAYERS; ++i)
    for (int64_t at = 0; at < layers[i]->out / kTile; ++at) tiles.push_back({layers[i], inner.data() + i * size, at});
  const int64_t together = paired ? LAYERS : 1, items = int64_t(tiles.size()) / together;
  pool.run(items, [&](int64_t item) {
    prefetch.fetch_part(item, items);
    thread_local std::vector<Sums> sums;
    if (int64_t(sums.size()) < adapters.tokens) sums.resize(adapters.tokens);
    for (int64_t k = 0; k < together; ++k) {
      const int64_t later = k * items + std::min(item + pool.threads(), items - 1);  // the threads take turns: most likely one's own
      compute(tiles[k * items + item], adapters, inputs, tiles[later].weights(), sums.data(), emit);
    }
  });
}
