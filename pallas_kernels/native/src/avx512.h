// Weights in 512-bit registers: how each format is decoded. Included by files under an AVX-512 VNNI target pragma only.
//
// A group of 256 weights becomes four registers of unsigned bytes, q + bias, in the order of places (see isa.h): register i
// holds blocks i and i + 4. VNNI multiplies unsigned by signed bytes; bias times the sum of the activations is
// subtracted from the integer dot product, so nothing is rounded.
#pragma once

#include "scalar.h"

namespace ferrum {
namespace {

#define FERRUM_INLINE inline __attribute__((always_inline))

using V = __m512i;
using F = __m512;

FERRUM_INLINE V dpbusd(V acc, V u, V s) { return _mm512_dpbusd_epi32(acc, u, s); }
FERRUM_INLINE V load512(const void* p) { return _mm512_load_si512(p); }
FERRUM_INLINE V bytes(int v) { return _mm512_set1_epi8(char(v)); }
FERRUM_INLINE __m256i load256(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
FERRUM_INLINE __m128i load128(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
FERRUM_INLINE V halves(__m256i low, __m256i high) { return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1); }
FERRUM_INLINE uint64_t load64(const uint8_t* p) {
  uint64_t v;
  std::memcpy(&v, p, 8);
  return v;
}

// The bias is 2 to this power; 0: none.
constexpr int bias_shift(Type t) {
  switch (t) {
    case Type::Q3_K: return 2;
    case Type::Q4_0: return 3;
    case Type::Q5_0: case Type::MXFP4: case Type::NVFP4: return 4;
    case Type::Q6_K: return 5;
    case Type::Q8_0: case Type::IQ4_NL: case Type::IQ4_XS: return 7;
    default: return 0;
  }
}

// Prefetches the bytes about 4 KiB ahead: hardware prefetchers stop at page boundaries, and decoding hides little latency.
template <Type T>
FERRUM_INLINE void ask_ahead(const uint8_t* p) {
  for (int at = 0; at < group_bytes(T); at += 64) _mm_prefetch(reinterpret_cast<const char*>(p) + 4096 + at, _MM_HINT_T0);
}

// 16 bytes of block i and 16 of block i + 4, four bits per weight: [i low, i high, i + 4 low, i + 4 high].
FERRUM_INLINE V nibbles(const uint8_t* first, const uint8_t* second) {
  const V both = _mm512_mask_broadcast_i32x4(_mm512_broadcast_i32x4(load128(first)), 0xff00, load128(second));
  return _mm512_and_si512(_mm512_srlv_epi64(both, _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0)), bytes(15));
}

FERRUM_INLINE V look_up(const int8_t* table, int bias, V index) {
  alignas(16) int8_t biased[16];
  for (int i = 0; i < 16; ++i) biased[i] = int8_t(table[i] + bias);
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(biased))), index);
}

// The four registers of the group at p.
template <Type T>
FERRUM_INLINE void registers(const uint8_t* p, V w[4]) {
  if constexpr (T == Type::Q4_K || T == Type::Q5_K) {
    const uint8_t* low = T == Type::Q5_K ? p + 48 : p + 16;
    const V even = halves(load256(low), load256(low + 64)), odd = halves(load256(low + 32), load256(low + 96));
    w[0] = _mm512_and_si512(even, bytes(15));
    w[1] = _mm512_and_si512(_mm512_srli_epi16(even, 4), bytes(15));
    w[2] = _mm512_and_si512(odd, bytes(15));
    w[3] = _mm512_and_si512(_mm512_srli_epi16(odd, 4), bytes(15));
    if constexpr (T == Type::Q5_K) {
      const V fifth = _mm512_broadcast_i64x4(load256(p + 16)), bit = halves(_mm256_set1_epi8(1), _mm256_set1_epi8(16));
      w[0] = _mm512_mask_add_epi8(w[0], _mm512_test_epi8_mask(fifth, bit), w[0], bytes(16));
      w[1] = _mm512_mask_add_epi8(w[1], _mm512_test_epi8_mask(fifth, _mm512_slli_epi16(bit, 1)), w[1], bytes(16));
      w[2] = _mm512_mask_add_epi8(w[2], _mm512_test_epi8_mask(fifth, _mm512_slli_epi16(bit, 2)), w[2], bytes(16));
      w[3] = _mm512_mask_add_epi8(w[3], _mm512_test_epi8_mask(fifth, _mm512_slli_epi16(bit, 3)), w[3], bytes(16));
    }
  } else if constexpr (T == Type::Q6_K) {
    const V even = halves(load256(p), load256(p + 64)), odd = halves(load256(p + 32), load256(p + 96));
    const V high = _mm512_loadu_si512(p + 128), low_bits = bytes(15), high_bits = bytes(48);
    // low | high & 48, as one ternary operation.
    const auto join = [&](V low, V top) { return _mm512_ternarylogic_epi64(low, top, high_bits, 0xf8); };
    w[0] = join(_mm512_and_si512(even, low_bits), _mm512_slli_epi16(high, 4));
    w[1] = join(_mm512_and_si512(odd, low_bits), _mm512_slli_epi16(high, 2));
    w[2] = join(_mm512_and_si512(_mm512_srli_epi16(even, 4), low_bits), high);
    w[3] = join(_mm512_and_si512(_mm512_srli_epi16(odd, 4), low_bits), _mm512_srli_epi16(high, 2));
  } else if constexpr (T == Type::IQ4_XS) {
    for (int i = 0; i < 4; ++i) w[i] = look_up(kLevels, 128, nibbles(p + 8 + 16 * i, p + 8 + 16 * (i + 4)));
  } else if constexpr (has_zero_point(T)) {
    for (int i = 0; i < 4; ++i) w[i] = nibbles(p + codes_of<T>(i), p + codes_of<T>(i + 4));
  } else {
    constexpr int size = block_bytes(T);
    for (int i = 0; i < 4; ++i) {
      const uint8_t *a = p + i * size, *b = p + (i + 4) * size;
      if constexpr (T == Type::Q8_0) {
        w[i] = _mm512_xor_si512(halves(load256(a + 2), load256(b + 2)), bytes(128));
      } else if constexpr (T == Type::IQ4_NL) {
        w[i] = look_up(kLevels, 128, nibbles(a + 2, b + 2));
      } else if constexpr (T == Type::MXFP4) {
        w[i] = look_up(kFp4, 16, nibbles(a + 1, b + 1));
      } else {
        constexpr bool five = T == Type::Q5_0 || T == Type::Q5_1;
        constexpr int start = has_offset(T) ? 4 : 2, low = start + (five ? 4 : 0);
        w[i] = nibbles(a + low, b + low);
        if constexpr (five) {
          const __mmask64 fifth = uint64_t(load32(a + start)) | uint64_t(load32(b + start)) << 32;
          w[i] = _mm512_mask_add_epi8(w[i], fifth, w[i], bytes(16));
        }
      }
    }
  }
}

FERRUM_INLINE F wide(__m128i bytes16) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes16)); }
FERRUM_INLINE F two(float first, float second) {
  return _mm512_mask_mov_ps(_mm512_set1_ps(first), 0xff00, _mm512_set1_ps(second));
}

// Bytes of the scales and of the offsets of Q4_K and Q5_K, lowest first.
FERRUM_INLINE void k_scale_words(const uint8_t* s, uint64_t& scale, uint64_t& offset) {
  const uint32_t a = load32(s), b = load32(s + 4), c = load32(s + 8);
  scale = uint64_t(a & 0x3f3f3f3f) | uint64_t((c & 0x0f0f0f0f) | ((a >> 2) & 0x30303030)) << 32;
  offset = uint64_t(b & 0x3f3f3f3f) | uint64_t((c >> 4 & 0x0f0f0f0f) | ((b >> 2) & 0x30303030)) << 32;
}

FERRUM_INLINE uint64_t xs_scale_word(const uint8_t* p) {
  return _pdep_u64(load32(p + 4), 0x0f0f0f0f0f0f0f0f) | _pdep_u64(load16(p + 2), 0x3030303030303030);
}

// Scales and offsets of the blocks of two groups: those of p in lanes 0..7, those of q in lanes 8..15.
template <Type T>
FERRUM_INLINE void scales(const uint8_t* p, const uint8_t* q, F& scale, F& offset) {
  if constexpr (T == Type::Q4_K || T == Type::Q5_K) {
    uint64_t s0, s1, o0, o1;
    k_scale_words(p + 4, s0, o0);
    k_scale_words(q + 4, s1, o1);
    // d and dmin of both as four floats, then each spread over its eight lanes.
    const __m128 d = _mm_cvtph_ps(_mm_set_epi32(0, 0, int(load32(q)), int(load32(p))));
    const F all = _mm512_broadcast_f32x4(d);
    const V at = _mm512_set_epi32(2, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0);
    scale = _mm512_mul_ps(wide(_mm_set_epi64x(int64_t(s1), int64_t(s0))), _mm512_permutevar_ps(all, at));
    offset = _mm512_mul_ps(wide(_mm_set_epi64x(int64_t(o1), int64_t(o0))),
                           _mm512_permutevar_ps(all, _mm512_or_si512(at, _mm512_set1_epi32(1))));
  } else if constexpr (T == Type::Q6_K) {
    scale = two(_cvtsh_ss(load16(p + 208)), _cvtsh_ss(load16(q + 208)));
  } else if constexpr (T == Type::IQ4_XS) {
    const V s = _mm512_cvtepu8_epi32(_mm_set_epi64x(int64_t(xs_scale_word(q)), int64_t(xs_scale_word(p))));
    scale = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(s, _mm512_set1_epi32(32))),
                          two(_cvtsh_ss(load16(p)), _cvtsh_ss(load16(q))));
  } else if constexpr (has_zero_point(T)) {
    const __m256i at = _mm256_set_epi32(block_of<T>(7), block_of<T>(6), block_of<T>(5), block_of<T>(4), block_of<T>(3),
                                        block_of<T>(2), block_of<T>(1), 0);
    const V words = halves(_mm256_i32gather_epi32(reinterpret_cast<const int*>(p), at, 1),
                           _mm256_i32gather_epi32(reinterpret_cast<const int*>(q), at, 1));
    scale = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words));
    const V zero = _mm512_and_si512(_mm512_srli_epi32(words, 16), _mm512_set1_epi32(255));
    offset = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(zero));
  } else {
    constexpr int size = block_bytes(T);
    const __m256i at = _mm256_mullo_epi32(_mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0), _mm256_set1_epi32(size));
    const V words = halves(_mm256_i32gather_epi32(reinterpret_cast<const int*>(p), at, 1),
                           _mm256_i32gather_epi32(reinterpret_cast<const int*>(q), at, 1));
    if constexpr (T == Type::MXFP4) {
      const V e = _mm512_and_si512(words, _mm512_set1_epi32(255)), one = _mm512_set1_epi32(1);
      const V normal = _mm512_slli_epi32(_mm512_sub_epi32(e, one), 23);
      const V tiny = _mm512_sllv_epi32(_mm512_set1_epi32(0x00200000), e);
      scale = _mm512_castsi512_ps(_mm512_mask_mov_epi32(normal, _mm512_cmple_epu32_mask(e, one), tiny));
    } else {
      scale = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words));
      if constexpr (has_offset(T)) {
        const F m = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16)));
        offset = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(m), _mm512_set1_epi32(int(0x80000000))));
      }
    }
  }
}

// The group at p: in place if all of it is before `end` (what follows a row that ends inside the group is read, but never used,
// see `mask_absent`), else a copy.
template <Type T>
FERRUM_INLINE const uint8_t* readable(const uint8_t* p, int64_t weights, const uint8_t* end, uint8_t* room) {
  return p + group_bytes(T) <= end ? p : whole<T>(p, weights, room);
}

// Scales and offsets of two groups that have only `weights` weights: zero for the absent blocks.
template <Type T>
FERRUM_INLINE void mask_absent(int64_t weights, F& scale, F& offset) {
  if (block_weights(T) == kGroup || weights >= kGroup) return;
  const auto mask = __mmask16(((1u << (weights / 32)) - 1) * 0x101u);
  scale = _mm512_maskz_mov_ps(mask, scale);
  if constexpr (has_offset(T)) offset = _mm512_maskz_mov_ps(mask, offset);
}

// Q6_K: the 16 integer scales of a group in the order of Group::half_sum.
FERRUM_INLINE F part_scales(const uint8_t* p) {
  const __m128i order = _mm_set_epi8(15, 13, 11, 9, 14, 12, 10, 8, 7, 5, 3, 1, 6, 4, 2, 0);
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_shuffle_epi8(load128(p + 192), order)));
}

// Four registers of four 128-bit lanes of partial sums -> the sum of each lane, in the order of Group::half_sum.
FERRUM_INLINE V half_sums(V a, V b, V c, V d) {
  const V p = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const V q = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(p, q), _mm512_unpackhi_epi64(p, q));
}

// The half sums of two groups -> the eight sums of the first and of the second.
FERRUM_INLINE V block_sums(V p, V q) {
  return _mm512_add_epi32(_mm512_shuffle_i32x4(p, q, 0x88), _mm512_shuffle_i32x4(p, q, 0xdd));
}

}  // namespace
}  // namespace ferrum
