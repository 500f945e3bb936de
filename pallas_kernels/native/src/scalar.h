// The kernels in plain C++. Everything is in an unnamed namespace: a file that includes this under a target pragma gets
// its own copy for its instruction set, and no other file can pick it up.
#pragma once

#include <cmath>
#include <cstring>

#include "low_bits.h"

namespace ferrum {
namespace {

template <Type T>
inline void decode(const uint8_t* __restrict p, Weights& __restrict w) {
  if constexpr (one_decoder(T) && !has_zero_point(T)) {
    decode_low_bits<T>(p, w);
  } else if constexpr (T == Type::Q4_K || T == Type::Q5_K) {
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
    for (int i = 0; i < 16; ++i) w.part[i] = float(int8_t(p[192 + i]));
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
      nibbles(p + 8 + 16 * b, q);
      look_up(kLevels, q);
    }
  } else if constexpr (has_zero_point(T)) {
    for (int b = 0; b < 8; ++b) {
      const uint8_t *at = p + block_of<T>(b), *codes = p + codes_of<T>(b), *zero = at + head_bytes<T>() - code_bits(T) / 4;
      int8_t* q = w.q + 32 * place(b);
      w.scale[b] = scale_at<T>(at);
      w.offset[b] = w.scale[b] * float(code_bits(T) == 4 ? zero[0] : int(load16(zero)) - 128);
      if (code_bits(T) == 4) nibbles(codes, q);
      else
        for (int j = 0; j < 32; ++j) q[j] = int8_t(codes[j] ^ 128);
    }
  } else {
    for (int b = 0; b < 8; ++b, p += block_bytes(T)) {
      int8_t* q = w.q + 32 * place(b);
      if constexpr (T == Type::Q8_0) {
        w.scale[b] = half_at(p);
        std::memcpy(q, p + 2, 32);
      } else if constexpr (T == Type::MXFP4) {
        w.scale[b] = fp4_scale(p[0]);
        nibbles(p + 1, q);
        look_up(kFp4, q);
      } else if constexpr (T == Type::IQ4_NL) {
        w.scale[b] = half_at(p);
        nibbles(p + 2, q);
        look_up(kLevels, q);
      } else {
        constexpr bool five = T == Type::Q5_0 || T == Type::Q5_1;
        constexpr int start = has_offset(T) ? 4 : 2, bias = T == Type::Q4_0 ? 8 : T == Type::Q5_0 ? 16 : 0;
        w.scale[b] = half_at(p);
        if (has_offset(T)) w.offset[b] = -half_at(p + 2);
        const uint32_t fifth = five ? load32(p + start) : 0;
        nibbles(p + start + (five ? 4 : 0), q);
        for (int j = 0; j < 32; ++j) q[j] = int8_t(int(q[j] | (fifth >> j & 1) << 4) - bias);
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

// The group at `p`, of which a row has `weights` weights.
using Decode = void(const uint8_t* p, int64_t weights, Weights& w);
template <Type T>
inline void decode_group(const uint8_t* p, int64_t weights, Weights& w) {
  uint8_t room[group_bytes(T)];
  decode<T>(whole<T>(p, weights, room), w);
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

#if FERRUM_LANES == 256
inline __m256i wide(const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
#endif

// Half h of each block b of a group of weights times the activations: dots[h][b].
inline void half_dots(const int8_t* w, const int8_t* x, int32_t dots[2][kBlocks]) {
#if FERRUM_LANES == 256
  for (int h = 0; h < 2; ++h)
    for (int b = 0; b < kBlocks; b += 4) {
      __m256i sum[4];
      for (int i = 0; i < 4; ++i) {
        const int at = 32 * place(b + i) + 16 * h;
        sum[i] = _mm256_madd_epi16(wide(w + at), wide(x + at));
      }
      const __m256i four = _mm256_hadd_epi32(_mm256_hadd_epi32(sum[0], sum[1]), _mm256_hadd_epi32(sum[2], sum[3]));
      const __m128i both = _mm_add_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(dots[h] + b), both);
    }
#else
  for (int h = 0; h < 2; ++h)
    for (int b = 0; b < kBlocks; ++b) {
      const int at = 32 * place(b) + 16 * h;
      dots[h][b] = 0;
      for (int j = 0; j < 16; ++j) dots[h][b] += int32_t(w[at + j]) * x[at + j];
    }
#endif
}

// T is the representative of the format.
template <Type T>
[[gnu::noinline]] inline void dots_by(Decode* decode, int64_t bytes, const Rows& w, const Group* const* x, int64_t m, Output y) {
  const int64_t groups = groups_of(w.k);
  constexpr int64_t kRows = 8;  // rows of x that share the decoding
  Weights weights;
  for (int64_t first = 0; first < m; first += kRows) {
    const int64_t rows = m - first < kRows ? m - first : kRows;
    for (int64_t i = 0; i < w.count; ++i) {
      float lanes[kRows][kBlocks] = {};
      const uint8_t* p = w.blocks + i * w.stride;
      for (int64_t g = 0; g < groups; ++g, p += bytes) {
        decode(p, w.k - g * kGroup, weights);
        for (int64_t r = 0; r < rows; ++r) {
          const Group& a = x[first + r][g];
          int32_t dots[2][kBlocks];
          half_dots(weights.q, a.q, dots);
          float dot[kBlocks], sum[kBlocks];
          for (int b = 0; b < kBlocks; ++b) {
            const float *part = weights.part + 2 * b, *low = weights.low + 2 * b;
            const int32_t* half = a.half_sum + 8 * (b / 4) + b % 4;
            dot[b] = has_parts(T) ? __builtin_fmaf(float(dots[1][b]), part[1], float(dots[0][b]) * part[0]) : float(dots[0][b] + dots[1][b]);
            sum[b] = has_lows(T) ? a.scale[b] * __builtin_fmaf(float(half[4]), low[1], float(half[0]) * low[0]) : a.scaled_sum[b];
          }
          for (int b = 0; b < kBlocks; ++b) {
            lanes[r][b] = __builtin_fmaf(dot[b] * a.scale[b], weights.scale[b], lanes[r][b]);
            if (has_offset(T)) lanes[r][b] = __builtin_fmaf(-sum[b], weights.offset[b], lanes[r][b]);
          }
        }
      }
      for (int64_t r = 0; r < rows; ++r) y.at(first + r)[i] = fold(lanes[r], kBlocks);
    }
  }
}

template <Type T>
inline void dots_of(const Rows& w, const Group* const* x, int64_t m, Output y) {
  dots_by<once_decoded(T)>(decode_group<T>, group_bytes(T), w, x, m, y);
}

}  // namespace
}  // namespace ferrum

// In a switch over the type of a format, by itself or by FERRUM_QUANTIZED (tables.h) for all that are quantized: CALL is the
// name of a template, the rest its arguments.
#define FERRUM_CASE(T, CALL, ...) \
  case Type::T:                   \
    CALL<Type::T>(__VA_ARGS__);   \
    break;
