// The threads that share one operation's chunks. Unlike a fork and join, nobody waits for a thread that has not begun: on a busy machine
// the caller simply does the chunks of a helper that the system has put aside.

#pragma once

#include <ATen/Parallel.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

// Lets the processor's other thread work while this one waits.
inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

class ThreadPool {
 public:
  static ThreadPool& shared() {
    static ThreadPool* pool = new ThreadPool(at::get_num_threads() - 1);  // never destroyed: its threads live as long as the process
    return *pool;
  }

  int threads() const { return helpers_ + 1; }

  // Calls work(i) for every i in [0, n), some at a time.
  template <typename Work>
  void each(int64_t n, const Work& work) {
    const int64_t share = std::max<int64_t>(1, n / (16 * threads()));
    run((n + share - 1) / share, [&](int64_t chunk) {
      for (int64_t i = chunk * share; i < std::min((chunk + 1) * share, n); ++i) work(i);
    });
  }

  // Calls work(chunk) for every chunk in [0, chunks), at most 65535, on any thread; returns when all are done. One caller at a time.
  template <typename Work>
  void run(int64_t chunks, const Work& work) {
    if (chunks <= 1 || helpers_ == 0) {
      for (int64_t i = 0; i < chunks; ++i) work(i);
      return;
    }
    call_ = [](const void* context, int64_t chunk) { (*static_cast<const Work*>(context))(chunk); };
    context_ = &work;
    done_.store(0, std::memory_order_relaxed);
    const uint64_t epoch = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    ticket_.store(epoch << 32 | uint64_t(chunks) << 16, std::memory_order_release);
    ticket_.notify_all();
    while (claim()) {}
    while (done_.load(std::memory_order_acquire) != uint32_t(chunks)) relax();
  }

 private:
  explicit ThreadPool(int helpers) : helpers_(helpers) {
    for (int i = 0; i < helpers; ++i) std::thread([this] { help(); }).detach();
  }

  // A ticket is 32 bits of epoch, 16 of the number of chunks, 16 of the next one. A claim that succeeds keeps the job alive until done.
  bool claim() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    while ((ticket & 0xffff) < (ticket >> 16 & 0xffff)) {
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
      call_(context_, ticket & 0xffff);
      done_.fetch_add(1, std::memory_order_release);
      return true;
    }
    return false;
  }

  // Between the operations of a step a helper stays awake, giving way to whoever wants the processor; between steps it sleeps.
  void help() {
    for (int idle = 0;; ++idle) {
      const uint64_t seen = ticket_.load(std::memory_order_acquire);
      if (claim()) idle = 0;
      else if (idle < kAwake) idle % 16 ? relax() : (void)sched_yield();
      else ticket_.wait(seen);
    }
  }

  static constexpr int kAwake = 32000;  // one or two milliseconds
  const int helpers_;
  std::atomic<uint64_t> ticket_{0};
  std::atomic<uint32_t> done_{0};
  void (*call_)(const void*, int64_t) = nullptr;
  const void* context_ = nullptr;
};
