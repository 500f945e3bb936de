// Tests of the CPU kernels without XLA, to be run under sanitizers: every format and instruction set of this machine
// against plain double-precision arithmetic, and bit for bit against each other.
//
// Block formats are decoded here a second time, weight by weight from their description, and weights are in arrays of exactly
// their size, so that a read beyond the last block is caught.
#include "isa.h"
#include "testing.h"

namespace testing {
namespace {

// ---- formats -----------------------------------------------------------------------------------------------------

const std::vector<std::string> kNames = [] {  // of matrices; only routers use F32
  std::vector<std::string> names;
  for (const Format& format : kFormats)
    if (format.type != Type::F32) names.push_back(format.name);
  return names;
}();

double level(int q) {
  static const int levels[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  return levels[q];
}

double fp4(int q) {
  static const int magnitudes[] = {0, 1, 2, 3, 4, 6, 8, 12};
  return q & 8 ? -magnitudes[q & 7] : magnitudes[q & 7];
}

// Weight j of a block as its scaled part and its offset: w = scaled + offset.
struct Weight {
  double scaled, offset;
};

int byte_of(uint64_t word, int i) { return int(word >> (8 * i) & 255); }

// Sign i of eight, of which the last makes the number of negative ones even.
int even_sign(uint32_t seven, int i) { return (i < 7 ? int(seven >> i) : __builtin_popcount(seven & 127)) & 1 ? -1 : 1; }

// Of the formats with few bits, and NVFP4.
Weight low_bits_weight(const std::string& f, const uint8_t* p, int j) {
  const int b = j / 32, h = j / 16, g = j / 8, i = j % 8;
  const auto bits = [&](int at, int first, int count) { return p[at + first / 8] >> (first % 8) & ((1 << count) - 1); };
  const auto two = [&](int at) { return p[at + 32 * (j / 128) + j % 32] >> (j % 128 / 32 * 2) & 3; };
  const auto word = [&](int at) { return uint32_t(p[at] | p[at + 1] << 8 | p[at + 2] << 16) | uint32_t(p[at + 3]) << 24; };
  if (f == "Q2_K") return {half(p + 80) * (p[h] & 15) * two(16), -half(p + 82) * (p[h] >> 4)};
  if (f == "Q3_K") {
    const int scale = (p[96 + h % 8] >> (h / 8 * 4) & 15) | (p[104 + h % 4] >> (h / 4 * 2) & 3) << 4;
    return {half(p + 108) * (scale - 32) * (two(32) + (p[j % 32] >> b & 1) * 4 - 4), 0};
  }
  if (f == "TQ2_0") return {half(p + 64) * (two(0) - 1), 0};
  if (f == "TQ1_0") {
    const int at = j < 160 ? j % 32 : j < 240 ? 32 + j % 16 : 48 + j % 4, digit = j < 160 ? b : j < 240 ? (j - 160) / 16 : (j - 240) / 4;
    int fraction = p[at];
    for (int k = 0; k < digit; ++k) fraction = fraction * 3 % 256;
    return {half(p + 52) * (fraction * 3 / 256 - 1), 0};
  }
  if (f == "NVFP4") {
    const int s = p[h] & 127, exponent = s >> 3, fraction = s & 7;
    const double scale = s == 127 ? 0 : exponent ? std::ldexp(8 + fraction, exponent - 10) : std::ldexp(fraction, -9);
    return {scale / 2 * fp4(p[4 + 8 * h + i] >> (4 * (g % 2)) & 15), 0};
  }
  if (f == "IQ1_S") {
    const int head = p[34 + 2 * b] | p[35 + 2 * b] << 8, row = p[2 + g] | (head >> (g % 4 * 3) & 7) << 8;
    return {half(p) * (2 * (head >> 12 & 7) + 1) * ((byte_of(kIq1SGrid[row], i) - 9) / 8.0 + (head >> 15 ? -0.125 : 0.125)), 0};
  }
  if (f == "IQ1_M") {
    const uint8_t d[] = {uint8_t(p[49] >> 4 | (p[51] & 0xf0)), uint8_t(p[53] >> 4 | (p[55] & 0xf0))};
    const int nibble = bits(32, 4 * g, 4), scale = (p[48 + h / 4 * 2] | p[49 + h / 4 * 2] << 8) >> (h % 4 * 3) & 7;
    const int row = p[g] | (nibble & 7) << 8;
    return {half(d) * (2 * scale + 1) * ((byte_of(kIq1SGrid[row], i) - 9) / 8.0 + (nibble & 8 ? -0.125 : 0.125)), 0};
  }
  if (f == "IQ2_XXS") {
    const uint32_t second = word(6 + 8 * b);
    const int magnitude = byte_of(kIq2XxsGrid[p[2 + 8 * b + g % 4]], i);
    return {half(p) * (2 * (second >> 28) + 1) / 8 * magnitude * even_sign(second >> (g % 4 * 7) & 127, i), 0};
  }
  if (f == "IQ2_XS") {
    const int row = p[2 + 2 * g] | (p[3 + 2 * g] & 1) << 8;
    return {half(p) * (2 * bits(66, 4 * h, 4) + 1) / 8 * byte_of(kIq2XsGrid[row], i) * even_sign(p[3 + 2 * g] >> 1, i), 0};
  }
  if (f == "IQ2_S") {
    const int magnitude = byte_of(kIq2SGrid[p[2 + g] | bits(66, 2 * g, 2) << 8], i);
    return {half(p) * (2 * bits(74, 4 * h, 4) + 1) / 8 * (bits(34, j, 1) ? -magnitude : magnitude), 0};
  }
  if (f == "IQ3_XXS") {
    const uint32_t second = word(66 + 4 * b);
    return {half(p) * (2 * (second >> 28) + 1) / 4 * byte_of(kIq3XxsGrid[p[2 + j / 4]], j % 4) * even_sign(second >> (g % 4 * 7) & 127, i), 0};
  }
  const int magnitude = byte_of(kIq3SGrid[p[2 + j / 4] | bits(66, j / 4, 1) << 8], j % 4);  // IQ3_S
  return {half(p) * (2 * bits(106, 4 * b, 4) + 1) * (bits(74, j, 1) ? -magnitude : magnitude), 0};
}

Weight weight(const std::string& f, const uint8_t* p, int j) {
  const auto nibble = [&](int start) { return p[start + j % 16] >> (4 * (j / 16)) & 15; };
  const auto bit = [&](int start) { return p[start + j / 8] >> (j % 8) & 1; };
  if (f == "F16") return {half(p), 0};
  if (f == "BF16") {
    const uint32_t bits = uint32_t(p[0] | p[1] << 8) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return {value, 0};
  }
  if (f == "Q4_0") return {half(p) * (nibble(2) - 8), 0};
  if (f == "Q4_1") return {half(p) * nibble(4), half(p + 2)};
  if (f == "Q5_0") return {half(p) * ((nibble(6) | bit(2) << 4) - 16), 0};
  if (f == "Q5_1") return {half(p) * (nibble(8) | bit(4) << 4), half(p + 2)};
  if (f == "Q8_0") return {half(p) * int8_t(p[2 + j]), 0};
  if (f == "IQ4_NL") return {half(p) * level(nibble(2)), 0};
  if (f == "MXFP4") return {std::ldexp(fp4(nibble(1)), p[0] - 128), 0};
  const int group = j / 32, lane = j % 32;
  if (f[0] == 'U') {  // 8-bit codes and zero points count as less by 128, which is no matter for their difference
    const bool eight = f[1] == '8', wide = f.back() == '2', brain = f.find('B') != f.npos;
    const uint8_t *zero = p + (wide ? 4 : 2), *codes = zero + (eight ? 2 : 1);
    const uint32_t bits = wide ? uint32_t(p[0] | p[1] << 8 | p[2] << 16) | uint32_t(p[3]) << 24 : uint32_t(p[0] | p[1] << 8) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    const double scale = wide || brain ? value : half(p);
    if (eight) return {scale * (codes[j] - 128), -scale * ((zero[0] | zero[1] << 8) - 128)};
    return {scale * (codes[16 * group + lane % 16] >> (4 * (lane / 16)) & 15), -scale * zero[0]};
  }
  if (f == "IQ4_XS") {
    const int low = p[4 + group / 2] >> (4 * (group % 2)) & 15, high = p[2 + group / 4] >> (2 * (group % 4)) & 3;
    const int q = p[8 + 16 * group + lane % 16] >> (4 * (lane / 16)) & 15;
    return {half(p) * ((low | high << 4) - 32) * level(q), 0};
  }
  if (f == "Q6_K") {
    const int k = j / 32 % 4;
    const uint8_t *l = p + 64 * (j / 128), *h = p + 128 + 32 * (j / 128);
    const int q = (l[32 * (k % 2) + lane] >> (4 * (k / 2)) & 15) | (h[lane] >> (2 * k) & 3) << 4;
    return {half(p + 208) * int8_t(p[192 + j / 16]) * (q - 32), 0};
  }
  if (f != "Q4_K" && f != "Q5_K") return low_bits_weight(f, p, j);
  const uint8_t* s = p + 4;
  const int scale = group < 4 ? s[group] & 63 : (s[group + 4] & 15) | s[group - 4] >> 6 << 4;
  const int offset = group < 4 ? s[group + 4] & 63 : s[group + 4] >> 4 | s[group] >> 6 << 4;
  const bool five = f == "Q5_K";
  int q = p[(five ? 48 : 16) + 32 * (group / 2) + lane] >> (4 * (group % 2)) & 15;
  if (five) q |= (p[16 + lane] >> group & 1) << 4;
  return {half(p) * scale * q, -half(p + 2) * offset};
}

// ---- references --------------------------------------------------------------------------------------------------

// One result in double precision and the largest error that float32 sums in the stated order can have.
struct Expected {
  double value, bound;
};

constexpr double kUlp = 1.0 / (1 << 24);

struct Quantized {
  std::vector<double> q, scale;
};

Quantized quantize(const float* x, int64_t k) {
  Quantized out{std::vector<double>(size_t(k)), std::vector<double>(size_t(k / 32))};
  for (int64_t b = 0; b < k / 32; ++b) {
    float top = 0;
    for (int j = 0; j < 32; ++j) top = std::fmax(top, std::fabs(x[32 * b + j]));
    out.scale[size_t(b)] = top / 127.0f;
    for (int j = 0; j < 32; ++j) out.q[size_t(32 * b + j)] = top > 0 ? std::nearbyint(x[32 * b + j] * (127.0f / top)) : 0;
  }
  return out;
}

Expected expected(const Weight* row, const float* x, int64_t k, bool int8) {
  const Quantized q = int8 ? quantize(x, k) : Quantized{};
  double value = 0, size = 0, block_scaled = 0, block_offset = 0;
  for (int64_t j = 0; j < k; ++j) {
    const Weight w = row[j];
    const double a = int8 ? q.q[size_t(j)] * q.scale[size_t(j / 32)] : x[j];
    value += a * (w.scaled + w.offset);
    block_scaled += a * w.scaled;
    block_offset += a * w.offset;
    if (!int8) size += std::fabs(a) * (std::fabs(w.scaled) + std::fabs(w.offset));
    if (int8 && j % 32 == 31) {
      size += std::fabs(block_scaled) + std::fabs(block_offset);
      block_scaled = block_offset = 0;
    }
  }
  const double sums = int8 ? double(k) / 32 / 8 * 2 : double(k) / 16;
  return {value, kUlp * (sums + 8) * size};
}

// ---- cases -----------------------------------------------------------------------------------------------------------

std::vector<float> multiply(int threads, Arithmetic how, const float* x, int64_t m, const std::vector<Matrix>& matrices) {
  int64_t width = 0;
  for (const Matrix& matrix : matrices) width += matrix.n;
  std::vector<float> y(size_t(m * width), 1e30f);
  std::vector<float*> at;
  for (int64_t i = 0, start = 0; i < int64_t(matrices.size()); start += m * matrices[size_t(i++)].n) at.push_back(y.data() + start);
  with_threads(threads, [&](Pool& pool) {
    matmuls(pool, how, x, m, matrices[0].k, matrices.data(), int(matrices.size()), at.data());
  });
  return y;
}

bool all_nan(const float* a, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (!std::isnan(a[i])) return false;
  return true;
}

const Arithmetic kBoth[] = {Arithmetic::int8, Arithmetic::float32};


constexpr int64_t kRows = 64;

void test_products(const std::string& name, int64_t n, int64_t k) {
  const Stored w = store(name, n, k);
  const Format& format = *w.matrix.format;
  std::vector<Weight> weights;
  for (int64_t block = 0; block < n * k / format.block_weights; ++block)
    for (int j = 0; j < format.block_weights; ++j)
      weights.push_back(weight(name, w.blocks.data() + block * format.block_bytes, j));
  std::vector<float> x = random_floats(kRows * k);
  for (int64_t j = 0; j < k; ++j) x[size_t(j)] = 0;          // a row of zeros
  for (int64_t j = 0; j < k; ++j) x[size_t(k + j)] *= 1e-40f;  // one of subnormals
  for (Arithmetic how : kBoth) {
    const bool int8 = how == Arithmetic::int8 && !format.plain();
    std::vector<float> first;
    for (const std::string& isa : isas) {
      set_isa(isa.c_str());
      const std::string what = name + " " + std::to_string(n) + " x " + std::to_string(k) + (int8 ? " int8 " : " float32 ") + isa;
      const std::vector<float> y = multiply(1, how, x.data(), kRows, {w.matrix});
      if (first.empty()) {
        first = y;
        for (int64_t r = 0; r < kRows; r += n > 33 ? 18 : 6)  // row 1 is too small to be quantized
          for (int64_t i = 0; i < n; ++i) {
            const Expected e = expected(weights.data() + i * k, x.data() + r * k, k, int8);
            const double error = std::fabs(e.value - double(y[size_t(r * n + i)]));
            check(error <= e.bound, what + ": row " + std::to_string(r) + " is off by " + std::to_string(error));
          }
      }
      check(same(first, y), what + ": other bits than " + isas[0]);
      for (int64_t m : {1, 2, 3, 8, 17}) {
        const int64_t from = kRows - m - 3;
        const std::vector<float> part = multiply(1, how, x.data() + from * k, m, {w.matrix});
        check(same(part.data(), y.data() + from * n, m * n), what + ": other bits for " + std::to_string(m) + " rows");
      }
    }
  }
}

void test_threads() {
  const Stored a = store("Q4_K", 700, 256), b = store("F16", 33, 256), c = store("Q6_K", 500, 256);
  const std::vector<float> x = random_floats(17 * 256);
  for (const std::string& isa : isas) {
    set_isa(isa.c_str());
    for (int way = 0; way < 4; ++way) {
      const Arithmetic how = way & 1 ? Arithmetic::int8x2 : Arithmetic::int8;
      const int64_t m = way & 2 ? 17 : 1;
      const std::vector<float> alone = multiply(1, how, x.data(), m, {a.matrix, b.matrix, c.matrix});
      int64_t start = 0;
      for (const Matrix& matrix : {a.matrix, b.matrix, c.matrix}) {
        const std::vector<float> one = multiply(1, how, x.data(), m, {matrix});
        check(same(one.data(), alone.data() + start, m * matrix.n), isa + ": matrices together have other bits than alone");
        start += m * matrix.n;
      }
      for (int threads : {2, 3, 4})
        check(same(alone, multiply(threads, how, x.data(), m, {a.matrix, b.matrix, c.matrix})),
              isa + ": other bits with " + std::to_string(threads) + " threads");
    }
  }
}

void test_not_finite() {
  const float bad[] = {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                       -std::numeric_limits<float>::infinity()};
  for (const char* name : {"Q4_1", "Q8_0", "Q6_K", "Q2_K", "IQ1_S", "BF16"}) {
    const int64_t n = 3, k = 512, m = 20;
    const Stored w = store(name, n, k);
    std::vector<float> x = random_floats(m * k);
    for (Arithmetic how : {Arithmetic::int8, Arithmetic::int8x2, Arithmetic::float32})
      for (const std::string& isa : isas) {
        set_isa(isa.c_str());
        const std::vector<float> clean = multiply(2, how, x.data(), m, {w.matrix});
        for (float value : bad)
          for (int64_t row : {0, 7, 19}) {
            std::vector<float> spoilt = x;
            spoilt[size_t(row * k + 300)] = value;
            const std::vector<float> y = multiply(2, how, spoilt.data(), m, {w.matrix});
            const std::string what = std::string(name) + " " + isa + ": ";
            check(all_nan(y.data() + row * n, n), what + "a row that is not finite must give NaN");
            check(same(y.data(), clean.data(), row * n), what + "it must not touch earlier rows");
            check(same(y.data() + (row + 1) * n, clean.data() + (row + 1) * n, (m - row - 1) * n),
                  what + "it must not touch later rows");
          }
        // The largest finite values.
        std::vector<float> large(size_t(k), std::numeric_limits<float>::max());
        multiply(1, how, large.data(), 1, {w.matrix});
      }
  }
}

// A hidden row as `more` says, element by element.
std::vector<float> with_additions(std::vector<float> gate, std::vector<float> up, const Additions& more, int64_t e) {
  const size_t n = gate.size();
  std::vector<float> y(n);
  for (size_t i = 0; i < n; ++i) {
    gate[i] += more.gate[size_t(e) * n + i], up[i] += more.up[size_t(e) * n + i];
    current_isa().clamped(&gate[i], &up[i], 1, more.limit, more.alpha, &y[i]);
    const double g = gate[i] > more.limit ? more.limit : gate[i], u = up[i] > more.limit ? more.limit : up[i] < -more.limit ? -more.limit : up[i];
    const double exact = (u + 1) * g / (1 + std::exp(-double(more.alpha) * g));
    check(std::isnan(gate[i] + up[i]) ? std::isnan(y[i]) : std::abs(y[i] - exact) <= 1e-6 * (1 + std::abs(exact)), "clamped: other numbers");
  }
  return y;
}

std::vector<float> gated(int threads, Arithmetic how, const float* x, int64_t m, const Matrix& gate, const Matrix& up) {
  std::vector<float> y(size_t(m * gate.n), 1e30f);
  with_threads(threads, [&](Pool& pool) { swiglu(pool, how, x, m, gate.k, gate, up, y.data()); });
  return y;
}

void test_swiglu() {
  const int64_t n = 37, k = 256;
  std::vector<float> x = random_floats(40 * k);
  for (float& value : x) value *= 30;  // both ends of the sigmoid
  for (const auto& [first, second] : {std::pair{"Q4_K", "Q4_K"}, std::pair{"Q5_0", "F16"}, std::pair{"F16", "Q6_K"}}) {
    const Stored gate = store(first, n, k), up = store(second, n, k);
    for (Arithmetic how : kBoth) {
      std::vector<float> before;
      for (const std::string& isa : isas) {
        set_isa(isa.c_str());
        const std::string what = "swiglu " + isa;
        const std::vector<float> y = gated(1, how, x.data(), 40, gate.matrix, up.matrix);
        if (before.empty()) before = y;
        check(same(before, y), what + ": other bits than " + isas[0]);
        check(same(y, gated(3, how, x.data(), 40, gate.matrix, up.matrix)), what + ": other bits with three threads");
        for (int64_t r : {0, 17, 39})
          check(same(y.data() + r * n, gated(1, how, x.data() + r * k, 1, gate.matrix, up.matrix).data(), n),
                what + ": other bits for one row");
        const std::vector<float> a = multiply(1, how, x.data(), 40, {gate.matrix}), b = multiply(1, how, x.data(), 40, {up.matrix});
        for (size_t i = 0; i < y.size(); ++i) {
          const double value = a[i] / (1 + std::exp(-double(a[i]))) * b[i];
          check(std::fabs(value - y[i]) <= 1e-6 * std::fabs(value) + 1e-38 * (1 + std::fabs(double(a[i]) * b[i])), what + ": wrong by more than a few roundings");
        }
      }
    }
  }
}

Matrix expert_of(const Matrix& all, int64_t expert) {
  return {all.format, all.row(expert * all.n), all.n, all.k};
}

void test_experts() {
  const int64_t n = 32, k = 256, count = 5, top_k = 3;
  for (const auto& formats : {std::vector<const char*>{"Q4_K", "Q4_K", "Q8_0"}, {"Q4_1", "F16", "Q5_1"}}) {
    const Stored gate = store(formats[0], n, k, count), up = store(formats[1], n, k, count), down = store(formats[2], k, n, count);
    const std::vector<float> gate_bias = random_floats(count * n), up_bias = random_floats(count * n), down_bias = random_floats(count * k);
    for (const Additions& more : {Additions{}, Additions{gate_bias.data(), up_bias.data(), down_bias.data(), 0.75f, 1.702f}})
    for (const char* routing : {"random", "nobody", "one"})
      for (int64_t tokens : {1, 3, 30}) {
        if (tokens > 1 && routing[0] == 'n') continue;
        std::vector<float> x = random_floats(tokens * k), weights = random_floats(tokens * top_k);
        if (tokens == 30) x[size_t(7 * k + 5)] = std::numeric_limits<float>::quiet_NaN();
        std::vector<int32_t> ids(size_t(tokens * top_k));
        for (auto& id : ids) id = routing[0] == 'r' ? int32_t(rng() % (count + 1)) : routing[0] == 'n' ? int32_t(count) : 3;
        for (Arithmetic how : kBoth) {
          // From the other operations, one row at a time.
          set_isa(isas[0].c_str());
          std::vector<float> wanted(size_t(tokens * k), 0.0f);
          for (int64_t t = 0; t < tokens; ++t)
            for (int64_t slot = 0; slot < top_k; ++slot) {
              const int32_t e = ids[size_t(t * top_k + slot)];
              if (e == count) continue;
              const Matrix of_gate = expert_of(gate.matrix, e), of_up = expert_of(up.matrix, e);
              const float* row = x.data() + t * k;
              const std::vector<float> hidden = !more.gate ? gated(1, how, row, 1, of_gate, of_up)
                                                           : with_additions(multiply(1, how, row, 1, {of_gate}), multiply(1, how, row, 1, {of_up}), more, e);
              std::vector<float> part = multiply(1, how, hidden.data(), 1, {expert_of(down.matrix, e)});
              for (int64_t i = 0; more.down && i < k; ++i) part[size_t(i)] += more.down[e * k + i];
              for (int64_t i = 0; i < k; ++i)
                wanted[size_t(t * k + i)] =
                    std::fma(weights[size_t(t * top_k + slot)], part[size_t(i)], wanted[size_t(t * k + i)]);
            }
          for (const std::string& isa : isas)
            for (int threads : {1, 3}) {
              set_isa(isa.c_str());
              std::vector<float> y(size_t(tokens * k), 1e30f);
              with_threads(threads, [&](Pool& pool) {
                experts(pool, how, x.data(), tokens, k, ids.data(), weights.data(), top_k, count, gate.matrix, up.matrix,
                        down.matrix, more, y.data());
              });
              const std::string what = "experts, " + std::string(routing) + ", " + std::to_string(tokens) + " tokens, " + isa;
              for (int64_t t = 0; t < tokens; ++t) {
                const bool spoilt = std::isnan(wanted[size_t(t * k)]);
                check(spoilt ? all_nan(y.data() + t * k, k) : same(y.data() + t * k, wanted.data() + t * k, k),
                      what + ": other bits than its parts");
              }
            }
        }
      }
  }
}

// Each index of each loop is run once, for any number of threads, including helpers that arrive late.
void test_pool() {
  for (int threads : {1, 2, 3, 4})
    with_threads(threads, [&](Pool& pool) {
      for (int64_t count : {0, 1, 2, 3, 5, 64, 65, 1000, 3, 1}) {
        std::vector<std::atomic<int>> runs(static_cast<size_t>(count));
        parallel(pool, count, [&](int64_t i) { runs[size_t(i)].fetch_add(1); });
        for (const std::atomic<int>& times : runs) check(times == 1, "pool: an index was not run once");
      }
    });
}

}  // namespace
}  // namespace testing

using namespace testing;

int main(int count, char**) {
  for (const char* isa : {"portable", "avx2", "avx512_vnni", "amx", "neon_dotprod", "neon_i8mm"})
    if (set_isa(isa)) isas.push_back(isa);
  check(!set_isa("abacus"), "an unknown instruction set must be refused");
  check(find_format("Q9_K", 4) == nullptr, "an unknown format must be refused");
  Workers threads(3);
  workers = &threads;
  for (const std::string& name : kNames) {
    const int block = find_format(name.c_str(), name.size())->block_weights;
    for (const auto& [n, k] : {std::pair{1, 32}, std::pair{5, 96}, std::pair{33, 288}, std::pair{130, 32}})
      test_products(name, n, block == 256 ? k == 32 ? 256 : 512 : (k + block - 1) / block * block);
    if (block == 1) test_products(name, 5, 7);
  }
  test_pool();
  test_threads();
  test_not_finite();
  test_swiglu();
  test_experts();
  test_layers(count > 1);  // with any argument: fewer of the slow ones
  test_delta_net();
  for (const std::string& isa : isas) std::printf("%s ", isa.c_str());
  std::printf("%s: %d failures\n", "tested", failures);
  return failures != 0;
}
