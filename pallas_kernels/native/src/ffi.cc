// XLA's view of the kernels: four FFI handlers that check shapes, and its thread pool as a Pool.
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
using FloatMatrix = ffi::Buffer<ffi::F32, 2>;
using IntMatrix = ffi::Buffer<ffi::S32, 2>;

constexpr size_t kMaxMatrices = 16;

ffi::Error wrong(std::string words) { return ffi::Error::InvalidArgument("ferrum: " + std::move(words)); }

// Everything that can be wrong with the arguments of one call; the first complaint is kept.
class Checker {
 public:
  bool require(bool holds, const char* words) {
    if (!holds && words_.empty()) words_ = words;
    return holds;
  }
  bool require(bool holds, const std::string& words) { return require(holds, words.c_str()); }
  bool failed() const { return !words_.empty(); }
  ffi::Error error() const { return wrong(words_); }

  ferrum::Arithmetic arithmetic(std::string_view name) {
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
  std::string words_;
};

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

ffi::Error matmuls(ffi::ThreadPool threads, FloatMatrix x, ffi::RemainingArgs args, ffi::RemainingRets results,
                   std::string_view formats, std::string_view arithmetic) {
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1];
  const size_t count = results.size();
  Checker check;
  const ferrum::Arithmetic how = check.arithmetic(arithmetic);
  if (!check.require(args.size() == 2 * count, "an index and blocks are wanted for each result") ||
      !check.require(count <= kMaxMatrices, "more than 16 matrices in one call"))
    return check.error();
  Matrix matrices[kMaxMatrices];
  float* y[kMaxMatrices];
  for (size_t i = 0; i < count; ++i) {
    auto index = args.get<ffi::AnyBuffer>(2 * i);
    auto blocks = args.get<ffi::AnyBuffer>(2 * i + 1);
    auto result = results.get<FloatMatrix>(i);
    if (!index.has_value() || !blocks.has_value() || !result.has_value()) return wrong("results must be float32 [m, n]");
    matrices[i] = check.matrix(check.format(formats, i), *index, *blocks, k, 0);
    if (check.failed()) return check.error();
    const auto dims = (*result)->dimensions();
    if (!check.require(dims[0] == m && dims[1] == matrices[i].n, "a result does not fit its matrix")) return check.error();
    y[i] = (*result)->typed_data();
  }
  return with_pool(threads, [&](ferrum::Pool& pool) { ferrum::matmuls(pool, how, x.typed_data(), m, k, matrices, int(count), y); });
}

ffi::Error swiglu(ffi::ThreadPool threads, FloatMatrix x, ffi::AnyBuffer gate_index, ffi::AnyBuffer gate_blocks,
                  ffi::AnyBuffer up_index, ffi::AnyBuffer up_blocks, ffi::Result<FloatMatrix> y, std::string_view formats,
                  std::string_view arithmetic) {
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1];
  Checker check;
  const ferrum::Arithmetic how = check.arithmetic(arithmetic);
  const Matrix gate = check.matrix(check.format(formats, 0), gate_index, gate_blocks, k, 0);
  const Matrix up = check.matrix(check.format(formats, 1), up_index, up_blocks, k, 0);
  if (check.failed()) return check.error();
  if (gate.n != up.n || y->dimensions()[0] != m || y->dimensions()[1] != gate.n) return wrong("gate, up and y do not fit");
  return with_pool(threads, [&](ferrum::Pool& pool) { ferrum::swiglu(pool, how, x.typed_data(), m, k, gate, up, y->typed_data()); });
}

ffi::Error experts(ffi::ThreadPool threads, FloatMatrix x, IntMatrix ids, FloatMatrix weights, ffi::AnyBuffer gate_index,
                   ffi::AnyBuffer gate_blocks, ffi::AnyBuffer up_index, ffi::AnyBuffer up_blocks, ffi::AnyBuffer down_index,
                   ffi::AnyBuffer down_blocks, ffi::Result<FloatMatrix> y, std::string_view formats,
                   std::string_view arithmetic) {
  const int64_t tokens = x.dimensions()[0], k = x.dimensions()[1], top_k = ids.dimensions()[1];
  Checker check;
  const ferrum::Arithmetic how = check.arithmetic(arithmetic);
  const auto stack = gate_blocks.dimensions();
  if (stack.size() < 3 || stack[stack.size() - 3] < 1) return wrong("blocks of experts are [..., experts, rows, width]");
  const int64_t num_experts = stack[stack.size() - 3];
  const Matrix gate = check.matrix(check.format(formats, 0), gate_index, gate_blocks, k, num_experts);
  const Matrix up = check.matrix(check.format(formats, 1), up_index, up_blocks, k, num_experts);
  const Matrix down = check.matrix(check.format(formats, 2), down_index, down_blocks, gate.n, num_experts);
  if (check.failed()) return check.error();
  if (gate.n != up.n || down.n != k) return wrong("gate, up and down do not fit");
  if (ids.dimensions()[0] != tokens || weights.dimensions()[0] != tokens || weights.dimensions()[1] != top_k ||
      y->dimensions()[0] != tokens || y->dimensions()[1] != k)
    return wrong("x, ids, weights and y do not fit");
  const int32_t* id = ids.typed_data();
  for (int64_t i = 0; i < tokens * top_k; ++i)
    if (id[i] < 0 || id[i] > num_experts)
      return wrong("expert " + std::to_string(id[i]) + " of " + std::to_string(num_experts));
  return with_pool(threads, [&](ferrum::Pool& pool) {
    ferrum::experts(pool, how, x.typed_data(), tokens, k, id, weights.typed_data(), top_k, num_experts, gate, up, down,
                    y->typed_data());
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

using IntVector = ffi::Buffer<ffi::S32, 1>;

// `places`, of each layer and part: number of the operand among `stacks` (-1: none) and place in its first axis. `kept`: the
// pages of the cache, the scales of an int8 one, and where they are wanted experts and weights [routers, tokens, top_k].
ffi::Error layers(ffi::ThreadPool threads, FloatMatrix x, IntVector slots, IntVector positions, IntVector query_starts,
                  IntVector kv_lengths, IntMatrix page_table, FloatMatrix cosine, FloatMatrix sine, ffi::RemainingArgs stacks,
                  ffi::Result<FloatMatrix> y, ffi::RemainingRets kept, ffi::Span<const int64_t> places, std::string_view formats,
                  std::string_view kv_dtype, int64_t top_k, int64_t window, float eps, float scale, float expert_scale,
                  bool normalise) {
  const int64_t tokens = x.dimensions()[0], hidden = x.dimensions()[1];
  Checker check;
  ferrum::KvCache store{};
  check.require(find_kv_type(kv_dtype, store.type), "no kernels for this dtype of the KV cache");
  auto pages = kept.get<ffi::AnyBuffer>(0);
  if (!pages.has_value() || (*pages)->dimensions().size() != 5 || places.size() % (2 * kRoles)) return wrong("operands do not fit");
  const auto dims = (*pages)->dimensions();
  const int64_t count = int64_t(places.size()) / (2 * kRoles);
  store = {static_cast<uint8_t*>((*pages)->untyped_data()), nullptr, store.type, dims[1], dims[2], dims[3] / 2, dims[4]};
  if (store.type == ferrum::KvType::int8) {
    auto scales = kept.get<ffi::Buffer<ffi::F32, 3>>(1);
    if (!scales.has_value()) return wrong("an int8 cache needs its scales");
    store.scales = (*scales)->typed_data();
  }
  check.require(int64_t(ffi::ByteWidth((*pages)->element_type())) == store.item_bytes(), "the cache holds other elements");
  check.require(count <= dims[0] && store.head_dim % 16 == 0 && store.num_pages > 0, "the cache does not fit");
  ferrum::Batch batch{tokens, page_table.dimensions()[0], page_table.dimensions()[1], slots.typed_data(), positions.typed_data(),
                      query_starts.typed_data(), kv_lengths.typed_data(), page_table.typed_data(), cosine.typed_data(),
                      sine.typed_data(), cosine.dimensions()[1]};
  check.require(slots.dimensions()[0] == tokens && positions.dimensions()[0] == tokens && cosine.dimensions()[0] == tokens &&
                    sine.dimensions()[0] == tokens && sine.dimensions()[1] == batch.rotated && 2 * batch.rotated <= store.head_dim &&
                    query_starts.dimensions()[0] == batch.sequences + 1 && kv_lengths.dimensions()[0] == batch.sequences &&
                    y->dimensions()[0] == tokens && y->dimensions()[1] == hidden && hidden % 32 == 0,
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
  if (const size_t first = store.scales ? 2 : 1; kept.size() > first) {
    auto experts = kept.get<ffi::Buffer<ffi::S32, 3>>(first);
    auto shares = kept.get<ffi::Buffer<ffi::F32, 3>>(first + 1);
    if (!experts.has_value() || !shares.has_value()) return wrong("what records the routing does not fit");
    const auto one = (*experts)->dimensions(), other = (*shares)->dimensions();
    wanted = one[0];
    check.require(one == other && one[1] == tokens && one[2] == top_k, "what records the routing does not fit");
    ids = (*experts)->typed_data(), weights = (*shares)->typed_data();
  }
  for (int64_t l = 0; l < count && !check.failed(); ++l) {
    ferrum::Layer& layer = all[size_t(l)];
    const int64_t rows = l * store.num_pages * store.page_size * 2 * store.kv_heads;
    caches[size_t(l)].pages += rows * store.head_dim * store.item_bytes();
    if (store.scales) caches[size_t(l)].scales += rows;
    const int64_t* place = places.begin() + l * 2 * kRoles;
    const auto at = [&](Role role) { return stacks.get<ffi::AnyBuffer>(size_t(place[2 * role])); };
    const auto has = [&](Role role) { return place[2 * role] >= 0; };
    const auto vector = [&](Role role, int64_t n) -> const float* {
      if (!has(role)) return nullptr;
      auto stack = at(role);
      const bool fits = stack.has_value() && stack->element_type() == ffi::F32 && stack->dimensions().size() == 2 &&
                        stack->dimensions()[1] == n && place[2 * role + 1] < stack->dimensions()[0];
      if (!check.require(fits, "a norm or bias does not fit")) return nullptr;
      return static_cast<const float*>(stack->untyped_data()) + place[2 * role + 1] * n;
    };
    const auto matrix = [&](Role role, int64_t k, int64_t n, int64_t experts = 0) {
      auto stack = has(role) ? at(role) : stacks.get<ffi::AnyBuffer>(stacks.size());
      if (!check.require(stack.has_value(), "a matrix is missing")) return Matrix{};
      const Matrix found = check.matrix(check.format(formats, size_t(place[2 * role])), place[2 * role + 1], *stack, k, experts);
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
  std::memcpy(y->typed_data(), x.typed_data(), size_t(tokens * hidden) * sizeof(float));
  return with_pool(threads, [&](ferrum::Pool& pool) { ferrum::decoder_layers(pool, shape, batch, all.data(), caches.data(), count, y->typed_data()); });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ferrum_layers, layers,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<FloatMatrix>()
                                  .Arg<IntVector>()
                                  .Arg<IntVector>()
                                  .Arg<IntVector>()
                                  .Arg<IntVector>()
                                  .Arg<IntMatrix>()
                                  .Arg<FloatMatrix>()
                                  .Arg<FloatMatrix>()
                                  .RemainingArgs()
                                  .Ret<FloatMatrix>()
                                  .RemainingRets()
                                  .Attr<ffi::Span<const int64_t>>("places")
                                  .Attr<std::string_view>("formats")
                                  .Attr<std::string_view>("kv_dtype")
                                  .Attr<int64_t>("top_k")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("eps")
                                  .Attr<float>("scale")
                                  .Attr<float>("expert_scale")
                                  .Attr<bool>("normalise"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(ferrum_experts, experts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<FloatMatrix>()
                                  .Arg<IntMatrix>()
                                  .Arg<FloatMatrix>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<FloatMatrix>()
                                  .Attr<std::string_view>("formats")
                                  .Attr<std::string_view>("arithmetic"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(ferrum_matmuls, matmuls,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<FloatMatrix>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<std::string_view>("formats")
                                  .Attr<std::string_view>("arithmetic"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(ferrum_swiglu, swiglu,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<FloatMatrix>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<FloatMatrix>()
                                  .Attr<std::string_view>("formats")
                                  .Attr<std::string_view>("arithmetic"));

extern "C" const char* ferrum_native_isa() { return ferrum::isa(); }
extern "C" int ferrum_native_set_isa(const char* name) { return ferrum::set_isa(name) ? 1 : 0; }
