// bfloat16 in 512-bit vectors: what every kernel computes with. Sums are float32.

#pragma once

#include <ATen/ATen.h>
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

using bf16 = at::BFloat16;
constexpr int64_t kLanes = 16;  // float32 in one vector

inline __m512 widen(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}

inline void narrow(bf16* p, __m512 v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v)); }

// v as bfloat16 holds it: transformers rounds after every operation, and so do the kernels.
inline __m512 rounded(__m512 v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(v)), 16));
}

inline __m512bh pairs(const void* p) { return (__m512bh)_mm512_loadu_si512(p); }

inline __m512bh broadcast(const bf16* p) { return (__m512bh)_mm512_set1_epi32(*reinterpret_cast<const int32_t*>(p)); }

// sums[i] = a · b[i], i < MANY, for rows of b that lie `stride` apart.
template <int MANY>
inline void dots(const bf16* a, const bf16* b, int64_t stride, int64_t n, float* sums) {
  __m512 sum[MANY];
  for (auto& s : sum) s = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 32 <= n; i += 32)
    for (int k = 0; k < MANY; ++k) sum[k] = _mm512_dpbf16_ps(sum[k], pairs(a + i), pairs(b + k * stride + i));
  for (int k = 0; k < MANY; ++k) {
    sums[k] = _mm512_reduce_add_ps(sum[k]);
    for (int64_t rest = i; rest < n; ++rest) sums[k] += float(a[rest]) * float(b[k * stride + rest]);
  }
}

// e^x for x <= 0: 2^n of the nearest whole n, times a polynomial of the rest (relative error under 2e-7, Cephes' expf).
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x));
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(_mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1)), n);
}

// x / (1 + e^-x), from e^-|x|, which cannot overflow.
inline __m512 silu(__m512 x) {
  const __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x)));
  const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  const __m512 above = _mm512_mask_mul_ps(x, negative, x, e);
  return _mm512_div_ps(above, _mm512_add_ps(_mm512_set1_ps(1), e));
}

// out = bf16(x / rms(x)) * weight over n numbers (RMSNorm, arXiv:1910.07467), rounded as transformers rounds. n is a multiple of 16.
inline void normalize(const bf16* x, const bf16* weight, float epsilon, int64_t n, bf16* out) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += kLanes) squares = _mm512_fmadd_ps(widen(x + i), widen(x + i), squares);
  const __m512 scale = _mm512_set1_ps(1 / std::sqrt(_mm512_reduce_add_ps(squares) / float(n) + epsilon));
  for (int64_t i = 0; i < n; i += kLanes) narrow(out + i, _mm512_mul_ps(widen(weight + i), rounded(_mm512_mul_ps(widen(x + i), scale))));
}
