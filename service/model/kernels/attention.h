// Attention over KV rows, keys and values bf16 [rows, kv heads, context, dim]: every token sees its own row up to its own position.

#pragma once

#include <limits>
#include <utility>
#include <vector>

#include "thread_pool.h"
#include "linear.h"
#include "vectors.h"

struct Rows {
  const bf16 *query, *keys, *values;
  bf16* out;  // [tokens, heads, dim]
  int64_t heads, kv_heads, context, dim;
  int64_t query_head, query_token;  // strides of the query
  float scale, softcap;  // softcap 0: none
  int64_t window;  // 0: none
};

// Lane i: the sum over all lanes of v[i].
inline __m512 sums_of(__m512 (&v)[16]) {
  const auto by_four = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)); };
  const auto floats = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); };
  const auto doubles = [](__m512 a, __m512 b) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  };
  __m512 four[4];
  for (int i = 0; i < 4; ++i) four[i] = doubles(floats(v[4 * i], v[4 * i + 1]), floats(v[4 * i + 2], v[4 * i + 3]));
  return by_four(by_four(four[0], four[1]), by_four(four[2], four[3]));
}

// q · keys[p] for 16 positions from `keys` on, of which `live` exist.
inline __m512 scores_of(const bf16* q, const bf16* keys, int64_t dim, int64_t live) {
  __m512 sum[16];
  for (int64_t p = 0; p < 16; ++p) {
    const bf16* key = keys + std::min(p, live - 1) * dim;
    sum[p] = _mm512_setzero_ps();
    int64_t d = 0;
    for (; d + 32 <= dim; d += 32) sum[p] = _mm512_dpbf16_ps(sum[p], pairs(q + d), pairs(key + d));
    if (d < dim) sum[p] = _mm512_fmadd_ps(widen(q + d), widen(key + d), sum[p]);
  }
  return sums_of(sum);
}

inline __m512 capped(__m512 scores, float softcap) {
  alignas(64) float each[16];
  _mm512_store_ps(each, scores);
  for (float& s : each) s = std::tanh(s / softcap) * softcap;
  return _mm512_load_ps(each);
}

// weights = exp(scores - most), bf16, and zeros behind them; their sum
inline float soften(const float* scores, int64_t seen, float most, bf16* weights) {
  __m512 total = _mm512_setzero_ps();
  for (int64_t i = 0; i < seen; i += kLanes) {
    const __mmask16 live = seen - i >= kLanes ? 0xffff : (1u << (seen - i)) - 1;
    const __m512 e = _mm512_maskz_mov_ps(live, exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(most))));
    narrow(weights + i, e);
    total = _mm512_add_ps(total, e);
  }
  return _mm512_reduce_add_ps(total);
}

// out[0 : 32 BLOCKS] = sum over positions of weights[p] · values[p] / total, two positions at a time; `live` are the lanes that exist.
template <int BLOCKS>
inline void mix(bf16* out, const bf16* values, const bf16* weights, int64_t seen, int64_t dim, __mmask32 live, float total) {
  __m512 low[BLOCKS], high[BLOCKS];
  for (int b = 0; b < BLOCKS; ++b) low[b] = high[b] = _mm512_setzero_ps();
  for (int64_t p = 0; p < seen; p += 2) {
    const __m512bh weight = broadcast(weights + p);
    const bf16 *first = values + p * dim, *second = p + 1 < seen ? first + dim : first;
    for (int b = 0; b < BLOCKS; ++b) {
      const __m512i x = _mm512_maskz_loadu_epi16(live, first + b * 32), y = _mm512_maskz_loadu_epi16(live, second + b * 32);
      low[b] = _mm512_dpbf16_ps(low[b], weight, (__m512bh)_mm512_unpacklo_epi16(x, y));
      high[b] = _mm512_dpbf16_ps(high[b], weight, (__m512bh)_mm512_unpackhi_epi16(x, y));
    }
  }
  const __m512 scale = _mm512_set1_ps(1 / total);
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // unpacking took four lanes of every eight to `low`
  for (int b = 0; b < BLOCKS; ++b) {
    const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_mul_ps(high[b], scale), _mm512_mul_ps(low[b], scale));
    _mm512_mask_storeu_epi16(out + b * 32, live, _mm512_permutexvar_epi64(order, (__m512i)both));
  }
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

// One query of one head over `seen` positions of its row.
inline void attend_head(const Rows& r, const bf16* q, const bf16* keys, const bf16* values, int64_t seen, Scratch& scratch, bf16* out) {
  __m512 most = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int64_t p = 0; p < seen; p += kLanes) {
    __m512 s = _mm512_mul_ps(scores_of(q, keys + p * r.dim, r.dim, seen - p), _mm512_set1_ps(r.scale));
    if (r.softcap > 0) s = capped(s, r.softcap);
    most = _mm512_max_ps(most, s);
    _mm512_storeu_ps(scratch.scores.data() + p, s);
  }
  const bf16* weights = scratch.weights.data();
  const float total = soften(scratch.scores.data(), seen, _mm512_reduce_max_ps(most), scratch.weights.data());
  int64_t d = 0;
  for (; d + 64 <= r.dim; d += 64) mix<2>(out + d, values + d, weights, seen, r.dim, ~__mmask32(0), total);
  for (; d < r.dim; d += 32) mix<1>(out + d, values + d, weights, seen, r.dim, r.dim - d >= 32 ? ~__mmask32(0) : 0xffff, total);
}

// One token's queries that share a KV head.
inline void attend_group(const Rows& r, const Span& span, int64_t token, int64_t head, Scratch& scratch) {
  const int64_t position = span.position + token - span.start, group = r.heads / r.kv_heads;
  const int64_t first = r.window > 0 ? std::max<int64_t>(0, position - r.window + 1) : 0, seen = position + 1 - first;
  const int64_t base = ((int64_t(span.row) * r.kv_heads + head) * r.context + first) * r.dim;
  scratch.reserve(seen);
  for (int64_t h = head * group; h < (head + 1) * group; ++h)
    attend_head(r, r.query + h * r.query_head + token * r.query_token, r.keys + base, r.values + base, seen, scratch,
                r.out + (token * r.heads + h) * r.dim);
}

inline void write(const at::Tensor& from, const at::Tensor& to, const Spans& spans) {
  const int64_t heads = to.size(1), context = to.size(2), dim = to.size(3);
  const bf16* source = from.const_data_ptr<bf16>();
  bf16* target = to.mutable_data_ptr<bf16>();
  for (int s = 0; s < spans.count; ++s) {
    const Span& span = spans.first[s];
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t t = 0; t < span.length; ++t)
        std::copy_n(source + h * from.stride(1) + (span.start + t) * from.stride(2), dim,
                    target + ((span.row * heads + h) * context + span.position + t) * dim);
  }
}

// A long run of one sequence's tokens by torch's own tiled attention.
inline at::Tensor long_span(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values, const Span& span, double scale) {
  const int64_t end = span.position + span.length, kv_heads = keys.size(1), group = query.size(1) / kv_heads;
  auto seen = [&](const at::Tensor& rows) {
    return rows.select(0, span.row).slice(1, 0, end).unsqueeze(1).expand({kv_heads, group, end, rows.size(3)});
  };
  at::Tensor q = query.select(0, 0).slice(1, span.start, span.start + span.length).reshape({kv_heads, group, span.length, query.size(3)});
  std::optional<at::Tensor> mask;
  if (span.position) {
    at::Tensor at_ = at::arange(end), from = at::arange(span.position, end);
    mask = at_.unsqueeze(0).le(from.unsqueeze(1));
  }
  at::Tensor out = at::scaled_dot_product_attention(q, seen(keys), seen(values), mask, 0.0, !mask, scale);
  return out.reshape({query.size(1), span.length, query.size(3)}).transpose(0, 1);
}

constexpr int64_t kLong = 256;  // tokens times positions, in squares: from here on torch's tiles are faster

// attend(q [1, heads, T, dim], k, v [1, kv heads, T, dim], keys, values [rows, kv heads, context, dim], table, scale, window, softcap)
// -> [1, T, heads, dim], bf16: writes k and v to their rows, then attends over what each token may see. window 0 and softcap 0: none.
inline at::Tensor attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, at::Tensor keys, at::Tensor values,
                         const at::Tensor& table, double scale, int64_t window, double softcap) {
  const Spans spans(table);
  at::Tensor q = query.stride(3) == 1 ? query : query.contiguous();
  write(key.stride(3) == 1 ? key : key.contiguous(), keys, spans);
  write(value.stride(3) == 1 ? value : value.contiguous(), values, spans);
  at::Tensor out = at::empty({1, query.size(2), query.size(1), query.size(3)}, query.options());
  Rows r{q.const_data_ptr<bf16>(), keys.const_data_ptr<bf16>(), values.const_data_ptr<bf16>(), out.mutable_data_ptr<bf16>(),
         query.size(1), keys.size(1), keys.size(2), keys.size(3), q.stride(1), q.stride(2), float(scale), float(softcap), window};
  std::vector<std::pair<const Span*, int>> work;  // span, token
  for (int s = 0; s < spans.count; ++s) {
    const Span& span = spans.first[s];
    const int64_t end = span.position + span.length;
    if (span.length * end > kLong * kLong && softcap == 0 && (window == 0 || end <= window))
      out.select(0, 0).slice(0, span.start, span.start + span.length).copy_(long_span(q, keys, values, span, scale));
    else for (int t = 0; t < span.length; ++t) work.emplace_back(&span, span.start + t);
  }
  ThreadPool::shared().each(work.size() * r.kv_heads, [&](int64_t task) {
    thread_local Scratch scratch;
    const auto [span, token] = work[task / r.kv_heads];
    attend_group(r, *span, token, task % r.kv_heads, scratch);
  });
  return out;
}
