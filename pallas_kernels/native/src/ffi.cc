// XLA's view of the kernels: three FFI handlers that check shapes, and its thread pool as a Pool.
#include <cstdint>
#include <string>
#include <string_view>

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

  // Entry `index` of the stack `blocks` [..., experts, n, stored width] as its first matrix; experts 0: no such axis.
  Matrix matrix(const ferrum::Format* format, ffi::AnyBuffer index, ffi::AnyBuffer blocks, int64_t k, int64_t experts) {
    Matrix result{format, nullptr, 0, k};
    const auto dims = blocks.dimensions();
    const size_t axes = experts ? 3 : 2;
    if (!format || !require(dims.size() >= axes, "blocks have too few axes")) return result;
    if (!require(index.element_type() == ffi::S32 && index.element_count() == 1, "an index must be one int32")) return result;
    const int64_t item = int64_t(ffi::ByteWidth(blocks.element_type()));
    const int64_t n = dims[dims.size() - 2], width = dims.back() * item;
    if (!require(k % format->block_weights == 0 && width == format->row_bytes(k),
                 std::string(format->name) + " rows of " + std::to_string(width) + " bytes do not hold " +
                     std::to_string(k) + " weights"))
      return result;
    if (experts && !require(dims[dims.size() - 3] == experts, "stacks of different numbers of experts")) return result;
    int64_t layers = 1;
    for (size_t i = 0; i + axes < dims.size(); ++i) layers *= dims[i];
    const int64_t layer = *static_cast<const int32_t*>(index.untyped_data());
    if (!require(layer >= 0 && layer < layers, "index " + std::to_string(layer) + " of a stack of " + std::to_string(layers)))
      return result;
    result.n = n;
    result.blocks = static_cast<const uint8_t*>(blocks.untyped_data()) + layer * (experts ? experts : 1) * n * width;
    return result;
  }

 private:
  std::string words_;
};

template <typename F>
void with_pool(ffi::ThreadPool& threads, F&& run) {
  auto schedule = [&](auto task) { threads.Schedule(std::move(task)); };
  ferrum::HelpedPool<decltype(schedule)> pool(int(threads.num_threads()), schedule);
  run(pool);
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
  with_pool(threads, [&](ferrum::Pool& pool) { ferrum::matmuls(pool, how, x.typed_data(), m, k, matrices, int(count), y); });
  return ffi::Error::Success();
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
  with_pool(threads, [&](ferrum::Pool& pool) { ferrum::swiglu(pool, how, x.typed_data(), m, k, gate, up, y->typed_data()); });
  return ffi::Error::Success();
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
  with_pool(threads, [&](ferrum::Pool& pool) {
    ferrum::experts(pool, how, x.typed_data(), tokens, k, id, weights.typed_data(), top_k, num_experts, gate, up, down,
                    y->typed_data());
  });
  return ffi::Error::Success();
}

}  // namespace

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
