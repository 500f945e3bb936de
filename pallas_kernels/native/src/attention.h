// Attention over pages, norms, rotation and SwiGLU: the parts of a layer other than its products.
//
// A range of positions is walked in tiles of 64, aligned to position 0, with the online softmax. Keys of a tile are
// transposed, so that scores and weighted values are one small product each, [rows, 64 columns], summed in order.
#pragma once

#include "delta_net.h"
#include "lanes.h"

namespace ferrum {
namespace {

constexpr int kTile = 64;
constexpr float kMasked = -1e30f;  // finite, so that a row before its first visible position never computes inf - inf

// c[r] += the sum over j of a[r][j] * b[j], for R rows and N vectors of columns; rows of b are `stride` apart.
template <int R, int N>
inline void add_products(const float* const* a, int64_t from, int64_t to, const float* b, int64_t stride, float* const* c) {
  Lanes sum[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) sum[r][n] = load(c[r] + kLanes * n);
  for (int64_t j = from; j < to; ++j) {
    Lanes row[N];
    for (int n = 0; n < N; ++n) row[n] = load(b + j * stride + kLanes * n);
    for (int r = 0; r < R; ++r) {
      const Lanes factor = all(a[r][j]);
      for (int n = 0; n < N; ++n) sum[r][n] = fma(factor, row[n], sum[r][n]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) store(sum[r][n], c[r] + kLanes * n);
}

// The same for any number of columns, a multiple of 16.
template <int R>
inline void add_all_products(const float* const* a, int64_t from, int64_t to, const float* b, int64_t columns, float* const* c) {
  if (from >= to) return;
  const float* at[R];
  float* out[R];
  int64_t done = 0;
  for (; done < columns; done += kTile) {
    for (int r = 0; r < R; ++r) at[r] = a[r], out[r] = c[r] + done;
    switch (columns - done) {
      case 16: return add_products<R, 1>(at, from, to, b + done, columns, out);
      case 32: return add_products<R, 2>(at, from, to, b + done, columns, out);
      case 48: return add_products<R, 3>(at, from, to, b + done, columns, out);
      default: add_products<R, 4>(at, from, to, b + done, columns, out);
    }
  }
}

// 16 stored elements.
template <KvType T>
inline Lanes from_stored(const uint8_t* p) {
  if constexpr (T == KvType::float32) return load(reinterpret_cast<const float*>(p));
  else if constexpr (T == KvType::float16) return from_half(p);
  else if constexpr (T == KvType::bfloat16) return from_bfloat(p);
  else if constexpr (T == KvType::int8) return from_int8(p);
  else {
    float values[kLanes];
    for (int i = 0; i < kLanes; ++i) values[i] = e4m3_to_float(p[i]);
    return load(values);
  }
}

// The rows of the keys of `count` positions from `first` on.
inline void find_rows(const KvCache& cache, int64_t head, const int32_t* pages, int64_t first, int64_t count, int64_t* rows) {
  int64_t page = first / cache.page_size, place = first % cache.page_size;
  for (int64_t i = 0; i < count; ++i) {
    rows[i] = cache.row(pages[page], place, head);
    if (++place == cache.page_size) place = 0, ++page;
  }
}

// Prefetches what the tile at `start` will read: rows of a page are too far apart for hardware prefetchers.
inline void ask_for_tile(const KvCache& cache, int64_t head, const int32_t* pages, int64_t start, int64_t high) {
  const int64_t count = high - start < kTile ? high - start : kTile, bytes = cache.head_dim * cache.item_bytes();
  int64_t rows[kTile];
  if (count > 0) find_rows(cache, head, pages, start, count, rows);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t at = 0; at < 2 * bytes; at += 64) __builtin_prefetch(cache.pages + rows[i] * bytes + at);
}

// Keys of positions low .. high - 1 of the tile at `start`, transposed [head_dim][64], and values [64][head_dim].
template <KvType T>
inline void load_tile(const KvCache& cache, int64_t head, const int32_t* pages, int64_t start, int64_t low, int64_t high,
                      float* keys, float* values) {
  const int64_t width = cache.head_dim, bytes = width * cache.item_bytes();
  int64_t rows[kTile];
  find_rows(cache, head, pages, start + low, high - low, rows + low);
  for (int64_t group = low / kLanes * kLanes; group < high; group += kLanes) {
    const uint8_t* at[kLanes];
    float scales[2][kLanes];
    for (int i = 0; i < kLanes; ++i) {  // places outside repeat the nearest inside: they are read, but never used
      const int64_t row = rows[group + i < low ? low : group + i < high ? group + i : high - 1];
      at[i] = cache.pages + row * bytes;
      if (T == KvType::int8) scales[0][i] = cache.scales[row], scales[1][i] = cache.scales[row + 1];
    }
    for (int64_t d = 0; d < width; d += kLanes) {
      Lanes square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        square[i] = from_stored<T>(at[i] + d * cache.item_bytes());
        if (T == KvType::int8) square[i] = mul(square[i], all(scales[0][i]));
      }
      transpose(square);
      for (int i = 0; i < kLanes; ++i) store(square[i], keys + (d + i) * kTile + group);
    }
    for (int i = 0; i < kLanes; ++i)
      for (int64_t d = 0; d < width; d += kLanes) {
        Lanes value = from_stored<T>(at[i] + bytes + d * cache.item_bytes());
        if (T == KvType::int8) value = mul(value, all(scales[1][i]));
        store(value, values + (group + i) * width + d);
      }
  }
}

// R rows over one tile.
template <int R>
inline void attend_rows(Attending* rows, int64_t start, const float* keys, const float* values, int64_t width) {
  alignas(64) float scores[R][kTile] = {};
  const float* queries[R];
  const float* weights[R];
  float *to[R], *out[R];
  int64_t from[R], until[R], all_from = 0, all_until = kTile;  // the part of the tile that each row sees, and the part that all see
  for (int r = 0; r < R; ++r) {
    queries[r] = rows[r].query;
    weights[r] = to[r] = scores[r];
    out[r] = rows[r].out;
    from[r] = rows[r].low > start ? rows[r].low - start : 0;
    until[r] = rows[r].high - start < kTile ? rows[r].high - start : kTile;
    all_from = from[r] > all_from ? from[r] : all_from;
    all_until = until[r] < all_until ? until[r] : all_until;
  }
  add_products<R, kTile / kLanes>(queries, 0, width, keys, kTile, to);
  for (int r = 0; r < R; ++r) {
    Attending& row = rows[r];
    const int64_t low = row.low - start, high = row.high - start;
    Lanes s[kTile / kLanes];
    for (int n = 0; n < kTile / kLanes; ++n) s[n] = within(low - kLanes * n, high - kLanes * n, load(scores[r] + kLanes * n), kMasked);
    const float top = max_of(max(max(s[0], s[1]), max(s[2], s[3])));
    const float best = row.best > top ? row.best : top;
    float keep[kLanes];
    store(exp_of(all(row.best - best)), keep);
    for (int n = 0; n < kTile / kLanes; ++n) {
      s[n] = within(low - kLanes * n, high - kLanes * n, exp_of(sub(s[n], all(best))), 0);
      store(s[n], scores[r] + kLanes * n);
    }
    row.total = __builtin_fmaf(row.total, keep[0], sum_of(add(add(s[0], s[1]), add(s[2], s[3]))));
    row.best = best;
    for (int64_t d = 0; d < width; d += kLanes) store(mul(load(row.out + d), all(keep[0])), row.out + d);
  }
  // A value that a row does not see is not multiplied, not even by zero, because it may be NaN.
  if (all_from > all_until) all_until = all_from;
  for (int r = 0; r < R; ++r) add_all_products<1>(weights + r, from[r], all_from < until[r] ? all_from : until[r], values, width, out + r);
  add_all_products<R>(weights, all_from, all_until, values, width, out);
  for (int r = 0; r < R; ++r) add_all_products<1>(weights + r, from[r] > all_until ? from[r] : all_until, until[r], values, width, out + r);
}

template <KvType T>
inline void attend_to(const KvCache& cache, int64_t head, const int32_t* pages, Attending* rows, int64_t count, int64_t first,
                      int64_t last) {
  const int64_t width = cache.head_dim;
  auto* keys = static_cast<float*>(scratch(kKeys, size_t(2 * width * kTile) * sizeof(float)));
  float* values = keys + width * kTile;
  int64_t low = last, high = first;
  for (int64_t r = 0; r < count; ++r) {
    rows[r].best = kMasked, rows[r].total = 0;
    std::memset(rows[r].out, 0, size_t(width) * sizeof(float));
    if (rows[r].low >= rows[r].high) continue;
    low = rows[r].low < low ? rows[r].low : low;
    high = rows[r].high > high ? rows[r].high : high;
  }
  low = low < first ? first : low;
  high = high > last ? last : high;
  for (int64_t start = low / kTile * kTile; start < high; start += kTile) {
    load_tile<T>(cache, head, pages, start, low > start ? low - start : 0, high - start < kTile ? high - start : kTile, keys, values);
    ask_for_tile(cache, head, pages, start + kTile, high);
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) attend_rows<4>(rows + r, start, keys, values, width);
    if (count - r == 3) attend_rows<3>(rows + r, start, keys, values, width);
    if (count - r == 2) attend_rows<2>(rows + r, start, keys, values, width);
    if (count - r == 1) attend_rows<1>(rows + r, start, keys, values, width);
  }
}

inline void attend(const KvCache& cache, int64_t head, const int32_t* pages, Attending* rows, int64_t count, int64_t first,
                   int64_t last) {
  switch (cache.type) {
    case KvType::float32: return attend_to<KvType::float32>(cache, head, pages, rows, count, first, last);
    case KvType::float16: return attend_to<KvType::float16>(cache, head, pages, rows, count, first, last);
    case KvType::bfloat16: return attend_to<KvType::bfloat16>(cache, head, pages, rows, count, first, last);
    case KvType::int8: return attend_to<KvType::int8>(cache, head, pages, rows, count, first, last);
    case KvType::float8_e4m3fn: return attend_to<KvType::float8_e4m3fn>(cache, head, pages, rows, count, first, last);
  }
}

inline void merge(const Attending& later, int64_t width, Attending& row) {
  const float best = row.best > later.best ? row.best : later.best;
  float keep[kLanes], take[kLanes];
  store(exp_of(all(row.best - best)), keep);
  store(exp_of(all(later.best - best)), take);
  row.best = best;
  row.total = __builtin_fmaf(row.total, keep[0], later.total * take[0]);
  for (int64_t d = 0; d < width; d += kLanes)
    store(fma(load(row.out + d), all(keep[0]), mul(load(later.out + d), all(take[0]))), row.out + d);
}

inline void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
  Lanes squares = all(0);
  for (int64_t i = 0; i < n; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
  const Lanes scale = all(1.0f / __builtin_sqrtf(sum_of(squares) / float(n) + eps));
  for (int64_t i = 0; i < n; i += kLanes) store(mul(mul(load(x + i), scale), load(weight + i)), out + i);
}

inline void rotate(float* x, const float* cosine, const float* sine, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[half + i];
    x[i] = __builtin_fmaf(first, cosine[i], -(second * sine[i]));
    x[half + i] = __builtin_fmaf(second, cosine[i], first * sine[i]);
  }
}

inline void softmax(float* x, int64_t n) {
  float top = x[0];
  for (int64_t i = 1; i < n; ++i) top = top > x[i] ? top : x[i];
  Lanes total = all(0);
  for (int64_t i = 0; i < n; i += kLanes) {
    const Lanes odds = exp_of(sub(load(x + i), all(top)));
    store(odds, x + i);
    total = add(total, odds);
  }
  const float sum = sum_of(total);
  for (int64_t i = 0; i < n; ++i) x[i] /= sum;
}

inline void store_kv(KvType type, const float* x, int64_t n, uint8_t* to, float* scale) {
  if (type == KvType::float32) {
    std::memcpy(to, x, size_t(n) * sizeof(float));
  } else if (type == KvType::float16) {
    for (int64_t i = 0; i < n; i += kLanes) to_half(load(x + i), to + 2 * i);
  } else if (type == KvType::bfloat16) {
    for (int64_t i = 0; i < n; ++i) {
      const uint16_t bits = float_to_bfloat(x[i]);
      std::memcpy(to + 2 * i, &bits, 2);
    }
  } else if (type == KvType::float8_e4m3fn) {
    for (int64_t i = 0; i < n; ++i) to[i] = float_to_e4m3(x[i]);
  } else {
    uint32_t top = 0;
    for (int64_t i = 0; i < n; ++i) top = (bits_of(x[i]) & 0x7fffffff) > top ? bits_of(x[i]) & 0x7fffffff : top;
    *scale = float_of(top) / 127.0f;  // NaN or infinity for a row that is not finite, which is read back as such
    const float step = *scale == 0 ? 1.0f : *scale;
    for (int64_t i = 0; i < n; ++i) to[i] = top < 0x7f800000 ? uint8_t(int8_t(__builtin_rintf(x[i] / step))) : 0;
  }
}

inline Lanes negative(Lanes x) { return sub(all(-0.0f), x); }

inline Lanes gated(Lanes gate, Lanes up) { return mul(div(gate, add(exp_of(negative(gate)), all(1.0f))), up); }

// out = of(gate, up), element by element.
template <typename F>
inline void pairwise(const float* gate, const float* up, int64_t count, float* out, F&& of) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(of(load(gate + i), load(up + i)), out + i);
  if (i == count) return;
  float rest[3][kLanes] = {};
  std::memcpy(rest[0], gate + i, size_t(count - i) * sizeof(float));
  std::memcpy(rest[1], up + i, size_t(count - i) * sizeof(float));
  store(of(load(rest[0]), load(rest[1])), rest[2]);
  std::memcpy(out + i, rest[2], size_t(count - i) * sizeof(float));
}

inline void gated_product(const float* gate, const float* up, int64_t count, float* out) {
  pairwise(gate, up, count, out, gated);
}

inline void clamped_product(const float* gate, const float* up, int64_t count, float limit, float alpha, float* out) {
  const Lanes high = all(limit), low = all(-limit), one = all(1.0f), slope = all(-alpha);
  pairwise(gate, up, count, out, [&](Lanes g, Lanes u) {
    // A NaN comes second, where the instructions keep it.
    g = min(high, g), u = min(high, max(low, u));
    return mul(add(u, one), div(g, add(exp_of(mul(slope, g)), one)));
  });
}

inline void sigmoid_of(const float* x, int64_t count, float* out) {
  pairwise(x, x, count, out, [](Lanes x, Lanes) { return div(all(1.0f), add(exp_of(negative(x)), all(1.0f))); });
}

// max(x, 0) + log(1 + y), y = exp(-|x|): the logarithm is that of (1 + s) / (1 - s), s = y / (2 + y) <= 1/3, a series in s.
inline void softplus_of(const float* x, int64_t count, float* out) {
  pairwise(x, x, count, out, [](Lanes x, Lanes) {
    const Lanes y = exp_of(min(x, negative(x))), s = div(y, add(y, all(2.0f))), square = mul(s, s);
    Lanes series = all(1.0f / 17);
    for (int i = 15; i > 0; i -= 2) series = fma(series, square, all(1.0f / float(i)));
    return fma(add(s, s), series, max(all(0), x));
  });
}

inline void add_scaled_row(float weight, const float* x, int64_t count, float* sum) {
  for (int64_t i = 0; i < count; ++i) sum[i] = __builtin_fmaf(weight, x[i], sum[i]);
}

}  // namespace
}  // namespace ferrum

// The functions of an Isa from `attend` on.
#define FERRUM_BESIDE \
  attend, merge, rms_norm, rotate, softmax, store_kv, gated_product, clamped_product, \
  sigmoid_of, softplus_of, add_scaled_row, delta_head
