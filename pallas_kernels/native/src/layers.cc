// All layers of a decoder in one call: everything between the products happens in this file, and the helper threads are woken once.
//
// A layer is: norm, queries, keys and values; normalizing and rotating heads, writing the cache; attention; adding its output
// to x; norm, feed-forward, adding it to x. Each of these is a loop over the threads. Attention sums over ranges of positions
// of a fixed size in order (each a separate task if there are few rows), so a row's bits depend on its sequence alone.
#include <cstring>

#include "products.h"

namespace ferrum {
namespace {

constexpr int64_t kRange = 256;     // positions of a range
constexpr int64_t kQueryRows = 64;  // rows of queries that share the tiles of a head

void add(const float* __restrict x, int64_t count, float* __restrict sum) {
  for (int64_t i = 0; i < count; ++i) sum[i] += x[i];
}

// A layer in a step.
class Step {
 public:
  Step(Pool& pool, const LayerShape& shape, const Batch& batch, const Layer& layer, float* x)
      : pool_(pool), isa_(current_isa()), shape_(shape), batch_(batch), layer_(layer), cache_(layer.cache), x_(x), m_(batch.tokens),
        width_(cache_.head_dim), heads_(layer.query.n / width_) {
    const int64_t kv_heads = cache_.kv_heads;
    group_ = heads_ / kv_heads;
    queries_ = heads_ * width_;
    keys_ = kv_heads * width_;
    tile_tokens_ = kQueryRows / group_ > 0 ? kQueryRows / group_ : 1;
    int64_t longest = 1;
    for (int64_t s = 0; s < batch.sequences; ++s) {
      tiles_ += ceil_div(count_of(s), tile_tokens_);
      longest = batch.kv_lengths[s] > longest ? batch.kv_lengths[s] : longest;
    }
    // Separate ranges if there would be too few tasks otherwise.
    ranges_ = ceil_div(longest, kRange);
    if (tiles_ * kv_heads >= 8 * pool.threads() || m_ > kQueryRows) ranges_ = 1;
    int64_t floats = m_ * (2 * queries_ + 2 * keys_ + shape.hidden) + width_ + (ranges_ > 1 ? m_ * heads_ * ranges_ * (width_ + 2) : 0);
    floats += floats % 2;
    q_ = static_cast<float*>(scratch(kLayer, size_t(floats) * sizeof(float) + size_t(3 * tiles_) * sizeof(int64_t)));
    k_ = q_ + m_ * queries_;
    v_ = k_ + m_ * keys_;
    y_ = v_ + m_ * keys_;
    normed_ = y_ + m_ * queries_;
    zeros_ = normed_ + m_ * shape.hidden;
    std::memset(zeros_, 0, size_t(width_) * sizeof(float));
    parts_ = zeros_ + width_;
    tile_ = reinterpret_cast<int64_t*>(q_ + floats);
    for (int64_t s = 0, i = 0; s < batch.sequences; ++s)
      for (int64_t first = 0; first < count_of(s); first += tile_tokens_, ++i) {
        tile_[3 * i] = s;
        tile_[3 * i + 1] = batch.query_starts[s] + first;
        tile_[3 * i + 2] = first + tile_tokens_ < count_of(s) ? tile_tokens_ : count_of(s) - first;
      }
  }

  void run() {
    project();
    for_rows([&](int64_t t) { append(t); });
    attention();
    add_product(layer_.output, layer_.output_bias, y_, queries_);
    layer_.experts ? mixture() : feed_forward();
  }

 private:
  int64_t count_of(int64_t s) const { return batch_.query_starts[s + 1] - batch_.query_starts[s]; }

  template <typename F>
  void for_rows(F&& run) {
    const int64_t some = m_ > 4 * kPanel ? kPanel : 4;
    maybe_parallel(m_ > 4 && pool_.threads() > 1, pool_, ceil_div(m_, some), [&](int64_t i) {
      for (int64_t t = i * some; t < (i + 1) * some && t < m_; ++t) run(t);
    });
  }

  // x normalized, in the forms of the matrices.
  Operand normed(const float* weight, const Matrix* matrices, int count, Arithmetic arithmetic, bool alone) {
    const Activations form = forms(isa_, arithmetic, shape_.hidden, matrices, count);
    return prepare(pool_, isa_, form, m_, arithmetic == Arithmetic::int8x2, alone, [&](int64_t t) {
      auto* row = static_cast<float*>(scratch(kNormed, size_t(shape_.hidden) * sizeof(float)));
      isa_.rms_norm(x_ + t * shape_.hidden, weight, shape_.hidden, shape_.eps, row);
      return row;
    });
  }

  bool alone(const Matrix* matrices, int count) const { return pool_.threads() < 2 || serial(matrices, count, m_); }

  void project() {
    const Matrix matrices[] = {layer_.query, layer_.key, layer_.value};
    const float* biases[] = {layer_.query_bias, layer_.key_bias, layer_.value_bias};
    float* const to[] = {q_, k_, v_};
    const bool one = alone(matrices, 3);
    const Operand x = normed(layer_.attention_norm, matrices, 3, Arithmetic::int8x2, one);
    products(pool_, isa_, Arithmetic::int8x2, x, m_, matrices, 3, one, [&](int i, int64_t first, int64_t width, const float* part) {
      for (int64_t t = 0; t < m_; ++t) {
        float* out = to[i] + t * matrices[i].n + first;
        std::memcpy(out, part + t * width, size_t(width) * sizeof(float));
        if (biases[i]) add(biases[i] + first, width, out);
      }
    });
  }

  // Normalizes and rotates the heads of token t and writes its keys and values to the cache; queries are multiplied by the
  // scale of the scores.
  void append(int64_t t) {
    const Rope& rope = layer_.rope;
    const auto turn = [&](float* head, const float* norm) {
      if (norm) isa_.rms_norm(head, norm, width_, shape_.eps, head);
      isa_.rotate(head, rope.cosine + t * rope.half, rope.sine + t * rope.half, rope.half);
    };
    float *q = q_ + t * queries_, *k = k_ + t * keys_, *v = v_ + t * keys_;
    for (int64_t h = 0; h < heads_; ++h) turn(q + h * width_, layer_.query_norm);
    for (int64_t i = 0; i < queries_; ++i) q[i] *= shape_.scale;
    for (int64_t h = 0; h < cache_.kv_heads; ++h) turn(k + h * width_, layer_.key_norm);
    const int64_t slot = cache_.kv_slots[t], bytes = width_ * cache_.item_bytes();
    if (slot < 0 || slot >= cache_.num_pages * cache_.page_size) return;
    for (int64_t h = 0; h < cache_.kv_heads; ++h)
      for (int of = 0; of < 2; ++of) {
        const int64_t row = (slot * cache_.kv_heads + h) * 2 + of;
        isa_.store_kv(cache_.type, (of ? v : k) + h * width_, width_, cache_.pages + row * bytes,
                      cache_.scales ? cache_.scales + row : nullptr);
      }
  }

  void attention() {
    std::memset(y_, 0, size_t(m_ * queries_) * sizeof(float));
    const int64_t kv_heads = cache_.kv_heads, tasks = tiles_ * kv_heads * ranges_;
    maybe_parallel(pool_.threads() > 1, pool_, tasks, [&](int64_t task) {
      const int64_t* tile = tile_ + 3 * (task / ranges_ / kv_heads);
      attend(tile[0], tile[1], tile[2], task / ranges_ % kv_heads, ranges_ > 1 ? task % ranges_ : -1);
    });
    if (ranges_ > 1) for_rows([&](int64_t t) { gather(t); });
  }

  // Tokens first .. first + count - 1 of sequence s, one head of the cache, one range of positions or (-1) all of them.
  void attend(int64_t s, int64_t first, int64_t count, int64_t head, int64_t range) {
    const int64_t rows = count * group_, window = layer_.window;
    auto* memory = static_cast<uint8_t*>(scratch(kHidden, size_t(rows) * (2 * sizeof(Attending) + size_t(width_) * sizeof(float))));
    auto *all = reinterpret_cast<Attending*>(memory), *some = all + rows;
    auto* room = reinterpret_cast<float*>(some + rows);
    const int32_t* pages = cache_.page_table + s * cache_.max_pages;
    int64_t from = batch_.kv_lengths[s], until = 0;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t t = first + i / group_, h = head * group_ + i % group_, p = batch_.positions[t];
      const int64_t low = window && p + 1 > window ? p + 1 - window : 0;
      const int64_t high = p + 1 < batch_.kv_lengths[s] ? p + 1 : batch_.kv_lengths[s];
      float* out = range < 0 ? y_ + t * queries_ + h * width_ : part(t, h, range);
      some[i] = all[i] = {q_ + t * queries_ + h * width_, out, low, high, 0, 0};
      from = low < from ? low : from;
      until = high > until ? high : until;
    }
    if (range >= 0) {
      isa_.attend(cache_, head, pages, all, rows, range * kRange, (range + 1) * kRange);
      for (int64_t i = 0; i < rows; ++i) all[i].out[width_] = all[i].best, all[i].out[width_ + 1] = all[i].total;
      return;
    }
    const int64_t start = from / kRange;
    isa_.attend(cache_, head, pages, all, rows, start * kRange, (start + 1) * kRange);
    for (int64_t r = start + 1; r * kRange < until; ++r) {
      for (int64_t i = 0; i < rows; ++i) some[i].out = room + i * width_;
      isa_.attend(cache_, head, pages, some, rows, r * kRange, (r + 1) * kRange);
      for (int64_t i = 0; i < rows; ++i) isa_.merge(some[i], width_, all[i]);
    }
    for (int64_t i = 0; i < rows; ++i) finish(all[i], head * group_ + i % group_);
  }

  float* part(int64_t t, int64_t h, int64_t range) const { return parts_ + ((t * heads_ + h) * ranges_ + range) * (width_ + 2); }

  // Merges the ranges of a token's heads, in order.
  void gather(int64_t t) {
    for (int64_t h = 0; h < heads_; ++h) {
      Attending row = {nullptr, y_ + t * queries_ + h * width_, 0, 0, 0, 0};
      for (int64_t r = 0; r < ranges_; ++r) {
        float* out = part(t, h, r);
        const Attending later = {nullptr, out, 0, 0, out[width_], out[width_ + 1]};
        if (r > 0) {
          isa_.merge(later, width_, row);
        } else {
          row.best = later.best, row.total = later.total;
          std::memcpy(row.out, out, size_t(width_) * sizeof(float));
        }
      }
      finish(row, h);
    }
  }

  // The sink of head h is one more position, whose value is zero; then the sums are the result.
  void finish(Attending& row, int64_t h) const {
    if (layer_.sinks) isa_.merge({nullptr, zeros_, 0, 0, layer_.sinks[h], 1}, width_, row);
    if (row.total == 0) return;
    for (int64_t d = 0; d < width_; ++d) row.out[d] /= row.total;
  }

  // x += in times the transposed matrix, plus its bias.
  void add_product(const Matrix& matrix, const float* bias, const float* in, int64_t k) {
    const bool one = alone(&matrix, 1);
    const Activations form = forms(isa_, Arithmetic::int8, k, &matrix, 1);
    const Operand rows = prepare(pool_, isa_, form, m_, false, one, [&](int64_t t) { return in + t * k; });
    products(pool_, isa_, Arithmetic::int8, rows, m_, &matrix, 1, one, [&](int, int64_t first, int64_t width, const float* part) {
      for (int64_t t = 0; t < m_; ++t) {
        float* out = x_ + t * shape_.hidden + first;
        add(part + t * width, width, out);
        if (bias) add(bias + first, width, out);
      }
    });
  }

  void feed_forward() {
    const Matrix both[] = {layer_.gate, layer_.up};
    const bool one = alone(both, 2);
    auto* hidden = static_cast<float*>(scratch(kHidden, size_t(m_ * layer_.gate.n) * sizeof(float)));
    const Operand x = normed(layer_.feed_forward_norm, both, 2, Arithmetic::int8, one);
    gated(pool_, isa_, Arithmetic::int8, x, layer_.gate, layer_.up, one, hidden);
    add_product(layer_.down, layer_.down_bias, hidden, layer_.gate.n);
  }

  void mixture() {
    const Layer& layer = layer_;
    const int64_t experts = layer.experts, padded = ceil_div(experts, kPanel) * kPanel, top_k = shape_.top_k;
    auto* logits = static_cast<float*>(scratch(kRouting, size_t(m_) * size_t(padded + 2 * top_k) * sizeof(float)));
    float* weights = layer.weights ? layer.weights : logits + m_ * padded;
    int32_t* ids = layer.ids ? layer.ids : reinterpret_cast<int32_t*>(logits + m_ * (padded + top_k));
    for_rows([&](int64_t t) { isa_.rms_norm(x_ + t * shape_.hidden, layer.feed_forward_norm, shape_.hidden, shape_.eps, normed_ + t * shape_.hidden); });
    const bool one = alone(&layer.router, 1);
    const Activations form = forms(isa_, Arithmetic::float32, shape_.hidden, &layer.router, 1);
    const Operand rows = prepare(pool_, isa_, form, m_, false, one, [&](int64_t t) { return normed_ + t * shape_.hidden; });
    products(pool_, isa_, Arithmetic::float32, rows, m_, &layer.router, 1, one, [&](int, int64_t first, int64_t width, const float* part) {
      for (int64_t t = 0; t < m_; ++t) {
        std::memcpy(logits + t * padded + first, part + t * width, size_t(width) * sizeof(float));
        if (layer.router_bias) add(layer.router_bias + first, width, logits + t * padded + first);
      }
    });
    for_rows([&](int64_t t) { route(logits + t * padded, experts, padded, cache_.kv_slots[t] >= 0, ids + t * top_k, weights + t * top_k); });
    float* sum = y_;  // free after attention; hidden may be wider than all queries
    if (shape_.hidden > queries_) sum = static_cast<float*>(scratch(kMixed, size_t(m_ * shape_.hidden) * sizeof(float)));
    ferrum::experts(pool_, Arithmetic::int8, normed_, m_, shape_.hidden, ids, weights, top_k, experts, layer.gate, layer.up, layer.down, layer.more, sum);
    for_rows([&](int64_t t) { add(sum + t * shape_.hidden, shape_.hidden, x_ + t * shape_.hidden); });
  }

  // The top_k of the softmax, ties to the smaller id; no expert if the row is padding.
  void route(float* odds, int64_t experts, int64_t padded, bool live, int32_t* ids, float* weights) const {
    for (int64_t e = experts; e < padded; ++e) odds[e] = -1e30f;
    isa_.softmax(odds, padded);
    float total = 0;
    for (int64_t i = 0; i < shape_.top_k; ++i) {
      int64_t best = 0;
      while (odds[best] < 0) ++best;
      for (int64_t e = best + 1; e < experts; ++e)
        if (odds[e] > odds[best]) best = e;
      ids[i] = live ? int32_t(best) : int32_t(experts);
      weights[i] = odds[best];
      total += odds[best];
      odds[best] = -1;
    }
    for (int64_t i = 0; i < shape_.top_k; ++i) {
      if (shape_.normalize) weights[i] = total > 0 || total != total ? weights[i] / total : 1.0f / float(shape_.top_k);
      weights[i] *= shape_.expert_scale;
    }
  }

  Pool& pool_;
  const Isa& isa_;
  const LayerShape& shape_;
  const Batch& batch_;
  const Layer& layer_;
  const KvCache& cache_;
  float* x_;
  int64_t m_, width_, heads_, group_ = 1, queries_ = 0, keys_ = 0, tile_tokens_ = 1, tiles_ = 0, ranges_ = 1;
  float *q_, *k_, *v_, *y_, *normed_, *zeros_, *parts_;
  int64_t* tile_;
};

}  // namespace

void decoder_layers(Pool& pool, const LayerShape& shape, const Batch& batch, const Layer* layers, int64_t count, float* x) {
  if (batch.tokens == 0) return;
  for (int64_t i = 0; i < count; ++i) Step(pool, shape, batch, layers[i], x).run();
}

}  // namespace ferrum
