// Products in float32: weights decoded exactly, summed in sixteen lanes by fma. A few rows of the matrix are decoded and multiplied
// by a few rows of x at a time, all in registers; rows of x that fit into the second cache share the decoding.
#pragma once

#include "lanes.h"

namespace ferrum {
namespace {

// A row of weights as float32 in their order, followed by zeros up to a whole number of groups. Blocks are decoded only for the
// tests, which compare int8 arithmetic with this one; cold, so that a compiler spends little time on them.
template <Type T>
[[gnu::cold]] inline void decode_blocks(const uint8_t* p, int64_t k, float* out) {
  Weights w;
  for (int64_t first = 0; first < k; first += kGroup, p += group_bytes(T), out += kGroup) {
    decode_group<T>(p, k - first, w);
    for (int b = 0; b < kBlocks; ++b)
      for (int j = 0; j < 32; ++j) {
        const int half = 2 * b + j / 16;
        const float scale = has_parts(T) ? w.scale[b] * w.part[half] : w.scale[b], q = float(w.q[32 * place(b) + j]);
        const float offset = has_lows(T) ? w.offset[b] * w.low[half] : w.offset[b];
        out[32 * b + j] = has_offset(T) ? __builtin_fmaf(scale, q, -offset) : scale * q;
      }
  }
}

template <Type T>
inline void decode_floats(const uint8_t* p, int64_t k, float* out) {
  if constexpr (block_weights(T) != 1) {
    decode_blocks<T>(p, k, out);
  } else {
    int64_t j = 0;
    for (; j + kLanes <= k; j += kLanes)
      store(T == Type::F16 ? from_half(p + 2 * j) : T == Type::BF16 ? from_bfloat(p + 2 * j) : load(reinterpret_cast<const float*>(p) + j), out + j);
    for (; j < k; ++j)
      out[j] = T == Type::F16 ? half_at(p + 2 * j) : T == Type::BF16 ? float_of(uint32_t(load16(p + 2 * j)) << 16) : float_of(load32(p + 4 * j));
    std::memset(out + k, 0, size_t(groups_of(k) * kGroup - k) * sizeof(float));
  }
}

// Rows of the matrix and of x that are multiplied together: the lanes of their results stay in registers.
constexpr int kW = FERRUM_LANES == 512 ? 4 : 2, kX = FERRUM_LANES == 512 ? 6 : 2;
constexpr int64_t kColumns = 1024;         // of these rows, which stay in the first cache
constexpr int64_t kSharing = 384 << 10;  // bytes of rows of x that share the decoding, in the second cache

// Columns of rows that have `all` of them.
struct Columns {
  int64_t first, end, all;
};

// Some columns of R rows of x times kW rows of w. Between columns `kept` has the lanes of the results; after the last column
// the results are in y: row r of x in y.at(r)[0 .. count - 1].
template <int R>
inline void multiply_tile(const float* const* x, const float* const* w, Columns columns, float* kept, int64_t count, Output y) {
  Lanes lanes[R][kW];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < kW; ++i) lanes[r][i] = columns.first == 0 ? all(0) : load(kept + (kW * r + i) * kLanes);
  for (int64_t j = columns.first; j < columns.end; j += kLanes) {
    Lanes weights[kW];
    for (int i = 0; i < kW; ++i) weights[i] = load(w[i] + j);
    for (int r = 0; r < R; ++r) {
      const Lanes a = load(x[r] + j);
      for (int i = 0; i < kW; ++i) lanes[r][i] = fma(a, weights[i], lanes[r][i]);
    }
  }
  for (int r = 0; r < R; ++r) {
    if (columns.end < columns.all) {
      for (int i = 0; i < kW; ++i) store(lanes[r][i], kept + (kW * r + i) * kLanes);
    } else {
      float sums[kW];
      fold_some<kW>(lanes[r], sums);
      for (int64_t i = 0; i < count; ++i) y.at(r)[i] = sums[i];
    }
  }
}

using MultiplyTile = void(const float* const* x, const float* const* w, Columns columns, float* kept, int64_t count, Output y);

[[gnu::noinline]] inline void float_dots_by(void (*decode)(const uint8_t*, int64_t, float*), const Rows& w,
                                            const float* const* x, int64_t m, Output y) {
  static constexpr MultiplyTile* kTiles[kX] = {
      multiply_tile<1>, multiply_tile<2>,
#if FERRUM_LANES == 512
      multiply_tile<3>, multiply_tile<4>, multiply_tile<5>, multiply_tile<6>,
#endif
  };
  const int64_t length = groups_of(w.k) * kGroup, row_bytes = length * int64_t(sizeof(float));
  const int64_t some = kX * (1 + kSharing / (kX * row_bytes));
  auto* decoded = static_cast<float*>(scratch(kDecoded, size_t(kW * row_bytes) + size_t(some * kW) * sizeof(Lanes)));
  float* kept = decoded + kW * length;
  const float* rows[kW];
  for (int i = 0; i < kW; ++i) rows[i] = decoded + i * length;
  for (int64_t begin = 0; begin < m; begin += some) {
    const int64_t end = begin + some < m ? begin + some : m;
    for (int64_t i = 0; i < w.count; i += kW) {
      const int64_t count = w.count - i < kW ? w.count - i : kW;
      for (int64_t j = 0; j < count; ++j) decode(w.blocks + (i + j) * w.stride, w.k, decoded + j * length);
      for (int64_t first = 0; first < w.k; first += kColumns) {
        const Columns columns = {first, first + kColumns < w.k ? first + kColumns : w.k, w.k};
        for (int64_t r = begin; r < end; r += kX)
          kTiles[(end - r < kX ? end - r : kX) - 1](x + r, rows, columns, kept + (r - begin) * kW * kLanes, count, {y.at(r) + i, y.stride});
      }
    }
  }
}

template <Type T>
inline void float_dots_of(const Rows& w, const float* const* x, int64_t m, Output y) {
  float_dots_by(decode_floats<T>, w, x, m, y);
}

inline void float_dots(const Rows& w, const float* const* x, int64_t m, Output y) {
  switch (w.format->type) {
    FERRUM_QUANTIZED(float_dots_of, w, x, m, y)
    FERRUM_CASE(F16, float_dots_of, w, x, m, y)
    FERRUM_CASE(BF16, float_dots_of, w, x, m, y)
    FERRUM_CASE(F32, float_dots_of, w, x, m, y)
  }
}

}  // namespace
}  // namespace ferrum
