// The base's weights as a layer keeps them, and as they are read to be multiplied: bfloat16, or the 4-bit and 8-bit values that bitsandbytes
// holds. Tiles of 32 outputs lie together, in them pairs of inputs, in those two halves of 16 outputs. Must not know tokens or adapters.

#pragma once

#include <array>
#include <bit>

#include "vectors.h"

constexpr int64_t kTile = 2 * kLanes;  // outputs computed together
constexpr int64_t kAhead = 4096;       // bytes of weights asked for ahead of their use
constexpr int64_t kLine = 64;          // bytes that come from memory at once
constexpr int64_t kScaled = 32;        // pairs of inputs that share a 4-bit scale
constexpr int64_t kPiece = 128;        // pairs of 8-bit values that are widened at a time, so that they stay in the nearest cache

// What inputs and weights are multiplied as: pairs of bfloat16 where an instruction takes them, else float32.
#if defined(__AVX512BF16__)
using Input = bf16;
constexpr bool kPaired = true;
#else
using Input = float;
constexpr bool kPaired = false;
#endif

using Part = Floats::Part;
constexpr int64_t kPartLanes = kBytes / sizeof(float);

// What a pair of weights is multiplied as, for each lane: the pair at once, or the first and then the second.
#if defined(__AVX512BF16__)
using Factor = __m512bh;
constexpr int kFactors = 1;
#else
using Factor = Part;
constexpr int kFactors = 2;
#endif

// AVX2 looks sixteen 4-bit values up by byte, and finds outputs four by four in another order: 0, 8, 4, 12.
#if defined(ADAPTERD_AVX2)
constexpr bool kByBytes = true;
#else
constexpr bool kByBytes = false;
#endif

// Asks memory for what will be read soon.
inline void prefetch(const void* address) { __builtin_prefetch(address, 0, 2); }

// QLoRA's 4-bit values (arXiv:2305.14314, appendix E), in bitsandbytes' order.
constexpr float kNf4[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f,
    0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// The same as bfloat16, the nearest and of two the even one.
constexpr std::array<uint16_t, 16> round_nf4() {
  std::array<uint16_t, 16> bits{};
  for (int i = 0; i < 16; ++i) {
    const uint32_t whole = std::bit_cast<uint32_t>(kNf4[i]);
    bits[i] = (whole + 0x7fff + ((whole >> 16) & 1)) >> 16;
  }
  return bits;
}
alignas(64) constexpr std::array<uint16_t, 16> kNf4Bits = round_nf4();

constexpr std::array<float, 16> widen_nf4() {
  std::array<float, 16> values{};
  for (int i = 0; i < 16; ++i) values[i] = std::bit_cast<float>(uint32_t(kNf4Bits[i]) << 16);
  return values;
}
alignas(64) constexpr std::array<float, 16> kNf4Rounded = widen_nf4();

constexpr std::array<uint8_t, 16> nf4_bytes(int shift) {
  std::array<uint8_t, 16> bytes{};
  for (int i = 0; i < 16; ++i) bytes[i] = uint8_t(kNf4Bits[i] >> shift);
  return bytes;
}
alignas(16) constexpr std::array<uint8_t, 16> kNf4Low = nf4_bytes(0), kNf4High = nf4_bytes(8);

// Words of a pair of bfloat16 each, of which float32 is the first or the second.
inline Factor factor_of(Words::Part words, int i) {
#if defined(__AVX512BF16__)
  return (__m512bh)words;
#else
  return (Part)(i ? words & 0xffff0000u : words << 16);
#endif
}

// Of the pairs of two neighbours, [in / 4]'s, of a half of a tile, from their 32 bytes; `second`: the second of the two. The values are
// rounded to bfloat16, by as much as a dequantized weight would be. Where pairs lie together or are looked up by byte, byte 2 o + i has
// output o's weight for input i, of the first in its low half. Else byte 16 pair + o has it for input 0 in its low half, for input 1 in its high.
inline Factor read_nf4(const uint8_t* from, bool second, int p, int i) {
#if defined(__AVX512BF16__)
  const __m512i table = _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(kNf4Bits.data())));  // an index's fifth bit is another's
  const __m512i index = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return (__m512bh)_mm512_permutexvar_epi16(second ? _mm512_srli_epi16(index, 4) : index, table);
#elif defined(__AVX512F__)
  const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + second * kLanes)));
  return _mm512_permutexvar_ps(i ? _mm512_srli_epi32(index, 4) : index, _mm512_load_ps(kNf4Rounded.data()));
#elif defined(ADAPTERD_AVX2)
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  const __m256i index = _mm256_and_si256(second ? _mm256_srli_epi16(both, 4) : both, _mm256_set1_epi8(15));
  const auto look_up = [&](const std::array<uint8_t, 16>& table) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table.data()))), index);
  };
  const __m256i low = look_up(kNf4Low), high = look_up(kNf4High);
  return factor_of((Words::Part)(p ? _mm256_unpackhi_epi8(low, high) : _mm256_unpacklo_epi8(low, high)), i);
#else
  Part values;
  for (int64_t o = 0; o < kPartLanes; ++o) values[o] = kNf4Rounded[from[second * kLanes + p * kPartLanes + o] >> (4 * i) & 15];
  return values;
#endif
}

// Signed bytes as float32, one a lane.
inline Part widen_bytes(const int8_t* from) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(ADAPTERD_AVX2)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  Part wide;
  for (int64_t i = 0; i < kPartLanes; ++i) wide[i] = from[i];
  return wide;
#endif
}

// Of a pair of 8-bit values, whole numbers, which bfloat16 holds exactly: 32 bytes, input 0's first.
inline Factor read_int8(const int8_t* from, int p, int i) {
#if defined(__AVX512BF16__)
  return _mm512_cvtne2ps_pbh(widen_bytes(from + kLanes), widen_bytes(from));
#else
  return widen_bytes(from + i * kLanes + p * kPartLanes);
#endif
}

// Each reader's read(pair, j, half, p, i) is the i-th factor of pair + j, for part p of a half of a tile.

// Weights in bfloat16, [pairs, 2, 16, 2]; what lies at `next` is asked for meanwhile.
struct WideReader {
  static constexpr int kTogether = 1;
  const char *bytes, *next;

  Factor read(int64_t pair, int, int half, int p, int i) const {
    const int64_t at = (pair * 2 + half) * kLine + p * kBytes;
    if (p == 0 && i == 0) prefetch(next + at);
    Words::Part words;
    std::memcpy(&words, bytes + at, sizeof words);
    return factor_of(words, i);
  }
};

// Words that were made before, [pairs, 2, parts].
struct NearReader {
  static constexpr int kTogether = 1;
  const Words::Part* words;

  static int64_t place(int64_t pair, int half, int p) { return (pair * 2 + half) * Floats::kParts + p; }

  Factor read(int64_t pair, int, int half, int p, int i) const {
    const Words::Part* from = words + place(pair, half, p);
    if (i) asm("" : "+r"(from));  // read anew: kept since the first factor, they would push a sum out of the registers
    return factor_of(*from, i);
  }
};
constexpr int64_t kNear = 2 * Floats::kParts;  // words of a tile's pair

// 4-bit values, [pairs / 2, 2, 32], without their scales.
struct Nf4Reader {
  static constexpr int kTogether = 2;
  const char *bytes, *next;

  Factor read(int64_t pair, int second, int half, int p, int i) const {
    const int64_t at = (pair + half) * kLanes * 2;
    if (p == 0 && i == 0 && !second && half == 0) prefetch(next + at);
    return read_nf4(reinterpret_cast<const uint8_t*>(bytes) + at, second, p, i);
  }
};

// 8-bit values, [pairs, 2, 32], without their scales.
struct Int8Reader {
  static constexpr int kTogether = 1;
  const char *bytes, *next;

  Factor read(int64_t pair, int, int half, int p, int i) const {
    const int64_t at = (pair * 2 + half) * kTile;
    if (p == 0 && i == 0 && half == 0) prefetch(next + at);
    return read_int8(reinterpret_cast<const int8_t*>(bytes) + at, p, i);
  }
};

// `pairs` pairs as NearReader has them, of values that bfloat16 holds.
template <typename Reader>
inline void widen(const Reader& reader, int64_t pairs, Words::Part* to) {
  for (int64_t k = 0; k < pairs; k += Reader::kTogether)
    for (int half = 0; half < 2; ++half) {
      Words::Part words[Reader::kTogether][Floats::kParts];  // all read before any is written, which might be what is read
      for (int j = 0; j < Reader::kTogether; ++j)
        for (int p = 0; p < Floats::kParts; ++p) {
          words[j][p] = (Words::Part)reader.read(k, j, half, p, 0);
          if (kFactors == 2) words[j][p] = words[j][p] >> 16 | (Words::Part)reader.read(k, j, half, p, 1);
        }
      for (int j = 0; j < Reader::kTogether; ++j)
        for (int p = 0; p < Floats::kParts; ++p) to[NearReader::place(k + j, half, p)] = words[j][p];
    }
}

enum class Format { bfloat16, nf4, int8 };

// One tile; scales float32: of 4 bits [in / 64, 32], of 8 bits [32].
struct PackedTile {
  Format format;
  const char* bytes;
  const float* scales;
};

// A layer's weights: bf16 [out / 32, in / 2, 2, 16, 2], uint8 (4 bits) [out / 32, in / 2, 32] or int8 [out / 32, in / 2, 64];
// scales float32 [out / 32, in / 64, 32] or [out / 32, 32], empty for bfloat16.
struct Weights {
  Format format;
  const char* bytes;
  const float* scales;

  Weights(const at::Tensor& packed, const at::Tensor& scales)
      : format(packed.scalar_type() == at::kBFloat16 ? Format::bfloat16 : packed.scalar_type() == at::kByte ? Format::nf4 : Format::int8),
        bytes(static_cast<const char*>(packed.const_data_ptr())), scales(scales.const_data_ptr<float>()) {}

  PackedTile tile(int64_t at, int64_t pairs) const {
    const int64_t size = pairs * kTile * (format == Format::bfloat16 ? 4 : format == Format::int8 ? 2 : 1);
    const int64_t own = format == Format::nf4 ? pairs / kScaled * kTile : kTile;  // scales
    return {format, bytes + at * size, format == Format::bfloat16 ? nullptr : scales + at * own};
  }
};

inline void check_packed(int64_t out, int64_t in, int64_t inputs) {
  TORCH_CHECK(out % kTile == 0 && in % inputs == 0, "adapterd::pack: [", out, ", ", in, "] is not a multiple of [32, ", inputs, "]");
}

// values [out, in] of any type -> [out / 32, in / 2, 2, 16, 2]: the two of each pair beside each other.
inline at::Tensor pair_up(const at::Tensor& values) {
  return values.reshape({values.size(0) / kTile, 2, kLanes, values.size(1) / 2, 2}).permute({0, 3, 1, 2, 4});
}

// pack(weight bf16 or int8 [out, in]) -> the same dtype, [out / 32, in / 2, 2, 16, 2] or [out / 32, in / 2, 64]
inline at::Tensor pack(const at::Tensor& weight) {
  check_packed(weight.size(0), weight.size(1), 2);
  const at::Tensor pairs = pair_up(weight);
  if (weight.scalar_type() == at::kBFloat16) return pairs.contiguous();
  return (kPaired ? pairs : pairs.transpose(3, 4)).contiguous().view({weight.size(0) / kTile, weight.size(1) / 2, 2 * kTile});
}

// pack_nf4(codes uint8 [out, in / 2], the first of two values in the upper half) -> uint8 [out / 32, in / 2, 32], see read_nf4
inline at::Tensor pack_nf4(const at::Tensor& codes) {
  const int64_t out = codes.size(0), in = codes.size(1) * 2;
  check_packed(out, in, 2 * kScaled);
  const at::Tensor values = at::stack({at::bitwise_right_shift(codes, 4), at::bitwise_and(codes, 15)}, -1).view({out, in});
  at::Tensor pairs = pair_up(values).reshape({out / kTile, in / 4, 2, 2, kLanes, 2}).transpose(2, 3);  // tile, two pairs, half, pair, output, input
  if (kByBytes) pairs = pairs.unflatten(4, {2, 2, 4}).transpose(4, 5).flatten(4, 6);
  const auto join = [](const at::Tensor& low, const at::Tensor& high) { return at::bitwise_or(low, at::bitwise_left_shift(high, 4)); };
  const at::Tensor bytes = kPaired || kByBytes ? join(pairs.select(3, 0), pairs.select(3, 1)) : join(pairs.select(5, 0), pairs.select(5, 1));
  return bytes.contiguous().view({out / kTile, in / 2, kTile});
}

// pack_scales(scales float32 [out, blocks]) -> [out / 32, blocks, 32]
inline at::Tensor pack_scales(const at::Tensor& scales) {
  return scales.reshape({scales.size(0) / kTile, kTile, scales.size(1)}).transpose(1, 2).contiguous();
}
