// Reads tests/golden.txt, whose header describes its records, and runs them against a backend:
//   void project(const ProjectJob&), bool apply(const ApplyJob&), void basis(const BasisJob&)
#pragma once

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "core/job.h"
#include "testing.h"

namespace golden {

using ferret::Basis;
using ferret::Dtype;

inline Basis basis_of(const std::string& name) {
  return name == "rademacher" ? Basis::rademacher : name == "uniform" ? Basis::uniform : Basis::gaussian;
}

inline Dtype dtype_of(const std::string& name) {
  return name == "f32"    ? Dtype::float32
         : name == "bf16" ? Dtype::bfloat16
         : name == "f16"  ? Dtype::float16
                          : Dtype::float64;
}

inline uint64_t hex(const std::string& token) { return std::strtoull(token.c_str(), nullptr, 16); }

// Elements of a dtype as raw bytes.
struct Array {
  Dtype dtype;
  std::vector<char> bytes;

  Array(Dtype type, int64_t count) : dtype(type), bytes(static_cast<size_t>(count * ferret::size_of(type))) {}
  int64_t count() const { return static_cast<int64_t>(bytes.size()) / ferret::size_of(dtype); }
  ferret::TensorRef ref() { return {bytes.data(), dtype}; }
  uint64_t pattern(int64_t i) const {
    uint64_t bits = 0;
    std::memcpy(&bits, &bytes[static_cast<size_t>(i * ferret::size_of(dtype))], ferret::size_of(dtype));
    return bits;
  }
  void set(int64_t i, double x) {
    void* to = &bytes[static_cast<size_t>(i * ferret::size_of(dtype))];
    switch (dtype) {
      case Dtype::float32: return ferret::store_rounded(x, static_cast<float*>(to));
      case Dtype::bfloat16: return ferret::store_rounded(x, static_cast<ferret::bfloat16_t*>(to));
      case Dtype::float16: return ferret::store_rounded(x, static_cast<ferret::float16_t*>(to));
      case Dtype::float64: return ferret::store_rounded(x, static_cast<double*>(to));
    }
  }
};

// The exact test data that starts at `x`.
inline Array input(Dtype dtype, int64_t count, uint64_t x) {
  const int p = dtype == Dtype::float32 ? 24 : dtype == Dtype::bfloat16 ? 8 : dtype == Dtype::float16 ? 11 : 53;
  Array array(dtype, count);
  for (int64_t i = 0; i < count; ++i) {
    x = x * 6364136223846793005u + 1442695040888963407u;
    const auto h = static_cast<double>(static_cast<int64_t>(x >> (64 - p)) - (int64_t{1} << (p - 1)));
    array.set(i, std::ldexp(h, -(p - 1 + static_cast<int>((x >> 5) % 8))));
  }
  return array;
}

// Copies of `from` in the working precision.
inline Array widened(const Array& from, bool wide) {
  Array to(wide ? Dtype::float64 : Dtype::float32, from.count());
  for (int64_t i = 0; i < from.count(); ++i) {
    const uint64_t bits = from.pattern(i);
    if (from.dtype == Dtype::float64) {
      double x;
      std::memcpy(&x, &bits, sizeof x);
      to.set(i, x);
    } else {
      const float x = from.dtype == Dtype::float32 ? ferret::bits_to_float(static_cast<uint32_t>(bits))
                      : from.dtype == Dtype::bfloat16
                          ? ferret::to_float(ferret::bfloat16_t{static_cast<uint16_t>(bits)})
                          : ferret::to_float(ferret::float16_t{static_cast<uint16_t>(bits)});
      to.set(i, x);
    }
  }
  return to;
}

class Record {
 public:
  explicit Record(const std::string& line) : line_(line) {
    std::istringstream stream(line);
    std::string token;
    bool behind = false;
    while (stream >> token) {
      if (token == ":") {
        behind = true;
      } else {
        (behind ? values_ : arguments_).push_back(token);
      }
    }
  }
  const std::string& kind() const { return arguments_[0]; }
  const std::string& argument(int i) const { return arguments_.at(static_cast<size_t>(i)); }
  int64_t integer(int i) const { return std::strtoll(argument(i).c_str(), nullptr, 10); }
  double real(int i) const { return std::strtod(argument(i).c_str(), nullptr); }
  const std::vector<std::string>& values() const { return values_; }
  std::string name() const { return line_.substr(0, line_.find(" :")); }

  // Compares with `checksum first-values..`.
  void check(const Array& result, const std::string& who) const {
    uint64_t checksum = 0xCBF29CE484222325u;
    for (int64_t i = 0; i < result.count(); ++i) checksum = (checksum ^ result.pattern(i)) * 0x100000001B3u;
    bool equal = checksum == hex(values_.at(0));
    for (size_t i = 1; i < values_.size(); ++i) equal &= result.pattern(static_cast<int64_t>(i) - 1) == hex(values_[i]);
    testing::check(equal, who + ": " + name());
  }

 private:
  std::string line_;
  std::vector<std::string> arguments_, values_;
};

inline std::vector<Record> read(const char* path) {
  std::ifstream file(path);
  std::vector<Record> records;
  for (std::string line; std::getline(file, line);) {
    if (!line.empty() && line[0] != '#') records.emplace_back(line);
  }
  testing::check(!records.empty(), std::string("records in ") + path);
  return records;
}

template <class Backend>
void run_project(const Record& r, Backend& backend, const std::string& who) {
  const int64_t offset = r.integer(4), numel = r.integer(5), count = r.integer(6), columns = r.integer(7);
  Array delta = input(dtype_of(r.argument(1)), count, hex(r.argument(8)));
  const bool wide = delta.dtype == Dtype::float64;
  Array gamma(wide ? Dtype::float64 : Dtype::float32, columns);
  const ferret::Block block = {offset, numel, columns, 0};
  const ferret::Piece piece = {0, 0, count, offset, 0};
  const ferret::TensorRef now = delta.ref();
  backend.project(ferret::ProjectJob{
      {&block, 1, &piece, 1}, &now, nullptr, {hex(r.argument(3)), basis_of(r.argument(2))}, wide, gamma.bytes.data()});
  r.check(gamma, who);
}

template <class Backend>
void run_apply(const Record& r, Backend& backend, const std::string& who) {
  const bool overwrite = r.kind() == "reconstruct", stochastic = r.kind() == "round";
  const ferret::Rounding rounding = {stochastic, stochastic ? hex(r.argument(1)) : 0};
  const int skip = stochastic ? 1 : 0;  // the seed stands in front of apply's arguments
  const Dtype dtype = dtype_of(r.argument(skip + 1));
  const Dtype gamma_dtype = dtype_of(r.argument(overwrite ? 9 : skip + 7));
  const int64_t offset = r.integer(overwrite ? 4 : skip + 3), count = r.integer(overwrite ? 6 : skip + 4);
  const int64_t numel = overwrite ? r.integer(5) : count, columns = r.integer(overwrite ? 7 : skip + 5);
  const bool wide = dtype == Dtype::float64 || gamma_dtype == Dtype::float64;
  Array param = overwrite ? Array(dtype, count) : input(dtype, count, hex(r.argument(skip + 6)));
  std::vector<ferret::Update> updates;
  Array gammas(wide ? Dtype::float64 : Dtype::float32, 0);
  const auto add_update = [&](const std::string& seed, double weight, const std::string& start) {
    const Array gamma = widened(input(gamma_dtype, columns, hex(start)), wide);
    updates.push_back({hex(seed), weight});
    gammas.bytes.insert(gammas.bytes.end(), gamma.bytes.begin(), gamma.bytes.end());
  };
  if (overwrite) {
    add_update(r.argument(3), 1.0, r.argument(8));
  } else {
    for (int64_t i = 0; i < r.integer(skip + 9); ++i) {
      const int at = skip + 10 + 3 * static_cast<int>(i);
      add_update(r.argument(at), r.real(at + 1), r.argument(at + 2));
    }
  }
  const ferret::Block block = {offset, numel, columns, 0};
  const ferret::Piece piece = {0, 0, count, offset, 0};
  const ferret::TensorRef ref = param.ref();
  const bool done = backend.apply(ferret::ApplyJob{{&block, 1, &piece, 1},
                                                   &ref,
                                                   updates.data(),
                                                   static_cast<int64_t>(updates.size()),
                                                   {gammas.bytes.data()},
                                                   columns,
                                                   basis_of(r.argument(skip + 2)),
                                                   overwrite ? 1.0 : r.real(skip + 8),
                                                   wide,
                                                   overwrite,
                                                   rounding});
  testing::check(done, who + ": apply accepts " + r.name());
  r.check(param, who);
}

template <class Backend>
void run_basis(const Record& r, Backend& backend, const std::string& who) {
  Array column(dtype_of(r.argument(1)), r.integer(7));
  backend.basis(ferret::BasisJob{{hex(r.argument(3)), basis_of(r.argument(2))},
                                 static_cast<uint32_t>(r.integer(4)),
                                 r.integer(5),
                                 r.integer(6),
                                 r.integer(7),
                                 column.ref()});
  r.check(column, who);
}

// Every record that asks for a job.
template <class Backend>
void run(const std::vector<Record>& records, Backend& backend, const std::string& who) {
  for (const Record& r : records) {
    if (r.kind() == "project") run_project(r, backend, who);
    if (r.kind() == "reconstruct" || r.kind() == "apply" || r.kind() == "round") run_apply(r, backend, who);
    if (r.kind() == "basis") run_basis(r, backend, who);
  }
}

}  // namespace golden
