// A step's two heavy operations on a CPU with AVX512-BF16, each one call: a linear layer with every token's own adapter added, and
// attention over KV rows. Formulas and shapes stand at the declarations below; kernels.py has the same in plain torch.
//
// A table is int32 [1 + spans, 8]. Its first row holds the number of spans; each further row describes consecutive tokens of one
// sequence: start, length, KV row, position, pool row, rank, whether a DoRA gate applies.

#include <ATen/ATen.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "crew.h"

namespace {

using bf16 = at::BFloat16;
constexpr int64_t kOut = 16;   // outputs in one vector of accumulators
constexpr int64_t kAhead = 4096;  // bytes of weights asked for ahead of their use
constexpr int64_t kFew = 16;   // up to so many tokens are computed together
constexpr int64_t kTogether = 4;  // ... for so many blocks of outputs before their adapters are added
constexpr int64_t kTile = 8;   // of more, so many are, ...
constexpr int64_t kWide = 2;   // ... for so many blocks of outputs

struct Span {
  int start, length, row, position, low, rank, gated, unused;
};

struct Spans {
  const Span* first;
  int count;
  explicit Spans(const at::Tensor& table)
      : first(reinterpret_cast<const Span*>(table.const_data_ptr<int32_t>()) + 1), count(table.const_data_ptr<int32_t>()[0]) {}
};

inline __m512 widen(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}

inline void narrow(bf16* p, __m512 v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v)); }

inline __m512bh pairs(const void* p) { return (__m512bh)_mm512_loadu_si512(p); }

inline __m512bh broadcast(const bf16* p) { return (__m512bh)_mm512_set1_epi32(*reinterpret_cast<const int32_t*>(p)); }

float dot(const bf16* a, const bf16* b, int64_t n) {
  __m512 sum = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) sum = _mm512_dpbf16_ps(sum, pairs(a + i), pairs(b + i));
  float rest = 0;
  for (; i < n; ++i) rest += float(a[i]) * float(b[i]);
  return _mm512_reduce_add_ps(sum) + rest;
}

// pack(weight bf16 [out, in]) -> bf16 [out / 16, in / 2, 16, 2]: what one dpbf16 instruction eats lies together.
at::Tensor pack(const at::Tensor& weight) {
  const int64_t out = weight.size(0), in = weight.size(1);
  TORCH_CHECK(out % kOut == 0 && in % 2 == 0, "adapterd::pack: [", out, ", ", in, "] is not a multiple of [16, 2]");
  return weight.reshape({out / kOut, kOut, in / 2, 2}).permute({0, 2, 1, 3}).contiguous();
}

// The accumulators of TOKENS tokens and BLOCKS blocks of 16 outputs.
template <int TOKENS, int BLOCKS>
inline void multiply(const bf16* x, int64_t in, const bf16* w, int64_t stride, __m512 (&sum)[TOKENS][BLOCKS]) {
  for (int t = 0; t < TOKENS; ++t)
    for (int b = 0; b < BLOCKS; ++b) sum[t][b] = _mm512_setzero_ps();
  for (int64_t k = 0; k < in / 2; ++k) {
    __m512bh weights[BLOCKS];
    for (int b = 0; b < BLOCKS; ++b) {
      weights[b] = pairs(w + b * stride + k * kOut * 2);
      _mm_prefetch(reinterpret_cast<const char*>(w + b * stride + k * kOut * 2) + kAhead, _MM_HINT_T0);
    }
    for (int t = 0; t < TOKENS; ++t) {
      const __m512bh value = broadcast(x + t * in + k * 2);
      for (int b = 0; b < BLOCKS; ++b) sum[t][b] = _mm512_dpbf16_ps(sum[t][b], value, weights[b]);
    }
  }
}

struct Layer {
  const bf16 *x, *weight, *bias, *b;
  const float *inner, *gate;
  bf16* y;
  int64_t tokens, in, out, ranks;
  Spans spans;
  std::vector<int> span_of;  // the span of each token; -1 where no adapter applies
};

// y = (base - bias) * gate + bias + inner · B for one token and some blocks of outputs; `sum` holds the base without its bias.
template <int BLOCKS>
inline void finish(const Layer& l, int64_t token, int64_t out, __m512 (&sum)[BLOCKS]) {
  const int at = l.span_of.empty() ? -1 : l.span_of[token];
  if (at >= 0) {
    const Span& span = l.spans.first[at];
    const float* inner = l.inner + token * l.ranks;
    const float* gate = l.gate + span.low * l.out + out;
    const bf16* b = l.b + span.low * l.out + out;
    if (span.gated)
      for (int i = 0; i < BLOCKS; ++i) sum[i] = _mm512_fmadd_ps(sum[i], _mm512_loadu_ps(gate + i * kOut), sum[i]);
    for (int r = 0; r < span.rank; ++r)
      for (int i = 0; i < BLOCKS; ++i) sum[i] = _mm512_fmadd_ps(_mm512_set1_ps(inner[r]), widen(b + r * l.out + i * kOut), sum[i]);
  }
  for (int i = 0; i < BLOCKS; ++i) {
    if (l.bias) sum[i] = _mm512_add_ps(sum[i], widen(l.bias + out + i * kOut));
    narrow(l.y + token * l.out + out + i * kOut, sum[i]);
  }
}

// Leaves the base's sums of TOKENS tokens and one block in `sums`, [tokens, kTogether] vectors.
template <int TOKENS>
inline void base(const Layer& l, int64_t token, int64_t block, __m512* sums) {
  __m512 sum[TOKENS][1];
  multiply<TOKENS, 1>(l.x + token * l.in, l.in, l.weight + block * l.in * kOut, 0, sum);
  for (int t = 0; t < TOKENS; ++t) sums[t * kTogether] = sum[t][0];
}

template <int TOKENS, int BLOCKS>
inline void tile(const Layer& l, int64_t token, int64_t block) {
  __m512 sum[TOKENS][BLOCKS];
  const int64_t stride = l.in * kOut;
  multiply<TOKENS, BLOCKS>(l.x + token * l.in, l.in, l.weight + block * stride, stride, sum);
  for (int t = 0; t < TOKENS; ++t) finish<BLOCKS>(l, token + t, block * kOut, sum[t]);
}

// `left` < AT_MOST tokens from `token` on.
template <int BLOCKS, int AT_MOST>
inline void rest(const Layer& l, int64_t token, int64_t left, int64_t block) {
  if constexpr (AT_MOST > 1) {
    if (left == AT_MOST - 1) tile<AT_MOST - 1, BLOCKS>(l, token, block);
    else rest<BLOCKS, AT_MOST - 1>(l, token, left, block);
  }
}

template <int AT_MOST>
inline void base_of(const Layer& l, int64_t block, __m512* sums) {
  if constexpr (AT_MOST > 0) {
    if (l.tokens == AT_MOST) base<AT_MOST>(l, 0, block, sums);
    else base_of<AT_MOST - 1>(l, block, sums);
  }
}

// Few tokens: one pass over the weights, which stream from memory while all tokens use them; then each token's adapter, whose rows of B
// are read over several blocks at once.
inline void narrow_columns(const Layer& l, int64_t block, int64_t blocks) {
  __m512 sums[kFew * kTogether];
  for (int64_t i = 0; i < blocks; ++i) base_of<kFew>(l, block + i, sums + i);
  for (int64_t t = 0; t < l.tokens; ++t) {
    auto& sum = *reinterpret_cast<__m512(*)[kTogether]>(sums + t * kTogether);
    if (blocks == kTogether) finish<kTogether>(l, t, block * kOut, sum);
    else
      for (int64_t i = 0; i < blocks; ++i) finish<1>(l, t, (block + i) * kOut, *reinterpret_cast<__m512(*)[1]>(&sum[i]));
  }
}

// Many tokens: the weights of some blocks stay in cache while tile after tile of tokens uses them.
template <int BLOCKS>
inline void wide_column(const Layer& l, int64_t block) {
  int64_t token = 0;
  for (; token + kTile <= l.tokens; token += kTile) tile<kTile, BLOCKS>(l, token, block);
  rest<BLOCKS, kTile>(l, token, l.tokens - token, block);
}

// inner[token] = x[token] · A[low : low + rank]ᵀ, float32 [tokens, ranks]
void shrink(const Layer& l, const bf16* a, float* inner) {
  const int64_t chunk = std::max<int64_t>(1, l.tokens / (4 * Crew::all().threads()));
  Crew::all().run((l.tokens + chunk - 1) / chunk, [&](int64_t i) {
    for (int64_t token = i * chunk; token < std::min((i + 1) * chunk, l.tokens); ++token) {
      if (l.span_of[token] < 0) continue;
      const Span& span = l.spans.first[l.span_of[token]];
      for (int r = 0; r < span.rank; ++r) inner[token * l.ranks + r] = dot(l.x + token * l.in, a + (span.low + r) * l.in, l.in);
    }
  });
}

// linear(x [1, T, in], packed, bias [out]?, A [R, in], B [R, out], gate float32 [R, out], table) -> y [1, T, out], all bf16 but the gate:
// y = x·Wᵀ·G + bias + (x·A[own]ᵀ)·B[own], each token with its own adapter's pool rows; G is 1 + the gate of its DoRA adapter, else 1.
at::Tensor linear(const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias, const at::Tensor& a,
                  const at::Tensor& b, const at::Tensor& gate, const at::Tensor& table) {
  const at::Tensor input = x.contiguous();
  const int64_t in = input.size(-1), tokens = input.numel() / in, blocks = packed.size(0), out = blocks * kOut;
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = out;
  at::Tensor y = at::empty(shape, x.options());
  Layer l{input.const_data_ptr<bf16>(), packed.const_data_ptr<bf16>(), bias ? bias->const_data_ptr<bf16>() : nullptr,
          b.const_data_ptr<bf16>(), nullptr, gate.const_data_ptr<float>(), y.mutable_data_ptr<bf16>(), tokens, in, out, 0, Spans(table), {}};
  for (int s = 0; s < l.spans.count; ++s) l.ranks = std::max<int64_t>(l.ranks, l.spans.first[s].rank);
  std::vector<float> inner;
  if (l.ranks) {
    l.span_of.assign(tokens, -1);
    for (int s = 0; s < l.spans.count; ++s) {
      const Span& span = l.spans.first[s];
      TORCH_CHECK(span.start + span.length <= tokens, "adapterd::linear: a layer sees ", tokens, " tokens, the step has more");
      if (span.rank) std::fill_n(l.span_of.begin() + span.start, span.length, s);
    }
    inner.resize(tokens * l.ranks);
    shrink(l, a.const_data_ptr<bf16>(), inner.data());
    l.inner = inner.data();
  }
  const int64_t wide = tokens > kFew ? kWide : kTogether, steps = (blocks + wide - 1) / wide;
  const int64_t chunk = std::max<int64_t>(1, steps / (8 * Crew::all().threads()));
  Crew::all().run((steps + chunk - 1) / chunk, [&](int64_t i) {
    for (int64_t block = i * chunk * wide; block < std::min((i + 1) * chunk * wide, blocks); block += wide) {
      if (tokens <= kFew) narrow_columns(l, block, std::min(wide, blocks - block));
      else if (block + wide <= blocks) wide_column<kWide>(l, block);
      else wide_column<1>(l, block);
    }
  });
  return y;
}

struct Rows {
  const bf16 *query, *keys, *values;
  bf16* out;
  int64_t heads, kv_heads, context, dim;
  int64_t query_head, query_token;  // strides of the query
  float scale, softcap;
  int64_t window;
};

// e^x for x <= 0: 2^n of the nearest whole n, times a polynomial of the rest (relative error under 2e-7, Cephes' expf).
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x));
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(_mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1)), n);
}

// scores = exp(scores - most); their sum
float soften(float* scores, int64_t n, float most) {
  __m512 total = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += kOut) {
    const __mmask16 live = n - i >= kOut ? 0xffff : (1u << (n - i)) - 1;
    const __m512 e = exponential(_mm512_sub_ps(_mm512_maskz_loadu_ps(live, scores + i), _mm512_set1_ps(most)));
    _mm512_mask_storeu_ps(scores + i, live, e);
    total = _mm512_mask_add_ps(total, live, total, e);
  }
  return _mm512_reduce_add_ps(total);
}

// out[0 : 16 BLOCKS] = sum over positions of scores[p] · values[p] / total
template <int BLOCKS>
inline void mix(bf16* out, const bf16* values, const float* scores, int64_t seen, int64_t dim, float total) {
  __m512 sum[BLOCKS];
  for (int b = 0; b < BLOCKS; ++b) sum[b] = _mm512_setzero_ps();
  for (int64_t p = 0; p < seen; ++p)
    for (int b = 0; b < BLOCKS; ++b) sum[b] = _mm512_fmadd_ps(_mm512_set1_ps(scores[p]), widen(values + p * dim + b * kOut), sum[b]);
  for (int b = 0; b < BLOCKS; ++b) narrow(out + b * kOut, _mm512_mul_ps(sum[b], _mm512_set1_ps(1 / total)));
}

// One query token of all heads that share a KV head, over the positions that it may see.
void attend_one(const Rows& r, const Span& span, int64_t token, int64_t head, std::vector<float>& scores) {
  const int64_t position = span.position + token - span.start, group = r.heads / r.kv_heads;
  const int64_t first = r.window > 0 ? std::max<int64_t>(0, position - r.window + 1) : 0, seen = position + 1 - first;
  const int64_t base = ((int64_t(span.row) * r.kv_heads + head) * r.context + first) * r.dim;
  if (int64_t(scores.size()) < seen) scores.resize(seen);
  for (int64_t g = 0; g < group; ++g) {
    const bf16* q = r.query + (head * group + g) * r.query_head + token * r.query_token;
    float most = -std::numeric_limits<float>::infinity();
    for (int64_t p = 0; p < seen; ++p) {
      float s = dot(q, r.keys + base + p * r.dim, r.dim) * r.scale;
      if (r.softcap > 0) s = std::tanh(s / r.softcap) * r.softcap;
      scores[p] = s;
      most = std::max(most, s);
    }
    const float total = soften(scores.data(), seen, most);
    bf16* out = r.out + (token * r.heads + head * group + g) * r.dim;
    int64_t d = 0;
    for (; d + 4 * kOut <= r.dim; d += 4 * kOut) mix<4>(out + d, r.values + base + d, scores.data(), seen, r.dim, total);
    for (; d < r.dim; d += kOut) mix<1>(out + d, r.values + base + d, scores.data(), seen, r.dim, total);
  }
}

void write(const at::Tensor& from, const at::Tensor& to, const Spans& spans) {
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

at::Tensor long_span(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values, const Span& span, double scale) {
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

// attend(q [1, heads, T, dim], k, v [1, kv heads, T, dim], keys, values [rows, kv heads, context, dim], table, scale, window, softcap)
// -> [1, T, heads, dim], bf16: writes k and v to their rows, then attends over what each token may see. window 0 and softcap 0: none.
at::Tensor attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, at::Tensor keys, at::Tensor values,
                  const at::Tensor& table, double scale, int64_t window, double softcap) {
  const Spans spans(table);
  at::Tensor q = query.stride(3) == 1 ? query : query.contiguous();
  write(key.stride(3) == 1 ? key : key.contiguous(), keys, spans);
  write(value.stride(3) == 1 ? value : value.contiguous(), values, spans);
  at::Tensor out = at::empty({1, query.size(2), query.size(1), query.size(3)}, query.options());
  Rows r{q.const_data_ptr<bf16>(), keys.const_data_ptr<bf16>(), values.const_data_ptr<bf16>(), out.mutable_data_ptr<bf16>(),
         query.size(1), keys.size(1), keys.size(2), keys.size(3), q.stride(1), q.stride(2), float(scale), float(softcap), window};
  std::vector<std::pair<int, int>> work;  // span, token
  for (int s = 0; s < spans.count; ++s) {
    const Span& span = spans.first[s];
    const bool plain = softcap == 0 && (window == 0 || span.position + span.length <= window);
    if (span.length > 1 && plain) out.select(0, 0).slice(0, span.start, span.start + span.length).copy_(long_span(q, keys, values, span, scale));
    else for (int t = 0; t < span.length; ++t) work.emplace_back(s, span.start + t);
  }
  const int64_t tasks = work.size() * r.kv_heads, share = std::max<int64_t>(1, tasks / (8 * Crew::all().threads()));
  Crew::all().run((tasks + share - 1) / share, [&](int64_t i) {
    std::vector<float> scores;
    for (int64_t task = i * share; task < std::min((i + 1) * share, tasks); ++task) {
      const auto [s, token] = work[task / r.kv_heads];
      attend_one(r, spans.first[s], token, task % r.kv_heads, scores);
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY(adapterd, library) {
  library.def("pack(Tensor weight) -> Tensor", &pack);
  library.def("linear(Tensor x, Tensor packed, Tensor? bias, Tensor a, Tensor b, Tensor gate, Tensor table) -> Tensor");
  library.def("attend(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor table, float scale, int window, float softcap) -> Tensor");
}

TORCH_LIBRARY_IMPL(adapterd, CPU, library) {
  library.impl("linear", &linear);
  library.impl("attend", &attend);
}
