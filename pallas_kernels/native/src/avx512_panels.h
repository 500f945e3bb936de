// Many rows of x for tiles: 16 rows of the matrix are decoded once, then multiplied by panels of 16 rows of x.
//
// Lanes are the rows of x here, so the eight float lanes of the arithmetic (see kernels.h) are eight registers, and an integer
// dot product needs no sum across lanes. Formats differ only in the decoding.
#pragma once

#include "avx512.h"
#include "lanes.h"

namespace ferrum {
namespace {

struct alignas(64) Decoded {  // a group of 16 rows
  uint8_t q[kBlocks][kPanel][32];
  float scale[kPanel][kBlocks];
  float offset[kPanel][kBlocks];
  float part[kPanel][2 * kBlocks];  // in the order of Group::half_sum, as `low`
  float low[kPanel][2 * kBlocks];
};

// The halves of register j of row `row`, blocks j and j + 4.
FERRUM_INLINE void put(V q, int j, int64_t row, Decoded& out) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(out.q[j][row]), _mm512_castsi512_si256(q));
  _mm256_store_si256(reinterpret_cast<__m256i*>(out.q[j + 4][row]), _mm512_extracti64x4_epi64(q, 1));
}

[[gnu::noinline]] inline void decode_rows_by(Decode* decode, int64_t bytes, const Rows& w, int64_t groups, Decoded* out) {
  Weights weights{};
  for (int64_t i = 0; i < w.count; ++i)
    for (int64_t g = 0; g < groups; ++g) {
      decode(w.blocks + i * w.stride + g * bytes, w.k - g * kGroup, weights);
      Decoded& o = out[g];
      std::memcpy(o.scale[i], weights.scale, sizeof weights.scale);
      std::memcpy(o.offset[i], weights.offset, sizeof weights.offset);
      for (int b = 0; b < kBlocks; ++b) {
        std::memcpy(o.q[b][i], weights.q + 32 * place(b), 32);
        for (int h = 0; h < 2; ++h) {
          const int at = 8 * (b / 4) + 4 * h + b % 4;
          o.part[i][at] = weights.part[2 * b + h];
          o.low[i][at] = weights.low[2 * b + h];
        }
      }
    }
}

// Without their bias.
template <Type T>
inline void decode_rows(const Rows& w, int64_t groups, Decoded* out) {
  if constexpr (one_decoder(T)) return decode_rows_by(decode_group<T>, group_bytes(T), w, groups, out);
  alignas(64) uint8_t room[2][kWidest];
  const uint8_t* end = w.blocks + w.count * w.stride;
  for (int64_t i = 0; i < w.count; i += 2) {
    const uint8_t* p = w.blocks + i * w.stride;
    const uint8_t* q = i + 1 < w.count ? p + w.stride : p;
    for (int64_t g = 0; g < groups; ++g, p += group_bytes(T), q += group_bytes(T)) {
      const uint8_t* a = readable<T>(p, w.k - g * kGroup, end, room[0]);
      const uint8_t* b = readable<T>(q, w.k - g * kGroup, end, room[1]);
      ask_ahead<T>(p);
      ask_ahead<T>(q);
      V u[4], v[4];
      F scale, offset;
      registers<T>(a, u);
      registers<T>(b, v);
      scales<T>(a, b, scale, offset);
      mask_absent<T>(w.k - g * kGroup, scale, offset);
      Decoded& o = out[g];
      const V bias = bytes(bias_shift(T) ? 1 << bias_shift(T) : 0);
      for (int j = 0; j < 4; ++j) {
        put(_mm512_sub_epi8(u[j], bias), j, i, o);
        put(_mm512_sub_epi8(v[j], bias), j, i + 1, o);
      }
      _mm512_store_ps(o.scale[i], scale);
      if constexpr (has_offset(T)) _mm512_store_ps(o.offset[i], offset);
      if constexpr (has_parts(T)) {
        _mm512_store_ps(o.part[i], part_scales(a));
        _mm512_store_ps(o.part[i + 1], part_scales(b));
      }
    }
  }
}

// One block's integers (two where the format has parts) into its lane.
template <Type T>
FERRUM_INLINE void add_block(const Decoded& w, const PanelGroup& x, int row, int block, const V* dots, F& lane) {
  const int first = 8 * (block / 4) + block % 4, second = first + 4;
  const F scale = _mm512_load_ps(x.scale[block]);
  F dot = _mm512_cvtepi32_ps(dots[0]);
  if constexpr (has_parts(T)) {
    dot = _mm512_mul_ps(dot, _mm512_set1_ps(w.part[row][first]));
    dot = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[1]), _mm512_set1_ps(w.part[row][second]), dot);
  }
  lane = _mm512_fmadd_ps(_mm512_mul_ps(dot, scale), _mm512_set1_ps(w.scale[row][block]), lane);
  if constexpr (has_offset(T)) {
    F sum = _mm512_load_ps(x.scaled_sum[block]);
    if constexpr (has_lows(T)) {
      const F low = _mm512_mul_ps(_mm512_cvtepi32_ps(load512(x.half_sum[first])), _mm512_set1_ps(w.low[row][first]));
      sum = _mm512_mul_ps(scale, _mm512_fmadd_ps(_mm512_cvtepi32_ps(load512(x.half_sum[second])), _mm512_set1_ps(w.low[row][second]), low));
    }
    lane = _mm512_fnmadd_ps(sum, _mm512_set1_ps(w.offset[row][block]), lane);
  }
}

using DecodeRows = void(const Rows& w, int64_t groups, Decoded* out);
using Multiply = void(const Decoded* w, int count, int64_t groups, const PanelGroup* x, float (*out)[kPanel]);

[[gnu::noinline]] inline void panels_by(DecodeRows* decode, Multiply* multiply, Rows w, const PanelGroup* x, int64_t m, Output y) {
  const int64_t groups = groups_of(w.k), all = w.count;
  auto* decoded = static_cast<Decoded*>(scratch(kDecoded, size_t(groups) * sizeof(Decoded)));
  // The number of panels that stay in the second-level cache while the rows of the matrix are processed.
  const int64_t some = kPanel * (1 + (768 << 10) / (groups * int64_t(sizeof(PanelGroup))));
  for (int64_t first = 0; first < m; first += some) {
    Rows left = w;
    for (int64_t done = 0; done < all; done += kPanel, left.blocks += kPanel * left.stride) {
      left.count = all - done < kPanel ? all - done : kPanel;
      decode(left, groups, decoded);
      for (int64_t r = first; r < m && r < first + some; r += kPanel) {
        alignas(64) Lanes tile[kPanel];
        multiply(decoded, int(left.count), groups, x + r / kPanel * groups, reinterpret_cast<float(*)[kPanel]>(tile));
        transpose(tile);
        const auto inside = __mmask16((1u << left.count) - 1);
        for (int64_t lane = 0; lane < kPanel && r + lane < m; ++lane)
          _mm512_mask_storeu_ps(y.at(r + lane) + done, inside, tile[lane].v);
      }
    }
  }
}

}  // namespace
}  // namespace ferrum
