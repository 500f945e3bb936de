// arm64 with the dot product: everything but prompts on CPUs that also have the matrix product (neon_i8mm.cc).
//
// A block of 32 weights takes two instructions for each row of x; pairwise additions put the integers of four blocks into one
// register, in the order of their float lanes (see kernels.h). For more than four rows of x a row of the matrix is decoded into
// memory first. build.py gives the flags.
#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include <cmath>
#include <cstring>
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#define FERRUM_LANES 128
#include "neon.h"
#include "attention.h"
#include "floats.h"

namespace ferrum {
namespace {

FERRUM_INLINE int32x4_t sums_of(const int32x4_t v[4]) { return vpaddq_s32(vpaddq_s32(v[0], v[1]), vpaddq_s32(v[2], v[3])); }

// The two halves of four blocks times their factors.
FERRUM_INLINE float32x4_t in_halves(float32x4_t first, float32x4_t second, const float factors[8]) {
  const float32x4x2_t both = vld2q_f32(factors);
  return vfmaq_f32(vmulq_f32(first, both.val[0]), second, both.val[1]);
}

// A row of the matrix, at p or already decoded, times R rows of x.
template <Type T, bool Decoded, int R>
void row_dots(const uint8_t* p, const Weights* decoded, int64_t k, const Group* const* x, float* y) {
  const int32x4_t zero = vdupq_n_s32(0);
  uint8_t room[kWidest];
  Weights own;
  float32x4_t lanes[R][2];
  for (int r = 0; r < R; ++r) lanes[r][0] = lanes[r][1] = vdupq_n_f32(0);
  for (int64_t g = 0; g * kGroup < k; ++g, p += group_bytes(T)) {
    const uint8_t* from = Decoded ? p : whole<T>(p, k - g * kGroup, room);
    if constexpr (!Decoded) decode_scales<T>(from, own);
    const Weights& w = Decoded ? decoded[g] : own;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      int32x4_t first[R][4], second[R][4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Block weights = Decoded ? decoded_block(w, 4 * half + i) : block<T>(from, 4 * half + i, w);
        for (int r = 0; r < R; ++r) {
          const int8_t* a = x[r][g].q + 32 * place(4 * half + i);
          first[r][i] = vdotq_s32(zero, weights.q[0], vld1q_s8(a));
          if constexpr (has_parts(T)) second[r][i] = vdotq_s32(zero, weights.q[1], vld1q_s8(a + 16));
          else first[r][i] = vdotq_s32(first[r][i], weights.q[1], vld1q_s8(a + 16));
        }
      }
      for (int r = 0; r < R; ++r) {
        const Group& a = x[r][g];
        const float32x4_t scale = vld1q_f32(a.scale + 4 * half);
        float32x4_t dot = vcvtq_f32_s32(sums_of(first[r])), sum = vld1q_f32(a.scaled_sum + 4 * half);
        if constexpr (has_parts(T)) dot = in_halves(dot, vcvtq_f32_s32(sums_of(second[r])), w.part + 8 * half);
        if constexpr (has_lows(T)) {
          const int32_t* sums = a.half_sum + 8 * half;
          sum = vmulq_f32(scale, in_halves(vcvtq_f32_s32(vld1q_s32(sums)), vcvtq_f32_s32(vld1q_s32(sums + 4)), w.low + 8 * half));
        }
        float32x4_t& lane = lanes[r][half];
        lane = vfmaq_f32(lane, vmulq_f32(dot, scale), vld1q_f32(w.scale + 4 * half));
        if constexpr (has_offset(T)) lane = vfmsq_f32(lane, sum, vld1q_f32(w.offset + 4 * half));
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    const float32x4_t four = vaddq_f32(lanes[r][0], lanes[r][1]);
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    y[r] = vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
  }
}

template <Type T, bool Decoded>
void all_dots(const uint8_t* p, const Weights* decoded, int64_t k, const Group* const* x, int64_t m, float* y) {
  int64_t r = 0;
  for (; r + 4 <= m; r += 4) row_dots<T, Decoded, 4>(p, decoded, k, x + r, y + r);
  if (m & 2) row_dots<T, Decoded, 2>(p, decoded, k, x + r, y + r), r += 2;
  if (m & 1) row_dots<T, Decoded, 1>(p, decoded, k, x + r, y + r);
}

template <Type T>
void decode_row(const uint8_t* p, int64_t k, Weights* out) {
  uint8_t room[kWidest];
  for (int64_t g = 0; g * kGroup < k; ++g, p += group_bytes(T)) {
    const uint8_t* from = whole<T>(p, k - g * kGroup, room);
    decode_scales<T>(from, out[g]);
    if constexpr (!in_registers(T)) continue;
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
      const Block q = block<T>(from, b, out[g]);
      for (int h = 0; h < 2; ++h) vst1q_s8(out[g].q + 32 * place(b) + 16 * h, q.q[h]);
    }
  }
}

template <Type T>
void dots_of_type(const Rows& w, const Group* const* x, int64_t m, Output y) {
  constexpr int64_t kSome = 32;  // rows of x that stay in the nearest cache
  auto* decoded = static_cast<Weights*>(scratch(kDecoded, size_t(groups_of(w.k)) * sizeof(Weights)));
  float sums[kSome];
  for (int64_t first = 0; first < m; first += kSome)
    for (int64_t i = 0; i < w.count; ++i) {
      const uint8_t* row = w.blocks + i * w.stride;
      const int64_t some = m - first < kSome ? m - first : kSome;
      if (some <= 4) {
        all_dots<T, false>(row, nullptr, w.k, x + first, some, sums);
      } else {
        decode_row<T>(row, w.k, decoded);
        all_dots<once_decoded(T), true>(row, decoded, w.k, x + first, some, sums);
      }
      for (int64_t r = 0; r < some; ++r) y.at(first + r)[i] = sums[r];
    }
}

void dots(const Rows& w, const Group* const* x, int64_t m, Output y) {
  switch (w.format->type) {
    FERRUM_QUANTIZED(dots_of_type, w, x, m, y)
    default: break;
  }
}

// number: of the bit in Linux's auxiliary vector, name: Darwin's.
bool has_feature([[maybe_unused]] int vector, [[maybe_unused]] int bit, [[maybe_unused]] const char* name) {
#if defined(__linux__)
  return getauxval(vector ? AT_HWCAP2 : AT_HWCAP) >> bit & 1;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname(name, &has, &size, nullptr, 0) == 0 && has;
#else
  return false;
#endif
}

}  // namespace

bool has_neon_dotprod() { return has_feature(0, 20, "hw.optional.arm.FEAT_DotProd"); }
bool has_neon_i8mm() { return has_neon_dotprod() && has_feature(1, 13, "hw.optional.arm.FEAT_I8MM"); }

const Isa neon_dotprod = {"neon_dotprod", quantize_row, rest_of_row, pack_panel, dots, nullptr, float_dots, FERRUM_BESIDE};

}  // namespace ferrum
#endif
