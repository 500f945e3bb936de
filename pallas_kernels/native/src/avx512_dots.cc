// AVX-512 with VNNI: products of any number of rows of x with 16 rows of the matrix at a time, and the conversion of x.
//
// Lanes are the 16 rows of the matrix: blocks are transposed while they are still packed, then decoded into registers, where a
// 32-bit word has four neighboring weights of one row. So an integer dot product needs no sum across lanes, the eight float
// lanes of the arithmetic (see kernels.h) are eight registers, and each row of x adds only its own products to the decoding.
// A separate file, so that two processors can compile.
#if defined(__x86_64__)
#include <cmath>
#include <cstring>
#include <immintrin.h>

#include "isa.h"

#define FERRUM_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi2"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target(FERRUM_TARGET))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi2,prefer-vector-width=512")
#endif

#define FERRUM_LANES 512
#include "avx512.h"

namespace ferrum {
void avx512_quantize(const float* x, int64_t k, Group* out) {
  const int64_t groups = groups_of(k);
  bool finite = true;
  const V magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int64_t g = 0; g < groups; ++g) {
    Group& o = out[g];
    alignas(32) float amax[kBlocks] = {};
    const int blocks = int(k - g * kGroup < kGroup ? (k - g * kGroup) / 32 : kBlocks);
    const float* from = x + g * kGroup;
    for (int b = 0; b < blocks; ++b) {
      const V u = _mm512_and_si512(_mm512_loadu_si512(from + 32 * b), magnitude);
      const V v = _mm512_and_si512(_mm512_loadu_si512(from + 32 * b + 16), magnitude);
      const uint32_t top = uint32_t(_mm512_reduce_max_epi32(_mm512_max_epi32(u, v)));
      finite &= top < 0x7f800000;
      amax[b] = float_of(top);
    }
    if (!finite) break;
    const __m256 top = _mm256_load_ps(amax);
    const __m256 used = _mm256_castsi256_ps(_mm256_movm_epi32(_mm256_cmp_ps_mask(top, _mm256_set1_ps(kSmallest), _CMP_GT_OQ)));
    alignas(32) float inverse[kBlocks];
    _mm256_store_ps(inverse, _mm256_and_ps(_mm256_div_ps(_mm256_set1_ps(127.0f), top), used));
    const __m256 scale = _mm256_and_ps(_mm256_div_ps(top, _mm256_set1_ps(127.0f)), used);
    for (int b = 0; b < kBlocks; ++b) {
      auto* q = reinterpret_cast<__m128i*>(o.q + 32 * place(b));
      if (b >= blocks || inverse[b] == 0) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(q), _mm256_setzero_si256());
        continue;
      }
      const F times = _mm512_set1_ps(inverse[b]);
      const V u = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from + 32 * b), times));
      const V v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from + 32 * b + 16), times));
      _mm_store_si128(q, _mm512_cvtepi32_epi8(u));
      _mm_store_si128(q + 1, _mm512_cvtepi32_epi8(v));
    }
    const V one = bytes(1), zero = _mm512_setzero_si512();
    const V half = half_sums(dpbusd(zero, one, load512(o.q)), dpbusd(zero, one, load512(o.q + 64)),
                             dpbusd(zero, one, load512(o.q + 128)), dpbusd(zero, one, load512(o.q + 192)));
    const __m256i sum = _mm512_castsi512_si256(block_sums(half, half));
    _mm512_storeu_si512(o.half_sum, half);
    _mm256_store_si256(reinterpret_cast<__m256i*>(o.sum), sum);
    _mm256_store_ps(o.scale, scale);
    _mm256_store_ps(o.scaled_sum, _mm256_mul_ps(scale, _mm256_cvtepi32_ps(sum)));
  }
  if (!finite) poison(out, groups);
}

namespace {

constexpr int kTileRows = 16;
constexpr int64_t kSome = 32;  // rows of x that share the decoding: their lanes stay in the nearest cache

// Four by four words of each 128-bit lane, transposed.
FERRUM_INLINE void transpose_words(V w[4]) {
  const V a = _mm512_unpacklo_epi32(w[0], w[1]), b = _mm512_unpacklo_epi32(w[2], w[3]);
  const V c = _mm512_unpackhi_epi32(w[0], w[1]), d = _mm512_unpackhi_epi32(w[2], w[3]);
  w[0] = _mm512_unpacklo_epi64(a, b), w[1] = _mm512_unpackhi_epi64(a, b);
  w[2] = _mm512_unpacklo_epi64(c, d), w[3] = _mm512_unpackhi_epi64(c, d);
}

// Words of 32 bits from 16 rows, word j of row r in lane r of to[j]: the first 4 words of rows that begin at p, or 8.
FERRUM_INLINE void words4(const uint8_t* p, int64_t stride, V to[4]) {
  for (int j = 0; j < 4; ++j) {  // rows j, j + 4, j + 8 and j + 12
    const auto at = [&](int i) { return load128(p + (j + 4 * i) * stride); };
    to[j] = _mm512_zextsi128_si512(at(0));
    to[j] = _mm512_mask_broadcast_i32x4(to[j], 0x00f0, at(1));
    to[j] = _mm512_mask_broadcast_i32x4(to[j], 0x0f00, at(2));
    to[j] = _mm512_mask_broadcast_i32x4(to[j], 0xf000, at(3));
  }
  transpose_words(to);
}

FERRUM_INLINE void words8(const uint8_t* p, int64_t stride, V to[8]) {
  V w[8];  // rows j and j + 4, then j + 8 and j + 12
  for (int j = 0; j < 8; ++j) w[j] = halves(load256(p + (j + j / 4 * 4) * stride), load256(p + (j + j / 4 * 4 + 4) * stride));
  transpose_words(w);
  transpose_words(w + 4);
  for (int j = 0; j < 4; ++j) {
    to[j] = _mm512_shuffle_i32x4(w[j], w[j + 4], 0x88);
    to[j + 4] = _mm512_shuffle_i32x4(w[j], w[j + 4], 0xdd);
  }
}

FERRUM_INLINE V low_bits(V v, int shift, int mask) { return _mm512_and_si512(_mm512_srli_epi32(v, unsigned(shift)), bytes(mask)); }
FERRUM_INLINE F half_of(V words) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words)); }  // the low half of each
FERRUM_INLINE F byte_of(V words, int i) {
  return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(words, unsigned(8 * i)), _mm512_set1_epi32(255)));
}

// Formats that are decoded row by row, as on any machine, and then transposed.
constexpr bool by_rows(Type t) { return one_decoder(t) && t != Type::Q2_K && t != Type::Q3_K && t != Type::NVFP4; }

// The representative of a type: there is one code for all that are decoded row by row and have parts, one for those with offsets,
// and one for the rest.
constexpr Type shared(Type t) { return !by_rows(t) ? t : has_parts(t) ? Type::IQ2_S : has_offset(t) ? Type::U8_32_F32 : Type::TQ2_0; }

// The bias is 2 to this power; 0: none.
constexpr int bias_of(Type t) { return by_rows(t) ? 7 : bias_shift(t); }

// 16 rows of a matrix, and what follows them: the place after the rows that follow without a gap, and what is read then.
struct Tile {
  const uint8_t* blocks;
  int64_t stride, k;
  const uint8_t *end, *next;
  Decode* decode;       // of formats that are decoded row by row
  int64_t group_bytes;  // of the format, which `shared` does not have
};
template <Type T>
FERRUM_INLINE int64_t bytes_of(const Tile& tile) { return by_rows(T) ? tile.group_bytes : group_bytes(T); }

// A block of 16 rows: weights 4 s .. 4 s + 3, plus the bias, in q[s].
struct Block {
  V q[8];
  F scale, offset, part[2], low[2];
};

// Calls use(b, block) for the blocks of group g of a tile.
template <Type T, typename Use>
FERRUM_INLINE void each_block(const Tile& tile, int64_t g, Use&& use) {
  const uint8_t* p = tile.blocks + g * bytes_of<T>(tile);
  const int64_t stride = tile.stride, left = tile.k - g * kGroup;
  const int count = left < kGroup ? int(left / 32) : kBlocks;
  Block block;
  if constexpr (by_rows(T)) {
    Weights rows[kTileRows];
    const auto column = [&](const auto& first, V to[8]) { words8(reinterpret_cast<const uint8_t*>(&first), sizeof(Weights), to); };
    for (int r = 0; r < kTileRows; ++r) tile.decode(p + r * stride, left, rows[r]);
    V scale[kBlocks], offset[kBlocks], part[2 * kBlocks];
    column(rows->scale[0], scale);
    if constexpr (has_offset(T)) column(rows->offset[0], offset);
    if constexpr (has_parts(T)) column(rows->part[0], part), column(rows->part[kBlocks], part + kBlocks);
    for (int b = 0; b < count; ++b) {
      column(rows->q[32 * place(b)], block.q);
      for (int s = 0; s < 8; ++s) block.q[s] = _mm512_xor_si512(block.q[s], bytes(128));
      block.scale = _mm512_castsi512_ps(scale[b]);
      if constexpr (has_offset(T)) block.offset = _mm512_castsi512_ps(offset[b]);
      if constexpr (has_parts(T))
        for (int h = 0; h < 2; ++h) block.part[h] = _mm512_castsi512_ps(part[2 * b + h]);
      use(b, block);
    }
  } else if constexpr (T == Type::NVFP4) {
    block.scale = _mm512_set1_ps(0.5f);
    for (int b = 0; b < count; ++b) {
      const uint8_t* at = p + b / 2 * block_bytes(T);
      V head[4], packed[4];
      words4(at, stride, head);
      words4(at + 4 + 16 * (b % 2), stride, packed);
      // Weights 0..7 of 16 are in the low bits of two words, 8..15 in the high bits.
      for (int s = 0; s < 8; ++s) block.q[s] = look_up(kFp4, 16, low_bits(packed[s / 4 * 2 + s % 2], s & 2 ? 4 : 0, 15));
      for (int h = 0; h < 2; ++h) {  // the bits of a half-precision number that is 2^8 times smaller
        const V bits = _mm512_and_si512(_mm512_srl_epi32(head[0], _mm_cvtsi32_si128(8 * (2 * (b % 2) + h))), _mm512_set1_epi32(127));
        const __mmask16 number = _mm512_cmpneq_epi32_mask(bits, _mm512_set1_epi32(127));
        block.part[h] = _mm512_maskz_mul_ps(number, half_of(_mm512_slli_epi32(bits, 7)), _mm512_set1_ps(256));
      }
      use(b, block);
    }
  } else if constexpr (T == Type::Q2_K) {
    V head[4], tail[4];
    words4(p, stride, head);
    words4(p + 68, stride, tail);  // ends with the block
    block.scale = half_of(tail[3]), block.offset = half_of(_mm512_srli_epi32(tail[3], 16));
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      V packed[8];
      words8(p + 16 + 32 * half, stride, packed);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const int b = 4 * half + k;
        for (int s = 0; s < 8; ++s) block.q[s] = low_bits(packed[s], 2 * k, 3);
        for (int h = 0; h < 2; ++h) {
          block.part[h] = byte_of(low_bits(head[b / 2], 0, 15), 2 * b % 4 + h);
          block.low[h] = byte_of(low_bits(head[b / 2], 4, 15), 2 * b % 4 + h);
        }
        use(b, block);
      }
    }
  } else if constexpr (T == Type::Q3_K) {
    V third[8], tail[4], six[4];
    words8(p, stride, third);
    words4(p + 94, stride, tail);  // ends with the block; the scales begin two bytes later
    const auto word = [&](int i) { return _mm512_or_si512(_mm512_srli_epi32(tail[i], 16), _mm512_slli_epi32(tail[i + 1], 16)); };
    for (int i = 0; i < 4; ++i)
      six[i] = _mm512_or_si512(low_bits(word(i % 2), 4 * (i / 2), 15), _mm512_slli_epi32(low_bits(word(2), 2 * i, 3), 4));
    block.scale = half_of(_mm512_srli_epi32(tail[3], 16));
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      V packed[8];
      words8(p + 32 + 32 * half, stride, packed);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const int b = 4 * half + k;
        for (int s = 0; s < 8; ++s) {
          const V bit = b < 2 ? _mm512_slli_epi32(third[s], unsigned(2 - b)) : _mm512_srli_epi32(third[s], unsigned(b - 2));
          block.q[s] = _mm512_ternarylogic_epi64(low_bits(packed[s], 2 * k, 3), bit, bytes(4), 0xf8);  // low | bit & 4
        }
        for (int h = 0; h < 2; ++h) block.part[h] = _mm512_sub_ps(byte_of(six[b / 2], 2 * b % 4 + h), _mm512_set1_ps(32));
        use(b, block);
      }
    }
  } else if constexpr (T == Type::Q4_K || T == Type::Q5_K) {
    V head[4], fifth[8];
    words4(p, stride, head);
    const F d = half_of(head[0]), dmin = half_of(_mm512_srli_epi32(head[0], 16));
    V six[2][2];  // bits of the scales and of the offsets: blocks 0 to 3, then 4 to 7
    for (int of = 0; of < 2; ++of) {
      six[of][0] = low_bits(head[1 + of], 0, 63);
      six[of][1] = _mm512_or_si512(low_bits(head[3], 4 * of, 15), low_bits(head[1 + of], 2, 48));
    }
    if constexpr (T == Type::Q5_K) words8(p + 16, stride, fifth);
    const uint8_t* low = T == Type::Q5_K ? p + 48 : p + 16;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      V packed[8];
      words8(low + 32 * i, stride, packed);
#pragma GCC unroll 2
      for (int b = 2 * i; b < 2 * i + 2; ++b) {
        for (int s = 0; s < 8; ++s) {
          block.q[s] = low_bits(packed[s], 4 * (b % 2), 15);
          if constexpr (T == Type::Q5_K) {
            const V bit = b < 4 ? _mm512_slli_epi32(fifth[s], unsigned(4 - b)) : _mm512_srli_epi32(fifth[s], unsigned(b - 4));
            block.q[s] = _mm512_or_si512(block.q[s], _mm512_and_si512(bit, bytes(16)));
          }
        }
        block.scale = _mm512_mul_ps(byte_of(six[0][b / 4], b % 4), d);
        block.offset = _mm512_mul_ps(byte_of(six[1][b / 4], b % 4), dmin);
        use(b, block);
      }
    }
  } else if constexpr (T == Type::Q6_K) {
    V parts[4], d[4];
    words4(p + 192, stride, parts);
    words4(p + 194, stride, d);  // ends with the block
    block.scale = half_of(_mm512_srli_epi32(d[3], 16));
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      V high[8];
      words8(p + 128 + 32 * half, stride, high);
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        V low[8];
        words8(p + 64 * half + 32 * odd, stride, low);
#pragma GCC unroll 2
        for (int k = odd; k < 4; k += 2) {
          const int b = 4 * half + k;
          for (int s = 0; s < 8; ++s) {
            const V top = k < 2 ? _mm512_slli_epi32(high[s], unsigned(4 - 2 * k)) : _mm512_srli_epi32(high[s], unsigned(2 * k - 4));
            block.q[s] = _mm512_ternarylogic_epi64(low_bits(low[s], 4 * (k / 2), 15), top, bytes(48), 0xf8);  // low | top & 48
          }
          for (int i = 0; i < 2; ++i)
            block.part[i] = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(parts[b / 2], unsigned(24 - 8 * (2 * b % 4 + i))), 24));
          use(b, block);
        }
      }
    }
  } else if constexpr (T == Type::IQ4_XS) {
    V head[4];
    words4(p, stride, head);
    const F d = half_of(head[0]);
    for (int b = 0; b < kBlocks; ++b) {
      V packed[4];
      words4(p + 8 + 16 * b, stride, packed);
      for (int s = 0; s < 8; ++s) block.q[s] = look_up(kLevels, 128, low_bits(packed[s % 4], 4 * (s / 4), 15));
      const V low = _mm512_srl_epi32(head[1], _mm_cvtsi32_si128(4 * b)), high = _mm512_srl_epi32(head[0], _mm_cvtsi32_si128(16 + 2 * b));
      const V scale = _mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi32(15)),
                                      _mm512_slli_epi32(_mm512_and_si512(high, _mm512_set1_epi32(3)), 4));
      block.scale = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(scale, _mm512_set1_epi32(32))), d);
      use(b, block);
    }
  } else {
    for (int b = 0; b < count; ++b) {
      const uint8_t* at = p + (has_zero_point(T) ? block_of<T>(b) : b * block_bytes(T));
      V head[4], packed[8];
      words4(at, stride, head);
      if constexpr (T == Type::MXFP4) {
        const V e = _mm512_and_si512(head[0], _mm512_set1_epi32(255)), one = _mm512_set1_epi32(1);
        const V normal = _mm512_slli_epi32(_mm512_sub_epi32(e, one), 23);
        const V tiny = _mm512_sllv_epi32(_mm512_set1_epi32(0x00200000), e);
        block.scale = _mm512_castsi512_ps(_mm512_mask_mov_epi32(normal, _mm512_cmple_epu32_mask(e, one), tiny));
      } else {
        block.scale = half_of(head[0]);
        const V second = _mm512_srli_epi32(head[0], 16);
        if constexpr (has_zero_point(T))
          block.offset = _mm512_mul_ps(block.scale, _mm512_cvtepi32_ps(_mm512_and_si512(second, _mm512_set1_epi32(255))));
        else if constexpr (has_offset(T))
          block.offset = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(half_of(second)), _mm512_set1_epi32(int(0x80000000))));
      }
      constexpr bool five = T == Type::Q5_0 || T == Type::Q5_1;
      constexpr int start = T == Type::MXFP4 ? 1 : has_offset(T) ? 4 : 2;
      const uint8_t* from = has_zero_point(T) ? p + codes_of<T>(b) : at + start + (five ? 4 : 0);
      if constexpr (T == Type::Q8_0) words8(from, stride, packed);
      else words4(from, stride, packed);
      // Bit 4 s + i of a row's word is the fifth of byte i of its weights s.
      const V fifth = five ? start == 4 ? head[1] : _mm512_or_si512(_mm512_srli_epi32(head[0], 16), _mm512_slli_epi32(head[1], 16)) : V{};
      for (int s = 0; s < 8; ++s) {
        if constexpr (T == Type::Q8_0) {
          block.q[s] = _mm512_xor_si512(packed[s], bytes(128));
          continue;
        }
        const V q = low_bits(packed[s % 4], 4 * (s / 4), 15);
        if constexpr (T == Type::IQ4_NL) block.q[s] = look_up(kLevels, 128, q);
        else if constexpr (T == Type::MXFP4) block.q[s] = look_up(kFp4, 16, q);
        else block.q[s] = q;
        if constexpr (five) {
          // Byte s / 2 in all four bytes of a word, where bits 4 (s % 2) and up belong to one byte each.
          const V four = _mm512_shuffle_epi8(fifth, _mm512_add_epi8(_mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c)), bytes(s / 2)));
          const __mmask64 set = _mm512_test_epi8_mask(four, _mm512_set1_epi32(s % 2 ? int(0x80402010) : 0x08040201));
          block.q[s] = _mm512_mask_add_epi8(block.q[s], set, block.q[s], bytes(16));
        }
      }
      use(b, block);
    }
  }
}

// Prefetches, during a group of the tile, as much of what is 16 rows and 4 KiB ahead: hardware prefetchers do not follow so many rows
// at once.
template <Type T>
FERRUM_INLINE void ask_for_next(const Tile& tile, int64_t group) {
  const int64_t size = kTileRows * bytes_of<T>(tile);
  const uint8_t* p = tile.blocks + kTileRows * tile.stride + group * size + 4096;
  if (p + size / 2 > tile.end) p = tile.next + (p - tile.end);
  for (int64_t at = 0; at < size; at += 64) _mm_prefetch(reinterpret_cast<const char*>(p) + at, _MM_HINT_T0);
}

// The sums of R rows of x, which are float lanes, and what their integer sums start from: less what the bias adds.
struct alignas(64) Sums {
  F lanes[kBlocks];
  int32_t start[2 * kBlocks];
};

// Adds block b of R rows of x, in group g, to their sums. The rows take turns, as each waits for its last product.
template <Type T, int R>
FERRUM_INLINE void add_block(const Block& w, int b, const Group* const* x, int64_t g, Sums* sums) {
  const Group* o[R];
  for (int r = 0; r < R; ++r) o[r] = x[r] + g;
  const auto dots = [&](int first, int last, int at, F* to) {
    V sum[R];
    for (int r = 0; r < R; ++r) sum[r] = bias_of(T) ? _mm512_set1_epi32(sums[r].start[at]) : _mm512_setzero_si512();
    for (int s = first; s < last; ++s)
      for (int r = 0; r < R; ++r) {
        int32_t four;
        std::memcpy(&four, o[r]->q + 32 * place(b) + 4 * s, 4);
        sum[r] = dpbusd(sum[r], w.q[s], _mm512_set1_epi32(four));
      }
    for (int r = 0; r < R; ++r) to[r] = _mm512_cvtepi32_ps(sum[r]);
  };
  const int half = 8 * (b / 4) + b % 4;  // in the order of Group::half_sum
  F sum[R];
  if constexpr (has_parts(T)) {
    F second[R];
    dots(0, 4, half, sum);
    dots(4, 8, half + 4, second);
    for (int r = 0; r < R; ++r) sum[r] = _mm512_fmadd_ps(second[r], w.part[1], _mm512_mul_ps(sum[r], w.part[0]));
  } else {
    dots(0, 8, b, sum);
  }
  for (int r = 0; r < R; ++r) {
    F lane = _mm512_fmadd_ps(_mm512_mul_ps(sum[r], _mm512_set1_ps(o[r]->scale[b])), w.scale, sums[r].lanes[b]);
    if constexpr (has_lows(T)) {
      const F low = _mm512_mul_ps(_mm512_set1_ps(float(o[r]->half_sum[half])), w.low[0]);
      const F both = _mm512_fmadd_ps(_mm512_set1_ps(float(o[r]->half_sum[half + 4])), w.low[1], low);
      lane = _mm512_fnmadd_ps(_mm512_mul_ps(_mm512_set1_ps(o[r]->scale[b]), both), w.offset, lane);
    } else if constexpr (has_offset(T)) {
      lane = _mm512_fnmadd_ps(_mm512_set1_ps(o[r]->scaled_sum[b]), w.offset, lane);
    }
    sums[r].lanes[b] = lane;
  }
}

FERRUM_INLINE F fold_lanes(const F lanes[kBlocks]) {
  const F even = _mm512_add_ps(_mm512_add_ps(lanes[0], lanes[4]), _mm512_add_ps(lanes[2], lanes[6]));
  const F odd = _mm512_add_ps(_mm512_add_ps(lanes[1], lanes[5]), _mm512_add_ps(lanes[3], lanes[7]));
  return _mm512_add_ps(even, odd);
}

// m rows of x times a tile: row r of x in y[r]. M is m, or 0: any number.
template <Type T, int M>
void multiply(const Tile& tile, const Group* const* x, int64_t m, F* y) {
  Sums sums[M ? M : kSome];
  if (M) m = M;
  for (int64_t r = 0; r < m; ++r)
    for (int b = 0; b < kBlocks; ++b) sums[r].lanes[b] = _mm512_setzero_ps();
  for (int64_t g = 0; g * kGroup < tile.k; ++g) {
    ask_for_next<T>(tile, g);
    if constexpr (bias_of(T) != 0)
      for (int64_t r = 0; r < m; ++r) {
        const V sum = has_parts(T) ? _mm512_loadu_si512(x[r][g].half_sum) : _mm512_castsi256_si512(load256(reinterpret_cast<const uint8_t*>(x[r][g].sum)));
        _mm512_store_si512(sums[r].start, _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sum, bias_of(T))));
      }
    each_block<T>(tile, g, [&](int b, const Block& w) __attribute__((always_inline)) {
      if constexpr (M != 0) return add_block<T, M>(w, b, x, g, sums);
      int64_t r = 0;
      for (; r + 4 <= m; r += 4) add_block<T, 4>(w, b, x + r, g, sums + r);
      if (m & 2) add_block<T, 2>(w, b, x + r, g, sums + r), r += 2;
      if (m & 1) add_block<T, 1>(w, b, x + r, g, sums + r);
    });
  }
  for (int64_t r = 0; r < m; ++r) y[r] = fold_lanes(sums[r].lanes);
}

using Multiply = void(const Tile& tile, const Group* const* x, int64_t m, F* y);

void multiply_tiles(Multiply* any, Multiply* one, Decode* decode, int64_t bytes, const Rows& w, const Group* const* x, int64_t m, Output y) {
  alignas(64) F sums[kSome];
  for (int64_t first = 0; first < m; first += kSome) {
    const int64_t some = m - first < kSome ? m - first : kSome;
    for (int64_t i = 0; i < w.count; i += kTileRows) {
      const int64_t rows = w.count - i < kTileRows ? w.count - i : kTileRows;
      Tile tile = {w.blocks + i * w.stride, w.stride, w.k, w.blocks + w.count * w.stride, w.next, decode, bytes};
      if (rows < kTileRows) {  // a copy, followed by rows that do not matter
        auto* copy = static_cast<uint8_t*>(scratch(kDecoded, size_t(kTileRows * w.stride)));
        tile.blocks = static_cast<uint8_t*>(std::memcpy(copy, tile.blocks, size_t(rows * w.stride)));
      }
      (some == 1 ? one : any)(tile, x + first, some, sums);
      for (int64_t r = 0; r < some; ++r) _mm512_mask_storeu_ps(y.at(first + r) + i, __mmask16((1u << rows) - 1), sums[r]);
    }
  }
}

template <Type T>
void dots_of_type(const Rows& w, const Group* const* x, int64_t m, Output y) {
  constexpr Decode* decode = by_rows(T) ? decode_group<T> : nullptr;
  multiply_tiles(multiply<shared(T), 0>, multiply<shared(T), 1>, decode, group_bytes(T), w, x, m, y);
}

}  // namespace

void avx512_dots(const Rows& w, const Group* const* x, int64_t m, Output y) {
  switch (w.format->type) {
    FERRUM_QUANTIZED(dots_of_type, w, x, m, y)
    default: break;
  }
}

}  // namespace ferrum

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
