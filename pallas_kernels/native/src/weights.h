// Numbers in a few bytes, and what decoded weights are. In an unnamed namespace, as scalar.h says.
#pragma once

#include <cstring>

#include "isa.h"

namespace ferrum {
namespace {

inline uint16_t load16(const uint8_t* p) {
  uint16_t v;
  std::memcpy(&v, p, 2);
  return v;
}

inline uint32_t load32(const uint8_t* p) {
  uint32_t v;
  std::memcpy(&v, p, 4);
  return v;
}

inline float float_of(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

inline uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  if (magnitude < 0x0400) return float_of(sign | bits_of(float(magnitude) * 0x1p-24f));
  return float_of(sign | ((magnitude << 13) + (magnitude >= 0x7c00 ? 224u << 23 : 112u << 23)));
}

// Rounds to the nearest, ties to even.
inline uint16_t float_to_half(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (magnitude < 0x38800000)  // below 2^-14: the sum's last bit is worth 2^-24
    return uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
  return uint16_t(sign | (((magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13) - (112u << 10)));
}

inline uint16_t float_to_bfloat(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Four bits of exponent, three of fraction, no infinity; larger values become 448.
inline uint8_t float_to_e4m3(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 24 & 0x80;
  uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint8_t(sign | 0x7f);
  if (magnitude > 0x43e00000) magnitude = 0x43e00000;
  if (magnitude < 0x3c800000)  // below 2^-6: the sum's last bit is worth 2^-9
    return uint8_t(sign | (bits_of(float_of(magnitude) + 16384.0f) - bits_of(16384.0f)));
  return uint8_t(sign | (((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120u << 3)));
}

inline float e4m3_to_float(uint8_t e) {
  const uint32_t sign = uint32_t(e & 0x80) << 24, magnitude = e & 0x7f;
  if (magnitude == 0x7f) return float_of(sign | 0x7fc00000);
  if (magnitude < 8) return float_of(sign | bits_of(float(magnitude) * 0x1p-9f));
  return float_of(sign | ((magnitude << 20) + (120u << 23)));
}

inline float half_at(const uint8_t* p) { return half_to_float(load16(p)); }

constexpr int8_t kLevels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int8_t kFp4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// 2^(e - 128), also below the normal range.
inline float fp4_scale(uint8_t e) { return e < 2 ? float_of(0x00200000u << e) : float_of(uint32_t(e - 1) << 23); }

// The six-bit scales and offsets of Q4_K and Q5_K, eight bytes each.
inline void k_scales(const uint8_t* s, uint8_t scale[8], uint8_t offset[8]) {
  for (int g = 0; g < 4; ++g) {
    scale[g] = s[g] & 63;
    offset[g] = s[g + 4] & 63;
    scale[g + 4] = (s[g + 8] & 15) | (s[g] >> 6) << 4;
    offset[g + 4] = (s[g + 8] >> 4) | (s[g + 4] >> 6) << 4;
  }
}

// A group of weights: integers in the order of places, the scale and offset of each block. Formats with parts have factors of the
// scale for the two halves of block b at part[2 b] and part[2 b + 1], and Q2_K factors of the offset:
// w = scale * part * q - offset * low.
struct Weights {
  alignas(32) int8_t q[kGroup];
  float scale[kBlocks];
  float offset[kBlocks];
  float part[2 * kBlocks];
  float low[2 * kBlocks];
};

// The formats of pallas_kernels.blocks.groups: scale | zero point z | the codes q of every 32 weights; w = scale * (q - z). As
// bytes with a sign, codes of 8 bits and their zero points are less by 128.
constexpr const char* name_of(Type t) { return kFormats[int(t)].name; }
constexpr bool has_zero_point(Type t) { return name_of(t)[0] == 'U'; }
constexpr int code_bits(Type t) { return name_of(t)[1] - '0'; }
constexpr bool is_bfloat(Type t) {
  const char* at = name_of(t);
  while (*at && *at != 'B') ++at;
  return *at == 'B';
}

constexpr bool has_offset(Type t) {
  return t == Type::Q4_1 || t == Type::Q5_1 || t == Type::Q2_K || t == Type::Q4_K || t == Type::Q5_K || has_zero_point(t);
}
constexpr bool has_parts(Type t) {
  return t == Type::Q2_K || t == Type::Q3_K || t == Type::Q6_K || t == Type::IQ1_M || t == Type::IQ2_XS || t == Type::IQ2_S || t == Type::NVFP4;
}
constexpr bool has_lows(Type t) { return has_parts(t) && has_offset(t); }

// The representative of a type for decoded weights: one with the same properties.
constexpr Type once_decoded(Type t) {
  return has_lows(t) ? Type::Q2_K : has_parts(t) ? Type::Q6_K : has_offset(t) ? Type::Q4_1 : Type::Q8_0;
}

constexpr int block_weights(Type t) { return kFormats[int(t)].block_weights; }
constexpr int block_bytes(Type t) { return kFormats[int(t)].block_bytes; }

// Bytes of a group, and the maximum over quantized formats, as room for a padded group.
constexpr int group_bytes(Type t) { return kGroup / block_weights(t) * block_bytes(t); }
constexpr int widest_group() {
  int widest = 0;
  for (const Format& format : kFormats)
    if (!format.plain() && group_bytes(format.type) > widest) widest = group_bytes(format.type);
  return widest;
}
constexpr int kWidest = widest_group();

// For types with zero points: where the block of 32 weights b of a group is, its codes, and the scale's bytes.
template <Type T>
constexpr int block_of(int b) { return b / (block_weights(T) / 32) * block_bytes(T); }
template <Type T>
constexpr int head_bytes() { return block_bytes(T) - block_weights(T) * code_bits(T) / 8; }
template <Type T>
constexpr int codes_of(int b) { return block_of<T>(b) + head_bytes<T>() + 4 * code_bits(T) * (b % (block_weights(T) / 32)); }
template <Type T>
inline float scale_at(const uint8_t* p) {
  constexpr int bytes = head_bytes<T>() - code_bits(T) / 4;
  if constexpr (bytes == 4) return float_of(load32(p));
  else return is_bfloat(T) ? float_of(uint32_t(load16(p)) << 16) : half_at(p);
}

// nibbles: 16 bytes as 32 weights, the low four bits of each, then the high ones. look_up: 32 indices become entries of a table
// of 16.
#if FERRUM_LANES >= 256
inline void nibbles(const uint8_t* p, int8_t* q) {
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m256i both = _mm256_set_m128i(_mm_srli_epi16(low, 4), low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), _mm256_and_si256(both, _mm256_set1_epi8(15)));
}
inline void look_up(const int8_t* table, int8_t* q) {
  const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  auto* at = reinterpret_cast<__m256i*>(q);
  _mm256_storeu_si256(at, _mm256_shuffle_epi8(both, _mm256_loadu_si256(at)));
}
#else
inline void nibbles(const uint8_t* p, int8_t* q) {
  for (int j = 0; j < 16; ++j) q[j] = int8_t(p[j] & 15), q[j + 16] = int8_t(p[j] >> 4);
}
inline void look_up(const int8_t* table, int8_t* q) {
  for (int j = 0; j < 32; ++j) q[j] = table[q[j]];
}
#endif

}  // namespace
}  // namespace ferrum
