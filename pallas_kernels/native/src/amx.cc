// AMX: the integers of a panel from int8 tiles. 16 rows of the matrix are the left tile as decoded, a panel is the right
// one as packed; a block of 32 weights takes one instruction for 16 x 16 dot products.
//
// The instructions are written out: intrinsics of some compilers do not tell that tiles read memory.
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

#include "avx512_panels.h"

namespace ferrum {
namespace {

// Tiles 0 and 1 hold results, 2 and 4 weights, 3 and 5 activations, so that neighbouring blocks do not wait for each other.
struct alignas(64) TileShapes {
  uint8_t palette, start;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
constexpr TileShapes shapes(uint16_t bytes) {  // of `bytes` weights at a time
  const uint8_t words = uint8_t(bytes / 4);
  return {1, 0, {}, {64, 64, bytes, 64, bytes, 64}, {16, 16, 16, words, 16, words}};
}
constexpr TileShapes kWhole = shapes(32), kHalf = shapes(16);

template <int R, int A, int B>
FERRUM_INLINE void tile_product(const void* a, int64_t a_stride, const void* b, void* out) {
  asm volatile(
      "tilezero %%tmm%c4\n\t"
      "tileloadd (%0,%1,1), %%tmm%c5\n\t"
      "tileloadd (%2,%7,1), %%tmm%c6\n\t"
      "tdpbusd %%tmm%c6, %%tmm%c5, %%tmm%c4\n\t"
      "tilestored %%tmm%c4, (%3,%7,1)"
      :
      : "r"(a), "r"(a_stride), "r"(b), "r"(out), "i"(R), "i"(A), "i"(B), "r"(int64_t{64})
      : "memory");
}

template <Type T>
struct Tiles {
  static void run(const Decoded* w, int count, int64_t groups, const PanelGroup* x, float (*out)[kPanel]) {
    constexpr int parts = has_parts(T) ? 2 : 1, together = 2 / parts;  // groups whose integers wait in the cache
    alignas(64) int32_t dots[together][kBlocks * parts][kPanel][kPanel];
    alignas(64) float lanes[kPanel][kBlocks][kPanel];
    asm volatile("ldtilecfg %0" ::"m"(parts == 2 ? kHalf : kWhole));
    for (int64_t first = 0; first < groups; first += together) {
      const int some = groups - first < together ? int(groups - first) : together;
      for (int g = 0; g < some; ++g)
        for (int b = 0; b < kBlocks; ++b) {
          const uint8_t* a = w[first + g].q[0] + 32 * place(b);
          const void* p = x[first + g].q[8 * place(b)];
          if constexpr (parts == 1) {
            if (b % 2 == 0) tile_product<0, 2, 3>(a, kGroup, p, dots[g][b]);
            else tile_product<1, 4, 5>(a, kGroup, p, dots[g][b]);
          } else {
            tile_product<0, 2, 3>(a, kGroup, p, dots[g][2 * b]);
            tile_product<1, 4, 5>(a + 16, kGroup, x[first + g].q[8 * place(b) + 4], dots[g][2 * b + 1]);
          }
        }
      for (int i = 0; i < count; i += 2) {
        F lane[2][kBlocks];
        for (int b = 0; b < kBlocks; ++b)
          for (int r = 0; r < 2; ++r) lane[r][b] = first ? _mm512_load_ps(lanes[i + r][b]) : _mm512_setzero_ps();
        for (int g = 0; g < some; ++g)
#pragma GCC unroll 8
          for (int b = 0; b < kBlocks; ++b)
            for (int r = 0; r < 2; ++r) {
              V dot[2];
              for (int part = 0; part < parts; ++part) dot[part] = _mm512_load_si512(dots[g][b * parts + part][i + r]);
              add_block<T>(w[first + g], x[first + g], i + r, b, dot, lane[r][b]);
            }
        for (int r = 0; r < 2; ++r) {
          if (first + some < groups)
            for (int b = 0; b < kBlocks; ++b) _mm512_store_ps(lanes[i + r][b], lane[r][b]);
          else
            _mm512_store_ps(out[i + r], fold_lanes(lane[r]));
        }
      }
    }
  }
};

template <Type T>
void tile_panels(const Rows& w, const PanelGroup* x, int64_t m, Output y) {
  panels_of_type<T, Tiles>(w, x, m, y);
}

void panels(const Rows& w, const PanelGroup* x, int64_t m, Output y) {
  switch (w.format->type) {
    FERRUM_QUANTISED(tile_panels, w, x, m, y)
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
