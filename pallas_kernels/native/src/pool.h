// A parallel region on the threads of another pool: the caller works too, and helpers join whenever that pool runs them.
//
// A helper is scheduled once per region and stays for all its loops. Indices of a loop are handed out by one atomic counter
// that also names the loop, so a late helper, even one after the end of the region, finds nothing to take. Therefore users of
// the state are counted, and the last one to leave frees it.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>
#include <thread>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ferrum {

class Region {
 public:
  static constexpr int kLoops = 16;

  explicit Region(int threads) : threads_(threads), users_(threads) {}

  // The loops of one region, the work of a helper: take indices until the region ends.
  void help() {
    for (Wait wait;;) {
      const uint64_t ticket = ticket_.load(std::memory_order_acquire);
      if (ticket == kEnded) break;
      if (take(ticket)) wait = Wait();
      else wait.once();
    }
    leave();
  }

  // Called by the caller's thread: runs a loop and waits for it. bad_alloc if an index ran out of memory on any thread.
  void run(int64_t count, void (*fn)(void*, int64_t), void* arg) {
    const uint64_t loop = ++loops_;
    Loop& slot = slots_[loop % kLoops];
    slot = {count, fn, arg};
    done_.store(0, std::memory_order_relaxed);
    ticket_.store(loop << 32, std::memory_order_release);
    while (take(ticket_.load(std::memory_order_acquire))) {
    }
    for (Wait wait; done_.load(std::memory_order_acquire) < count;) wait.once();
    if (failed_.load(std::memory_order_relaxed)) throw std::bad_alloc();
  }

  void end() {
    ticket_.store(kEnded, std::memory_order_release);
    leave();
  }


 private:
  static constexpr uint64_t kEnded = ~uint64_t{0};
  struct Loop {
    int64_t count = 0;
    void (*fn)(void*, int64_t) = nullptr;
    void* arg = nullptr;
  };

  // Takes one index of the loop that `ticket` names and runs it; false if none is left.
  bool take(uint64_t ticket) {
    const Loop& loop = slots_[(ticket >> 32) % kLoops];
    if (int64_t(ticket & 0xffffffff) >= loop.count) return false;
    if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) return true;
    try {
      loop.fn(loop.arg, striped(int64_t(ticket & 0xffffffff), loop.count));
    } catch (const std::bad_alloc&) {  // must not leave this frame: other threads still use the data of the loop
      failed_.store(true, std::memory_order_relaxed);
    }
    done_.fetch_add(1, std::memory_order_acq_rel);
    return true;
  }

  // The index of a ticket: each thread has a contiguous range of indices and takes the next one in its turn. So each thread
  // goes through memory in order, and its processor prefetches its own data.
  int64_t striped(int64_t ticket, int64_t count) const {
    const int64_t stretch = ticket % threads_, length = count / threads_, longer = count % threads_;
    return stretch * length + (stretch < longer ? stretch : longer) + ticket / threads_;
  }

  void leave() {
    if (users_.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
  }

  // Waiting for another thread: first by spinning and, if that lasts because other work has the processor, by yielding.
  class Wait {
   public:
    void once() {
      if (++times_ > 2000) return std::this_thread::yield();
#if defined(__x86_64__)
      _mm_pause();
#endif
    }

   private:
    int times_ = 0;
  };

  const int threads_;
  std::atomic<int> users_;
  std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  std::atomic<bool> failed_{false};
  uint64_t loops_ = 0;
  Loop slots_[kLoops];
};

// A Pool over anything with `schedule(callable)`; regions start with the first loop.
template <typename Schedule>
class HelpedPool final : public Pool {
 public:
  HelpedPool(int threads, Schedule schedule) : threads_(threads), schedule_(schedule) {}
  ~HelpedPool() override {
    if (region_) region_->end();
  }
  int threads() const override { return threads_; }
  void parallel_for(int64_t count, void (*fn)(void*, int64_t), void* arg) override {
    if (threads_ < 2 || count < 2) {
      for (int64_t i = 0; i < count; ++i) fn(arg, i);
      return;
    }
    if (!region_) {
      region_ = new Region(threads_);
      for (int i = 1; i < threads_; ++i) schedule_([region = region_] { region->help(); });
    }
    region_->run(count, fn, arg);
  }

 private:
  int threads_;
  Schedule schedule_;
  Region* region_ = nullptr;
};

}  // namespace ferrum
