// AVX2: the plain kernels, vectorized for it.
#if defined(__x86_64__)
#include <cmath>
#include <cstring>
#include <immintrin.h>

#include "isa.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif

#define FERRUM_LANES 256
#include "attention.h"
#include "floats.h"

namespace ferrum {
namespace {

void dots(const Rows& w, const Group* const* x, int64_t m, Output y) {
  switch (w.format->type) {
    FERRUM_QUANTIZED(dots_of, w, x, m, y)
    default: break;
  }
}

}  // namespace

const Isa avx2 = {"avx2", quantize_row, rest_of_row, pack_panel, dots, nullptr, float_dots, FERRUM_BESIDE};

}  // namespace ferrum

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
