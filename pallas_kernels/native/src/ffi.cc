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
using ferrum::Type;

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

  // The gated delta net of `channels` whose state these arrays have.
  ferrum::DeltaNet delta_net(int64_t channels, bool tiled, Array tails, Array memories) {
    const int64_t heads = memories.dim(2), key_dim = memories.dim(3), value_dim = memories.dim(4);
    const int64_t keys = key_dim > 0 ? (channels - heads * value_dim) / (2 * key_dim) : 0;
    require(keys > 0 && heads > 0 && heads % keys == 0 && channels == 2 * keys * key_dim + heads * value_dim && key_dim % 16 == 0 &&
                value_dim % 16 == 0 && tails.dim(3) == channels,
            "heads and channels do not fit");
    require(tails.dim(0) == memories.dim(0) && tails.dim(1) == memories.dim(1), "the state does not fit");
    return {keys, heads, key_dim, value_dim, tails.dim(2) + 1, channels, tiled};
  }

  // Where the sequences of a step read and write a state with `places` places.
  ferrum::DeltaRows delta_rows(int64_t tokens, int64_t places, Array starts, Array begins, Array reads, Array writes) {
    const int64_t sequences = reads.dim(0);
    if (!require(starts.dim(0) == sequences + 1 && begins.dim(0) == sequences && writes.dim(0) == tokens,
                 "the tables of the sequences do not fit"))
      return {};
    for (int64_t s = 0; s < sequences; ++s) {
      const int64_t from = starts.ints()[s], to = starts.ints()[s + 1], place = reads.ints()[s];
      require(from >= 0 && from <= to && to <= tokens, "starts must not fall");
      require(from == to || (place >= 0 && place < places), "a sequence has its state elsewhere");
    }
    for (int64_t t = 0; t < tokens; ++t) require(writes.ints()[t] < places, "a state is to be kept elsewhere");
    return {sequences, starts.ints(), reads.ints(), writes.ints(), static_cast<const bool*>(begins.data())};
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

// The parameters of one layer among the stacks, whose first operand is `first`: `places` has for each role the number of the
// stack (-1: none) and the place in its first axis.
class Parameters {
 public:
  Parameters(Checker& check, const Call& call, std::string_view formats, size_t first, const int64_t* places)
      : check_(check), call_(call), formats_(formats), first_(first), places_(places) {}

  bool has(Role role) const { return stack_of(role) >= 0; }

  // n float32, or [experts, n]; nullptr if the layer does not have them.
  const float* vector(Role role, int64_t n, int64_t experts = 0) {
    if (!has(role)) return nullptr;
    const Array stack = at(role);
    const bool fits = stack.is(kF32, experts ? 3 : 2) && stack.from_end(1) == n && place_of(role) < stack.dim(0);
    if (!check_.require(fits && (!experts || stack.dim(1) == experts), "a norm or bias does not fit")) return nullptr;
    return stack.floats() + place_of(role) * n * (experts ? experts : 1);
  }

  // n 0: any number of rows.
  Matrix matrix(Role role, int64_t k, int64_t n, int64_t experts = 0) {
    if (!check_.require(has(role), "a matrix is missing")) return Matrix{};
    const Matrix found = check_.matrix(check_.format(formats_, size_t(stack_of(role))), place_of(role), at(role), k, experts);
    check_.require(n == 0 || found.n == n, "a matrix does not fit");
    return found;
  }

 private:
  int64_t stack_of(Role role) const { return places_[2 * int(role)]; }
  int64_t place_of(Role role) const { return places_[2 * int(role) + 1]; }
  Array at(Role role) const { return call_.operand(first_ + size_t(stack_of(role))); }

  Checker& check_;
  const Call& call_;
  std::string_view formats_;
  size_t first_;
  const int64_t* places_;
};

// Attention of a layer that has its cache.
void read_attention(Checker& check, Parameters& own, int64_t hidden, bool gated, ferrum::Layer& layer) {
  const int64_t width = layer.cache.head_dim, keys = layer.cache.kv_heads * width, each = gated ? 2 : 1;
  layer.query = own.matrix(Role::query, hidden, 0);
  if (!check.require(layer.query.n > 0 && layer.query.n % (each * keys) == 0, "heads do not fit")) return;
  layer.key = own.matrix(Role::key, hidden, keys);
  layer.value = own.matrix(Role::value, hidden, keys);
  layer.query_bias = own.vector(Role::query_bias, layer.query.n);
  layer.key_bias = own.vector(Role::key_bias, keys);
  layer.value_bias = own.vector(Role::value_bias, keys);
  layer.query_norm = own.vector(Role::query_norm, width);
  layer.key_norm = own.vector(Role::key_norm, width);
  layer.output = own.matrix(Role::output, layer.query.n / each, hidden);
  layer.output_bias = own.vector(Role::output_bias, hidden);
  layer.sinks = own.vector(Role::sinks, layer.query.n / each / width);
}

// The gated delta net of a layer, which has place `depth` in these states.
void read_recurrence(Checker& check, Parameters& own, int64_t hidden, bool tiled, Array tails, Array memories, int64_t depth,
                     ferrum::Layer& layer) {
  ferrum::Recurrence& to = layer.recurrence;
  to.qkv = own.matrix(Role::delta_qkv, hidden, 0);
  const ferrum::DeltaNet net = to.net = check.delta_net(to.qkv.n, tiled, tails, memories);
  if (check.failed()) return;
  const int64_t before = depth * memories.dim(1), values = net.heads * net.value_dim;
  const bool both = own.has(Role::delta_beta_alpha);
  to.tails = tails.floats() + before * (net.taps - 1) * net.channels;
  to.memories = memories.floats() + before * values * net.key_dim;
  to.gate = own.matrix(Role::delta_gate, hidden, values);
  to.beta = both ? own.matrix(Role::delta_beta_alpha, hidden, 2 * net.heads) : own.matrix(Role::delta_beta, hidden, net.heads);
  if (!both) to.alpha = own.matrix(Role::delta_alpha, hidden, net.heads);
  to.taps = own.vector(Role::delta_taps, net.taps, net.channels);
  to.decay = own.vector(Role::delta_decay, net.heads);
  to.time_bias = own.vector(Role::delta_time_bias, net.heads);
  to.norm = own.vector(Role::delta_norm, net.value_dim);
  layer.output = own.matrix(Role::delta_output, values, hidden);
  check.require(to.taps && to.decay && to.time_bias && to.norm, "a delta net has no taps, decay, bias or norm");
}

void read_feed_forward(Checker& check, Parameters& own, int64_t hidden, ferrum::Layer& layer) {
  if (!own.has(Role::router)) {
    layer.gate = own.matrix(Role::gate, hidden, 0);
    layer.up = own.matrix(Role::up, hidden, layer.gate.n);
    layer.down = own.matrix(Role::down, layer.gate.n, hidden);
    layer.down_bias = own.vector(Role::down_bias, hidden);
    return;
  }
  layer.router = own.matrix(Role::router, hidden, 0);
  const int64_t experts = layer.experts = layer.router.n;
  layer.gate = own.matrix(Role::expert_gate, hidden, 0, experts);
  layer.up = own.matrix(Role::expert_up, hidden, layer.gate.n, experts);
  layer.down = own.matrix(Role::expert_down, layer.gate.n, hidden, experts);
  layer.router_bias = own.vector(Role::router_bias, experts);
  layer.selection_bias = own.vector(Role::selection_bias, experts);
  layer.more.gate = own.vector(Role::expert_gate_bias, layer.gate.n, experts);
  layer.more.up = own.vector(Role::expert_up_bias, layer.gate.n, experts);
  layer.more.down = own.vector(Role::expert_down_bias, hidden, experts);
  check.require(!layer.more.gate == !layer.more.up, "gate and up have a bias both or neither");
  if (!own.has(Role::shared_gate)) return;
  if (const float* row = own.vector(Role::shared_router, hidden))
    layer.shared_router = {&ferrum::kFormats[int(Type::F32)], reinterpret_cast<const uint8_t*>(row), 1, hidden};
  layer.shared_gate = own.matrix(Role::shared_gate, hidden, 0);
  layer.shared_up = own.matrix(Role::shared_up, hidden, layer.shared_gate.n);
  layer.shared_down = own.matrix(Role::shared_down, layer.shared_gate.n, hidden);
}

// Operands: x, positions, query_starts, kv_lengths, for each rope cosine and sine, for each pool of pages kv_slots and
// page_table, if there are states begins, reads and writes, and the stacks. `mixers`: for each layer its pool, its place there,
// its rope and its window, or its state, its place there and whether it is tiled. `places`: for each layer and part the number of
// the operand among the stacks (-1: none) and the place in its first axis. Results: y, for each pool its pages and the scales of
// an int8 cache, for each state tails and memories, and, if requested, experts and weights [routers, tokens, top_k]. Tokens
// after the last sequence are padding: their y is x, their experts are `experts`, one more than there is.
XLA_FFI_Error* layers(const Call& call) {
  Checker check(call);
  const Array x = check.operand(0, kF32, 2), positions = check.operand(1, kS32, 1), query_starts = check.operand(2, kS32, 1);
  const Array kv_lengths = check.operand(3, kS32, 1), y = check.result(0, kF32, 2);
  const auto [mixers, mixers_size] = check.attribute<std::pair<const int64_t*, size_t>>("mixers");
  const auto [places, size] = check.attribute<std::pair<const int64_t*, size_t>>("places");
  const auto formats = check.attribute<std::string_view>("formats");
  const auto ropes = check.attribute<int64_t>("ropes"), pools = check.attribute<int64_t>("pools"), states = check.attribute<int64_t>("states");
  const ferrum::Router router{check.attribute<int64_t>("top_k"), check.attribute<int64_t>("groups"), check.attribute<int64_t>("groups_used"),
                              check.attribute<int64_t>("group_best"), check.attribute<float>("expert_scale"), check.attribute<float>("expert_eps"),
                              check.attribute<bool>("normalize"), check.attribute<bool>("sigmoid")};
  const int64_t top_k = router.top_k;
  const auto eps = check.attribute<float>("eps"), scale = check.attribute<float>("scale");
  const auto limit = check.attribute<float>("limit"), alpha = check.attribute<float>("alpha");
  const auto gated = check.attribute<bool>("gated");
  const auto type = check.named<ferrum::KvType>("kv_dtype", ferrum::kKvTypeNames);
  const int64_t count = int64_t(size) / (2 * kRoles);
  check.require(size % (2 * kRoles) == 0 && int64_t(mixers_size) == 4 * count && pools > 0, "operands do not fit");
  if (check.failed()) return check.error();
  const int64_t tokens = x.dim(0), hidden = x.dim(1);
  ferrum::Batch batch{tokens, kv_lengths.dim(0), positions.ints(), query_starts.ints(), kv_lengths.ints(), nullptr};
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
  std::vector<std::pair<Array, Array>> kept;
  ferrum::DeltaRows rows{};
  for (int64_t i = 0; i < states; ++i) {
    kept.emplace_back(check.result(result, kF32, 4), check.result(result + 1, kF32, 5));
    result += 2;
  }
  if (states > 0) {
    const Array begins = check.operand(next, XLA_FFI_DataType_PRED, 1), reads = check.operand(next + 1, kS32, 1);
    const Array writes = check.operand(next + 2, kS32, 1);
    next += 3;
    if (check.failed()) return check.error();
    int64_t places = kept[0].second.dim(1);
    for (const auto& state : kept) places = std::min(places, state.second.dim(1));
    rows = check.delta_rows(tokens, places, query_starts, begins, reads, writes);
  }
  if (check.failed()) return check.error();
  batch.slots = caches[0].kv_slots;
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
    Parameters own(check, call, formats, next, places + l * 2 * kRoles);
    const int64_t *told = mixers + 4 * l, number = told[0], depth = told[1];
    layer.attention_norm = own.vector(Role::attention_norm, hidden);
    layer.feed_forward_norm = own.vector(Role::feed_forward_norm, hidden);
    check.require(layer.attention_norm && layer.feed_forward_norm, "a layer has no norm");
    if (own.has(Role::delta_qkv)) {
      if (!check.require(number >= 0 && number < states && depth >= 0 && depth < kept[size_t(number)].second.dim(0), "a layer has no state")) break;
      layer.recurrence.rows = rows;
      read_recurrence(check, own, hidden, told[2] != 0, kept[size_t(number)].first, kept[size_t(number)].second, depth, layer);
    } else {
      const int64_t rope = told[2];
      if (!check.require(number >= 0 && number < pools && depth >= 0 && depth < depths[size_t(number)] && rope >= 0 && rope < ropes,
                         "a layer has no cache or no rope"))
        break;
      ferrum::KvCache& cache = layer.cache = caches[size_t(number)];
      const int64_t before = depth * cache.num_pages * cache.page_size * 2 * cache.kv_heads;
      cache.pages += before * cache.head_dim * cache.item_bytes();
      if (cache.scales) cache.scales += before;
      layer.rope = rotations[size_t(rope)], layer.window = told[3];
      check.require(2 * layer.rope.half <= cache.head_dim, "a rope does not fit");
      read_attention(check, own, hidden, gated, layer);
    }
    layer.more.limit = limit, layer.more.alpha = alpha;
    read_feed_forward(check, own, hidden, layer);
    if (layer.experts) {
      const int64_t groups = router.groups, size = groups > 0 ? layer.experts / groups : 0;
      check.require(groups > 0 && size * groups == layer.experts && router.groups_used <= groups && router.group_best <= size,
                    "the groups of experts do not fit");
      check.require(top_k > 0 && top_k <= size * router.groups_used, "there are fewer experts than a token takes");
      if (ids && check.require(routers < wanted, "there are more routers than are recorded")) {
        layer.ids = ids + routers * tokens * top_k;
        layer.weights = weights + routers++ * tokens * top_k;
        std::fill(layer.ids + batch.tokens * top_k, layer.ids + tokens * top_k, int32_t(layer.experts));
        std::fill(layer.weights + batch.tokens * top_k, layer.weights + tokens * top_k, 0.0f);
      }
    }
  }
  check.require(routers == wanted, "there are fewer routers than are recorded");
  if (check.failed()) return check.error();
  const ferrum::LayerShape shape{hidden, eps, scale, gated, router};
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
  const int64_t tokens = qkv.dim(0), channels = qkv.dim(1), places = memories.dim(1), index = *layer.ints();
  const ferrum::DeltaNet net = check.delta_net(channels, tiled, tails, memories);
  check.require(taps.dim(0) == channels && taps.dim(1) == net.taps, "taps and channels do not fit");
  check.require(log_decay.dim(0) == tokens && log_decay.dim(1) == net.heads && log_decay.same_shape(beta) && out.dim(0) == tokens &&
                    out.dim(1) == net.heads && out.dim(2) == net.value_dim,
                "rows do not fit");
  check.require(index >= 0 && index < tails.dim(0), "the state does not fit");
  const ferrum::DeltaRows rows = check.delta_rows(tokens, places, starts, begins, reads, writes);
  if (check.failed()) return check.error();
  const int64_t live = rows.sequences ? rows.starts[rows.sequences] : 0, before = rows.sequences ? rows.starts[0] : tokens;
  const int64_t width = net.heads * net.value_dim;
  std::memset(out.floats(), 0, size_t(before * width) * sizeof(float));
  std::memset(out.floats() + live * width, 0, size_t((tokens - live) * width) * sizeof(float));
  return with_pool(call, [&](ferrum::Pool& pool) {
    ferrum::delta_net(pool, net, qkv.floats(), log_decay.floats(), beta.floats(), taps.floats(), rows,
                      tails.floats() + index * places * (net.taps - 1) * channels,
                      memories.floats() + index * places * width * net.key_dim, out.floats());
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
