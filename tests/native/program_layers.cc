// Whole layers: any cut of texts into steps, any threads and any instruction set give the same bits; the values that a cache
// stores.
#include "testing.h"

namespace testing {
namespace {

// A model of two layers, dense or a mixture; the first sees `window` positions, the second all of them through other heads. In a
// hybrid the heads of the first have gates, the second is a gated delta net, and mixtures have a shared expert.
struct Model {
  LayerShape shape;
  std::vector<Stored> stored;
  std::vector<std::vector<float>> floats;
  std::vector<Layer> layers;
  int64_t kv_heads, head_dim;

  Model(int64_t heads, int64_t kv, int64_t width, int64_t experts, int64_t window, bool hybrid)
      : shape{96, 1e-6f, 1 / std::sqrt(float(width)), hybrid, {2, 1, 1, 1, 1.5f, 0, true, false}}, kv_heads(kv), head_dim(width) {
    if (experts == 6) shape.router = {2, 3, 2, 2, 1.5f, 1e-20f, true, true};  // sigmoids, the best two of three groups
    stored.reserve(40);
    floats.reserve(40);
    const auto matrix = [&](const char* name, int64_t n, int64_t k, int64_t copies = 1) {
      stored.push_back(store(name, n, k, copies));
      stored.back().matrix.blocks = stored.back().blocks.data();
      return stored.back().matrix;
    };
    const auto vector = [&](int64_t n) {
      floats.push_back(random_floats(n));
      return static_cast<const float*>(floats.back().data());
    };
    for (int l = 0; l < 2; ++l) {
      Layer layer{};
      layer.window = l ? 0 : window;
      if (l == 1) heads *= 2;
      layer.attention_norm = vector(96);
      layer.feed_forward_norm = vector(96);
      layer.query = matrix("Q8_0", (hybrid ? 2 : 1) * heads * width, 96);
      layer.key = matrix("Q4_0", kv * width, 96);
      layer.value = matrix(l ? "Q5_1" : "Q8_0", kv * width, 96);
      layer.output = matrix("Q4_1", 96, heads * width);
      if (hybrid && l == 1) {
        const DeltaNet net{2, 4, 16, 32, 3, 2 * 2 * 16 + 4 * 32, experts == 0};
        layer.recurrence = {net, {}, nullptr, nullptr, vector(net.channels * net.taps), vector(4), vector(4), vector(32),
                            matrix("Q5_0", net.channels, 96), matrix("Q8_0", 128, 96), matrix("Q4_0", experts ? 8 : 4, 96), {}};
        if (!experts) layer.recurrence.alpha = matrix("F16", 4, 96);
        for (float& value : floats[floats.size() - 3]) value = -std::fabs(value);  // the decay
        layer.output = matrix("Q8_0", 96, 128);
      }
      if (l == 0) layer.query_norm = vector(width), layer.key_norm = vector(width), layer.output_bias = vector(96);
      if (l == 1) layer.query_bias = vector(heads * width), layer.key_bias = vector(kv * width), layer.value_bias = vector(kv * width);
      layer.experts = experts;
      if (experts) {  // floats of a router are stored as bytes
        floats.push_back(random_floats(experts * 96));
        layer.router = {find_format("F32", 3), reinterpret_cast<const uint8_t*>(floats.back().data()), experts, 96};
      }
      layer.gate = matrix("Q5_0", 64, 96, experts ? experts : 1);
      layer.up = matrix("IQ4_NL", 64, 96, experts ? experts : 1);
      layer.down = matrix("F16", 96, 64, experts ? experts : 1);
      if (experts && hybrid) {
        floats.push_back(random_floats(96));
        layer.shared_router = {find_format("F32", 3), reinterpret_cast<const uint8_t*>(floats.back().data()), 1, 96};
        layer.shared_gate = matrix("Q8_0", 32, 96), layer.shared_up = matrix("Q4_1", 32, 96), layer.shared_down = matrix("Q8_0", 96, 32);
      } else if (experts && l == 1) {
        layer.sinks = vector(heads), layer.router_bias = vector(experts), layer.selection_bias = vector(experts);
        layer.more = {vector(experts * 64), vector(experts * 64), vector(experts * 96), 0.75f, 1.702f};
      }
      layers.push_back(layer);
    }
  }
};

constexpr int64_t kPageSize = 5, kPages = 751, kTablePages = 260;

// A cache of two layers whose every byte is a NaN or the largest number until it is written, and states, as many as sequences.
struct Memory {
  std::vector<uint8_t> bytes;
  std::vector<float> scales, tails, memories;
  std::vector<KvCache> caches;

  Memory(const Model& model, KvType type) {
    KvCache cache{nullptr, nullptr, type, kPages, kPageSize, model.kv_heads, model.head_dim, kTablePages, nullptr, nullptr};
    const int64_t rows = kPages * kPageSize * 2 * model.kv_heads;
    bytes.assign(size_t(2 * rows * model.head_dim * cache.item_bytes()), 0xff);
    const float nan = std::numeric_limits<float>::quiet_NaN();
    scales.assign(size_t(2 * rows), nan);
    const DeltaNet& net = model.layers[1].recurrence.net;
    tails.assign(size_t(3 * (net.taps - 1) * net.channels), nan);
    memories.assign(size_t(3 * net.heads * net.key_dim * net.value_dim), nan);
    for (int l = 0; l < 2; ++l) {
      cache.pages = bytes.data() + l * rows * model.head_dim * cache.item_bytes();
      if (type == KvType::int8) cache.scales = scales.data() + l * rows;
      caches.push_back(cache);
    }
  }
};

// Tokens from[s] .. to[s] - 1 of each sequence in one step, with a row of padding; their rows of x are changed in place. Each layer
// has pages and a rotation of its own.
void run_step(const Model& model, Memory& memory, int threads, std::vector<std::vector<float>>& x, const std::vector<int64_t>& from,
              const std::vector<int64_t>& to) {
  const int64_t sequences = int64_t(x.size()), half = model.head_dim / 2;
  std::vector<int32_t> slots[2], positions, starts = {0}, lengths, tables[2], reads, writes;
  bool begins[3];
  for (auto& table : tables) table.assign(size_t(sequences * kTablePages), 1 << 30);
  std::vector<float> rows;
  for (int64_t s = 0; s < sequences; ++s) {
    for (int64_t page = 0; page * kPageSize < to[size_t(s)]; ++page)
      for (int l : {0, 1}) tables[l][size_t(s * kTablePages + page)] = int32_t((page * sequences + s) * (l ? 11 : 7) % kPages);
    for (int64_t p = from[size_t(s)]; p < to[size_t(s)]; ++p) {
      for (int l : {0, 1})
        slots[l].push_back(tables[l][size_t(s * kTablePages + p / kPageSize)] * int32_t(kPageSize) + int32_t(p % kPageSize));
      positions.push_back(int32_t(p));
      writes.push_back(p + 1 < to[size_t(s)] ? -1 : int32_t(2 - s));
      rows.insert(rows.end(), x[size_t(s)].begin() + p * 96, x[size_t(s)].begin() + (p + 1) * 96);
    }
    starts.push_back(int32_t(positions.size()));
    lengths.push_back(int32_t(to[size_t(s)]));
    reads.push_back(int32_t(2 - s));
    begins[s] = from[size_t(s)] == 0;
  }
  writes.push_back(-1);
  for (auto& places : slots) places.push_back(-1);
  positions.push_back(0);
  rows.resize(rows.size() + 96, 1.0f);
  std::vector<float> cosine[2], sine[2];
  for (int l : {0, 1})
    for (int32_t p : positions)
      for (int64_t i = 0; i < half; ++i) {
        const double angle = p * std::pow(l ? 1e6 : 1e4, -double(i) / double(half));
        cosine[l].push_back(float(std::cos(angle)));
        sine[l].push_back(float(std::sin(angle)));
      }
  std::vector<Layer> layers = model.layers;
  for (int l : {0, 1}) {
    layers[size_t(l)].cache = memory.caches[size_t(l)];
    layers[size_t(l)].cache.kv_slots = slots[l].data();
    layers[size_t(l)].cache.page_table = tables[l].data();
    layers[size_t(l)].rope = {cosine[l].data(), sine[l].data(), half};
  }
  Recurrence& own = layers[1].recurrence;
  own.rows = {sequences, starts.data(), reads.data(), writes.data(), begins};
  own.tails = memory.tails.data(), own.memories = memory.memories.data();
  const Batch batch{int64_t(positions.size()), sequences, positions.data(), starts.data(), lengths.data(), slots[0].data()};
  with_threads(threads, [&](Pool& pool) { decoder_layers(pool, model.shape, batch, layers.data(), 2, rows.data()); });
  for (int64_t s = 0, row = 0; s < sequences; ++s)
    for (int64_t p = from[size_t(s)]; p < to[size_t(s)]; ++p, ++row)
      std::copy_n(rows.begin() + row * 96, 96, x[size_t(s)].begin() + p * 96);
}

void check_layers(KvType type, int64_t heads, int64_t kv_heads, int64_t width, int64_t experts, int64_t window, int64_t longest,
                  bool hybrid = false) {
  const Model model(heads, kv_heads, width, experts, window, hybrid);
  std::vector<std::vector<float>> texts;
  for (int64_t length : {int64_t{50}, int64_t{1}, longest}) texts.push_back(random_floats(length * 96));
  std::vector<std::vector<float>> wanted;
  for (const std::string& isa : isas) {
    set_isa(isa.c_str());
    const std::string what = "layers, cache " + std::to_string(int(type)) + ", " + std::to_string(experts) + " experts, " + isa;
    if (isa == "portable" && isas.size() > 1 && longest > 100) continue;  // takes minutes under sanitizers
    // In three steps together, the last with one token of each; then each alone in one step.
    auto together = texts;
    {
      Memory memory(model, type);
      run_step(model, memory, 3, together, {0, 0, 0}, {20, 0, longest - 20});
      run_step(model, memory, 2, together, {20, 0, longest - 20}, {49, 0, longest - 1});
      run_step(model, memory, 3, together, {49, 0, longest - 1}, {50, 1, longest});
    }
    for (const auto& rows : together)
      for (float value : rows)
        if (!std::isfinite(value)) return check(false, what + ": not finite");
    if (wanted.empty()) wanted = together;
    check(wanted == together, what + ": other bits than before");
    for (size_t s = 0; s < texts.size(); ++s) {
      Memory memory(model, type);
      std::vector<std::vector<float>> alone = {texts[s]};
      const int64_t length = int64_t(texts[s].size()) / 96;
      run_step(model, memory, 1, alone, {0}, {length});
      check(same(alone[0], together[s]), what + ": other bits alone and in one step, text " + std::to_string(s));
    }
  }
}

// Functions of single elements, in double precision.
void test_functions() {
  std::vector<float> x = random_floats(1000);
  for (size_t i = 0; i < x.size(); ++i) x[i] *= i % 2 ? 1 : 30;
  x[3] = 0, x[5] = 200, x[7] = -200;
  for (const std::string& isa : isas) {
    set_isa(isa.c_str());
    std::vector<float> sigmoids(x.size()), softpluses(x.size());
    current_isa().sigmoid(x.data(), int64_t(x.size()), sigmoids.data());
    current_isa().softplus(x.data(), int64_t(x.size()), softpluses.data());
    for (size_t i = 0; i < x.size(); ++i) {
      const double y = std::exp(-std::fabs(double(x[i]))), sigmoid = (x[i] < 0 ? y : 1) / (1 + y);
      const double softplus = std::fmax(double(x[i]), 0) + std::log1p(y);
      check(std::fabs(sigmoids[i] - sigmoid) <= 3e-7 * sigmoid + 1e-38, isa + ": sigmoid");
      check(std::fabs(softpluses[i] - softplus) <= 3e-7 * softplus + 1e-38, isa + ": softplus");
    }
  }
}

double stored_value(KvType type, const uint8_t* p) {
  if (type == KvType::float16) return half(p);
  if (type == KvType::bfloat16) {
    const uint32_t bits = uint32_t(p[0] | p[1] << 8) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  const int exponent = *p >> 3 & 15, fraction = *p & 7;
  const double value = exponent ? std::ldexp(8 + fraction, exponent - 10) : std::ldexp(fraction, -9);
  return *p & 0x80 ? -value : value;
}

// A cache stores the nearest number that it can hold, the even one of two.
void test_storing() {
  for (KvType type : {KvType::float16, KvType::bfloat16, KvType::float8_e4m3fn}) {
    const int bytes = type == KvType::float8_e4m3fn ? 1 : 2;
    std::vector<float> x(4096);
    for (size_t i = 0; i < x.size(); ++i) x[i] = std::ldexp(normal(), int(rng() % 40) - 25);
    for (int i = 0; i < 200; ++i) x[size_t(i)] = float(stored_value(type, reinterpret_cast<const uint8_t*>(&i)) * 1.03125);
    if (bytes == 1)
      for (float& value : x) value = std::fmin(std::fmax(value, -448.0f), 448.0f);
    for (const std::string& isa : isas) {
      set_isa(isa.c_str());
      std::vector<uint8_t> to(x.size() * size_t(bytes));
      current_isa().store_kv(type, x.data(), int64_t(x.size()), to.data(), nullptr);
      for (size_t i = 0; i < x.size(); ++i) {
        const uint8_t* p = to.data() + i * size_t(bytes);
        const double error = std::fabs(stored_value(type, p) - double(x[i]));
        for (int step : {-1, 1}) {
          int bits = (bytes == 2 ? p[0] | p[1] << 8 : *p) + step;
          if ((bits ^ (bits - step)) & (bytes == 2 ? 0x8000 : 0x80)) continue;
          const double other = std::fabs(stored_value(type, reinterpret_cast<const uint8_t*>(&bits)) - double(x[i]));
          if (bytes == 1 && (bits & 0x7f) == 0x7f) continue;
          check(error < other || (error == other && !(p[0] & 1)), isa + ": stored as another number than the nearest");
        }
      }
    }
  }
}

}  // namespace

void test_layers(bool brief) {
  test_storing();
  test_functions();
  if (brief) return check_layers(KvType::float16, 4, 2, 48, 5, 7, 40, true);
  for (KvType type : {KvType::float32, KvType::float16, KvType::bfloat16, KvType::int8, KvType::float8_e4m3fn})
    check_layers(type, 6, 2, 32, 0, 0, 90);
  check_layers(KvType::float16, 4, 4, 80, 5, 0, 75);
  check_layers(KvType::float16, 4, 1, 16, 0, 37, 90);
  check_layers(KvType::float16, 2, 1, 16, 0, 0, 1040);  // five ranges of positions
  check_layers(KvType::float16, 2, 1, 16, 6, 7, 300);
  check_layers(KvType::float16, 4, 2, 32, 0, 0, 90, true);
  check_layers(KvType::float32, 2, 1, 48, 5, 0, 300, true);
}

}  // namespace testing
