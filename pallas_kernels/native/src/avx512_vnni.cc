// AVX-512 with VNNI: panels of 16 rows of x, attention, float32. avx512_few.cc has the kernels for few rows of x.
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
#include "avx512_panels.h"
#include "attention.h"
#include "floats.h"

namespace ferrum {
namespace {

FERRUM_INLINE F fold_lanes(const F lanes[kBlocks]) {
  const F even = _mm512_add_ps(_mm512_add_ps(lanes[0], lanes[4]), _mm512_add_ps(lanes[2], lanes[6]));
  const F odd = _mm512_add_ps(_mm512_add_ps(lanes[1], lanes[5]), _mm512_add_ps(lanes[3], lanes[7]));
  return _mm512_add_ps(even, odd);
}

template <Type T>
struct Broadcast {  // each word of four weights against the 16 rows of a panel
  static constexpr bool is_signed = false;
  static void run(const Decoded* w, int count, int64_t groups, const PanelGroup* x, float (*out)[kPanel]) {
    constexpr int steps = has_parts(T) ? 4 : 8;
    for (int i = 0; i < count; i += 2) {
      F lanes[2][kBlocks];
      for (int b = 0; b < kBlocks; ++b) lanes[0][b] = lanes[1][b] = _mm512_setzero_ps();
      for (int64_t g = 0; g < groups; ++g)
#pragma GCC unroll 8
        for (int b = 0; b < kBlocks; ++b) {
          V dots[2][2];
          const uint8_t *p = w[g].q[b][i], *q = w[g].q[b][i + 1];
          for (int part = 0; part < 8 / steps; ++part) {
            dots[0][part] = dots[1][part] = _mm512_setzero_si512();
            for (int s = steps * part; s < steps * (part + 1); ++s) {
              const V xs = load512(x[g].q[8 * place(b) + s]);
              dots[0][part] = dpbusd(dots[0][part], _mm512_set1_epi32(int(load32(p + 4 * s))), xs);
              dots[1][part] = dpbusd(dots[1][part], _mm512_set1_epi32(int(load32(q + 4 * s))), xs);
            }
          }
          add_block<T, bias_shift(T)>(w[g], x[g], i, b, dots[0], lanes[0][b]);
          add_block<T, bias_shift(T)>(w[g], x[g], i + 1, b, dots[1], lanes[1][b]);
        }
      _mm512_store_ps(out[i], fold_lanes(lanes[0]));
      _mm512_store_ps(out[i + 1], fold_lanes(lanes[1]));
    }
  }
};

template <Type T>
void broadcast_panels(const Rows& w, const PanelGroup* x, int64_t m, Output y) {
  panels_of_type<T, Broadcast>(w, x, m, y);
}

void panels(const Rows& w, const PanelGroup* x, int64_t m, Output y) {
  switch (w.format->type) {
    FERRUM_QUANTIZED(broadcast_panels, w, x, m, y)
    default: break;
  }
}

void float_dots(const Rows& w, const float* const* x, int64_t m, Output y) {
  switch (w.format->type) {
    FERRUM_QUANTIZED(float_dots_of, w, x, m, y)
    FERRUM_CASE(F16, float_dots_of, w, x, m, y)
    FERRUM_CASE(BF16, float_dots_of, w, x, m, y)
    FERRUM_CASE(F32, float_dots_of, w, x, m, y)
  }
}

}  // namespace

const Isa avx512_vnni = {"avx512_vnni", avx512_quantize, rest_of_row, pack_panel, avx512_dots, panels, float_dots, FERRUM_BESIDE};

}  // namespace ferrum

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
