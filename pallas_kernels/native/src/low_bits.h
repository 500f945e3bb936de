// The formats that have one decoder, in plain C++ that compilers vectorize, for every instruction set: those of up to three bits
// and NVFP4, here, and most groups with a zero point. It writes a group of weights as bytes, which are still in the nearest cache when they are multiplied.
//
// Rows of a grid and runs of eight signs are words of eight bytes (tables.h has them): a lookup and three operations are eight
// weights. A sum of such words never carries from byte to byte, as the comments there say.
#pragma once

#include "weights.h"

namespace ferrum {
namespace {

constexpr bool one_decoder(Type t) {
  switch (t) {
    case Type::Q2_K: case Type::Q3_K: case Type::IQ1_S: case Type::IQ1_M: case Type::IQ2_XXS: case Type::IQ2_XS: case Type::IQ2_S:
    case Type::IQ3_XXS: case Type::IQ3_S: case Type::TQ1_0: case Type::TQ2_0: case Type::NVFP4: return true;
    default: return has_zero_point(t) && t != Type::U4_32_F16 && t != Type::U4_64_F16 && t != Type::U4_128_F16;
  }
}

constexpr uint64_t kOnes = 0x0101010101010101;

inline void store64(int8_t* p, uint64_t v) { std::memcpy(p, &v, 8); }
inline void fill(float* p, int count, float value) {
  for (int i = 0; i < count; ++i) p[i] = value;
}

// Weights 32 r + j = bits 2 r, 2 r + 1 of byte j, in two runs of 128.
inline int two_bits(const uint8_t* p, int b, int j) { return p[32 * (b / 4) + j] >> (2 * (b % 4)) & 3; }

// Eight magnitudes above zero, negative where a byte of `negative` is 255: no byte of ~magnitude is 255, so adding one does not
// carry.
inline uint64_t with_signs(uint64_t magnitudes, uint64_t negative) { return (magnitudes ^ negative) + (negative & kOnes); }

// Eight weights of IQ1_S or IQ1_M in eighths, plus 10: a row of the grid has 8 t + 9, and the shift adds 0 or 2.
inline uint64_t shifted(int row, bool negative) { return kIq1SGrid[row] + (2 * kOnes & (uint64_t(negative) - 1)); }

// The unsigned E4M3 number; 0x7f counts as zero.
inline float unsigned_e4m3(uint8_t bits) { return (bits & 0x7f) == 0x7f ? 0.0f : e4m3_to_float(bits & 0x7f); }

template <Type T>
inline void decode_low_bits(const uint8_t* __restrict p, Weights& __restrict w) {
  const auto block = [&](int b) { return w.q + 32 * place(b); };
  const auto eight = [&](int g) { return block(g / 4) + 8 * (g % 4); };  // group g of eight weights
  if constexpr (T == Type::Q2_K) {
    fill(w.scale, kBlocks, half_at(p + 80));
    fill(w.offset, kBlocks, half_at(p + 82));
    for (int i = 0; i < 16; ++i) w.part[i] = float(p[i] & 15), w.low[i] = float(p[i] >> 4);
    for (int b = 0; b < kBlocks; ++b)
      for (int j = 0; j < 32; ++j) block(b)[j] = int8_t(two_bits(p + 16, b, j));
  } else if constexpr (T == Type::Q3_K) {
    fill(w.scale, kBlocks, half_at(p + 108));
    for (int i = 0; i < 16; ++i) {
      const int low = p[96 + i % 8] >> (4 * (i / 8)) & 15, high = p[104 + i % 4] >> (2 * (i / 4)) & 3;
      w.part[i] = float((low | high << 4) - 32);
    }
    for (int b = 0; b < kBlocks; ++b)
      for (int j = 0; j < 32; ++j) block(b)[j] = int8_t((two_bits(p + 32, b, j) | (p[j] >> b & 1) << 2) - 4);
  } else if constexpr (T == Type::IQ1_S || T == Type::IQ1_M) {
    if constexpr (T == Type::IQ1_S) {
      const float d = half_at(p) * 0.125f;
      for (int b = 0; b < kBlocks; ++b) {
        const int word = load16(p + 34 + 2 * b);
        for (int i = 0; i < 4; ++i) store64(block(b) + 8 * i, shifted(p[2 + 4 * b + i] | (word >> (3 * i) & 7) << 8, word >> 15));
        w.scale[b] = d * float(2 * (word >> 12 & 7) + 1);
      }
    } else {
      const int words[] = {load16(p + 48), load16(p + 50), load16(p + 52), load16(p + 54)};
      fill(w.scale, kBlocks, half_to_float(uint16_t(words[0] >> 12 | (words[1] >> 12) << 4 | (words[2] >> 12) << 8 | (words[3] >> 12) << 12)) * 0.125f);
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) w.part[4 * i + j] = float(2 * (words[i] >> (3 * j) & 7) + 1);
      for (int b = 0; b < kBlocks; ++b) {
        const int nibbles = load16(p + 32 + 2 * b);
        for (int i = 0; i < 4; ++i)
          store64(block(b) + 8 * i, shifted(p[4 * b + i] | (nibbles >> (4 * i) & 7) << 8, nibbles >> (4 * i + 3) & 1));
      }
    }
    for (int i = 0; i < kGroup; ++i) w.q[i] = int8_t(w.q[i] - 10);
  } else if constexpr (T == Type::IQ2_XXS) {
    const float d = half_at(p) * 0.125f;
    for (int b = 0; b < kBlocks; ++b) {
      const uint8_t* at = p + 2 + 8 * b;
      const uint32_t word = load32(at + 4);
      for (int i = 0; i < 4; ++i) store64(block(b) + 8 * i, with_signs(kIq2XxsGrid[at[i]], kEvenSigns[word >> (7 * i) & 127]));
      w.scale[b] = d * float(2 * (word >> 28) + 1);
    }
  } else if constexpr (T == Type::IQ2_XS || T == Type::IQ2_S) {
    fill(w.scale, kBlocks, half_at(p) * 0.125f);
    const uint8_t* parts = p + (T == Type::IQ2_XS ? 66 : 74);
    for (int b = 0; b < kBlocks; ++b) w.part[2 * b] = float(2 * (parts[b] & 15) + 1), w.part[2 * b + 1] = float(2 * (parts[b] >> 4) + 1);
    for (int b = 0; b < kBlocks; ++b)
      for (int i = 0; i < 4; ++i) {
        const int g = 4 * b + i, word = load16(p + 2 + 2 * g);
        store64(block(b) + 8 * i, T == Type::IQ2_XS ? with_signs(kIq2XsGrid[word & 511], kEvenSigns[word >> 9])
                                                    : with_signs(kIq2SGrid[p[2 + g] | (p[66 + b] >> (2 * i) & 3) << 8], kSigns[p[34 + g]]));
      }
  } else if constexpr (T == Type::IQ3_XXS || T == Type::IQ3_S) {
    constexpr bool s = T == Type::IQ3_S;
    constexpr const uint32_t* grid = s ? kIq3SGrid : kIq3XxsGrid;
    const float d = half_at(p) * (s ? 1.0f : 0.25f);
    for (int b = 0; b < kBlocks; ++b) {
      const int ninth = s ? p[66 + b] << 8 : 0;
      const uint32_t word = load32(p + (s ? 74 : 66) + 4 * b);
      for (int i = 0; i < 4; ++i) {
        const uint8_t* at = p + 2 + 8 * b + 2 * i;
        const uint64_t low = grid[at[0] | (ninth >> (2 * i) & 256)], high = grid[at[1] | (ninth >> (2 * i + 1) & 256)];
        store64(block(b) + 8 * i, with_signs(low | high << 32, s ? kSigns[word >> (8 * i) & 255] : kEvenSigns[word >> (7 * i) & 127]));
      }
      w.scale[b] = d * float(2 * (s ? uint32_t(p[106 + b / 2] >> (4 * (b % 2)) & 15) : word >> 28) + 1);
    }
  } else if constexpr (T == Type::TQ2_0) {
    fill(w.scale, kBlocks, half_at(p + 64));
    for (int b = 0; b < kBlocks; ++b)
      for (int j = 0; j < 32; ++j) block(b)[j] = int8_t(two_bits(p, b, j) - 1);
  } else if constexpr (T == Type::TQ1_0) {
    fill(w.scale, kBlocks, half_at(p + 52));
    constexpr uint8_t powers[] = {1, 3, 9, 27, 81};
    const auto digits = [&](int at, int count, int i, int8_t* out) {
      for (int j = 0; j < count; ++j) out[j] = int8_t((uint8_t(p[at + j] * powers[i]) * 3 >> 8) - 1);
    };
    for (int i = 0; i < 5; ++i) digits(0, 32, i, block(i)), digits(32, 16, i, eight(20 + 2 * i));
    for (int i = 0; i < 4; ++i) digits(48, 4, i, block(7) + 16 + 4 * i);
  } else if constexpr (T == Type::NVFP4) {
    fill(w.scale, kBlocks, 0.5f);
    for (int i = 0; i < 16; ++i) {
      const uint8_t* at = p + 36 * (i / 4);
      uint64_t packed;
      std::memcpy(&packed, at + 4 + 8 * (i % 4), 8);
      store64(eight(2 * i), packed & 15 * kOnes);
      store64(eight(2 * i + 1), packed >> 4 & 15 * kOnes);
      w.part[i] = unsigned_e4m3(at[i % 4]);
    }
    for (int b = 0; b < kBlocks; ++b) look_up(kFp4, block(b));
  }
}

}  // namespace
}  // namespace ferrum
