// The kernels in plain C++. Everything is in an unnamed namespace: a file that includes this under a target pragma gets
// its own copy for its instruction set, and no other file can pick it up.
#pragma once

#include <cmath>
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

// A group of weights: integers in the order of places, the scale and offset of each block. Q6_K also has two integer scales per
// block (weights 0..15 and 16..31 of block b: part[2 b], part[2 b + 1]).
struct Weights {
  int8_t q[kGroup];
  float scale[kBlocks];
  float offset[kBlocks];
  int8_t part[2 * kBlocks];
};

// Half d | zero point z | for every 32 weights 16 bytes as in Q4_0; w = d * (q - z).
constexpr bool has_zero_point(Type t) { return t == Type::U4_32_F16 || t == Type::U4_64_F16 || t == Type::U4_128_F16; }
constexpr bool has_offset(Type t) {
  return t == Type::Q4_1 || t == Type::Q5_1 || t == Type::Q4_K || t == Type::Q5_K || has_zero_point(t);
}
constexpr bool has_parts(Type t) { return t == Type::Q6_K; }

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

// For types with zero points: the block of 32 weights of a group, and their 16 bytes in it.
template <Type T>
constexpr int block_of(int b) { return b / (block_weights(T) / 32) * block_bytes(T); }
template <Type T>
constexpr int nibbles_of(int b) { return block_of<T>(b) + 3 + 16 * (b % (block_weights(T) / 32)); }

template <Type T>
inline void decode(const uint8_t* p, Weights& w) {
  if constexpr (T == Type::Q4_K || T == Type::Q5_K) {
    const float d = half_at(p), dmin = half_at(p + 2);
    uint8_t scale[8], offset[8];
    k_scales(p + 4, scale, offset);
    const uint8_t* fifth = p + 16;
    const uint8_t* low = T == Type::Q5_K ? p + 48 : p + 16;
    for (int b = 0; b < 8; ++b) {
      w.scale[b] = d * float(scale[b]);
      w.offset[b] = dmin * float(offset[b]);
      int8_t* q = w.q + 32 * place(b);
      for (int j = 0; j < 32; ++j) {
        q[j] = int8_t(low[32 * (b / 2) + j] >> (4 * (b % 2)) & 15);
        if (T == Type::Q5_K) q[j] = int8_t(q[j] | (fifth[j] >> b & 1) << 4);
      }
    }
  } else if constexpr (T == Type::Q6_K) {
    const float d = half_at(p + 208);
    std::memcpy(w.part, p + 192, 16);
    for (int b = 0; b < 8; ++b) {
      const int half = b / 4, k = b % 4;
      const uint8_t* low = p + 64 * half + 32 * (k % 2);
      const uint8_t* high = p + 128 + 32 * half;
      w.scale[b] = d;
      int8_t* q = w.q + 32 * place(b);
      for (int j = 0; j < 32; ++j) q[j] = int8_t(((low[j] >> (4 * (k / 2)) & 15) | (high[j] >> (2 * k) & 3) << 4) - 32);
    }
  } else if constexpr (T == Type::IQ4_XS) {
    const float d = half_at(p);
    const uint32_t high = load16(p + 2), low = load32(p + 4);
    for (int b = 0; b < 8; ++b) {
      w.scale[b] = d * float(int((low >> (4 * b) & 15) | (high >> (2 * b) & 3) << 4) - 32);
      int8_t* q = w.q + 32 * place(b);
      for (int j = 0; j < 16; ++j) {
        q[j] = kLevels[p[8 + 16 * b + j] & 15];
        q[j + 16] = kLevels[p[8 + 16 * b + j] >> 4];
      }
    }
  } else if constexpr (has_zero_point(T)) {
    for (int b = 0; b < 8; ++b) {
      w.scale[b] = half_at(p + block_of<T>(b));
      w.offset[b] = w.scale[b] * float(p[block_of<T>(b) + 2]);
      int8_t* q = w.q + 32 * place(b);
      const uint8_t* low = p + nibbles_of<T>(b);
      for (int j = 0; j < 16; ++j) q[j] = int8_t(low[j] & 15), q[j + 16] = int8_t(low[j] >> 4);
    }
  } else {
    for (int b = 0; b < 8; ++b, p += block_bytes(T)) {
      int8_t* q = w.q + 32 * place(b);
      if constexpr (T == Type::Q8_0) {
        w.scale[b] = half_at(p);
        std::memcpy(q, p + 2, 32);
      } else if constexpr (T == Type::MXFP4) {
        w.scale[b] = fp4_scale(p[0]);
        for (int j = 0; j < 16; ++j) q[j] = kFp4[p[1 + j] & 15], q[j + 16] = kFp4[p[1 + j] >> 4];
      } else if constexpr (T == Type::IQ4_NL) {
        w.scale[b] = half_at(p);
        for (int j = 0; j < 16; ++j) q[j] = kLevels[p[2 + j] & 15], q[j + 16] = kLevels[p[2 + j] >> 4];
      } else {
        constexpr bool five = T == Type::Q5_0 || T == Type::Q5_1;
        constexpr int start = has_offset(T) ? 4 : 2, bias = T == Type::Q4_0 ? 8 : T == Type::Q5_0 ? 16 : 0;
        w.scale[b] = half_at(p);
        if (has_offset(T)) w.offset[b] = -half_at(p + 2);
        const uint32_t fifth = five ? load32(p + start) : 0;
        const uint8_t* low = p + start + (five ? 4 : 0);
        for (int j = 0; j < 16; ++j) {
          q[j] = int8_t(int((low[j] & 15) | (fifth >> j & 1) << 4) - bias);
          q[j + 16] = int8_t(int((low[j] >> 4) | (fifth >> (j + 16) & 1) << 4) - bias);
        }
      }
    }
  }
}

// The group at `p`; if a row ends inside it, a copy in `room` that is padded with zeros.
template <Type T>
inline const uint8_t* whole(const uint8_t* p, int64_t weights, uint8_t* room) {
  if (block_weights(T) == kGroup || weights >= kGroup) return p;
  const size_t bytes = size_t(weights / block_weights(T) * block_bytes(T));
  std::memcpy(room, p, bytes);
  std::memset(room + bytes, 0, size_t(group_bytes(T)) - bytes);
  return room;
}

inline float fold(const float* lanes, int count) {
  float part[16];
  for (int i = 0; i < count; ++i) part[i] = lanes[i];
  for (int half = count / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
}

// Blocks with a smaller largest magnitude count as zero: its inverse would not be finite, and nothing is lost.
constexpr float kSmallest = 0x1p-100f;

// A row with a NaN or an infinity: every result of it is NaN.
inline void poison(Group* out, int64_t groups) {
  for (int64_t g = 0; g < groups; ++g) {
    std::memset(&out[g], 0, sizeof(Group));
    for (int b = 0; b < kBlocks; ++b) out[g].scale[b] = out[g].scaled_sum[b] = float_of(0x7fc00000);
  }
}

inline void quantize_row(const float* x, int64_t k, Group* out) {
  const int64_t groups = groups_of(k);
  bool finite = true;
  for (int64_t g = 0; g < groups; ++g) {
    Group& o = out[g];
    for (int b = 0; b < kBlocks; ++b) {
      const int64_t first = g * kGroup + 32 * b;
      int8_t* q = o.q + 32 * place(b);
      int32_t* half = o.half_sum + 8 * (b / 4) + b % 4;
      float amax = 0;
      uint32_t top = 0;
      if (first < k)
        for (int j = 0; j < 32; ++j) {
          const uint32_t bits = bits_of(x[first + j]) & 0x7fffffff;
          top = bits > top ? bits : top;
        }
      finite &= top < 0x7f800000;
      amax = float_of(top);
      half[0] = half[4] = 0;
      if (top >= 0x7f800000 || !(amax > kSmallest)) {
        std::memset(q, 0, 32);
        o.scale[b] = 0;
      } else {
        const float inverse = 127.0f / amax;
        for (int j = 0; j < 32; ++j) {
          q[j] = int8_t(__builtin_rintf(x[first + j] * inverse));
          half[4 * (j / 16)] += q[j];
        }
        o.scale[b] = amax / 127.0f;
      }
      o.sum[b] = half[0] + half[4];
      o.scaled_sum[b] = o.scale[b] * float(o.sum[b]);
    }
  }
  if (!finite) poison(out, groups);
}

inline void rest_of_row(const float* x, int64_t k, const Group* groups, float* out) {
  for (int64_t first = 0; first < k; first += 32) {
    const Group& group = groups[first / kGroup];
    const int block = int(first % kGroup / 32);
    const int8_t* q = group.q + 32 * place(block);
    for (int j = 0; j < 32; ++j) out[first + j] = __builtin_fmaf(-group.scale[block], float(q[j]), x[first + j]);
  }
}

inline void pack_panel(const Group* const* rows, int64_t count, int64_t groups, PanelGroup* out) {
  std::memset(out, 0, size_t(groups) * sizeof(PanelGroup));
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t r = 0; r < count; ++r) {
      const Group& from = rows[r][g];
      PanelGroup& to = out[g];
      for (int i = 0; i < kGroup / 4; ++i) std::memcpy(to.q[i][r], from.q + 4 * i, 4);
      for (int b = 0; b < kBlocks; ++b) {
        to.scale[b][r] = from.scale[b];
        to.scaled_sum[b][r] = from.scaled_sum[b];
        to.sum[b][r] = from.sum[b];
      }
      for (int i = 0; i < 2 * kBlocks; ++i) to.half_sum[i][r] = from.half_sum[i];
    }
}

template <Type T>
inline void dots_of(const Rows& w, const Group* const* x, int64_t m, Output y) {
  const int64_t groups = groups_of(w.k);
  constexpr int64_t kRows = 8;  // rows of x that share the decoding
  uint8_t room[kWidest];
  Weights weights;
  for (int64_t first = 0; first < m; first += kRows) {
    const int64_t rows = m - first < kRows ? m - first : kRows;
    for (int64_t i = 0; i < w.count; ++i) {
      float lanes[kRows][kBlocks] = {};
      const uint8_t* p = w.blocks + i * w.stride;
      for (int64_t g = 0; g < groups; ++g, p += group_bytes(T)) {
        decode<T>(whole<T>(p, w.k - g * kGroup, room), weights);
        for (int64_t r = 0; r < rows; ++r) {
          const Group& a = x[first + r][g];
          float dot[kBlocks];
          for (int b = 0; b < kBlocks; ++b) {
            const int8_t* p1 = weights.q + 32 * place(b);
            const int8_t* p2 = a.q + 32 * place(b);
            int32_t part[2] = {0, 0};
            for (int h = 0; h < 2; ++h)
              for (int j = 0; j < 16; ++j) part[h] += int32_t(p1[16 * h + j]) * p2[16 * h + j];
            dot[b] = has_parts(T) ? float(part[0] * weights.part[2 * b] + part[1] * weights.part[2 * b + 1])
                                  : float(part[0] + part[1]);
          }
          for (int b = 0; b < kBlocks; ++b) {
            lanes[r][b] = __builtin_fmaf(dot[b] * a.scale[b], weights.scale[b], lanes[r][b]);
            if (has_offset(T)) lanes[r][b] = __builtin_fmaf(-a.scaled_sum[b], weights.offset[b], lanes[r][b]);
          }
        }
      }
      for (int64_t r = 0; r < rows; ++r) y.at(first + r)[i] = fold(lanes[r], kBlocks);
    }
  }
}

}  // namespace
}  // namespace ferrum

// In a switch over the type of a format, by itself or by FERRUM_QUANTIZED (tables.h) for all that are quantized: CALL is the
// name of a template, the rest its arguments.
#define FERRUM_CASE(T, CALL, ...) \
  case Type::T:                   \
    CALL<Type::T>(__VA_ARGS__);   \
    break;
