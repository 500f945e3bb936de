// The gated delta net: against double precision, and bit for bit on any instruction set, any threads and any cut into steps.
#include "testing.h"

namespace testing {
namespace {

constexpr int64_t kPlaces = 3;

// A text of some tokens, and the state of every place.
struct Text {
  DeltaNet net;
  int64_t tokens;
  std::vector<float> qkv, log_decay, beta, taps;

  Text(int64_t keys, int64_t heads, int64_t key_dim, int64_t value_dim, int64_t count, bool tiled)
      : net{keys, heads, key_dim, value_dim, 4, 2 * keys * key_dim + heads * value_dim, tiled}, tokens(count),
        qkv(random_floats(count * net.channels)), log_decay(random_floats(count * heads)), beta(random_floats(count * heads)),
        taps(random_floats(net.channels * net.taps)) {
    for (float& value : log_decay) value = -std::fabs(value);
    for (float& value : beta) value = 1 / (1 + std::exp(-value));
  }
  int64_t kept() const { return (net.taps - 1) * net.channels; }
  int64_t size() const { return net.heads * net.key_dim * net.value_dim; }
};

struct Result {
  std::vector<float> out, tails, memories;
  bool operator==(const Result& other) const {
    return same(out, other.out) && same(tails, other.tails) && same(memories, other.memories);
  }
};

// The text at place 1, in steps that end at `cuts`; with `keep`, the state after each token also at place 2.
Result run(const Text& text, const std::vector<int32_t>& cuts, int threads, bool keep) {
  const float nan = std::numeric_limits<float>::quiet_NaN();  // of places that are not read
  Result result{std::vector<float>(size_t(text.tokens * text.net.heads * text.net.value_dim)),
                std::vector<float>(size_t(kPlaces * text.kept()), nan), std::vector<float>(size_t(kPlaces * text.size()), nan)};
  const int32_t reads[] = {1};
  int32_t begin = 0;
  for (const int32_t end : cuts) {
    const int32_t starts[] = {0, end - begin};
    std::vector<int32_t> writes(size_t(end - begin), keep ? 2 : -1);
    writes.back() = 1;
    const bool begins[] = {begin == 0};
    with_threads(threads, [&](Pool& pool) {
      delta_net(pool, text.net, text.qkv.data() + begin * text.net.channels, text.log_decay.data() + begin * text.net.heads,
                text.beta.data() + begin * text.net.heads, text.taps.data(), {1, starts, reads, writes.data(), begins},
                result.tails.data(), result.memories.data(), result.out.data() + begin * text.net.heads * text.net.value_dim);
    });
    begin = end;
  }
  return result;
}

double channel(const Text& text, int64_t t, int64_t c) {
  double sum = 0;
  for (int64_t i = 0; i < text.net.taps; ++i)
    if (const int64_t from = t - text.net.taps + 1 + i; from >= 0)
      sum += double(text.taps[size_t(c * text.net.taps + i)]) * double(text.qkv[size_t(from * text.net.channels + c)]);
  return sum / (1 + std::exp(-sum));
}

void check_against_double(const Text& text, const Result& result) {
  const DeltaNet& net = text.net;
  const int64_t dk = net.key_dim, dv = net.value_dim;
  double largest = 0, error = 0;
  for (int64_t h = 0; h < net.heads; ++h) {
    const int64_t of_key = net.tiled ? h % net.keys : h / (net.heads / net.keys);
    std::vector<double> memory(size_t(dk * dv)), q(static_cast<size_t>(dk)), k(static_cast<size_t>(dk));
    for (int64_t t = 0; t < text.tokens; ++t) {
      double norms[2] = {1e-6, 1e-6};
      for (int64_t i = 0; i < dk; ++i) {
        q[size_t(i)] = channel(text, t, of_key * dk + i), k[size_t(i)] = channel(text, t, (net.keys + of_key) * dk + i);
        norms[0] += q[size_t(i)] * q[size_t(i)], norms[1] += k[size_t(i)] * k[size_t(i)];
      }
      const double decay = std::exp(double(text.log_decay[size_t(t * net.heads + h)])), beta = text.beta[size_t(t * net.heads + h)];
      for (int64_t j = 0; j < dv; ++j) {
        double seen = 0, out = 0;
        for (int64_t i = 0; i < dk; ++i) seen += k[size_t(i)] / std::sqrt(norms[1]) * memory[size_t(i * dv + j)] * decay;
        const double wrong = beta * (channel(text, t, 2 * net.keys * dk + h * dv + j) - seen);
        for (int64_t i = 0; i < dk; ++i) {
          double& value = memory[size_t(i * dv + j)];
          value = value * decay + k[size_t(i)] / std::sqrt(norms[1]) * wrong;
          out += q[size_t(i)] / std::sqrt(norms[0]) * value;
        }
        out /= std::sqrt(double(dk));
        largest = std::fmax(largest, std::fabs(out));
        error = std::fmax(error, std::fabs(out - double(result.out[size_t((t * net.heads + h) * dv + j)])));
      }
    }
  }
  check(error <= 1e-5 * largest, "delta net: error " + std::to_string(error) + " of " + std::to_string(largest));
}

void check_text(const Text& text) {
  const auto last = int32_t(text.tokens);
  std::vector<int32_t> each;
  for (int32_t end = 1; end <= last; ++end) each.push_back(end);
  set_isa(isas[0].c_str());
  const Result once = run(text, {last}, 1, false), kept = run(text, {last}, 1, true);
  check_against_double(text, once);
  check(same(once.out, kept.out), "delta net: other bits with states kept in between");
  for (const std::string& isa : isas) {
    set_isa(isa.c_str());
    check(run(text, {last}, 1, false) == once, isa + ": delta net, other bits");
    check(run(text, {1, 3, last - 1, last}, 4, false) == once, isa + ": delta net, other bits in steps");
    check(run(text, each, 2, true).out == once.out, isa + ": delta net, other bits token by token");
    check(run(text, {last}, 3, true) == kept, isa + ": delta net, other states in between");
  }
}

}  // namespace

void test_delta_net() {
  check_text(Text(2, 6, 16, 32, 9, false));
  check_text(Text(2, 4, 32, 16, 7, true));
  check_text(Text(1, 2, 48, 112, 6, true));
}

}  // namespace testing
