// Products in float32: weights decoded exactly, summed in sixteen lanes by fma. Four rows of the matrix are decoded once and
// multiplied by four rows of x at a time; a transpose turns the sixteen sums of lanes into lanes of sixteen sums.
#pragma once

#include "lanes.h"

namespace ferrum {
namespace {

// A row of weights as float32 in their order, followed by zeros up to a whole number of groups. Blocks are decoded only for the
// tests, which compare int8 arithmetic with this one; cold, so that a compiler spends little time on them.
template <Type T>
[[gnu::cold]] inline void decode_blocks(const uint8_t* p, int64_t k, float* out) {
  uint8_t room[kWidest];
  Weights w;
  for (int64_t first = 0; first < k; first += kGroup, p += group_bytes(T), out += kGroup) {
    decode<T>(whole<T>(p, k - first, room), w);
    for (int b = 0; b < kBlocks; ++b)
      for (int j = 0; j < 32; ++j) {
        const float scale = has_parts(T) ? w.scale[b] * float(w.part[2 * b + j / 16]) : w.scale[b];
        const float q = float(w.q[32 * place(b) + j]);
        out[32 * b + j] = has_offset(T) ? __builtin_fmaf(scale, q, -w.offset[b]) : scale * q;
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

constexpr int kFour = 4;

// sums[4 r + i] = x[r] times row i of w, for R rows of x; other elements are undefined.
template <int R>
inline void dots_of_four(const float* const* x, const float* const* w, int64_t length, float* sums) {
  Lanes lanes[kFour * kFour];
  for (Lanes& lane : lanes) lane = all(0);
  for (int64_t j = 0; j < length; j += kLanes) {
    Lanes weights[kFour];
    for (int i = 0; i < kFour; ++i) weights[i] = load(w[i] + j);
    for (int r = 0; r < R; ++r) {
      const Lanes a = load(x[r] + j);
      for (int i = 0; i < kFour; ++i) lanes[kFour * r + i] = fma(a, weights[i], lanes[kFour * r + i]);
    }
  }
  transpose(lanes);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = add(lanes[i], lanes[i + half]);
  store(lanes[0], sums);
}

[[gnu::noinline]] inline void float_dots_by(void (*decode)(const uint8_t*, int64_t, float*), const Rows& w,
                                            const float* const* x, int64_t m, Output y) {
  const int64_t length = groups_of(w.k) * kGroup;
  auto* decoded = static_cast<float*>(scratch(kDecoded, size_t(kFour * length) * sizeof(float)));
  const float* rows[kFour];
  for (int i = 0; i < kFour; ++i) rows[i] = decoded + i * length;
  for (int64_t first = 0; first < w.count; first += kFour) {
    const int64_t count = w.count - first < kFour ? w.count - first : kFour;
    for (int64_t i = 0; i < count; ++i) decode(w.blocks + (first + i) * w.stride, w.k, decoded + i * length);
    for (int64_t r = 0; r < m; r += kFour) {
      float sums[kLanes];
      const int64_t some = m - r < kFour ? m - r : kFour;
      switch (some) {
        case 4: dots_of_four<4>(x + r, rows, length, sums); break;
        case 3: dots_of_four<3>(x + r, rows, length, sums); break;
        case 2: dots_of_four<2>(x + r, rows, length, sums); break;
        default: dots_of_four<1>(x + r, rows, length, sums);
      }
      for (int64_t t = 0; t < some; ++t) std::memcpy(y.at(r + t) + first, sums + kFour * t, size_t(count) * sizeof(float));
    }
  }
}

template <Type T>
inline void float_dots_of(const Rows& w, const float* const* x, int64_t m, Output y) {
  float_dots_by(decode_floats<T>, w, x, m, y);
}

}  // namespace
}  // namespace ferrum
