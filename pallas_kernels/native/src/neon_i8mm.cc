// arm64 with the matrix product: many rows of x. Its instruction takes eight weights of two rows and eight values of two rows of
// x to four integers, so pairs of rows lie together, eight values of one and eight of the other.
#if defined(__aarch64__) && defined(__ARM_FEATURE_MATMUL_INT8)
#include <cmath>
#include <cstring>

#include "isa.h"
#include "neon.h"

namespace ferrum {
namespace {

constexpr int kPairs = kPanel / 2;
constexpr int kEights = 4;                     // of a block
constexpr int64_t kPanelBytes = 256 << 10;  // of panels that are multiplied by one decoded tile after the other

using Pairs = int8_t[kBlocks][kPairs][kEights][16];
static_assert(sizeof(Pairs) == sizeof(PanelGroup::q), "a panel has room for it");

// A group of 16 rows of the matrix. Its factors are repeated for the two rows of x: those of rows 2 i, 2 i, 2 i + 1, 2 i + 1.
struct alignas(64) Decoded {
  Pairs q;
  float scale[kBlocks][kPairs][4], offset[kBlocks][kPairs][4];
  float part[2][kBlocks][kPairs][4], low[2][kBlocks][kPairs][4];
};

// Of `row`; its block as two registers.
FERRUM_INLINE void put(int8x16_t first, int8x16_t second, int b, int64_t row, Pairs& out) {
  int8_t* to = out[b][row / 2][0] + 8 * (row % 2);
  vst1_s8(to, vget_low_s8(first));
  vst1_s8(to + 16, vget_high_s8(first));
  vst1_s8(to + 32, vget_low_s8(second));
  vst1_s8(to + 48, vget_high_s8(second));
}

void pack(const Group* const* rows, int64_t count, int64_t groups, PanelGroup* out) {
  std::memset(out, 0, size_t(groups) * sizeof(PanelGroup));
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t r = 0; r < count; ++r) {
      const Group& from = rows[r][g];
      for (int b = 0; b < kBlocks; ++b) {
        const int8_t* q = from.q + 32 * place(b);
        put(vld1q_s8(q), vld1q_s8(q + 16), b, r, reinterpret_cast<Pairs&>(out[g].q));
        out[g].scale[b][r] = from.scale[b];
        out[g].scaled_sum[b][r] = from.scaled_sum[b];
      }
      for (int i = 0; i < 2 * kBlocks; ++i) out[g].half_sum[i][r] = from.half_sum[i];
    }
}

template <Type T>
void decode_rows(const Rows& w, int64_t groups, Decoded* out) {
  uint8_t room[kWidest];
  Weights weights;
  for (int64_t i = 0; i < w.count; ++i) {
    const uint8_t* p = w.blocks + i * w.stride;
    for (int64_t g = 0; g < groups; ++g, p += group_bytes(T)) {
      const uint8_t* from = whole<T>(p, w.k - g * kGroup, room);
      decode_scales<T>(from, weights);
#pragma GCC unroll 8
      for (int b = 0; b < kBlocks; ++b) {
        const Block q = block<T>(from, b, weights);
        put(q.q[0], q.q[1], b, i, out[g].q);
        for (int j = 0; j < 2; ++j) {
          const int64_t at = 2 * (i % 2) + j;
          out[g].scale[b][i / 2][at] = weights.scale[b];
          if constexpr (has_offset(T)) out[g].offset[b][i / 2][at] = weights.offset[b];
          for (int h = 0; h < 2; ++h) {
            if constexpr (has_parts(T)) out[g].part[h][b][i / 2][at] = weights.part[2 * b + h];
            if constexpr (has_lows(T)) out[g].low[h][b][i / 2][at] = weights.low[2 * b + h];
          }
        }
      }
    }
  }
}

FERRUM_INLINE float32x4_t twice(const float* two) {
  const float32x2_t v = vld1_f32(two);
  return vcombine_f32(v, v);
}
FERRUM_INLINE float32x4_t twice(const int32_t* two) {
  const int32x2_t v = vld1_s32(two);
  return vcvtq_f32_s32(vcombine_s32(v, v));
}

constexpr int kW = 4, kX = 2;  // pairs of rows at a time: their integers and sums stay in registers

// Lane b (see kernels.h) of kW pairs of rows of the matrix from `first` on and kX pairs of rows of x from `begin` on.
template <Type T>
FERRUM_INLINE void lane_of(const Decoded* w, int64_t groups, const PanelGroup* x, int b, int first, int begin, float32x4_t sum[kW][kX]) {
  constexpr int parts = has_parts(T) ? 2 : 1;
  for (int i = 0; i < kW; ++i)
    for (int j = 0; j < kX; ++j) sum[i][j] = vdupq_n_f32(0);
  for (int64_t g = 0; g < groups; ++g) {
    const Decoded& from = w[g];
    const Pairs& values = reinterpret_cast<const Pairs&>(x[g].q);
    float32x4_t total[kW][kX];
#pragma GCC unroll 2
    for (int part = 0; part < parts; ++part) {
      int32x4_t dot[kW][kX];
      for (int i = 0; i < kW; ++i)
        for (int j = 0; j < kX; ++j) dot[i][j] = vdupq_n_s32(0);
#pragma GCC unroll 4
      for (int e = part * kEights / parts; e < (part + 1) * kEights / parts; ++e) {
        int8x16_t a[kX];
        for (int j = 0; j < kX; ++j) a[j] = vld1q_s8(values[b][begin + j][e]);
        for (int i = 0; i < kW; ++i) {
          const int8x16_t q = vld1q_s8(from.q[b][first + i][e]);
          for (int j = 0; j < kX; ++j) dot[i][j] = vmmlaq_s32(dot[i][j], q, a[j]);
        }
      }
      for (int i = 0; i < kW; ++i)
        for (int j = 0; j < kX; ++j) {
          const float32x4_t exact = vcvtq_f32_s32(dot[i][j]);
          if constexpr (parts == 1) total[i][j] = exact;
          else if (part == 0) total[i][j] = vmulq_f32(exact, vld1q_f32(from.part[0][b][first + i]));
          else total[i][j] = vfmaq_f32(total[i][j], exact, vld1q_f32(from.part[1][b][first + i]));
        }
    }
    for (int j = 0; j < kX; ++j) {
      const float32x4_t scale = twice(x[g].scale[b] + 2 * (begin + j));
      for (int i = 0; i < kW; ++i) {
        sum[i][j] = vfmaq_f32(sum[i][j], vmulq_f32(total[i][j], scale), vld1q_f32(from.scale[b][first + i]));
        if constexpr (has_offset(T)) {
          float32x4_t of_x = twice(x[g].scaled_sum[b] + 2 * (begin + j));
          if constexpr (has_lows(T)) {
            const int half = 8 * (b / 4) + b % 4;  // in the order of Group::half_sum
            const float32x4_t low = vmulq_f32(twice(x[g].half_sum[half] + 2 * (begin + j)), vld1q_f32(from.low[0][b][first + i]));
            of_x = vmulq_f32(scale, vfmaq_f32(low, twice(x[g].half_sum[half + 4] + 2 * (begin + j)), vld1q_f32(from.low[1][b][first + i])));
          }
          sum[i][j] = vfmsq_f32(sum[i][j], of_x, vld1q_f32(from.offset[b][first + i]));
        }
      }
    }
  }
}

// out[row of x][row of the matrix].
template <Type T>
void multiply_panel(const Decoded* w, int64_t groups, const PanelGroup* x, float (*out)[kPanel]) {
  for (int first = 0; first < kPairs; first += kW)
    for (int begin = 0; begin < kPairs; begin += kX) {
      float32x4_t lanes[kBlocks][kW][kX];
      for (int b = 0; b < kBlocks; ++b) lane_of<T>(w, groups, x, b, first, begin, lanes[b]);
      for (int i = 0; i < kW; ++i)
        for (int j = 0; j < kX; ++j) {
          const auto lane = [&](int b) { return vaddq_f32(lanes[b][i][j], lanes[b + 4][i][j]); };
          float four[4];
          vst1q_f32(four, vaddq_f32(vaddq_f32(lane(0), lane(2)), vaddq_f32(lane(1), lane(3))));
          for (int at = 0; at < 4; ++at) out[2 * (begin + j) + at % 2][2 * (first + i) + at / 2] = four[at];
        }
    }
}

using DecodeRows = void(const Rows& w, int64_t groups, Decoded* out);
using Multiply = void(const Decoded* w, int64_t groups, const PanelGroup* x, float (*out)[kPanel]);

void panels_by(DecodeRows* decode, Multiply* multiply, Rows w, const PanelGroup* x, int64_t m, Output y) {
  const int64_t groups = groups_of(w.k), all = w.count;
  auto* decoded = static_cast<Decoded*>(scratch(kDecoded, size_t(groups) * sizeof(Decoded)));
  const int64_t some = kPanel * (1 + kPanelBytes / (groups * int64_t(sizeof(PanelGroup))));
  for (int64_t first = 0; first < m; first += some) {
    Rows left = w;
    for (int64_t done = 0; done < all; done += kPanel, left.blocks += kPanel * left.stride) {
      left.count = all - done < kPanel ? all - done : kPanel;
      decode(left, groups, decoded);
      for (int64_t r = first; r < m && r < first + some; r += kPanel) {
        float tile[kPanel][kPanel];
        multiply(decoded, groups, x + r / kPanel * groups, tile);
        for (int64_t i = 0; i < kPanel && r + i < m; ++i)
          std::memcpy(y.at(r + i) + done, tile[i], size_t(left.count) * sizeof(float));
      }
    }
  }
}

template <Type T>
void panels_of_type(const Rows& w, const PanelGroup* x, int64_t m, Output y) {
  panels_by(decode_rows<T>, multiply_panel<once_decoded(T)>, w, x, m, y);
}

void panels(const Rows& w, const PanelGroup* x, int64_t m, Output y) {
  switch (w.format->type) {
    FERRUM_QUANTIZED(panels_of_type, w, x, m, y)
    default: break;
  }
}

}  // namespace

const Isa& neon_i8mm() {
  static const Isa isa = [] {
    Isa made = neon_dotprod;
    made.name = "neon_i8mm";
    made.pack = pack;
    made.panels = panels;
    return made;
  }();
  return isa;
}

}  // namespace ferrum
#endif
