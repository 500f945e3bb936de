// All layers of a decoder in one call: everything between the products happens in this file, and the helper threads are woken once.
//
// A layer is a mixer and a feed-forward, each added to x. Attention is: norm, queries, keys and values; normalizing and rotating
// heads, writing the cache; attention; a product. A gated delta net is: norm, what it is made of; its gates; the net; a product.
// Each of these is a loop over the threads. Attention sums over ranges of positions of a fixed size in order (each a separate
// task if there are few rows), so a row's bits depend on its sequence alone.
#include <cstring>

#include "products.h"

namespace ferrum {
namespace {

constexpr int64_t kRange = 256;     // positions of a range
constexpr int64_t kQueryRows = 64;  // rows of queries that share the tiles of a head
constexpr float kGone = -__builtin_inff();

void add(const float* __restrict x, int64_t count, float* __restrict sum) {
  for (int64_t i = 0; i < count; ++i) sum[i] += x[i];
}

// A part of a layer in a step.
class Part {
 public:
  Part(Pool& pool, const LayerShape& shape, const Batch& batch, const Layer& layer, float* x)
      : pool_(pool), isa_(current_isa()), shape_(shape), batch_(batch), layer_(layer), x_(x), m_(batch.tokens) {}

 protected:
  float* room(Slot slot, int64_t floats) const { return static_cast<float*>(scratch(slot, size_t(floats) * sizeof(float))); }

  template <typename F>
  void for_rows(F&& run) {
    const int64_t some = m_ > 4 * kPanel ? kPanel : 4;
    maybe_parallel(m_ > 4 && pool_.threads() > 1, pool_, ceil_div(m_, some), [&](int64_t i) {
      for (int64_t t = i * some; t < (i + 1) * some && t < m_; ++t) run(t);
    });
  }

  // Row t of x, normalized.
  const float* normed(const float* weight, int64_t t) const {
    float* row = room(kNormed, shape_.hidden);
    isa_.rms_norm(x_ + t * shape_.hidden, weight, shape_.hidden, shape_.eps, row);
    return row;
  }

  bool alone(const Matrix* matrices, int count) const { return pool_.threads() < 2 || serial(matrices, count, m_); }

  // Rows of k values in the forms of the matrices.
  template <typename Row>
  Operand operand(Arithmetic arithmetic, int64_t k, const Matrix* matrices, int count, bool alone, Row&& row) {
    return prepare(pool_, isa_, forms(isa_, arithmetic, k, matrices, count), m_, arithmetic == Arithmetic::int8x2, alone, row);
  }

  // x += (weights or 1) times (rows times the transposed matrix, plus its bias).
  template <typename Row>
  void add_product(const Matrix& matrix, const float* bias, const float* weights, Row&& row) {
    const bool one = alone(&matrix, 1);
    const Operand rows = operand(Arithmetic::int8, matrix.k, &matrix, 1, one, row);
    products(pool_, isa_, Arithmetic::int8, rows, m_, &matrix, 1, one, [&](int, int64_t first, int64_t width, const float* part) {
      for (int64_t t = 0; t < m_; ++t) {
        float* out = x_ + t * shape_.hidden + first;
        isa_.add_scaled(weights ? weights[t] : 1.0f, part + t * width, width, out);
        if (bias) add(bias + first, width, out);
      }
    });
  }

  Pool& pool_;
  const Isa& isa_;
  const LayerShape& shape_;
  const Batch& batch_;
  const Layer& layer_;
  float* x_;
  int64_t m_;
};

class Attention : Part {
 public:
  Attention(Pool& pool, const LayerShape& shape, const Batch& batch, const Layer& layer, float* x)
      : Part(pool, shape, batch, layer, x), cache_(layer.cache), width_(cache_.head_dim), step_(shape.gated ? 2 * width_ : width_),
        heads_(layer.query.n / step_) {
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
    int64_t floats = m_ * (heads_ * step_ + 2 * keys_ + queries_) + width_ + (ranges_ > 1 ? m_ * heads_ * ranges_ * (width_ + 2) : 0);
    floats += floats % 2;
    q_ = room(kLayer, floats + 6 * tiles_);
    k_ = q_ + m_ * heads_ * step_;
    v_ = k_ + m_ * keys_;
    y_ = v_ + m_ * keys_;
    zeros_ = y_ + m_ * queries_;
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
    add_product(layer_.output, layer_.output_bias, nullptr, [&](int64_t t) { return y_ + t * queries_; });
  }

 private:
  int64_t count_of(int64_t s) const { return batch_.query_starts[s + 1] - batch_.query_starts[s]; }

  void project() {
    const Matrix matrices[] = {layer_.query, layer_.key, layer_.value};
    const float* biases[] = {layer_.query_bias, layer_.key_bias, layer_.value_bias};
    float* const to[] = {q_, k_, v_};
    const bool one = alone(matrices, 3);
    const Operand x = operand(Arithmetic::int8x2, shape_.hidden, matrices, 3, one, [&](int64_t t) { return normed(layer_.attention_norm, t); });
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
    float *q = q_ + t * heads_ * step_, *k = k_ + t * keys_, *v = v_ + t * keys_;
    for (int64_t h = 0; h < heads_; ++h) {
      turn(q + h * step_, layer_.query_norm);
      for (int64_t i = 0; i < width_; ++i) q[h * step_ + i] *= shape_.scale;
    }
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
      some[i] = all[i] = {query(t, h), out, low, high, 0, 0};
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
    for (int64_t i = 0; i < rows; ++i) finish(all[i], first + i / group_, head * group_ + i % group_);
  }

  // The query of a head; its gate follows.
  float* query(int64_t t, int64_t h) const { return q_ + (t * heads_ + h) * step_; }
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
      finish(row, t, h);
    }
  }

  // The sink of head h is one more position, whose value is zero; then the sums are the result, which the gate multiplies.
  void finish(Attending& row, int64_t t, int64_t h) const {
    if (layer_.sinks) isa_.merge({nullptr, zeros_, 0, 0, layer_.sinks[h], 1}, width_, row);
    if (row.total == 0) return;
    for (int64_t d = 0; d < width_; ++d) row.out[d] /= row.total;
    if (!shape_.gated) return;
    float* gate = query(t, h) + width_;
    isa_.sigmoid(gate, width_, gate);
    for (int64_t d = 0; d < width_; ++d) row.out[d] *= gate[d];
  }

  const KvCache& cache_;
  int64_t width_, step_, heads_, group_ = 1, queries_ = 0, keys_ = 0, tile_tokens_ = 1, tiles_ = 0, ranges_ = 1;
  float *q_, *k_, *v_, *y_, *zeros_, *parts_;
  int64_t* tile_;
};

class Recurrent : Part {
 public:
  Recurrent(Pool& pool, const LayerShape& shape, const Batch& batch, const Layer& layer, float* x)
      : Part(pool, shape, batch, layer, x), own_(layer.recurrence), net_(own_.net), values_(net_.heads * net_.value_dim) {
    qkv_ = room(kLayer, m_ * (net_.channels + 2 * values_ + 4 * net_.heads));
    gate_ = qkv_ + m_ * net_.channels;
    y_ = gate_ + m_ * values_;
    beta_alpha_ = y_ + m_ * values_;
    beta_ = beta_alpha_ + m_ * 2 * net_.heads;
    log_decay_ = beta_ + m_ * net_.heads;
  }

  void run() {
    project();
    for_rows([&](int64_t t) { gates(t); });
    delta_net(pool_, net_, qkv_, log_decay_, beta_, own_.taps, own_.rows, own_.tails, own_.memories, y_);
    add_product(layer_.output, nullptr, nullptr, [&](int64_t t) { return gated(t); });
  }

 private:
  void project() {
    const Matrix matrices[] = {own_.qkv, own_.gate, own_.beta, own_.alpha};
    float* const to[] = {qkv_, gate_, beta_alpha_, beta_alpha_ + net_.heads};
    const int64_t strides[] = {net_.channels, values_, 2 * net_.heads, 2 * net_.heads};
    const int count = own_.alpha.blocks ? 4 : 3;
    const bool one = alone(matrices, count);
    const Operand x = operand(Arithmetic::int8x2, shape_.hidden, matrices, count, one, [&](int64_t t) { return normed(layer_.attention_norm, t); });
    products(pool_, isa_, Arithmetic::int8, x, m_, matrices, count, one, [&](int i, int64_t first, int64_t width, const float* part) {
      for (int64_t t = 0; t < m_; ++t) std::memcpy(to[i] + t * strides[i] + first, part + t * width, size_t(width) * sizeof(float));
    }, 2);
  }

  void gates(int64_t t) {
    const int64_t heads = net_.heads, group = heads / net_.keys;
    const float* from = beta_alpha_ + t * 2 * heads;
    float *beta = beta_ + t * heads, *log_decay = log_decay_ + t * heads;
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t at = own_.alpha.blocks ? h : h / group * group + h;  // in groups of betas and of alphas if both are in one matrix
      beta[h] = from[at];
      log_decay[h] = from[at + (own_.alpha.blocks ? heads : group)] + own_.time_bias[h];
    }
    isa_.sigmoid(beta, heads, beta);
    isa_.softplus(log_decay, heads, log_decay);
    for (int64_t h = 0; h < heads; ++h) log_decay[h] *= own_.decay[h];
  }

  const float* gated(int64_t t) {
    float *row = y_ + t * values_, *gate = gate_ + t * values_;
    for (int64_t i = 0; i < values_; i += net_.value_dim) isa_.rms_norm(row + i, own_.norm, net_.value_dim, shape_.eps, row + i);
    isa_.gated(gate, row, values_, row);
    return row;
  }

  const Recurrence& own_;
  const DeltaNet& net_;
  int64_t values_;
  float *qkv_, *gate_, *y_, *beta_alpha_, *beta_, *log_decay_;
};

class FeedForward : Part {
 public:
  using Part::Part;

  void run() {
    if (layer_.experts) return mixture();
    swiglu(layer_.gate, layer_.up, layer_.down, layer_.down_bias, nullptr, [&](int64_t t) { return normed(layer_.feed_forward_norm, t); });
  }

 private:
  // x += (weights or 1) times (down(silu(gate) * up) of rows, plus the bias).
  template <typename Row>
  void swiglu(const Matrix& gate, const Matrix& up, const Matrix& down, const float* bias, const float* weights, Row&& row) {
    const Matrix both[] = {gate, up};
    const bool one = alone(both, 2);
    float* hidden = room(kHidden, m_ * gate.n);
    const Operand rows = operand(Arithmetic::int8, shape_.hidden, both, 2, one, row);
    gated(pool_, isa_, Arithmetic::int8, rows, gate, up, one, hidden);
    add_product(down, bias, weights, [&](int64_t t) { return hidden + t * gate.n; });
  }

  void mixture() {
    const Layer& layer = layer_;
    const int64_t hidden = shape_.hidden, experts = layer.experts, padded = ceil_div(experts, kPanel) * kPanel, top_k = shape_.router.top_k;
    float *rows = room(kLayer, 2 * m_ * hidden), *sum = rows + m_ * hidden;
    float *logits = room(kRouting, m_ * (2 * padded + 2 * top_k + 1)), *choices = logits + m_ * padded;
    float* shared = choices + m_ * (padded + 2 * top_k);
    float* weights = layer.weights ? layer.weights : choices + m_ * padded;
    int32_t* ids = layer.ids ? layer.ids : reinterpret_cast<int32_t*>(choices + m_ * (padded + top_k));
    const auto row = [&](int64_t t) { return rows + t * hidden; };
    for_rows([&](int64_t t) { isa_.rms_norm(x_ + t * hidden, layer.feed_forward_norm, hidden, shape_.eps, row(t)); });
    const Matrix both[] = {layer.router, layer.shared_router};
    const int count = layer.shared_router.blocks ? 2 : 1;
    const bool one = alone(both, count);
    const Operand x = operand(Arithmetic::float32, hidden, both, count, one, row);
    products(pool_, isa_, Arithmetic::float32, x, m_, both, count, one, [&](int i, int64_t first, int64_t width, const float* part) {
      for (int64_t t = 0; t < m_; ++t) {
        std::memcpy(i ? shared + t : logits + t * padded + first, part + t * width, size_t(width) * sizeof(float));
        if (!i && layer.router_bias) add(layer.router_bias + first, width, logits + t * padded + first);
      }
    });
    for_rows([&](int64_t t) { route(logits + t * padded, choices + t * padded, padded, batch_.slots[t] >= 0, ids + t * top_k, weights + t * top_k); });
    ferrum::experts(pool_, Arithmetic::int8, rows, m_, hidden, ids, weights, top_k, experts, layer.gate, layer.up, layer.down, layer.more, sum);
    for_rows([&](int64_t t) { add(sum + t * hidden, hidden, x_ + t * hidden); });
    if (!layer.shared_gate.blocks) return;
    if (count == 2) isa_.sigmoid(shared, m_, shared);
    swiglu(layer.shared_gate, layer.shared_up, layer.shared_down, nullptr, count == 2 ? shared : nullptr, row);
  }

  // The choice of pallas_kernels.routing, where ties go to the smaller id; no expert if the row is padding.
  void route(float* scores, float* choice, int64_t padded, bool live, int32_t* ids, float* weights) const {
    const Router& router = shape_.router;
    const int64_t experts = layer_.experts;
    for (int64_t e = experts; e < padded; ++e) scores[e] = -1e30f;
    if (router.sigmoid)
      isa_.sigmoid(scores, padded, scores);
    else
      isa_.softmax(scores, padded);
    std::memcpy(choice, scores, size_t(experts) * sizeof(float));
    if (layer_.selection_bias) add(layer_.selection_bias, experts, choice);
    if (router.groups > 1) leave_groups(choice);
    float total = 0;
    for (int64_t i = 0; i < router.top_k; ++i) {
      const int64_t best = take_best(choice, experts);
      ids[i] = live ? int32_t(best) : int32_t(experts);
      weights[i] = scores[best];
      total += scores[best];
    }
    total += router.eps;
    for (int64_t i = 0; i < router.top_k; ++i) {
      if (router.normalize) weights[i] = total > 0 || total != total ? weights[i] / total : 1.0f / float(router.top_k);
      weights[i] *= router.scale;
    }
  }

  // The place of the largest number, which then is gone: -inf.
  static int64_t take_best(float* x, int64_t n) {
    int64_t best = 0;
    while (best + 1 < n && x[best] == kGone) ++best;
    for (int64_t i = best + 1; i < n; ++i)
      if (x[i] > x[best]) best = i;
    x[best] = kGone;
    return best;
  }

  // Takes the experts of all but the best groups out of the choice.
  void leave_groups(float* choice) const {
    const Router& router = shape_.router;
    const int64_t size = layer_.experts / router.groups;
    float *totals = room(kGroups, router.groups + size), *group = totals + router.groups;
    for (int64_t g = 0; g < router.groups; ++g) {
      std::memcpy(group, choice + g * size, size_t(size) * sizeof(float));
      totals[g] = 0;
      for (int64_t i = 0; i < router.group_best; ++i) totals[g] += choice[g * size + take_best(group, size)];
    }
    for (int64_t i = 0; i < router.groups_used; ++i) take_best(totals, router.groups);
    for (int64_t e = 0; e < layer_.experts; ++e)
      if (totals[e / size] != kGone) choice[e] = kGone;
  }
};

}  // namespace

void decoder_layers(Pool& pool, const LayerShape& shape, const Batch& batch, const Layer* layers, int64_t count, float* x) {
  if (batch.tokens == 0) return;
  for (int64_t i = 0; i < count; ++i) {
    if (layers[i].recurrence.qkv.blocks) Recurrent(pool, shape, batch, layers[i], x).run();
    else Attention(pool, shape, batch, layers[i], x).run();
    FeedForward(pool, shape, batch, layers[i], x).run();
  }
}

}  // namespace ferrum
