// The gated delta net: heads of sequences are distributed to the threads, then the tails are stored.
#include <cstring>

#include "kernels.h"
#include "products.h"

namespace ferrum {

void delta_net(Pool& pool, const DeltaNet& net, const float* qkv, const float* log_decay, const float* beta, const float* taps,
               const DeltaRows& rows, float* tails, float* memories, float* out) {
  const Isa& isa = current_isa();
  const int64_t size = net.key_dim * net.value_dim, per_place = net.heads * size, kept = (net.taps - 1) * net.channels;
  const auto first = [&](int64_t s) { return int64_t(rows.starts[s]); };
  const auto tail = [&](int64_t s) { return rows.begins[s] ? nullptr : tails + rows.reads[s] * kept; };
  parallel(pool, rows.sequences * net.heads, [&](int64_t task) {
    const int64_t s = task / net.heads, h = task % net.heads, t = first(s), tokens = first(s + 1) - t;
    if (tokens == 0) return;
    const int64_t per_key = net.heads / net.keys, key = net.tiled ? h % net.keys : h / per_key;
    // In place if the state is written only to its own place, after the last token.
    bool alone = rows.writes[t + tokens - 1] == rows.reads[s];
    for (int64_t i = t; i + 1 < t + tokens; ++i) alone = alone && rows.writes[i] < 0;
    float* const before = memories + rows.reads[s] * per_place + h * size;
    float* memory = alone ? before : static_cast<float*>(scratch(kMemory, size_t(size) * sizeof(float)));
    if (rows.begins[s]) std::memset(memory, 0, size_t(size) * sizeof(float));
    else if (!alone) std::memcpy(memory, before, size_t(size) * sizeof(float));
    isa.delta_head({qkv + t * net.channels, tail(s), taps, log_decay + t * net.heads + h, beta + t * net.heads + h,
                    rows.writes + t, memory, memories + h * size, out + (t * net.heads + h) * net.value_dim, net.channels,
                    net.taps, tokens, net.heads, key * net.key_dim, (net.keys + key) * net.key_dim,
                    2 * net.keys * net.key_dim + h * net.value_dim, net.key_dim, net.value_dim, per_place});
  });
  // The newest K - 1 rows after each token that is kept; those before the step from a copy, as their place may be written.
  maybe_parallel(rows.sequences > 8, pool, rows.sequences, [&](int64_t s) {
    const int64_t t = first(s), tokens = first(s + 1) - t, width = net.channels;
    if (tokens == 0) return;
    auto* old = static_cast<float*>(scratch(kMemory, size_t(kept) * sizeof(float)));
    if (const float* from = tail(s)) std::memcpy(old, from, size_t(kept) * sizeof(float));
    else std::memset(old, 0, size_t(kept) * sizeof(float));
    for (int64_t i = 0; i < tokens; ++i) {
      if (rows.writes[t + i] < 0) continue;
      float* to = tails + rows.writes[t + i] * kept;
      for (int64_t j = 0; j < net.taps - 1; ++j) {
        const int64_t from = i - net.taps + 2 + j;
        std::memcpy(to + j * width, from < 0 ? old + (from + net.taps - 1) * width : qkv + (t + from) * width, size_t(width) * sizeof(float));
      }
    }
  });
}

}  // namespace ferrum
