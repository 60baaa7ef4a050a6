// The threads that the tests give to the CPU backend.
#pragma once

#include <thread>
#include <vector>

#include "cpu/cpu.h"

namespace testing {

inline ferret::cpu::Threads threads(int count) {
  return {count, [count](const std::function<void()>& worker) {
            std::vector<std::thread> pool;
            for (int i = 0; i < count; ++i) pool.emplace_back(worker);
            for (std::thread& thread : pool) thread.join();
          }};
}

}  // namespace testing
