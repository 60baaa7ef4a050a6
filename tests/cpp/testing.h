// A count of checks that passed and failed, with a line about each failure.
#pragma once

#include <cstdio>
#include <string>

namespace testing {

inline int passed = 0, failed = 0;

inline void check(bool ok, const std::string& what) {
  ++(ok ? passed : failed);
  if (!ok) std::fprintf(stderr, "FAILED %s\n", what.c_str());
}

inline int summary() {
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}

}  // namespace testing
