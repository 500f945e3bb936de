// Many rows of x: 16 rows of the matrix are decoded once, then multiplied by panels of 16 rows of x.
//
// Lanes are the rows of x here, so the eight float lanes of the arithmetic (see kernels.h) are eight registers, and each
// integer dot product needs no sum across lanes. `Dots` makes the integers of a panel; everything after is the same.
#pragma once

#include "avx512.h"

namespace ferrum {
namespace {

struct alignas(64) Decoded {  // a group of 16 rows
  uint8_t q[kPanel][kGroup];
  float scale[kPanel][kBlocks];
  float offset[kPanel][kBlocks];
  float part[kPanel][2 * kBlocks];
};

template <Type T>
FERRUM_INLINE void decode_rows(const Rows& w, int64_t groups, Decoded* out) {
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
      for (int j = 0; j < 4; ++j) {
        _mm512_store_si512(o.q[i] + 64 * j, u[j]);
        _mm512_store_si512(o.q[i + 1] + 64 * j, v[j]);
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
  constexpr int shift = bias_shift(T);
  F dot;
  if constexpr (has_parts(T)) {
    const int low = 8 * (block / 4) + block % 4, high = low + 4;
    const V first = _mm512_sub_epi32(dots[0], _mm512_slli_epi32(_mm512_load_si512(x.half_sum[low]), shift));
    const V second = _mm512_sub_epi32(dots[1], _mm512_slli_epi32(_mm512_load_si512(x.half_sum[high]), shift));
    dot = _mm512_mul_ps(_mm512_cvtepi32_ps(first), _mm512_set1_ps(w.part[row][low]));
    dot = _mm512_fmadd_ps(_mm512_cvtepi32_ps(second), _mm512_set1_ps(w.part[row][high]), dot);  // exact
  } else {
    V sum = dots[0];
    if constexpr (shift != 0) sum = _mm512_sub_epi32(sum, _mm512_slli_epi32(_mm512_load_si512(x.sum[block]), shift));
    dot = _mm512_cvtepi32_ps(sum);
  }
  lane = _mm512_fmadd_ps(_mm512_mul_ps(dot, _mm512_load_ps(x.scale[block])), _mm512_set1_ps(w.scale[row][block]), lane);
  if constexpr (has_offset(T))
    lane = _mm512_fnmadd_ps(_mm512_load_ps(x.scaled_sum[block]), _mm512_set1_ps(w.offset[row][block]), lane);
}

FERRUM_INLINE F fold_lanes(const F lanes[kBlocks]) {
  const F even = _mm512_add_ps(_mm512_add_ps(lanes[0], lanes[4]), _mm512_add_ps(lanes[2], lanes[6]));
  const F odd = _mm512_add_ps(_mm512_add_ps(lanes[1], lanes[5]), _mm512_add_ps(lanes[3], lanes[7]));
  return _mm512_add_ps(even, odd);
}

// Multiply<T>::run(decoded rows, count, groups, panel, results [row][lane]) makes a tile of 16 x 16 results.
template <Type T, template <Type> class Multiply>
void panels_of_type(Rows w, const PanelGroup* x, int64_t m, Output y) {
  const int64_t groups = groups_of(w.k), all = w.count;
  auto* decoded = static_cast<Decoded*>(scratch(kDecoded, size_t(groups) * sizeof(Decoded)));
  alignas(64) float tile[kPanel][kPanel];
  for (int64_t done = 0; done < all; done += kPanel, w.blocks += kPanel * w.stride) {
    w.count = all - done < kPanel ? all - done : kPanel;
    decode_rows<T>(w, groups, decoded);
    for (int64_t r = 0; r < m; r += kPanel) {
      Multiply<T>::run(decoded, int(w.count), groups, x + r / kPanel * groups, tile);
      for (int64_t lane = 0; lane < kPanel && r + lane < m; ++lane)
        for (int64_t i = 0; i < w.count; ++i) y.at(r + lane)[done + i] = tile[i][lane];
    }
  }
}

}  // namespace
}  // namespace ferrum
