// Weights in the registers of arm64: how each format is decoded, block by block. Only for units that are built for it.
//
// A format without a decoder here is decoded by scalar.h into memory and read from there, so every format of the table is served.
#pragma once

#include <arm_neon.h>

#include "scalar.h"

namespace ferrum {
namespace {

#define FERRUM_INLINE inline __attribute__((always_inline))

using Bytes = uint8x16_t;
struct Block {  // 32 weights
  int8x16_t q[2];
};

constexpr bool in_registers(Type t) {
  switch (t) {
    case Type::Q4_0: case Type::Q4_1: case Type::Q5_0: case Type::Q5_1: case Type::Q8_0: case Type::IQ4_NL: case Type::IQ4_XS:
    case Type::MXFP4: case Type::Q4_K: case Type::Q5_K: case Type::Q6_K: return true;
    default: return has_zero_point(t) && !one_decoder(t);
  }
}

FERRUM_INLINE float half_value(const uint8_t* p) {
  __fp16 half;
  std::memcpy(&half, p, 2);
  return half;
}

FERRUM_INLINE int8x16_t with_sign(Bytes v) { return vreinterpretq_s8_u8(v); }
FERRUM_INLINE Bytes low_bits(Bytes v) { return vandq_u8(v, vdupq_n_u8(15)); }
FERRUM_INLINE Bytes nibble(Bytes v, int high) { return high ? vshrq_n_u8(v, 4) : low_bits(v); }
// Two bits or one of each byte at `at`, moved to where 16 is; mask: 48 or 16.
FERRUM_INLINE Bytes high_bits(Bytes v, int at, int mask) { return vandq_u8(vshlq_u8(v, vdupq_n_s8(int8_t(4 - at))), vdupq_n_u8(uint8_t(mask))); }

// Bits 0 to 15 of a word, each as 16 in a byte.
FERRUM_INLINE Bytes fifth_bits(const uint8_t* p) {
  static const uint8_t kBits[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  const Bytes both = vcombine_u8(vdup_n_u8(p[0]), vdup_n_u8(p[1]));
  return vandq_u8(vtstq_u8(both, vld1q_u8(kBits)), vdupq_n_u8(16));
}

// d times each byte of a word, the lowest first.
FERRUM_INLINE void times_bytes(float d, uint64_t word, float out[8]) {
  const uint16x8_t wide = vmovl_u8(vcreate_u8(word));
  vst1q_f32(out, vmulq_n_f32(vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide))), d));
  vst1q_f32(out + 4, vmulq_n_f32(vcvtq_f32_u32(vmovl_u16(vget_high_u16(wide))), d));
}

// What the group at p has in addition to its integers; if they are not decoded in registers, those, too.
template <Type T>
FERRUM_INLINE void decode_scales(const uint8_t* p, Weights& w) {
  if constexpr (!in_registers(T)) {
    decode<T>(p, w);
  } else if constexpr (T == Type::Q4_K || T == Type::Q5_K) {
    const uint32_t a = load32(p + 4), b = load32(p + 8), c = load32(p + 12);
    const auto last = [](uint32_t four, uint32_t top) { return uint64_t((four & 0x0f0f0f0f) | (top >> 2 & 0x30303030)) << 32; };
    times_bytes(half_value(p), (a & 0x3f3f3f3f) | last(c, a), w.scale);
    times_bytes(half_value(p + 2), (b & 0x3f3f3f3f) | last(c >> 4, b), w.offset);
  } else if constexpr (T == Type::Q6_K) {
    for (int i = 0; i < 2 * kBlocks; ++i) w.part[i] = float(int8_t(p[192 + i]));
    for (int b = 0; b < kBlocks; ++b) w.scale[b] = half_value(p + 208);
  } else if constexpr (T == Type::IQ4_XS) {
    const float d = half_value(p);
    const uint32_t high = load16(p + 2), low = load32(p + 4);
    for (int b = 0; b < kBlocks; ++b) w.scale[b] = d * float(int((low >> (4 * b) & 15) | (high >> (2 * b) & 3) << 4) - 32);
  } else if constexpr (has_zero_point(T)) {
    for (int b = 0; b < kBlocks; ++b) {
      w.scale[b] = half_value(p + block_of<T>(b));
      w.offset[b] = w.scale[b] * float(p[block_of<T>(b) + 2]);
    }
  } else {
    for (int b = 0; b < kBlocks; ++b, p += block_bytes(T)) {
      w.scale[b] = T == Type::MXFP4 ? fp4_scale(p[0]) : half_value(p);
      if (has_offset(T)) w.offset[b] = -half_value(p + 2);
    }
  }
}

// Block b of a group whose integers are in memory.
FERRUM_INLINE Block decoded_block(const Weights& w, int b) {
  const int8_t* q = w.q + 32 * place(b);
  return {{vld1q_s8(q), vld1q_s8(q + 16)}};
}

// Block b of the group at p.
template <Type T>
FERRUM_INLINE Block block(const uint8_t* p, int b, const Weights& w) {
  const auto bytes = [](const uint8_t* at) __attribute__((always_inline)) { return vld1q_u8(at); };
  Block out;
  if constexpr (!in_registers(T)) {
    out = decoded_block(w, b);
  } else if constexpr (T == Type::Q4_K || T == Type::Q5_K) {
    const uint8_t* low = p + (T == Type::Q5_K ? 48 : 16) + 32 * (b / 2);
    for (int h = 0; h < 2; ++h) {
      Bytes q = nibble(bytes(low + 16 * h), b % 2);
      if constexpr (T == Type::Q5_K) q = vorrq_u8(q, high_bits(bytes(p + 16 + 16 * h), b, 16));
      out.q[h] = with_sign(q);
    }
  } else if constexpr (T == Type::Q6_K) {
    const int k = b % 4;
    const uint8_t *low = p + 64 * (b / 4) + 32 * (k % 2), *high = p + 128 + 32 * (b / 4);
    for (int h = 0; h < 2; ++h) {
      const Bytes q = vorrq_u8(nibble(bytes(low + 16 * h), k / 2), high_bits(bytes(high + 16 * h), 2 * k, 48));
      out.q[h] = vsubq_s8(with_sign(q), vdupq_n_s8(32));
    }
  } else if constexpr (T == Type::Q8_0) {
    for (int h = 0; h < 2; ++h) out.q[h] = with_sign(bytes(p + b * block_bytes(T) + 2 + 16 * h));
  } else {
    constexpr bool five = T == Type::Q5_0 || T == Type::Q5_1;
    constexpr bool levels = T == Type::IQ4_NL || T == Type::IQ4_XS, table = levels || T == Type::MXFP4;
    constexpr int bias = T == Type::Q4_0 ? 8 : T == Type::Q5_0 ? 16 : 0;
    constexpr int start = T == Type::MXFP4 ? 1 : has_offset(T) ? 4 : 2;
    const uint8_t* at = p + b * block_bytes(T) + start;
    if constexpr (T == Type::IQ4_XS) at = p + 8 + 16 * b;
    if constexpr (has_zero_point(T)) at = p + codes_of<T>(b);
    const Bytes packed = bytes(five ? at + 4 : at);
    for (int h = 0; h < 2; ++h) {
      Bytes q = nibble(packed, h);
      if constexpr (five) q = vorrq_u8(q, fifth_bits(at + 2 * h));
      if constexpr (table) out.q[h] = vqtbl1q_s8(vld1q_s8(levels ? kLevels : kFp4), q);
      else out.q[h] = vsubq_s8(with_sign(q), vdupq_n_s8(bias));
    }
  }
  return out;
}

}  // namespace
}  // namespace ferrum
