// Sixteen floats, with the same bits on every instruction set. Included under a target pragma; FERRUM_LANES is 512 or 256 for
// the registers to use, 128 for those of arm64, 0 for none.
//
// max(a, b) and min(a, b) are b if either is NaN. exp_of is 2^n times a polynomial (Cephes' for expf), with x = n ln 2 + r and
// n read off the bits of a sum that rounds to it; below -87.6 it is zero, above 88 as at 88.
#pragma once

#include "scalar.h"

namespace ferrum {
namespace {

constexpr int kLanes = 16;

#if FERRUM_LANES == 512

struct Lanes {
  __m512 v;
};
inline Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(Lanes a, float* p) { _mm512_storeu_ps(p, a.v); }
inline Lanes all(float x) { return {_mm512_set1_ps(x)}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Lanes mul(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes sub(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Lanes div(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Lanes max(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Lanes min(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
// a in lanes low <= i < high, other elsewhere.
inline Lanes within(int64_t low, int64_t high, Lanes a, float other) {
  const __m512i i = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __mmask16 in = _mm512_cmpge_epi32_mask(i, _mm512_set1_epi32(int(low))) & _mm512_cmplt_epi32_mask(i, _mm512_set1_epi32(int(high)));
  return {_mm512_mask_mov_ps(_mm512_set1_ps(other), in, a.v)};
}
// p * 2^n, n the integer in the low bits of t.
inline Lanes times_power(Lanes p, Lanes t) {
  const __m512i n = _mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(t.v), 23), _mm512_set1_epi32(127 << 23));
  return {_mm512_mul_ps(p.v, _mm512_castsi512_ps(n))};
}
inline Lanes from_half(const uint8_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline Lanes from_bfloat(const uint8_t* p) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))};
}
inline Lanes from_int8(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline void to_half(Lanes a, uint8_t* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// Folded in halves.
inline float sum_of(Lanes a) {
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)), e = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(e, _mm_movehdup_ps(e)));
}
inline float max_of(Lanes a) {
  const __m256 h = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)), e = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(e, _mm_movehdup_ps(e)));
}
inline void transpose(Lanes* r) {
  __m512 a[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4)
    for (int h = 0; h < 2; ++h) {
      r[i + 2 * h].v = _mm512_shuffle_ps(a[i + h], a[i + h + 2], 0x44);
      r[i + 2 * h + 1].v = _mm512_shuffle_ps(a[i + h], a[i + h + 2], 0xee);
    }
  for (int i = 0; i < 4; ++i) {  // 128-bit lanes of rows i, i + 4, i + 8, i + 12
    const __m512 p = _mm512_shuffle_f32x4(r[i].v, r[i + 4].v, 0x88), q = _mm512_shuffle_f32x4(r[i].v, r[i + 4].v, 0xdd);
    const __m512 s = _mm512_shuffle_f32x4(r[i + 8].v, r[i + 12].v, 0x88), t = _mm512_shuffle_f32x4(r[i + 8].v, r[i + 12].v, 0xdd);
    a[i] = _mm512_shuffle_f32x4(p, s, 0x88);
    a[i + 4] = _mm512_shuffle_f32x4(q, t, 0x88);
    a[i + 8] = _mm512_shuffle_f32x4(p, s, 0xdd);
    a[i + 12] = _mm512_shuffle_f32x4(q, t, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i].v = a[i];
}

#elif FERRUM_LANES == 256

struct Lanes {
  __m256 v[2];
};
inline Lanes load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
inline void store(Lanes a, float* p) {
  _mm256_storeu_ps(p, a.v[0]);
  _mm256_storeu_ps(p + 8, a.v[1]);
}
inline Lanes all(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  return {{_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1])}};
}
inline Lanes mul(Lanes a, Lanes b) { return {{_mm256_mul_ps(a.v[0], b.v[0]), _mm256_mul_ps(a.v[1], b.v[1])}}; }
inline Lanes add(Lanes a, Lanes b) { return {{_mm256_add_ps(a.v[0], b.v[0]), _mm256_add_ps(a.v[1], b.v[1])}}; }
inline Lanes sub(Lanes a, Lanes b) { return {{_mm256_sub_ps(a.v[0], b.v[0]), _mm256_sub_ps(a.v[1], b.v[1])}}; }
inline Lanes div(Lanes a, Lanes b) { return {{_mm256_div_ps(a.v[0], b.v[0]), _mm256_div_ps(a.v[1], b.v[1])}}; }
inline Lanes min(Lanes a, Lanes b) { return {{_mm256_min_ps(a.v[0], b.v[0]), _mm256_min_ps(a.v[1], b.v[1])}}; }
inline Lanes max(Lanes a, Lanes b) { return {{_mm256_max_ps(a.v[0], b.v[0]), _mm256_max_ps(a.v[1], b.v[1])}}; }
inline Lanes within(int64_t low, int64_t high, Lanes a, float other) {
  for (int h = 0; h < 2; ++h) {
    const __m256i i = _mm256_add_epi32(_mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0), _mm256_set1_epi32(8 * h));
    const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(int(low)), i), in = _mm256_cmpgt_epi32(_mm256_set1_epi32(int(high)), i);
    a.v[h] = _mm256_blendv_ps(_mm256_set1_ps(other), a.v[h], _mm256_castsi256_ps(_mm256_andnot_si256(below, in)));
  }
  return a;
}
inline Lanes times_power(Lanes p, Lanes t) {
  for (int h = 0; h < 2; ++h) {
    const __m256i n = _mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(t.v[h]), 23), _mm256_set1_epi32(127 << 23));
    p.v[h] = _mm256_mul_ps(p.v[h], _mm256_castsi256_ps(n));
  }
  return p;
}
inline __m128i load128(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline Lanes from_half(const uint8_t* p) { return {{_mm256_cvtph_ps(load128(p)), _mm256_cvtph_ps(load128(p + 16))}}; }
inline __m256 widened(__m128i bits) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)); }
inline Lanes from_bfloat(const uint8_t* p) { return {{widened(load128(p)), widened(load128(p + 16))}}; }
inline Lanes from_int8(const uint8_t* p) {
  const __m128i bytes = load128(p);
  return {{_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))}};
}
inline void to_half(Lanes a, uint8_t* p) {
  for (int h = 0; h < 2; ++h)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p) + h, _mm256_cvtps_ph(a.v[h], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline float sum_of(Lanes a) {
  const __m256 h = _mm256_add_ps(a.v[0], a.v[1]);
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)), e = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(e, _mm_movehdup_ps(e)));
}

#elif FERRUM_LANES == 128

struct Lanes {
  float32x4_t v[4];
};
template <typename F>
inline Lanes quarters(F&& f) {
  return {{f(0), f(1), f(2), f(3)}};
}
inline Lanes load(const float* p) {
  return quarters([&](int i) { return vld1q_f32(p + 4 * i); });
}
inline void store(Lanes a, float* p) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]);
}
inline Lanes all(float x) {
  return quarters([&](int) { return vdupq_n_f32(x); });
}
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  return quarters([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
}
inline Lanes mul(Lanes a, Lanes b) {
  return quarters([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
inline Lanes add(Lanes a, Lanes b) {
  return quarters([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
inline Lanes sub(Lanes a, Lanes b) {
  return quarters([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
}
inline Lanes div(Lanes a, Lanes b) {
  return quarters([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
}
inline Lanes min(Lanes a, Lanes b) {
  return quarters([&](int i) { return vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
}
inline Lanes max(Lanes a, Lanes b) {
  return quarters([&](int i) { return vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
}
inline Lanes within(int64_t low, int64_t high, Lanes a, float other) {
  const int32_t first[] = {0, 1, 2, 3};
  return quarters([&](int h) {
    const int32x4_t i = vaddq_s32(vld1q_s32(first), vdupq_n_s32(4 * h));
    const uint32x4_t in = vandq_u32(vcgeq_s32(i, vdupq_n_s32(int(low))), vcltq_s32(i, vdupq_n_s32(int(high))));
    return vbslq_f32(in, a.v[h], vdupq_n_f32(other));
  });
}
inline Lanes times_power(Lanes p, Lanes t) {
  return quarters([&](int i) {
    const int32x4_t n = vaddq_s32(vshlq_n_s32(vreinterpretq_s32_f32(t.v[i]), 23), vdupq_n_s32(127 << 23));
    return vmulq_f32(p.v[i], vreinterpretq_f32_s32(n));
  });
}
inline uint16x4_t four_halves(const uint8_t* p) { return vreinterpret_u16_u8(vld1_u8(p)); }
inline Lanes from_half(const uint8_t* p) {
  return quarters([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(four_halves(p + 8 * i))); });
}
inline Lanes from_bfloat(const uint8_t* p) {
  return quarters([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(four_halves(p + 8 * i), 16)); });
}
inline Lanes from_int8(const uint8_t* p) {
  const int8x16_t bytes = vreinterpretq_s8_u8(vld1q_u8(p));
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
  return quarters([&](int i) {
    const int16x8_t eight = i < 2 ? low : high;
    return vcvtq_f32_s32(vmovl_s16(i % 2 ? vget_high_s16(eight) : vget_low_s16(eight)));
  });
}
inline void to_half(Lanes a, uint8_t* p) {
  for (int i = 0; i < 4; ++i) vst1_u8(p + 8 * i, vreinterpret_u8_f16(vcvt_f16_f32(a.v[i])));
}
inline float sum_of(Lanes a) {
  const float32x4_t q = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
  const float32x2_t e = vadd_f32(vget_low_f32(q), vget_high_f32(q));
  return vget_lane_f32(e, 0) + vget_lane_f32(e, 1);
}

#else

struct Lanes {
  float v[kLanes];
};
template <typename F>
inline Lanes each(F&& f) {
  Lanes out;
  for (int i = 0; i < kLanes; ++i) out.v[i] = f(i);
  return out;
}
inline Lanes load(const float* p) {
  return each([&](int i) { return p[i]; });
}
inline void store(const Lanes& a, float* p) { std::memcpy(p, a.v, sizeof a.v); }
inline Lanes all(float x) {
  return each([&](int) { return x; });
}
inline Lanes fma(const Lanes& a, const Lanes& b, const Lanes& c) {
  return each([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
}
inline Lanes mul(const Lanes& a, const Lanes& b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline Lanes add(const Lanes& a, const Lanes& b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Lanes sub(const Lanes& a, const Lanes& b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline Lanes div(const Lanes& a, const Lanes& b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}
inline Lanes min(const Lanes& a, const Lanes& b) {
  return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Lanes max(const Lanes& a, const Lanes& b) {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Lanes within(int64_t low, int64_t high, const Lanes& a, float other) {
  return each([&](int i) { return i >= low && i < high ? a.v[i] : other; });
}
inline Lanes times_power(const Lanes& p, const Lanes& t) {
  return each([&](int i) { return p.v[i] * float_of((bits_of(t.v[i]) << 23) + (127u << 23)); });
}
inline Lanes from_half(const uint8_t* p) {
  return each([&](int i) { return half_at(p + 2 * i); });
}
inline Lanes from_bfloat(const uint8_t* p) {
  return each([&](int i) { return float_of(uint32_t(load16(p + 2 * i)) << 16); });
}
inline Lanes from_int8(const uint8_t* p) {
  return each([&](int i) { return float(int8_t(p[i])); });
}
inline void to_half(const Lanes& a, uint8_t* p) {
  for (int i = 0; i < kLanes; ++i) {
    const uint16_t half = float_to_half(a.v[i]);
    std::memcpy(p + 2 * i, &half, 2);
  }
}
inline float sum_of(const Lanes& a) { return fold(a.v, kLanes); }

#endif

// The sums of some, each folded in halves.
template <int N>
inline void fold_some(const Lanes* a, float* out) {
#if FERRUM_LANES == 512
  static_assert(N == 4, "written for four");
  const __m512 p = _mm512_add_ps(_mm512_shuffle_f32x4(a[0].v, a[1].v, 0x44), _mm512_shuffle_f32x4(a[0].v, a[1].v, 0xee));
  const __m512 q = _mm512_add_ps(_mm512_shuffle_f32x4(a[2].v, a[3].v, 0x44), _mm512_shuffle_f32x4(a[2].v, a[3].v, 0xee));
  __m512 four = _mm512_add_ps(_mm512_shuffle_f32x4(p, q, 0x88), _mm512_shuffle_f32x4(p, q, 0xdd));
  four = _mm512_add_ps(four, _mm512_shuffle_ps(four, four, 0x4e));
  four = _mm512_add_ps(four, _mm512_shuffle_ps(four, four, 0xb1));
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, four)));
#else
  for (int i = 0; i < N; ++i) out[i] = sum_of(a[i]);
#endif
}

#if FERRUM_LANES != 512
inline float max_of(const Lanes& a) {
  float lanes[kLanes];
  store(a, lanes);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}
inline void transpose(Lanes* r) {
  float square[kLanes][kLanes];
  for (int i = 0; i < kLanes; ++i) store(r[i], square[i]);
  for (int i = 0; i < kLanes; ++i) {
    float column[kLanes];
    for (int j = 0; j < kLanes; ++j) column[j] = square[j][i];
    r[i] = load(column);
  }
}
#endif

inline Lanes exp_of(Lanes x) {
  constexpr float kPolynomial[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                   4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  x = min(all(88.0f), max(all(-88.0f), x));
  const Lanes magic = all(12582912.0f), t = fma(x, all(1.44269504f), magic), n = sub(t, magic);
  const Lanes r = fma(n, all(2.12194440e-4f), fma(n, all(-0.693359375f), x));
  Lanes p = all(kPolynomial[0]);
  for (int i = 1; i < 6; ++i) p = fma(p, r, all(kPolynomial[i]));
  p = fma(fma(p, r, all(1.0f)), r, all(1.0f));
  return times_power(p, t);
}

}  // namespace
}  // namespace ferrum
