// XLA's view of the kernels: four FFI handlers that check shapes, and its thread pool as a Pool.
//
// All handlers have one signature and look at their operands by number: a signature each, with types, would be checked by
// templates that take a compiler longer than most of the kernels do.
#include <cstdint>
#include <cstring>
#include <new>
#include <string>
#include <string_view>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using ferrum::Matrix;

constexpr size_t kMaxMatrices = 16;

ffi::Error wrong(std::string words) { return ffi::Error::InvalidArgument("ferrum: " + std::move(words)); }

// The arguments of one call and everything that can be wrong with them; the first complaint is kept.
class Checker {
 public:
  Checker(ffi::RemainingArgs operands, ffi::RemainingRets results, ffi::Dictionary attributes)
      : operands_(operands), results_(results), attributes_(attributes) {}

  // What is not there is a buffer without axes, and a complaint.
  ffi::AnyBuffer operand(size_t i) {
    const auto found = operands_.get<ffi::AnyBuffer>(i);
    return found.has_value() ? *found : missing();
  }
  ffi::AnyBuffer result(size_t i) {
    auto found = results_.get<ffi::AnyBuffer>(i);
    return found.has_value() ? **found : missing();
  }
  ffi::AnyBuffer of(ffi::DataType type, size_t axes, ffi::AnyBuffer buffer) {
    return buffer.element_type() == type && buffer.dimensions().size() == axes ? buffer : missing();
  }
  template <typename T>
  T attribute(const char* name) {
    const auto found = attributes_.get<T>(name);
    require(found.has_value(), "an attribute is missing");
    return found.has_value() ? *found : T{};
  }
  size_t operands() const { return operands_.size(); }
  size_t results() const { return results_.size(); }

  bool require(bool holds, const char* words) {
    if (!holds && words_.empty()) words_ = words;
    return holds;
  }
  bool require(bool holds, const std::string& words) { return require(holds, words.c_str()); }
  bool failed() const { return !words_.empty(); }
  ffi::Error error() const { return wrong(words_); }

  ferrum::Arithmetic arithmetic() {
    const auto name = attribute<std::string_view>("arithmetic");
    require(name == "int8" || name == "int8x2" || name == "float32", "arithmetic must be int8, int8x2 or float32");
    return name == "float32" ? ferrum::Arithmetic::float32
           : name == "int8x2" ? ferrum::Arithmetic::int8x2
                              : ferrum::Arithmetic::int8;
  }

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
  Matrix matrix(const ferrum::Format* format, int64_t layer, ffi::AnyBuffer blocks, int64_t k, int64_t experts) {
    Matrix result{format, nullptr, 0, k};
    const auto dims = blocks.dimensions();
    const size_t axes = experts ? 3 : 2;
    if (!format || !require(dims.size() >= axes, "blocks have too few axes")) return result;
    const int64_t item = int64_t(ffi::ByteWidth(blocks.element_type()));
    const int64_t n = dims[dims.size() - 2], width = dims.back() * item;
    if (!require(k % format->block_weights == 0 && width == format->row_bytes(k),
                 std::string(format->name) + " rows of " + std::to_string(width) + " bytes do not hold " +
                     std::to_string(k) + " weights"))
      return result;
    if (experts && !require(dims[dims.size() - 3] == experts, "stacks of different numbers of experts")) return result;
    int64_t layers = 1;
    for (size_t i = 0; i + axes < dims.size(); ++i) layers *= dims[i];
    if (!require(layer >= 0 && layer < layers, "index " + std::to_string(layer) + " of a stack of " + std::to_string(layers)))
      return result;
    result.n = n;
    result.blocks = static_cast<const uint8_t*>(blocks.untyped_data()) + layer * (experts ? experts : 1) * n * width;
    return result;
  }
  Matrix matrix(const ferrum::Format* format, ffi::AnyBuffer index, ffi::AnyBuffer blocks, int64_t k, int64_t experts) {
    const bool scalar = require(index.element_type() == ffi::S32 && index.element_count() == 1, "an index must be one int32");
    return matrix(format, scalar ? *static_cast<const int32_t*>(index.untyped_data()) : -1, blocks, k, experts);
  }

 private:
  ffi::AnyBuffer missing() {
    static const XLA_FFI_Buffer none{};
    require(false, "operands do not fit");
    return ffi::AnyBuffer(&none);
  }

  ffi::RemainingArgs operands_;
  ffi::RemainingRets results_;
  ffi::Dictionary attributes_;
  std::string words_;
};

float* floats(ffi::AnyBuffer buffer) { return static_cast<float*>(buffer.untyped_data()); }
int32_t* ints(ffi::AnyBuffer buffer) { return static_cast<int32_t*>(buffer.untyped_data()); }

using Args = ffi::RemainingArgs;
using Rets = ffi::RemainingRets;
using Attrs = ffi::Dictionary;

template <typename F>
ffi::Error with_pool(ffi::ThreadPool& threads, F&& run) {
  auto schedule = [&](auto task) { threads.Schedule(std::move(task)); };
  ferrum::HelpedPool<decltype(schedule)> pool(int(threads.num_threads()), schedule);
  try {
    run(pool);
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "ferrum: out of memory for the rows of a step");
  }
  return ffi::Error::Success();
}

ffi::Error matmuls(ffi::ThreadPool threads, Args args, Rets rets, Attrs attrs) {
  Checker check(args, rets, attrs);
  const auto x = check.of(ffi::F32, 2, check.operand(0));
  const auto formats = check.attribute<std::string_view>("formats");
  const ferrum::Arithmetic how = check.arithmetic();
  const size_t count = check.results();
  if (!check.require(check.operands() == 1 + 2 * count, "an index and blocks are wanted for each result") ||
      !check.require(count <= kMaxMatrices, "more than 16 matrices in one call") || check.failed())
    return check.error();
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1];
  Matrix matrices[kMaxMatrices];
  float* y[kMaxMatrices];
  for (size_t i = 0; i < count; ++i) {
    const auto result = check.result(i);
    const auto dims = result.dimensions();
    if (!check.require(result.element_type() == ffi::F32 && dims.size() == 2, "results must be float32 [m, n]")) return check.error();
    matrices[i] = check.matrix(check.format(formats, i), check.operand(1 + 2 * i), check.operand(2 + 2 * i), k, 0);
    if (check.failed()) return check.error();
    if (!check.require(dims[0] == m && dims[1] == matrices[i].n, "a result does not fit its matrix")) return check.error();
    y[i] = floats(result);
  }
  return with_pool(threads, [&](ferrum::Pool& pool) { ferrum::matmuls(pool, how, floats(x), m, k, matrices, int(count), y); });
}

ffi::Error swiglu(ffi::ThreadPool threads, Args args, Rets rets, Attrs attrs) {
  Checker check(args, rets, attrs);
  const auto x = check.of(ffi::F32, 2, check.operand(0)), y = check.of(ffi::F32, 2, check.result(0));
  const auto formats = check.attribute<std::string_view>("formats");
  const ferrum::Arithmetic how = check.arithmetic();
  if (check.failed()) return check.error();
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1];
  const Matrix gate = check.matrix(check.format(formats, 0), check.operand(1), check.operand(2), k, 0);
  const Matrix up = check.matrix(check.format(formats, 1), check.operand(3), check.operand(4), k, 0);
  if (check.failed()) return check.error();
  if (gate.n != up.n || y.dimensions()[0] != m || y.dimensions()[1] != gate.n) return wrong("gate, up and y do not fit");
  return with_pool(threads, [&](ferrum::Pool& pool) { ferrum::swiglu(pool, how, floats(x), m, k, gate, up, floats(y)); });
}

ffi::Error experts(ffi::ThreadPool threads, Args args, Rets rets, Attrs attrs) {
  Checker check(args, rets, attrs);
  const auto x = check.of(ffi::F32, 2, check.operand(0)), y = check.of(ffi::F32, 2, check.result(0));
  const auto ids = check.of(ffi::S32, 2, check.operand(1)), weights = check.of(ffi::F32, 2, check.operand(2));
  const auto formats = check.attribute<std::string_view>("formats");
  const ferrum::Arithmetic how = check.arithmetic();
  if (check.failed()) return check.error();
  const int64_t tokens = x.dimensions()[0], k = x.dimensions()[1], top_k = ids.dimensions()[1];
  const auto stack = check.operand(4).dimensions();
  if (stack.size() < 3 || stack[stack.size() - 3] < 1) return wrong("blocks of experts are [..., experts, rows, width]");
  const int64_t num_experts = stack[stack.size() - 3];
  const auto matrix = [&](size_t i, int64_t k) {
    return check.matrix(check.format(formats, i), check.operand(3 + 2 * i), check.operand(4 + 2 * i), k, num_experts);
  };
  const Matrix gate = matrix(0, k), up = matrix(1, k), down = matrix(2, gate.n);
  if (check.failed()) return check.error();
  if (gate.n != up.n || down.n != k) return wrong("gate, up and down do not fit");
  if (ids.dimensions()[0] != tokens || weights.dimensions()[0] != tokens || weights.dimensions()[1] != top_k ||
      y.dimensions()[0] != tokens || y.dimensions()[1] != k)
    return wrong("x, ids, weights and y do not fit");
  const int32_t* id = ints(ids);
  for (int64_t i = 0; i < tokens * top_k; ++i)
    if (id[i] < 0 || id[i] > num_experts)
      return wrong("expert " + std::to_string(id[i]) + " of " + std::to_string(num_experts));
  return with_pool(threads, [&](ferrum::Pool& pool) {
    ferrum::experts(pool, how, floats(x), tokens, k, id, floats(weights), top_k, num_experts, gate, up, down, floats(y));
  });
}

// The parts of a layer in the order of native.ROLES.
enum Role {
  kAttentionNorm, kQuery, kKey, kValue, kQueryBias, kKeyBias, kValueBias, kQueryNorm, kKeyNorm, kOutput, kOutputBias,
  kFeedForwardNorm, kGate, kUp, kDown, kDownBias, kRouter, kExpertGate, kExpertUp, kExpertDown, kRoles
};

bool find_kv_type(std::string_view name, ferrum::KvType& type) {
  const std::string_view names[] = {"float32", "float16", "bfloat16", "int8", "float8_e4m3fn"};
  for (int i = 0; i < 5; ++i)
    if (names[i] == name) return type = ferrum::KvType(i), true;
  return false;
}

// Operands: x, slots, positions, query_starts, kv_lengths, page_table, cosine, sine, stacks. `places`, of each layer and part: number of the operand among `stacks` (-1: none) and place in its first axis. Results: y, the
// pages of the cache, the scales of an int8 one, and where they are wanted experts and weights [routers, tokens, top_k].
ffi::Error layers(ffi::ThreadPool threads, Args args, Rets rets, Attrs attrs) {
  constexpr size_t kFirstStack = 8;
  Checker check(args, rets, attrs);
  const auto x = check.of(ffi::F32, 2, check.operand(0)), y = check.of(ffi::F32, 2, check.result(0));
  const auto vector_of_ints = [&](size_t i) { return check.of(ffi::S32, 1, check.operand(i)); };
  const auto slots = vector_of_ints(1), positions = vector_of_ints(2), query_starts = vector_of_ints(3), kv_lengths = vector_of_ints(4);
  const auto page_table = check.of(ffi::S32, 2, check.operand(5));
  const auto cosine = check.of(ffi::F32, 2, check.operand(6)), sine = check.of(ffi::F32, 2, check.operand(7));
  const auto pages = check.result(1);
  const auto places = check.attribute<ffi::Span<const int64_t>>("places");
  const auto formats = check.attribute<std::string_view>("formats");
  const auto top_k = check.attribute<int64_t>("top_k"), window = check.attribute<int64_t>("window");
  const auto eps = check.attribute<float>("eps"), scale = check.attribute<float>("scale");
  const auto expert_scale = check.attribute<float>("expert_scale");
  const auto normalise = check.attribute<bool>("normalise");
  ferrum::KvCache store{};
  check.require(find_kv_type(check.attribute<std::string_view>("kv_dtype"), store.type), "no kernels for this dtype of the KV cache");
  check.require(pages.dimensions().size() == 5 && places.size() % (2 * kRoles) == 0, "operands do not fit");
  if (check.failed()) return check.error();
  const int64_t tokens = x.dimensions()[0], hidden = x.dimensions()[1];
  const auto dims = pages.dimensions();
  const int64_t count = int64_t(places.size()) / (2 * kRoles);
  store = {static_cast<uint8_t*>(pages.untyped_data()), nullptr, store.type, dims[1], dims[2], dims[3] / 2, dims[4]};
  if (store.type == ferrum::KvType::int8) {
    store.scales = floats(check.of(ffi::F32, 3, check.result(2)));
    if (check.failed()) return wrong("an int8 cache needs its scales");
  }
  check.require(int64_t(ffi::ByteWidth(pages.element_type())) == store.item_bytes(), "the cache holds other elements");
  check.require(count <= dims[0] && store.head_dim % 16 == 0 && store.num_pages > 0, "the cache does not fit");
  ferrum::Batch batch{tokens, page_table.dimensions()[0], page_table.dimensions()[1], ints(slots), ints(positions),
                      ints(query_starts), ints(kv_lengths), ints(page_table), floats(cosine), floats(sine), cosine.dimensions()[1]};
  check.require(slots.dimensions()[0] == tokens && positions.dimensions()[0] == tokens && cosine.dimensions()[0] == tokens &&
                    sine.dimensions()[0] == tokens && sine.dimensions()[1] == batch.rotated && 2 * batch.rotated <= store.head_dim &&
                    query_starts.dimensions()[0] == batch.sequences + 1 && kv_lengths.dimensions()[0] == batch.sequences &&
                    y.dimensions()[0] == tokens && y.dimensions()[1] == hidden && hidden % 32 == 0,
                "the tables of the batch do not fit");
  if (check.failed()) return check.error();
  for (int64_t s = 0; s < batch.sequences; ++s) {
    const int64_t from = batch.query_starts[s], to = batch.query_starts[s + 1];
    check.require(from >= 0 && from <= to && to <= tokens, "query_starts must not fall");
    check.require(batch.kv_lengths[s] <= batch.max_pages * store.page_size, "a sequence is longer than its pages");
  }

  std::vector<ferrum::Layer> all(static_cast<size_t>(count));
  std::vector<ferrum::KvCache> caches(static_cast<size_t>(count), store);
  int64_t heads = 0, routers = 0, wanted = 0;
  int32_t* ids = nullptr;
  float* weights = nullptr;
  if (const size_t first = store.scales ? 3 : 2; check.results() > first) {
    const auto experts = check.of(ffi::S32, 3, check.result(first)), shares = check.of(ffi::F32, 3, check.result(first + 1));
    if (check.failed()) return wrong("what records the routing does not fit");
    const auto one = experts.dimensions();
    wanted = one[0];
    check.require(one == shares.dimensions() && one[1] == tokens && one[2] == top_k, "what records the routing does not fit");
    ids = ints(experts), weights = floats(shares);
  }
  for (int64_t l = 0; l < count && !check.failed(); ++l) {
    ferrum::Layer& layer = all[size_t(l)];
    const int64_t rows = l * store.num_pages * store.page_size * 2 * store.kv_heads;
    caches[size_t(l)].pages += rows * store.head_dim * store.item_bytes();
    if (store.scales) caches[size_t(l)].scales += rows;
    const int64_t* place = places.begin() + l * 2 * kRoles;
    const auto at = [&](Role role) { return check.operand(kFirstStack + size_t(place[2 * role])); };
    const auto has = [&](Role role) { return place[2 * role] >= 0; };
    const auto vector = [&](Role role, int64_t n) -> const float* {
      if (!has(role)) return nullptr;
      const auto stack = at(role);
      const auto dims = stack.dimensions();
      const bool fits = stack.element_type() == ffi::F32 && dims.size() == 2 && dims[1] == n && place[2 * role + 1] < dims[0];
      if (!check.require(fits, "a norm or bias does not fit")) return nullptr;
      return floats(stack) + place[2 * role + 1] * n;
    };
    const auto matrix = [&](Role role, int64_t k, int64_t n, int64_t experts = 0) {
      if (!check.require(has(role), "a matrix is missing")) return Matrix{};
      const Matrix found = check.matrix(check.format(formats, size_t(place[2 * role])), place[2 * role + 1], at(role), k, experts);
      check.require(n == 0 || found.n == n, "a matrix does not fit");
      return found;
    };
    const int64_t keys = store.kv_heads * store.head_dim;
    layer.attention_norm = vector(kAttentionNorm, hidden);
    layer.query = matrix(kQuery, hidden, 0);
    heads = layer.query.n / store.head_dim;
    if (!check.require(heads % store.kv_heads == 0 && layer.query.n == heads * store.head_dim, "heads do not fit")) break;
    layer.key = matrix(kKey, hidden, keys);
    layer.value = matrix(kValue, hidden, keys);
    layer.query_bias = vector(kQueryBias, layer.query.n);
    layer.key_bias = vector(kKeyBias, keys);
    layer.value_bias = vector(kValueBias, keys);
    layer.query_norm = vector(kQueryNorm, store.head_dim);
    layer.key_norm = vector(kKeyNorm, store.head_dim);
    layer.output = matrix(kOutput, layer.query.n, hidden);
    layer.output_bias = vector(kOutputBias, hidden);
    layer.feed_forward_norm = vector(kFeedForwardNorm, hidden);
    check.require(layer.attention_norm && layer.feed_forward_norm, "a layer has no norm");
    if (has(kRouter)) {
      layer.router = matrix(kRouter, hidden, 0);
      layer.experts = layer.router.n;
      check.require(layer.experts >= top_k && top_k > 0, "there are fewer experts than a token takes");
      layer.gate = matrix(kExpertGate, hidden, 0, layer.experts);
      layer.up = matrix(kExpertUp, hidden, layer.gate.n, layer.experts);
      layer.down = matrix(kExpertDown, layer.gate.n, hidden, layer.experts);
      if (ids && check.require(routers < wanted, "there are more routers than are recorded")) {
        layer.ids = ids + routers * tokens * top_k;
        layer.weights = weights + routers++ * tokens * top_k;
      }
    } else {
      layer.gate = matrix(kGate, hidden, 0);
      layer.up = matrix(kUp, hidden, layer.gate.n);
      layer.down = matrix(kDown, layer.gate.n, hidden);
      layer.down_bias = vector(kDownBias, hidden);
    }
  }
  check.require(routers == wanted, "there are fewer routers than are recorded");
  if (check.failed()) return check.error();
  const ferrum::Shape shape{hidden, heads, window, top_k, eps, scale, expert_scale, normalise};
  std::memcpy(floats(y), floats(x), size_t(tokens * hidden) * sizeof(float));
  return with_pool(threads, [&](ferrum::Pool& pool) { ferrum::decoder_layers(pool, shape, batch, all.data(), caches.data(), count, floats(y)); });
}

}  // namespace

#define FERRUM_HANDLER(name, handler) \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, handler, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attrs())
FERRUM_HANDLER(ferrum_layers, layers);
FERRUM_HANDLER(ferrum_experts, experts);
FERRUM_HANDLER(ferrum_matmuls, matmuls);
FERRUM_HANDLER(ferrum_swiglu, swiglu);

extern "C" const char* ferrum_native_isa() { return ferrum::isa(); }
extern "C" int ferrum_native_set_isa(const char* name) { return ferrum::set_isa(name) ? 1 : 0; }
