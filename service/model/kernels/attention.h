// Attention over KV blocks, keys bf16 [blocks, kv heads, kBlock, dim] and values [blocks, kv heads, kBlock, value dim]: every token sees its own
// sequence up to its own position.

#pragma once

#include <limits>
#include <utility>
#include <vector>

#include "thread_pool.h"
#include "linear.h"
#include "vectors.h"

constexpr int64_t kBlock = 16;  // positions of a block, as BLOCK_TOKENS says
static_assert(kBlock == kLanes, "a vector of scores is that of one block");

struct Cache {
  const bf16 *query, *keys, *values;
  const int32_t* table;  // [sequences, width]: the blocks of each
  const float* sinks;  // [heads]: logits that take their share of the weights and give nothing; nullptr: none
  bf16* out;  // [tokens, heads, value dim]
  int64_t heads, kv_heads, width, dim, value_dim;
  int64_t query_head, query_token;  // strides of the query
  float scale, softcap;  // softcap 0: none
  int64_t window;  // 0: none

  // Which row of positions is one head's of a sequence's i-th block.
  int64_t row(const Span& span, int64_t i, int64_t head) const {
    return (table[span.sequence * width + i] * kv_heads + head) * kBlock;
  }
};

#if defined(__AVX512BF16__)
// Lane i: the sum over all lanes of v[i].
inline Floats sums_of(__m512 (&v)[16]) {
  const auto by_four = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)); };
  const auto floats = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); };
  const auto doubles = [](__m512 a, __m512 b) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  };
  __m512 four[4];
  for (int i = 0; i < 4; ++i) four[i] = doubles(floats(v[4 * i], v[4 * i + 1]), floats(v[4 * i + 2], v[4 * i + 3]));
  Floats r;
  r.part[0] = by_four(by_four(four[0], four[1]), by_four(four[2], four[3]));
  return r;
}

// q · keys[p] for the positions of one block, of which `live` exist; the last one's for the rest.
inline Floats scores_of(const bf16* q, const bf16* keys, int64_t dim, int64_t live) {
  __m512 sum[16];
  for (int64_t p = 0; p < 16; ++p) {
    const bf16* key = keys + std::min(p, live - 1) * dim;
    __m512 own = _mm512_setzero_ps();  // no `Floats`: those of sixteen positions would live in memory
    int64_t d = 0;
    for (; d + 32 <= dim; d += 32) own = _mm512_dpbf16_ps(own, (__m512bh)_mm512_loadu_si512(q + d), (__m512bh)_mm512_loadu_si512(key + d));
    if (d < dim) own += widen(q + d).part[0] * widen(key + d).part[0];
    sum[p] = own;
  }
  return sums_of(sum);
}
#else
#if defined(ADAPTERD_AVX2)
// Lane i: the sum over all lanes of v[i].
inline __m256 sums_of(const __m256 (&v)[8]) {
  const auto fours = [&](int i) { return _mm256_hadd_ps(_mm256_hadd_ps(v[i], v[i + 1]), _mm256_hadd_ps(v[i + 2], v[i + 3])); };
  const __m256 low = fours(0), high = fours(4);
  return _mm256_permute2f128_ps(low, high, 0x20) + _mm256_permute2f128_ps(low, high, 0x31);
}

inline Floats sums_of(const Floats (&v)[16]) {
  Floats r;
  for (int half = 0; half < 2; ++half) {
    __m256 each[8];
    for (int i = 0; i < 8; ++i) each[i] = v[half * 8 + i].part[0] + v[half * 8 + i].part[1];
    r.part[half] = sums_of(each);
  }
  return r;
}
#else
inline Floats sums_of(const Floats (&v)[16]) {
  alignas(64) float each[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) each[i] = sum_of(v[i]);
  return load(each);
}
#endif

// q · keys[p] for the positions of one block, of which `live` exist; the last one's for the rest.
inline Floats scores_of(const bf16* q, const bf16* keys, int64_t dim, int64_t live) {
  Floats sums[kLanes];
  for (int64_t p = 0; p < kLanes; p += 4) {  // several sums, for each waits for its own last
    Floats own[4];
    for (int64_t d = 0; d < dim; d += kLanes) {
      const Floats query = widen(q + d);
      for (int i = 0; i < 4; ++i) own[i] += query * widen(keys + std::min(p + i, live - 1) * dim + d);
    }
    for (int i = 0; i < 4; ++i) sums[p + i] = own[i];
  }
  return sums_of(sums);
}
#endif

inline Floats capped(Floats scores, float softcap) {
  alignas(64) float each[kLanes];
  store(each, scores);
  for (float& s : each) s = std::tanh(s / softcap) * softcap;
  return load(each);
}

// weights = exp(scores - most), bf16, with zeros behind them and for the first `hidden`, fewer than kLanes; their sum
inline float soften(const float* scores, int64_t hidden, int64_t seen, float most, bf16* weights) {
  Floats total;
  for (int64_t i = 0; i < seen; i += kLanes) {
    Floats e = exponential(load(scores + i) - most);
    if ((i == 0 && hidden) || seen - i < kLanes) e = within(i ? 0 : hidden, std::min(kLanes, seen - i), e, Floats{});
    narrow(weights + i, e);
    total += e;
  }
  return sum_of(total);
}

// 32 outputs of BLOCKS times: the sums over positions of weight times value. Arrays of the processor's vectors: a structure of sums
// would live in memory.
#if defined(__AVX512BF16__)
template <int BLOCKS>
struct Mixed {
  __m512 low[BLOCKS]{}, high[BLOCKS]{};
  __mmask32 live;  // the lanes that exist

  explicit Mixed(int64_t outputs) : live(outputs >= 32 ? ~__mmask32(0) : 0xffff) {}

  // Two positions' values, and their weights.
  __attribute__((always_inline)) void add(const bf16* first, const bf16* second, const bf16* weights) {
    const __m512bh weight = (__m512bh)broadcast(weights).part[0];
    for (int b = 0; b < BLOCKS; ++b) {
      const __m512i x = _mm512_maskz_loadu_epi16(live, first + 32 * b), y = _mm512_maskz_loadu_epi16(live, second + 32 * b);
      low[b] = _mm512_dpbf16_ps(low[b], weight, (__m512bh)_mm512_unpacklo_epi16(x, y));
      high[b] = _mm512_dpbf16_ps(high[b], weight, (__m512bh)_mm512_unpackhi_epi16(x, y));
    }
  }

  void put(bf16* out, float scale) const {
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // unpacking took four lanes of every eight to `low`
    for (int b = 0; b < BLOCKS; ++b) {
      const __m512bh both = _mm512_cvtne2ps_pbh(high[b] * scale, low[b] * scale);
      _mm512_mask_storeu_epi16(out + 32 * b, live, _mm512_permutexvar_epi64(order, (__m512i)both));
    }
  }
};
#else
template <int BLOCKS>
struct Mixed {
  Floats low[BLOCKS], high[BLOCKS];
  bool whole;

  explicit Mixed(int64_t outputs) : whole(outputs >= 32) {}

  __attribute__((always_inline)) void add(const bf16* first, const bf16* second, const bf16* weights) {
    const Words weight = broadcast(weights);
    const Floats w = first_of(weight), v = second_of(weight);
    for (int b = 0; b < BLOCKS; ++b) {
      low[b] += widen(first + 32 * b) * w;
      low[b] += widen(second + 32 * b) * v;
      if (!whole) continue;
      high[b] += widen(first + 32 * b + kLanes) * w;
      high[b] += widen(second + 32 * b + kLanes) * v;
    }
  }

  void put(bf16* out, float scale) const {
    for (int b = 0; b < BLOCKS; ++b) {
      narrow(out + 32 * b, low[b] * scale);
      if (whole) narrow(out + 32 * b + kLanes, high[b] * scale);
    }
  }
};
#endif

// The blocks that one query sees, from the sequence's `first` on: of all their `seen` positions it does not see the first `hidden`.
struct Seen {
  const Span& span;
  int64_t head, first, hidden, seen;
};

// out[d : d + 32 BLOCKS] = sum over positions of weights[p] · values[p] / total, two positions at a time.
template <int BLOCKS>
inline void mix(const Cache& c, const Seen& s, int64_t d, const bf16* weights, float total, bf16* out) {
  const int64_t dim = c.value_dim;
  Mixed<BLOCKS> mixed(dim - d);
  for (int64_t p = 0; p < s.seen; p += kBlock) {
    const bf16* values = c.values + c.row(s.span, s.first + p / kBlock, s.head) * dim + d;
    const int64_t live = std::min(kBlock, s.seen - p);
    int64_t i = 0;
    for (; i + 1 < live; i += 2) mixed.add(values + i * dim, values + (i + 1) * dim, weights + p + i);
    if (i < live) mixed.add(values + i * dim, values + i * dim, weights + p + i);  // the weight behind the last is 0
  }
  mixed.put(out + d, 1 / total);
}

struct Scratch {
  std::vector<float> scores;
  std::vector<bf16> weights;
  void reserve(int64_t seen) {
    if (int64_t(scores.size()) >= seen + kLanes) return;
    scores.resize(seen + kLanes);
    weights.resize(seen + kLanes);
  }
};

// One query of one head, whose sink is `sink`; nullptr: it has none.
inline void attend_head(const Cache& c, const Seen& s, const bf16* q, const float* sink, Scratch& scratch, bf16* out) {
  const Floats none = all(-std::numeric_limits<float>::infinity());
  Floats most = none;
  for (int64_t p = 0; p < s.seen; p += kBlock) {
    const bf16* keys = c.keys + c.row(s.span, s.first + p / kBlock, s.head) * c.dim;
    Floats each = scores_of(q, keys, c.dim, std::min(kBlock, s.seen - p)) * c.scale;
    if (c.softcap > 0) each = capped(each, c.softcap);
    store(scratch.scores.data() + p, each);
    most = larger(most, p == 0 && s.hidden ? within(s.hidden, kBlock, each, none) : each);
  }
  const bf16* weights = scratch.weights.data();
  const float top = sink ? std::max(largest_of(most), *sink) : largest_of(most);
  float total = soften(scratch.scores.data(), s.hidden, s.seen, top, scratch.weights.data());
  if (sink) total += std::exp(*sink - top);
  int64_t d = 0;
  for (; d + 64 <= c.value_dim; d += 64) mix<2>(c, s, d, weights, total, out);
  for (; d < c.value_dim; d += 32) mix<1>(c, s, d, weights, total, out);
}

// One token's queries that share a KV head.
inline void attend_group(const Cache& c, const Span& span, int64_t token, int64_t head, Scratch& scratch) {
  const int64_t position = span.position + token - span.start, group = c.heads / c.kv_heads;
  const int64_t from = c.window > 0 ? std::max<int64_t>(0, position - c.window + 1) : 0, first = from / kBlock;
  const Seen seen{span, head, first, from % kBlock, position + 1 - first * kBlock};
  scratch.reserve(seen.seen);
  for (int64_t h = head * group; h < (head + 1) * group; ++h)
    attend_head(c, seen, c.query + h * c.query_head + token * c.query_token, c.sinks ? c.sinks + h : nullptr, scratch,
                c.out + (token * c.heads + h) * c.value_dim);
}

inline void write(const at::Tensor& from, const at::Tensor& to, const Spans& spans, const at::Tensor& blocks) {
  const int64_t heads = to.size(1), dim = to.size(3), width = blocks.size(1);
  const bf16* source = from.const_data_ptr<bf16>();
  const int32_t* table = blocks.const_data_ptr<int32_t>();
  bf16* target = to.mutable_data_ptr<bf16>();
  for (int s = 0; s < spans.count; ++s) {
    const Span& span = spans.first[s];
    for (int64_t t = 0; t < span.length; ++t) {
      const int64_t position = span.position + t, block = table[span.sequence * width + position / kBlock];
      for (int64_t h = 0; h < heads; ++h)
        std::copy_n(source + h * from.stride(1) + (span.start + t) * from.stride(2), dim,
                    target + ((block * heads + h) * kBlock + position % kBlock) * dim);
    }
  }
}

// A long run of one sequence's tokens by torch's own tiled attention.
inline at::Tensor long_span(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values, const Span& span,
                            const at::Tensor& blocks, double scale) {
  const int64_t end = span.position + span.length, kv_heads = keys.size(1), group = query.size(1) / kv_heads;
  const at::Tensor own = blocks.select(0, span.sequence).slice(0, 0, (end + kBlock - 1) / kBlock);
  auto seen = [&](const at::Tensor& cache) {
    const at::Tensor flat = cache.index_select(0, own).transpose(0, 1).reshape({kv_heads, -1, cache.size(3)}).slice(1, 0, end);
    return flat.unsqueeze(1).expand({kv_heads, group, end, cache.size(3)});
  };
  at::Tensor q = query.select(0, 0).slice(1, span.start, span.start + span.length).reshape({kv_heads, group, span.length, query.size(3)});
  std::optional<at::Tensor> mask;
  if (span.position) {
    at::Tensor at_ = at::arange(end), from = at::arange(span.position, end);
    mask = at_.unsqueeze(0).le(from.unsqueeze(1));
  }
  at::Tensor out = at::scaled_dot_product_attention(q, seen(keys), seen(values), mask, 0.0, !mask, scale);
  return out.reshape({query.size(1), span.length, values.size(3)}).transpose(0, 1);
}

// Tokens times positions from which on torch's tiles are faster; with them a token's last bits depend on the chunk that it came in. Where
// bfloat16 pairs are multiplied they are slower up to some thousand positions, and never taken.
constexpr int64_t kLong = kPaired ? std::numeric_limits<int64_t>::max() : 256 * 256;

// attend(q [1, heads, T, dim], k [1, kv heads, T, dim], v [1, kv heads, T, value dim], keys, values, table, blocks int32 [sequences, width],
// sinks float32 [heads] or none, scale, window, softcap) -> [1, T, heads, value dim], bf16: writes k and v to their blocks, then attends over what each
// token may see. window 0 and softcap 0: none.
inline at::Tensor attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, at::Tensor keys, at::Tensor values,
                         const at::Tensor& table, const at::Tensor& blocks, const std::optional<at::Tensor>& sinks, double scale,
                         int64_t window, double softcap) {
  TORCH_CHECK(keys.size(2) == kBlock, "adapterd::attend: blocks of ", keys.size(2), " positions");
  const Spans spans(table);
  at::Tensor q = query.stride(3) == 1 ? query : query.contiguous();
  write(key.stride(3) == 1 ? key : key.contiguous(), keys, spans, blocks);
  write(value.stride(3) == 1 ? value : value.contiguous(), values, spans, blocks);
  at::Tensor out = at::empty({1, query.size(2), query.size(1), values.size(3)}, query.options());
  Cache c{q.const_data_ptr<bf16>(), keys.const_data_ptr<bf16>(), values.const_data_ptr<bf16>(), blocks.const_data_ptr<int32_t>(),
          sinks ? sinks->const_data_ptr<float>() : nullptr, out.mutable_data_ptr<bf16>(), query.size(1), keys.size(1), blocks.size(1),
          keys.size(3), values.size(3), q.stride(1), q.stride(2), float(scale), float(softcap), window};
  std::vector<std::pair<const Span*, int>> work;  // span, token
  for (int s = 0; s < spans.count; ++s) {
    const Span& span = spans.first[s];
    const int64_t end = span.position + span.length;
    if (span.length * end > kLong && softcap == 0 && !sinks && (window == 0 || end <= window))
      out.select(0, 0).slice(0, span.start, span.start + span.length).copy_(long_span(q, keys, values, span, blocks, scale));
    else for (int t = 0; t < span.length; ++t) work.emplace_back(&span, span.start + t);
  }
  ThreadPool::shared().each(work.size() * c.kv_heads, [&](int64_t task) {
    thread_local Scratch scratch;
    const auto [span, token] = work[task / c.kv_heads];
    attend_group(c, *span, token, task % c.kv_heads, scratch);
  });
  return out;
}
