// AVX-512 with VNNI for few rows of x: two rows of the matrix at a time. A separate file, so that two processors can compile.
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

#include "avx512.h"

namespace ferrum {
namespace {

FERRUM_INLINE F twice(const float* p) { return _mm512_broadcast_f32x8(_mm256_load_ps(p)); }

}  // namespace

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

// M rows of x times all rows of the matrix, two at a time: lanes 0..7 are the blocks of one, 8..15 those of the other.
template <Type T, int M>
void few(const Rows& w, const Group* const* x, Output y) {
  const int64_t groups = groups_of(w.k);
  alignas(64) uint8_t room[2][kWidest];
  const uint8_t* end = w.blocks + w.count * w.stride;
  for (int64_t i = 0; i < w.count; i += 2) {
    const uint8_t* p = w.blocks + i * w.stride;
    const uint8_t* q = i + 1 < w.count ? p + w.stride : p;
    F lanes[M];
    for (int r = 0; r < M; ++r) lanes[r] = _mm512_setzero_ps();
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
      for (int r = 0; r < M; ++r) {
        const Group& o = x[r][g];
        const V zero = _mm512_setzero_si512();
        const V x0 = load512(o.q), x1 = load512(o.q + 64), x2 = load512(o.q + 128), x3 = load512(o.q + 192);
        V first = half_sums(dpbusd(zero, u[0], x0), dpbusd(zero, u[1], x1), dpbusd(zero, u[2], x2), dpbusd(zero, u[3], x3));
        V second = half_sums(dpbusd(zero, v[0], x0), dpbusd(zero, v[1], x1), dpbusd(zero, v[2], x2), dpbusd(zero, v[3], x3));
        F dot;
        if constexpr (has_parts(T)) {
          const V less = _mm512_slli_epi32(_mm512_loadu_si512(o.half_sum), bias_shift(T));
          const F f = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(first, less)), part_scales(a));
          const F s = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(second, less)), part_scales(b));
          dot = block_sums(f, s);  // integers below 2^24: exact, contracted or not
        } else {
          V sums = block_sums(first, second);
          if constexpr (bias_shift(T) != 0) {
            const __m256i sum = _mm256_load_si256(reinterpret_cast<const __m256i*>(o.sum));
            sums = _mm512_sub_epi32(sums, _mm512_broadcast_i32x8(_mm256_slli_epi32(sum, bias_shift(T))));
          }
          dot = _mm512_cvtepi32_ps(sums);
        }
        lanes[r] = _mm512_fmadd_ps(_mm512_mul_ps(dot, twice(o.scale)), scale, lanes[r]);
        if constexpr (has_offset(T)) lanes[r] = _mm512_fnmadd_ps(twice(o.scaled_sum), offset, lanes[r]);
      }
    }
    for (int r = 0; r < M; ++r) {
      y.at(r)[i] = fold8(_mm512_castps512_ps256(lanes[r]));
      if (i + 1 < w.count) y.at(r)[i + 1] = fold8(_mm512_extractf32x8_ps(lanes[r], 1));
    }
  }
}

template <Type T>
void dots_of_type(const Rows& w, const Group* const* x, int64_t m, Output y) {
  for (; m >= 4; m -= 4, x += 4, y.y += 4 * y.stride) few<T, 4>(w, x, y);
  if (m == 3) few<T, 3>(w, x, y);
  if (m == 2) few<T, 2>(w, x, y);
  if (m == 1) few<T, 1>(w, x, y);
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
