// Shared by the tests of the CPU kernels: threads, blocks of random weights, comparisons.
#pragma once

#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <mutex>
#include <queue>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "products.h"

namespace testing {

using namespace ferrum;

inline int failures = 0;

inline void check(bool holds, const std::string& what) {
  if (holds) return;
  if (++failures <= 20) std::printf("FAILED %s\n", what.c_str());
}

// ---- threads -----------------------------------------------------------------------------------------------------

class Workers {
 public:
  explicit Workers(int count) {
    for (int i = 0; i < count; ++i) threads_.emplace_back([this] { work(); });
  }
  ~Workers() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ended_ = true;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }
  void schedule(std::function<void()> task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push(std::move(task));
    }
    wake_.notify_one();
  }

 private:
  void work() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [this] { return ended_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      auto task = std::move(tasks_.front());
      tasks_.pop();
      lock.unlock();
      task();
    }
  }
  std::mutex mutex_;
  std::condition_variable wake_;
  std::queue<std::function<void()>> tasks_;
  std::vector<std::thread> threads_;
  bool ended_ = false;
};

inline Workers* workers;

template <typename F>
void with_threads(int threads, F&& run) {
  auto schedule = [](auto task) { workers->schedule(task); };
  HelpedPool<decltype(schedule)> pool(threads, schedule);
  run(pool);
}

// ---- random weights and rows -----------------------------------------------------------------------------------------

inline double half(const uint8_t* p) {
  const int bits = p[0] | p[1] << 8, exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double value = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return bits & 0x8000 ? -value : value;
}

inline std::mt19937 rng(1);

inline float normal() { return std::normal_distribution<float>()(rng); }

inline void put_half(uint8_t* p) {  // about 0.01, of either sign
  p[0] = uint8_t(rng());
  p[1] = uint8_t((rng() & 0x83) | 0x20);
}

inline int scale_at(const std::string& format) {
  for (const auto& [name, at] : {std::pair{"Q6_K", 208}, {"Q2_K", 80}, {"Q3_K", 108}, {"TQ1_0", 52}, {"TQ2_0", 64}})
    if (format == name) return at;
  return 0;
}

inline std::vector<uint8_t> random_blocks(const Format& format, int64_t count) {
  const std::string f = format.name;
  std::vector<uint8_t> blocks(size_t(count * format.block_bytes));
  for (auto& byte : blocks) byte = uint8_t(rng());
  for (int64_t i = 0; i < count; ++i) {
    uint8_t* p = blocks.data() + i * format.block_bytes;
    if (f == "MXFP4") p[0] = uint8_t(118 + rng() % 8);
    else if (f == "BF16") p[1] = uint8_t((p[1] & 0x80) | 0x3c);
    else if (f == "IQ1_M") p[55] = 0x20 | (p[55] & 15), p[53] &= 0x3f;  // as put_half, spread
    else if (f != "NVFP4") put_half(p + scale_at(f));
    if (f[0] == 'U') {
      const int bytes = f.back() == '2' ? 4 : 2, zero = int(rng() % (f[1] == '8' ? 257 : 17));
      if (bytes == 4 || f.find('B') != f.npos) p[bytes - 1] = uint8_t((p[bytes - 1] & 0x80) | 0x3c);
      p[bytes] = uint8_t(zero);
      if (f[1] == '8') p[bytes + 1] = uint8_t(zero >> 8);
    }
    if (f == "Q2_K") put_half(p + 82);
    if (f == "Q4_1" || f == "Q5_1" || f == "Q4_K" || f == "Q5_K") put_half(p + 2);
  }
  return blocks;
}

struct Stored {
  Matrix matrix;
  std::vector<uint8_t> blocks;
};

inline Stored store(const std::string& name, int64_t n, int64_t k, int64_t copies = 1) {
  const Format* format = find_format(name.c_str(), name.size());
  Stored stored{{format, nullptr, n, k}, random_blocks(*format, copies * n * k / format->block_weights)};
  stored.matrix.blocks = stored.blocks.data();
  return stored;
}

inline std::vector<float> random_floats(int64_t count) {
  std::vector<float> x(static_cast<size_t>(count));
  for (auto& value : x) value = normal();
  return x;
}

// ---- comparisons -----------------------------------------------------------------------------------------------------

inline bool same(const float* a, const float* b, int64_t count) { return std::memcmp(a, b, size_t(count) * sizeof(float)) == 0; }
inline bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && same(a.data(), b.data(), int64_t(a.size()));
}

inline std::vector<std::string> isas;  // of this machine

void test_layers(bool brief);  // program_layers.cc; brief: few of them, for an emulator
void test_delta_net();  // program_delta.cc

}  // namespace testing
