// AVX-512 with VNNI: attention, float32. avx512_dots.cc has the products of quantized rows.
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
#include "attention.h"
#include "floats.h"

namespace ferrum {

const Isa avx512_vnni = {"avx512_vnni", avx512_quantize, rest_of_row, pack_panel, avx512_dots, nullptr, float_dots, FERRUM_BESIDE};

}  // namespace ferrum

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
