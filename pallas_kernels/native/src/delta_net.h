// One head of a gated delta net over the tokens of a sequence: the contract is that of pallas_kernels.delta_net.
//
// Columns of the memory are independent, so 64 of them at a time are read, corrected and read again while they are in the
// nearest cache; sums run over the rows in order. The result of a token depends only on it and the tokens before it.
#pragma once

#include "lanes.h"

namespace ferrum {
namespace {

// Channels first .. first + count - 1 of token t after the convolution and silu; count is a multiple of 16. taps: of these
// channels, those of the next row `stride` later.
inline void convolved(const DeltaHead& head, int64_t t, int64_t first, int64_t count, const float* taps, int64_t stride, float* out) {
  for (int64_t c = 0; c < count; ++c) out[c] = 0;
  for (int64_t i = 0; i < head.taps_count; ++i) {
    const int64_t before = head.taps_count - 1, from = t - before + i;
    if (from < 0 && !head.tail) continue;
    const float* x = (from < 0 ? head.tail + (from + before) * head.channels : head.qkv + from * head.channels) + first;
    for (int64_t c = 0; c < count; c += kLanes) store(fma(load(taps + i * stride + c), load(x + c), load(out + c)), out + c);
  }
  for (int64_t c = 0; c < count; c += kLanes) {
    const Lanes x = load(out + c);
    store(div(x, add(exp_of(sub(all(-0.0f), x)), all(1.0f))), out + c);
  }
}

// x divided by its norm, times `factor`.
inline void normed(float* x, int64_t n, float factor) {
  Lanes squares = all(0);
  for (int64_t i = 0; i < n; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
  const Lanes scale = all(factor / __builtin_sqrtf(sum_of(squares) + 1e-6f));
  for (int64_t i = 0; i < n; i += kLanes) store(mul(load(x + i), scale), x + i);
}

// N vectors of columns of the memory, `stride` apart by row, through one token.
template <int N>
inline void through_columns(float* memory, int64_t stride, int64_t rows, const float* q, const float* k, const float* v,
                            float decay, float beta, float* out) {
  Lanes sum[N], wrong[N];
  for (int n = 0; n < N; ++n) sum[n] = all(0);
  for (int64_t i = 0; i < rows; ++i) {
    const Lanes key = all(k[i]);
    for (int n = 0; n < N; ++n) sum[n] = fma(key, load(memory + i * stride + kLanes * n), sum[n]);
  }
  for (int n = 0; n < N; ++n) {
    wrong[n] = mul(all(beta), fma(all(-decay), sum[n], load(v + kLanes * n)));
    sum[n] = all(0);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const Lanes key = all(k[i]), query = all(q[i]);
    for (int n = 0; n < N; ++n) {
      float* at = memory + i * stride + kLanes * n;
      const Lanes value = fma(key, wrong[n], mul(all(decay), load(at)));
      store(value, at);
      sum[n] = fma(query, value, sum[n]);
    }
  }
  for (int n = 0; n < N; ++n) store(sum[n], out + kLanes * n);
}

inline void delta_head(const DeltaHead& head) {
  const int64_t rows = head.key_dim, columns = head.value_dim;
  const int64_t width = 2 * rows + columns, count = head.taps_count;
  auto* q = static_cast<float*>(scratch(kDelta, size_t((1 + count) * width) * sizeof(float)));
  float *k = q + rows, *v = k + rows, *taps = q + width;  // [count, width]
  const float factor = 1.0f / __builtin_sqrtf(float(rows));
  for (int64_t c = 0; c < width; ++c) {
    const int64_t channel = c < rows ? head.query + c : c < 2 * rows ? head.key + c - rows : head.value + c - 2 * rows;
    for (int64_t i = 0; i < count; ++i) taps[i * width + c] = head.taps[channel * count + i];
  }
  for (int64_t t = 0; t < head.tokens; ++t) {
    convolved(head, t, head.query, rows, taps, width, q);
    convolved(head, t, head.key, rows, taps + rows, width, k);
    convolved(head, t, head.value, columns, taps + 2 * rows, width, v);
    normed(q, rows, factor);
    normed(k, rows, 1.0f);
    float decay[kLanes];
    store(exp_of(all(head.log_decay[t * head.heads])), decay);
    const float beta = head.beta[t * head.heads];
    float* out = head.out + t * head.heads * columns;
    for (int64_t c = 0; c < columns; c += 4 * kLanes) {
      float* memory = head.memory + c;
      switch (columns - c) {
        case kLanes: through_columns<1>(memory, columns, rows, q, k, v + c, decay[0], beta, out + c); break;
        case 2 * kLanes: through_columns<2>(memory, columns, rows, q, k, v + c, decay[0], beta, out + c); break;
        case 3 * kLanes: through_columns<3>(memory, columns, rows, q, k, v + c, decay[0], beta, out + c); break;
        default: through_columns<4>(memory, columns, rows, q, k, v + c, decay[0], beta, out + c);
      }
    }
    if (const int32_t place = head.writes[t]; place >= 0 && head.kept + place * head.kept_stride != head.memory)
      std::memcpy(head.kept + place * head.kept_stride, head.memory, size_t(rows * columns) * sizeof(float));
  }
}

}  // namespace
}  // namespace ferrum
