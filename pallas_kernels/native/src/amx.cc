// AMX: the integers of a panel from int8 tiles. 16 decoded rows of the matrix are the left tile, a packed panel is the right
// one; a block of 32 weights takes one instruction for 16 x 16 dot products.
//
// The instructions are written in assembly, because the intrinsics of some compilers do not declare that tile loads read
// memory.
#if defined(__x86_64__)
#include <cmath>
#include <cpuid.h>
#include <cstring>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "isa.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi2,prefer-vector-width=512")
#endif

#define FERRUM_LANES 512
#include "avx512_panels.h"

namespace ferrum {
namespace {

// Tiles 0, 1 and 6 hold results, 2 and 4 weights, 3 and 5 activations.
struct alignas(64) TileShapes {
  uint8_t palette, start;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
constexpr TileShapes shapes(uint16_t bytes) {  // of `bytes` weights at a time
  const uint8_t words = uint8_t(bytes / 4);
  return {1, 0, {}, {64, 64, bytes, 64, bytes, 64, 64}, {16, 16, 16, words, 16, words, 16}};
}
constexpr TileShapes kWhole = shapes(32), kHalf = shapes(16);

template <int R, int A, int B>
FERRUM_INLINE void tile_product(const void* a, int64_t a_stride, const void* b, void* out) {
  asm volatile(
      "tilezero %%tmm%c4\n\t"
      "tileloadd (%0,%1,1), %%tmm%c5\n\t"
      "tileloadd (%2,%7,1), %%tmm%c6\n\t"
      "tdpbssd %%tmm%c6, %%tmm%c5, %%tmm%c4\n\t"
      "tilestored %%tmm%c4, (%3,%7,1)"
      :
      : "r"(a), "r"(a_stride), "r"(b), "r"(out), "i"(R), "i"(A), "i"(B), "r"(int64_t{64})
      : "memory");
}

// The float lanes of the arithmetic, one after the other: a lane's sums of 16 rows stay in registers over all groups, while the
// tile unit computes the integers of the next group.
template <Type T>
struct Tiles {
  static constexpr int parts = has_parts(T) ? 2 : 1;
  using Dots = int32_t[parts][kPanel][kPanel];

  template <int Even>  // neighboring groups use different tiles, so that they do not wait for each other
  FERRUM_INLINE static void multiply(const Decoded& w, const PanelGroup& x, int b, Dots& dots) {
    const uint8_t* a = w.q[b][0];
    tile_product<Even, 2 + 2 * Even, 3 + 2 * Even>(a, 32, x.q[8 * place(b)], dots[0]);
    if constexpr (parts == 2) tile_product<6, 2 + 2 * Even, 3 + 2 * Even>(a + 16, 32, x.q[8 * place(b) + 4], dots[1]);
  }

  FERRUM_INLINE static void add(const Decoded& w, const PanelGroup& x, int b, const Dots& dots, F* sum) {
#pragma GCC unroll 16
    for (int i = 0; i < kPanel; ++i) {
      V dot[parts];
      for (int part = 0; part < parts; ++part) dot[part] = _mm512_load_si512(dots[part][i]);
      add_block<T>(w, x, i, b, dot, sum[i]);
    }
  }

  FERRUM_INLINE static void lane(const Decoded* w, int64_t groups, const PanelGroup* x, int b, F* sum) {
    alignas(64) Dots dots[2];
    for (int i = 0; i < kPanel; ++i) sum[i] = _mm512_setzero_ps();
    multiply<0>(w[0], x[0], b, dots[0]);
    for (int64_t g = 0; g < groups; g += 2) {
      if (g + 1 < groups) multiply<1>(w[g + 1], x[g + 1], b, dots[1]);
      add(w[g], x[g], b, dots[0], sum);
      if (g + 1 == groups) break;
      if (g + 2 < groups) multiply<0>(w[g + 2], x[g + 2], b, dots[0]);
      add(w[g + 1], x[g + 1], b, dots[1], sum);
    }
  }

  // Two lanes' sums into `sum`.
  FERRUM_INLINE static void lanes(const Decoded* w, int64_t groups, const PanelGroup* x, int b, float (*sum)[kPanel]) {
    F first[kPanel], second[kPanel];
    lane(w, groups, x, b, first);
    for (int i = 0; i < kPanel; ++i) _mm512_store_ps(sum[i], first[i]);
    lane(w, groups, x, b + 4, second);
    for (int i = 0; i < kPanel; ++i) _mm512_store_ps(sum[i], _mm512_add_ps(_mm512_load_ps(sum[i]), second[i]));
  }

  static void run(const Decoded* w, int /*count*/, int64_t groups, const PanelGroup* x, float (*out)[kPanel]) {
    alignas(64) float sums[kBlocks / 2][kPanel][kPanel];
    asm volatile("ldtilecfg %0" ::"m"(parts == 2 ? kHalf : kWhole));
#pragma GCC unroll 1
    for (int b = 0; b < kBlocks / 2; ++b) lanes(w, groups, x, b, sums[b]);
    for (int i = 0; i < kPanel; ++i) {
      const F even = _mm512_add_ps(_mm512_load_ps(sums[0][i]), _mm512_load_ps(sums[2][i]));
      const F odd = _mm512_add_ps(_mm512_load_ps(sums[1][i]), _mm512_load_ps(sums[3][i]));
      _mm512_store_ps(out[i], _mm512_add_ps(even, odd));
    }
  }
};

template <Type T>
void tile_panels(const Rows& w, const PanelGroup* x, int64_t m, Output y) {
  panels_by(decode_rows<T>, Tiles<once_decoded(T)>::run, w, x, m, y);
}

void panels(const Rows& w, const PanelGroup* x, int64_t m, Output y) {
  switch (w.format->type) {
    FERRUM_QUANTIZED(tile_panels, w, x, m, y)
    default: break;
  }
  asm volatile("tilerelease" ::: "memory");
}

bool ask_for_tiles() {
#if defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kTiles = 1u << 24, kInt8 = 1u << 25;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
  return (d & kTiles) && (d & kInt8) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

bool has_amx() {
  static const bool has = has_avx512_vnni() && ask_for_tiles();
  return has;
}

const Isa& amx() {
  static const Isa isa = [] {
    Isa made = avx512_vnni;
    made.name = "amx";
    made.panels = panels;
    return made;
  }();
  return isa;
}

}  // namespace ferrum

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
