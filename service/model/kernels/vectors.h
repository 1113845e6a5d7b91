// Sixteen lanes of float32 and of bfloat16 pairs: what every kernel computes with. Sums are float32.
// The compiler's own vectors make of it what the processor has (AVX2, NEON, AVX-512); where it has AVX512-BF16, pairs are multiplied by
// its instruction, which adds the two products of a pair in another order.

#pragma once

#include <ATen/ATen.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

// A call passes such vectors through memory.
#define ADAPTERD_INLINE inline __attribute__((always_inline))

using bf16 = at::BFloat16;
constexpr int64_t kLanes = 16;  // float32 in one `Floats`

#if defined(__AVX512F__)
constexpr int kBytes = 64;  // of one of the processor's vectors
#elif defined(__AVX2__)
#define ADAPTERD_AVX2  // and no more than that
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

// Sixteen numbers of T in as many of the processor's vectors as they take: a single vector that is wider than those would live in memory.
template <typename T>
struct Lanes {
  typedef T Part __attribute__((vector_size(kBytes)));
  static constexpr int kParts = 64 / kBytes;
  Part part[kParts]{};

  template <typename U>
  ADAPTERD_INLINE Lanes<U> as() const {
    Lanes<U> r;
    for (int i = 0; i < kParts; ++i) r.part[i] = (typename Lanes<U>::Part)part[i];
    return r;
  }
};

using Floats = Lanes<float>;
using Words = Lanes<uint32_t>;

#define ADAPTERD_OPERATOR(op)                                                   \
  template <typename T>                                                         \
  ADAPTERD_INLINE Lanes<T> operator op(Lanes<T> a, const Lanes<T>& b) {                  \
    for (int i = 0; i < Lanes<T>::kParts; ++i) a.part[i] = a.part[i] op b.part[i]; \
    return a;                                                                   \
  }                                                                             \
  template <typename T>                                                         \
  ADAPTERD_INLINE Lanes<T> operator op(Lanes<T> a, std::type_identity_t<T> b) {          \
    for (int i = 0; i < Lanes<T>::kParts; ++i) a.part[i] = a.part[i] op b;      \
    return a;                                                                   \
  }
ADAPTERD_OPERATOR(+)
ADAPTERD_OPERATOR(-)
ADAPTERD_OPERATOR(*)
ADAPTERD_OPERATOR(/)
ADAPTERD_OPERATOR(&)
ADAPTERD_OPERATOR(|)
ADAPTERD_OPERATOR(<<)
ADAPTERD_OPERATOR(>>)
#undef ADAPTERD_OPERATOR

template <typename T>
ADAPTERD_INLINE Lanes<T>& operator+=(Lanes<T>& a, const Lanes<T>& b) { return a = a + b; }

ADAPTERD_INLINE Floats all(float x) { return Floats{} + x; }

ADAPTERD_INLINE Floats load(const float* p) {
  Floats v;
  std::memcpy(v.part, p, sizeof v.part);
  return v;
}

ADAPTERD_INLINE void store(float* p, const Floats& v) { std::memcpy(p, v.part, sizeof v.part); }

ADAPTERD_INLINE Floats larger(Floats a, const Floats& b) {
  for (int i = 0; i < Floats::kParts; ++i) a.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
  return a;
}

// `below` where x is under zero, else `other`.
ADAPTERD_INLINE Floats where_negative(const Floats& x, Floats below, const Floats& other) {
  for (int i = 0; i < Floats::kParts; ++i) below.part[i] = x.part[i] < 0.0f ? below.part[i] : other.part[i];
  return below;
}

// The lanes from `from` up to `to` of v, and `other` in the rest.
inline Floats within(int64_t from, int64_t to, const Floats& v, const Floats& other) {
  float each[kLanes], rest[kLanes];
  store(each, v);
  store(rest, other);
  for (int64_t i = 0; i < kLanes; ++i) each[i] = i >= from && i < to ? each[i] : rest[i];
  return load(each);
}

// Of all lanes: halves are added to halves.
ADAPTERD_INLINE float sum_of(const Floats& v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v.part[0]);
#endif
  Floats::Part sum = v.part[0];
  for (int i = 1; i < Floats::kParts; ++i) sum += v.part[i];
  float total = 0;
  for (size_t i = 0; i < kBytes / sizeof(float); ++i) total += sum[i];
  return total;
}

inline float largest_of(const Floats& v) {
  float each[kLanes];
  store(each, v);
  return *std::max_element(each, each + kLanes);
}

ADAPTERD_INLINE Floats widen(const bf16* p) {
  Words v;
  for (int i = 0; i < Words::kParts; ++i) {
#if defined(ADAPTERD_AVX2)
    v.part[i] = (Words::Part)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * 8))) << 16;  // GCC 12 takes seven for the same
#else
    typedef uint16_t Part __attribute__((vector_size(kBytes / 2)));
    Part part;
    std::memcpy(&part, p + i * (kBytes / 4), sizeof part);
    v.part[i] = __builtin_convertvector(part, Words::Part) << 16;
#endif
  }
  return v.as<float>();
}

// The bits of v as bfloat16 holds it, the nearest and of two the even one, in the upper half of each lane.
ADAPTERD_INLINE Words rounded_bits(const Floats& v) {
  Words bits = v.as<uint32_t>();
  for (int i = 0; i < Words::kParts; ++i) {
    const Words::Part nearest = bits.part[i] + 0x7fff + ((bits.part[i] >> 16) & 1);
    bits.part[i] = v.part[i] == v.part[i] ? nearest : bits.part[i] | 0x400000;
  }
  return bits;
}

ADAPTERD_INLINE void narrow(bf16* p, const Floats& v) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v.part[0]));
#else
  const Words bits = rounded_bits(v) >> 16;
  typedef uint16_t Part __attribute__((vector_size(kBytes / 2)));
  for (int i = 0; i < Words::kParts; ++i) {
    const Part part = __builtin_convertvector(bits.part[i], Part);
    std::memcpy(p + i * (kBytes / 4), &part, sizeof part);
  }
#endif
}

// v as bfloat16 holds it: transformers rounds after every operation, and so do the kernels.
ADAPTERD_INLINE Floats rounded(const Floats& v) { return (rounded_bits(v) & 0xffff0000u).as<float>(); }

// Sixteen pairs of bfloat16.
ADAPTERD_INLINE Words pairs(const void* p) {
  Words v;
  std::memcpy(v.part, p, sizeof v.part);
  return v;
}

ADAPTERD_INLINE Words broadcast(const bf16* p) {
  uint32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return Words{} + pair;
}

ADAPTERD_INLINE Floats first_of(const Words& pairs) { return (pairs << 16).as<float>(); }

ADAPTERD_INLINE Floats second_of(const Words& pairs) { return (pairs & 0xffff0000u).as<float>(); }

// sum + a.first · b.first + a.second · b.second, lane by lane.
ADAPTERD_INLINE Floats dot(const Floats& sum, const Words& a, const Words& b) {
#if defined(__AVX512BF16__)
  Floats r;
  r.part[0] = _mm512_dpbf16_ps(sum.part[0], (__m512bh)a.part[0], (__m512bh)b.part[0]);
  return r;
#else
  return sum + first_of(a) * first_of(b) + second_of(a) * second_of(b);
#endif
}

// sums[i] = a · b[i], i < MANY, for rows of b that lie `stride` apart.
template <int MANY>
inline void dots(const bf16* a, const bf16* b, int64_t stride, int64_t n, float* sums) {
  Floats sum[MANY];
  int64_t i = 0;
  for (; i + 32 <= n; i += 32)
    for (int k = 0; k < MANY; ++k) sum[k] = dot(sum[k], pairs(a + i), pairs(b + k * stride + i));
  for (int k = 0; k < MANY; ++k) {
    sums[k] = sum_of(sum[k]);
    for (int64_t rest = i; rest < n; ++rest) sums[k] += float(a[rest]) * float(b[k * stride + rest]);
  }
}

// e^x for x <= 0: 2^n of the nearest whole n, times a polynomial of the rest (relative error under 2e-7, Cephes' expf).
ADAPTERD_INLINE Floats exponential(Floats x) {
  x = larger(x, all(-87.0f));
  Floats whole, power;
  for (int i = 0; i < Floats::kParts; ++i) {
    typedef int32_t Part __attribute__((vector_size(kBytes)));
    const Part n = __builtin_convertvector(x.part[i] * 1.44269504f - 0.5f, Part);
    whole.part[i] = __builtin_convertvector(n, Floats::Part);
    power.part[i] = (Floats::Part)((n + 127) << 23);
  }
  const Floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats p = all(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = p * r + c;
  return (p * (r * r) + r + 1.0f) * power;
}

// x / (1 + e^-x), from e^-|x|, which cannot overflow.
ADAPTERD_INLINE Floats silu(const Floats& x) {
  const Floats e = exponential((x.as<uint32_t>() | 0x80000000u).as<float>());
  return where_negative(x, x * e, x) / (e + 1.0f);
}

// out = bf16(x / rms(x)) * weight over n numbers (RMSNorm, arXiv:1910.07467), rounded as transformers rounds. n is a multiple of 16.
inline void normalize(const bf16* x, const bf16* weight, float epsilon, int64_t n, bf16* out) {
  Floats squares;
  for (int64_t i = 0; i < n; i += kLanes) squares += widen(x + i) * widen(x + i);
  const Floats scale = all(1 / std::sqrt(sum_of(squares) / float(n) + epsilon));
  for (int64_t i = 0; i < n; i += kLanes) narrow(out + i, widen(weight + i) * rounded(widen(x + i) * scale));
}
