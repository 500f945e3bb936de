// XLA's view of the kernels: five handlers that check shapes, and XLA's thread pool as a Pool.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <string>
#include <string_view>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "xla.h"

namespace {

using ferrum::Array;
using ferrum::Call;
using ferrum::kF32;
using ferrum::kS32;
using ferrum::kRoles;
using ferrum::Matrix;
using ferrum::Role;

constexpr size_t kMaxMatrices = 16;

XLA_FFI_Error* wrong(const Call& call, const std::string& words) {
  return call.error(XLA_FFI_Error_Code_INVALID_ARGUMENT, "ferrum: " + words);
}

// The arguments of one call, with all checks; the first complaint is kept.
class Checker {
 public:
  explicit Checker(const Call& call) : call_(call) {}

  // An operand or result with this type and number of axes; anything else is a complaint.
  Array operand(size_t i, XLA_FFI_DataType type, size_t axes) { return fitting(call_.operand(i), type, axes); }
  Array result(size_t i, XLA_FFI_DataType type, size_t axes) { return fitting(call_.result(i), type, axes); }
  template <typename T>
  T attribute(const char* name) {
    T value{};
    require(call_.get(name, value), "an attribute is missing");
    return value;
  }

  bool require(bool holds, const char* words) {
    if (!holds && words_.empty()) words_ = words;
    return holds;
  }
  bool require(bool holds, const std::string& words) { return require(holds, words.c_str()); }
  bool failed() const { return !words_.empty(); }
  XLA_FFI_Error* error() const { return wrong(call_, words_); }

  // The member of an enum of tables.h that an attribute names.
  template <typename Enum, size_t n>
  Enum named(const char* attribute_name, const char* const (&names)[n]) {
    const auto name = attribute<std::string_view>(attribute_name);
    std::string known;
    for (size_t i = 0; i < n; ++i) {
      if (name == names[i]) return Enum(i);
      known += std::string(i ? ", " : "") + names[i];
    }
    require(false, std::string(attribute_name) + " must be one of " + known + ", not '" + std::string(name) + "'");
    return Enum(0);
  }
  ferrum::Arithmetic arithmetic() { return named<ferrum::Arithmetic>("arithmetic", ferrum::kArithmeticNames); }

  // Format number `which` of a comma-separated list.
  const ferrum::Format* format(std::string_view names, size_t which) {
    for (; which > 0; --which) {
      const size_t comma = names.find(',');
      if (!require(comma != std::string_view::npos, "there are fewer formats than matrices")) return nullptr;
      names.remove_prefix(comma + 1);
    }
    names = names.substr(0, names.find(','));
    const ferrum::Format* found = ferrum::find_format(names.data(), names.size());
    require(found != nullptr, "no kernels for the block format '" + std::string(names) + "'");
    return found;
  }

  // Entry `layer` of the stack `blocks` [..., experts, n, stored width] as its first matrix; experts 0: no such axis.
  Matrix matrix(const ferrum::Format* format, int64_t layer, Array blocks, int64_t k, int64_t experts) {
    Matrix result{format, nullptr, 0, k};
    const size_t axes = experts ? 3 : 2;
    if (!format || !require(blocks.axes() >= axes, "blocks have too few axes")) return result;
    const int64_t n = blocks.from_end(2), width = blocks.from_end(1) * blocks.item_bytes();
    if (!require(k % format->block_weights == 0 && width == format->row_bytes(k),
                 std::string(format->name) + " rows of " + std::to_string(width) + " bytes do not hold " +
                     std::to_string(k) + " weights"))
      return result;
    if (experts && !require(blocks.from_end(3) == experts, "stacks of different numbers of experts")) return result;
    int64_t layers = 1;
    for (size_t i = 0; i + axes < blocks.axes(); ++i) layers *= blocks.dim(i);
    if (!require(layer >= 0 && layer < layers, "index " + std::to_string(layer) + " of a stack of " + std::to_string(layers)))
      return result;
    result.n = n;
    result.blocks = static_cast<const uint8_t*>(blocks.data()) + layer * (experts ? experts : 1) * n * width;
    return result;
  }

  // Matrix number `which`: its index is operand `at`, its stack the next one.
  Matrix matrix(std::string_view formats, size_t which, size_t at, int64_t k, int64_t experts) {
    const Array index = call_.operand(at);
    const bool one = require(index.is_one_int(), "an index must be one int32");
    return matrix(format(formats, which), one ? *index.ints() : -1, call_.operand(at + 1), k, experts);
  }

 private:
  Array fitting(Array array, XLA_FFI_DataType type, size_t axes) {
    return require(array.is(type, axes), "operands do not fit") ? array : Array();
  }

  const Call& call_;
  std::string words_;
};

template <typename F>
XLA_FFI_Error* with_pool(const Call& call, F&& run) {
  auto schedule = [&](auto task) { call.schedule(std::move(task)); };
  ferrum::HelpedPool<decltype(schedule)> pool(call.threads(), schedule);
  try {
    run(pool);
  } catch (const std::bad_alloc&) {
    return call.error(XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "ferrum: out of memory for the rows of a step");
  }
  return nullptr;
}

XLA_FFI_Error* matmuls(const Call& call) {
  Checker check(call);
  const Array x = check.operand(0, kF32, 2);
  const auto formats = check.attribute<std::string_view>("formats");
  const ferrum::Arithmetic how = check.arithmetic();
  const size_t count = call.results();
  if (!check.require(call.operands() == 1 + 2 * count, "an index and blocks are wanted for each result") ||
      !check.require(count <= kMaxMatrices, "more than 16 matrices in one call") || check.failed())
    return check.error();
  const int64_t m = x.dim(0), k = x.dim(1);
  Matrix matrices[kMaxMatrices];
  float* y[kMaxMatrices];
  for (size_t i = 0; i < count; ++i) {
    const Array result = call.result(i);
    if (!check.require(result.is(kF32, 2), "results must be float32 [m, n]")) return check.error();
    matrices[i] = check.matrix(formats, i, 1 + 2 * i, k, 0);
    if (check.failed()) return check.error();
    if (!check.require(result.dim(0) == m && result.dim(1) == matrices[i].n, "a result does not fit its matrix")) return check.error();
    y[i] = result.floats();
  }
  return with_pool(call, [&](ferrum::Pool& pool) { ferrum::matmuls(pool, how, x.floats(), m, k, matrices, int(count), y); });
}

XLA_FFI_Error* swiglu(const Call& call) {
  Checker check(call);
  const Array x = check.operand(0, kF32, 2), y = check.result(0, kF32, 2);
  const auto formats = check.attribute<std::string_view>("formats");
  const ferrum::Arithmetic how = check.arithmetic();
  if (check.failed()) return check.error();
  const int64_t m = x.dim(0), k = x.dim(1);
  const Matrix gate = check.matrix(formats, 0, 1, k, 0), up = check.matrix(formats, 1, 3, k, 0);
  if (check.failed()) return check.error();
  if (gate.n != up.n || y.dim(0) != m || y.dim(1) != gate.n) return wrong(call, "gate, up and y do not fit");
  return with_pool(call, [&](ferrum::Pool& pool) { ferrum::swiglu(pool, how, x.floats(), m, k, gate, up, y.floats()); });
}

XLA_FFI_Error* experts(const Call& call) {
  Checker check(call);
  const Array x = check.operand(0, kF32, 2), y = check.result(0, kF32, 2);
  const Array ids = check.operand(1, kS32, 2), weights = check.operand(2, kF32, 2), stack = call.operand(4);
  const auto formats = check.attribute<std::string_view>("formats");
  const ferrum::Arithmetic how = check.arithmetic();
  if (check.failed()) return check.error();
  const int64_t tokens = x.dim(0), k = x.dim(1), top_k = ids.dim(1);
  if (stack.axes() < 3 || stack.from_end(3) < 1) return wrong(call, "blocks of experts are [..., experts, rows, width]");
  const int64_t num_experts = stack.from_end(3);
  ferrum::Additions more;
  more.limit = check.attribute<float>("limit"), more.alpha = check.attribute<float>("alpha");
  const Matrix gate = check.matrix(formats, 0, 3, k, num_experts), up = check.matrix(formats, 1, 5, k, num_experts);
  const Matrix down = check.matrix(formats, 2, 7, gate.n, num_experts);
  if (check.failed()) return check.error();
  if (gate.n != up.n || down.n != k) return wrong(call, "gate, up and down do not fit");
  if (ids.dim(0) != tokens || weights.dim(0) != tokens || weights.dim(1) != top_k || y.dim(0) != tokens || y.dim(1) != k)
    return wrong(call, "x, ids, weights and y do not fit");
  if (call.operands() > 9) {
    const Array biases[] = {check.operand(9, kF32, 2), check.operand(10, kF32, 2), check.operand(11, kF32, 2)};
    if (check.failed()) return check.error();
    const int64_t widths[] = {gate.n, gate.n, k};
    for (int i = 0; i < 3; ++i)
      if (biases[i].dim(0) != num_experts || biases[i].dim(1) != widths[i]) return wrong(call, "biases of experts do not fit");
    more.gate = biases[0].floats(), more.up = biases[1].floats(), more.down = biases[2].floats();
  }
  const int32_t* id = ids.ints();
  for (int64_t i = 0; i < tokens * top_k; ++i)
    if (id[i] < 0 || id[i] > num_experts)
      return wrong(call, "expert " + std::to_string(id[i]) + " of " + std::to_string(num_experts));
  return with_pool(call, [&](ferrum::Pool& pool) {
    ferrum::experts(pool, how, x.floats(), tokens, k, id, weights.floats(), top_k, num_experts, gate, up, down, more, y.floats());
  });
}

// Operands: x, positions, query_starts, kv_lengths, for each rope cosine and sine, for each pool of pages kv_slots and
// page_table, and the stacks. `attention`: for each layer its pool, its place there, its rope and its window. `places`: for each
// layer and part the number of the operand among the stacks (-1: none) and the place in its first axis. Results: y, for each
// pool its pages and the scales of an int8 cache, and, if requested, experts and weights [routers, tokens, top_k]. Tokens after
// the last sequence are padding: their y is x, their experts are `experts`, one more than there is.
XLA_FFI_Error* layers(const Call& call) {
  Checker check(call);
  const Array x = check.operand(0, kF32, 2), positions = check.operand(1, kS32, 1), query_starts = check.operand(2, kS32, 1);
  const Array kv_lengths = check.operand(3, kS32, 1), y = check.result(0, kF32, 2);
  const auto [attention, attention_size] = check.attribute<std::pair<const int64_t*, size_t>>("attention");
  const auto [places, size] = check.attribute<std::pair<const int64_t*, size_t>>("places");
  const auto formats = check.attribute<std::string_view>("formats");
  const auto ropes = check.attribute<int64_t>("ropes"), pools = check.attribute<int64_t>("pools");
  const auto top_k = check.attribute<int64_t>("top_k");
  const auto eps = check.attribute<float>("eps"), scale = check.attribute<float>("scale");
  const auto expert_scale = check.attribute<float>("expert_scale");
  const auto limit = check.attribute<float>("limit"), alpha = check.attribute<float>("alpha");
  const auto normalize = check.attribute<bool>("normalize");
  const auto type = check.named<ferrum::KvType>("kv_dtype", ferrum::kKvTypeNames);
  const int64_t count = int64_t(size) / (2 * kRoles);
  check.require(size % (2 * kRoles) == 0 && int64_t(attention_size) == 4 * count, "operands do not fit");
  if (check.failed()) return check.error();
  const int64_t tokens = x.dim(0), hidden = x.dim(1);
  ferrum::Batch batch{tokens, kv_lengths.dim(0), positions.ints(), query_starts.ints(), kv_lengths.ints()};
  check.require(positions.dim(0) == tokens && query_starts.dim(0) == batch.sequences + 1 && y.dim(0) == tokens &&
                    y.dim(1) == hidden && hidden % 32 == 0,
                "the tables of the batch do not fit");
  size_t next = 4, result = 1;
  std::vector<ferrum::Rope> rotations;
  for (int64_t i = 0; i < ropes; ++i, next += 2) {
    const Array cosine = check.operand(next, kF32, 2), sine = check.operand(next + 1, kF32, 2);
    if (check.failed()) return check.error();
    check.require(cosine.dim(0) == tokens && sine.same_shape(cosine), "a rope does not fit");
    rotations.push_back({cosine.floats(), sine.floats(), cosine.dim(1)});
  }
  std::vector<ferrum::KvCache> caches;  // the first layers of the pools
  std::vector<int64_t> depths;
  for (int64_t i = 0; i < pools; ++i, next += 2) {
    const Array kv_slots = check.operand(next, kS32, 1), page_table = check.operand(next + 1, kS32, 2), pages = call.result(result++);
    const Array scales = type == ferrum::KvType::int8 ? check.result(result++, kF32, 3) : Array();
    check.require(pages.axes() == 5, "operands do not fit");
    if (check.failed()) return check.error();
    caches.push_back({static_cast<uint8_t*>(pages.data()), scales.floats(), type, pages.dim(1), pages.dim(2), pages.dim(3) / 2,
                      pages.dim(4), page_table.dim(1), kv_slots.ints(), page_table.ints()});
    depths.push_back(pages.dim(0));
    const ferrum::KvCache& cache = caches.back();
    check.require(pages.item_bytes() == cache.item_bytes(), "the cache holds other elements");
    check.require(cache.head_dim % 16 == 0 && cache.kv_heads > 0 && cache.num_pages > 0 && kv_slots.dim(0) == tokens && page_table.dim(0) == batch.sequences,
                  "the cache does not fit");
    for (int64_t s = 0; s < batch.sequences; ++s)
      check.require(batch.kv_lengths[s] <= cache.max_pages * cache.page_size, "a sequence is longer than its pages");
  }
  for (int64_t s = 0; s < batch.sequences; ++s) {
    const int64_t from = batch.query_starts[s], to = batch.query_starts[s + 1];
    check.require(from >= 0 && from <= to && to <= tokens, "query_starts must not fall");
  }
  if (check.failed()) return check.error();
  batch.tokens = batch.sequences ? batch.query_starts[batch.sequences] : 0;  // the rest is padding, which is not computed

  std::vector<ferrum::Layer> all(static_cast<size_t>(count));
  int64_t routers = 0, wanted = 0;
  int32_t* ids = nullptr;
  float* weights = nullptr;
  if (call.results() > result) {
    const Array experts = call.result(result), shares = call.result(result + 1);
    const bool fits = experts.is(kS32, 3) && shares.is(kF32, 3) && experts.same_shape(shares);
    if (!fits || experts.dim(1) != tokens || experts.dim(2) != top_k) return wrong(call, "what records the routing does not fit");
    wanted = experts.dim(0), ids = experts.ints(), weights = shares.floats();
  }
  for (int64_t l = 0; l < count && !check.failed(); ++l) {
    ferrum::Layer& layer = all[size_t(l)];
    const int64_t *told = attention + 4 * l, pool = told[0], depth = told[1], rope = told[2];
    if (!check.require(pool >= 0 && pool < pools && depth >= 0 && depth < depths[size_t(pool)] && rope >= 0 && rope < ropes,
                       "a layer has no cache or no rope"))
      break;
    ferrum::KvCache& cache = layer.cache = caches[size_t(pool)];
    const int64_t rows = depth * cache.num_pages * cache.page_size * 2 * cache.kv_heads;
    cache.pages += rows * cache.head_dim * cache.item_bytes();
    if (cache.scales) cache.scales += rows;
    layer.rope = rotations[size_t(rope)], layer.window = told[3];
    check.require(2 * layer.rope.half <= cache.head_dim, "a rope does not fit");
    const int64_t* place = places + l * 2 * kRoles;
    const auto stack_of = [&](Role role) { return place[2 * int(role)]; };
    const auto place_of = [&](Role role) { return place[2 * int(role) + 1]; };
    const auto at = [&](Role role) { return call.operand(next + size_t(stack_of(role))); };
    const auto has = [&](Role role) { return stack_of(role) >= 0; };
    const auto vector = [&](Role role, int64_t n, int64_t experts = 0) -> const float* {
      if (!has(role)) return nullptr;
      const Array stack = at(role);
      const bool fits = stack.is(kF32, experts ? 3 : 2) && stack.from_end(1) == n && place_of(role) < stack.dim(0);
      if (!check.require(fits && (!experts || stack.dim(1) == experts), "a norm or bias does not fit")) return nullptr;
      return stack.floats() + place_of(role) * n * (experts ? experts : 1);
    };
    const auto matrix = [&](Role role, int64_t k, int64_t n, int64_t experts = 0) {
      if (!check.require(has(role), "a matrix is missing")) return Matrix{};
      const Matrix found = check.matrix(check.format(formats, size_t(stack_of(role))), place_of(role), at(role), k, experts);
      check.require(n == 0 || found.n == n, "a matrix does not fit");
      return found;
    };
    const int64_t width = cache.head_dim, keys = cache.kv_heads * width;
    layer.attention_norm = vector(Role::attention_norm, hidden);
    layer.query = matrix(Role::query, hidden, 0);
    if (!check.require(layer.query.n > 0 && layer.query.n % keys == 0, "heads do not fit")) break;
    layer.key = matrix(Role::key, hidden, keys);
    layer.value = matrix(Role::value, hidden, keys);
    layer.query_bias = vector(Role::query_bias, layer.query.n);
    layer.key_bias = vector(Role::key_bias, keys);
    layer.value_bias = vector(Role::value_bias, keys);
    layer.query_norm = vector(Role::query_norm, width);
    layer.key_norm = vector(Role::key_norm, width);
    layer.output = matrix(Role::output, layer.query.n, hidden);
    layer.output_bias = vector(Role::output_bias, hidden);
    layer.sinks = vector(Role::sinks, layer.query.n / width);
    layer.feed_forward_norm = vector(Role::feed_forward_norm, hidden);
    check.require(layer.attention_norm && layer.feed_forward_norm, "a layer has no norm");
    if (has(Role::router)) {
      layer.router = matrix(Role::router, hidden, 0);
      layer.experts = layer.router.n;
      check.require(layer.experts >= top_k && top_k > 0, "there are fewer experts than a token takes");
      layer.gate = matrix(Role::expert_gate, hidden, 0, layer.experts);
      layer.up = matrix(Role::expert_up, hidden, layer.gate.n, layer.experts);
      layer.down = matrix(Role::expert_down, layer.gate.n, hidden, layer.experts);
      layer.router_bias = vector(Role::router_bias, layer.experts);
      layer.more = {vector(Role::expert_gate_bias, layer.gate.n, layer.experts), vector(Role::expert_up_bias, layer.gate.n, layer.experts),
                    vector(Role::expert_down_bias, hidden, layer.experts), limit, alpha};
      check.require(!layer.more.gate == !layer.more.up, "gate and up have a bias both or neither");
      if (ids && check.require(routers < wanted, "there are more routers than are recorded")) {
        layer.ids = ids + routers * tokens * top_k;
        layer.weights = weights + routers++ * tokens * top_k;
        std::fill(layer.ids + batch.tokens * top_k, layer.ids + tokens * top_k, int32_t(layer.experts));
        std::fill(layer.weights + batch.tokens * top_k, layer.weights + tokens * top_k, 0.0f);
      }
    } else {
      layer.gate = matrix(Role::gate, hidden, 0);
      layer.up = matrix(Role::up, hidden, layer.gate.n);
      layer.down = matrix(Role::down, layer.gate.n, hidden);
      layer.down_bias = vector(Role::down_bias, hidden);
    }
  }
  check.require(routers == wanted, "there are fewer routers than are recorded");
  if (check.failed()) return check.error();
  const ferrum::LayerShape shape{hidden, top_k, eps, scale, expert_scale, normalize};
  std::memcpy(y.floats(), x.floats(), size_t(tokens * hidden) * sizeof(float));
  return with_pool(call, [&](ferrum::Pool& pool) { ferrum::decoder_layers(pool, shape, batch, all.data(), count, y.floats()); });
}

// Operands: qkv, log_decay, beta, taps, layer, starts, begins, reads, writes, tails, memories. Results: out, and the last two
// operands, in place.
XLA_FFI_Error* delta_net(const Call& call) {
  Checker check(call);
  const Array qkv = check.operand(0, kF32, 2), log_decay = check.operand(1, kF32, 2), beta = check.operand(2, kF32, 2);
  const Array taps = check.operand(3, kF32, 2), layer = call.operand(4), starts = check.operand(5, kS32, 1);
  const Array begins = check.operand(6, XLA_FFI_DataType_PRED, 1), reads = check.operand(7, kS32, 1), writes = check.operand(8, kS32, 1);
  const Array out = check.result(0, kF32, 3), tails = check.result(1, kF32, 4), memories = check.result(2, kF32, 5);
  const auto tiled = check.attribute<bool>("tiled");
  check.require(layer.is_one_int(), "the layer must be one int32");
  if (check.failed()) return check.error();
  const int64_t tokens = qkv.dim(0), channels = qkv.dim(1), places = memories.dim(1), heads = memories.dim(2);
  const int64_t key_dim = memories.dim(3), value_dim = memories.dim(4), sequences = reads.dim(0), index = *layer.ints();
  const int64_t keys = (channels - heads * value_dim) / (2 * key_dim);
  const ferrum::DeltaNet net{keys, heads, key_dim, value_dim, taps.dim(1), channels, tiled};
  check.require(keys > 0 && heads % keys == 0 && channels == 2 * keys * key_dim + heads * value_dim && taps.dim(0) == channels &&
                    key_dim % 16 == 0 && value_dim % 16 == 0 && tails.dim(2) == net.taps - 1 && tails.dim(3) == channels,
                "heads and channels do not fit");
  check.require(log_decay.dim(0) == tokens && log_decay.dim(1) == heads && log_decay.same_shape(beta) && out.dim(0) == tokens &&
                    out.dim(1) == heads && out.dim(2) == value_dim && writes.dim(0) == tokens,
                "rows do not fit");
  check.require(tails.dim(0) == memories.dim(0) && tails.dim(1) == places && index >= 0 && index < tails.dim(0),
                "the state does not fit");
  check.require(starts.dim(0) == sequences + 1 && begins.dim(0) == sequences, "the tables of the sequences do not fit");
  if (check.failed()) return check.error();
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t from = starts.ints()[s], to = starts.ints()[s + 1], place = reads.ints()[s];
    check.require(from >= 0 && from <= to && to <= tokens, "starts must not fall");
    check.require(from == to || (place >= 0 && place < places), "a sequence has its state elsewhere");
  }
  for (int64_t t = 0; t < tokens; ++t) check.require(writes.ints()[t] < places, "a state is to be kept elsewhere");
  if (check.failed()) return check.error();
  const ferrum::DeltaRows rows{sequences, starts.ints(), reads.ints(), writes.ints(), static_cast<const bool*>(begins.data())};
  const int64_t live = sequences ? rows.starts[sequences] : 0, before = sequences ? rows.starts[0] : tokens, width = heads * value_dim;
  std::memset(out.floats(), 0, size_t(before * width) * sizeof(float));
  std::memset(out.floats() + live * width, 0, size_t((tokens - live) * width) * sizeof(float));
  return with_pool(call, [&](ferrum::Pool& pool) {
    ferrum::delta_net(pool, net, qkv.floats(), log_decay.floats(), beta.floats(), taps.floats(), rows,
                      tails.floats() + index * places * (net.taps - 1) * channels,
                      memories.floats() + index * places * heads * key_dim * value_dim, out.floats());
  });
}

}  // namespace

extern "C" XLA_FFI_Error* ferrum_delta_net(XLA_FFI_CallFrame* frame) { return ferrum::answered(frame) ? nullptr : delta_net(Call(frame)); }
extern "C" XLA_FFI_Error* ferrum_layers(XLA_FFI_CallFrame* frame) { return ferrum::answered(frame) ? nullptr : layers(Call(frame)); }
extern "C" XLA_FFI_Error* ferrum_experts(XLA_FFI_CallFrame* frame) { return ferrum::answered(frame) ? nullptr : experts(Call(frame)); }
extern "C" XLA_FFI_Error* ferrum_matmuls(XLA_FFI_CallFrame* frame) { return ferrum::answered(frame) ? nullptr : matmuls(Call(frame)); }
extern "C" XLA_FFI_Error* ferrum_swiglu(XLA_FFI_CallFrame* frame) { return ferrum::answered(frame) ? nullptr : swiglu(Call(frame)); }

extern "C" const char* ferrum_native_isa() { return ferrum::isa(); }
extern "C" int ferrum_native_set_isa(const char* name) { return ferrum::set_isa(name) ? 1 : 0; }
