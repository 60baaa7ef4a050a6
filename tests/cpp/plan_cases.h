// Plans of odd shape with random tensors, and what project and apply must make of them by contract.h.
#pragma once

#include <cstring>
#include <vector>

#include "contract.h"

namespace cases {

using namespace ferret;

// Its data are aligned to its dtype and to nothing more.
class Tensor {
 public:
  Tensor(Dtype dtype, int64_t numel) : dtype_(dtype), numel_(numel), bytes_((numel + 1) * size_of(dtype)) {}

  int64_t numel() const { return numel_; }
  TensorRef ref() { return {bytes_.data() + size_of(dtype_), dtype_}; }
  const std::vector<char>& bytes() const { return bytes_; }

  double get(int64_t i) {
    return with(i, [](auto* x) { return static_cast<double>(to_float(*x)); });
  }
  template <class Real>
  void set(int64_t i, Real value) {
    with(i, [=](auto* x) { return store_rounded(value, x), 0.0; });
  }

 private:
  template <class F>
  double with(int64_t i, F f) {
    char* at = bytes_.data() + (i + 1) * size_of(dtype_);
    switch (dtype_) {
      case Dtype::float32: return f(reinterpret_cast<float*>(at));
      case Dtype::bfloat16: return f(reinterpret_cast<bfloat16_t*>(at));
      case Dtype::float16: return f(reinterpret_cast<float16_t*>(at));
      case Dtype::float64: return f(reinterpret_cast<double*>(at));
    }
    return 0;
  }
  Dtype dtype_;
  int64_t numel_;
  std::vector<char> bytes_;
};

class Random {
 public:
  explicit Random(uint64_t seed) : x_(seed) {}
  uint64_t bits() { return x_ = x_ * 6364136223846793005u + 1442695040888963407u; }
  int64_t below(int64_t n) { return static_cast<int64_t>((bits() >> 33) % n); }
  // Of all magnitudes between 2^-12 and 2^4, sometimes 0.
  double value() {
    const double mantissa = static_cast<double>(static_cast<int64_t>(bits())) * 0x1p-63;
    return below(50) == 0 ? 0.0 : std::ldexp(mantissa, static_cast<int>(below(17)) - 12);
  }

 private:
  uint64_t x_;
};

struct Case {
  std::vector<Tensor> tensors;
  std::vector<Block> blocks;
  std::vector<Piece> pieces;

  int64_t total() const { return blocks.back().start + blocks.back().columns; }
  Plan plan() const {
    return {blocks.data(), static_cast<int64_t>(blocks.size()), pieces.data(), static_cast<int64_t>(pieces.size())};
  }
  void add_block(int64_t offset, int64_t numel, int64_t columns) {
    const int64_t start = blocks.empty() ? 0 : total();
    blocks.push_back({offset, numel, columns, start});
  }
  void add_piece(int64_t tensor, int64_t start, int64_t length, int64_t offset) {
    pieces.push_back({tensor, start, length, offset, static_cast<int64_t>(blocks.size()) - 1});
  }
  void fill(uint64_t seed) {
    Random random(seed);
    for (Tensor& tensor : tensors) {
      for (int64_t i = 0; i < tensor.numel(); ++i) tensor.set(i, random.value());
    }
  }
  std::vector<TensorRef> refs() {
    std::vector<TensorRef> result;
    for (Tensor& tensor : tensors) result.push_back(tensor.ref());
    return result;
  }
};

// A shard of one tensor.
inline Case single(Dtype dtype, int64_t offset, int64_t numel, int64_t count, int64_t columns) {
  Case c;
  c.tensors.emplace_back(dtype, count);
  c.add_block(offset, numel, columns);
  c.add_piece(0, 0, count, offset);
  return c;
}

// Blocks of several tensors that meet inside tiles, of parts of tensors, of nothing, of a shard with a hole; far
// offsets.
inline Case packed(bool wide) {
  Case c;
  const Dtype dtypes[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16, wide ? Dtype::float64 : Dtype::float32};
  const int64_t numels[] = {700, 0, 1, 33, 2500, 640, 77};
  for (int i = 0; i < 7; ++i) c.tensors.emplace_back(dtypes[i % 4], numels[i]);
  c.add_block(0, 1234, 5);
  c.add_piece(0, 0, 700, 0), c.add_piece(1, 0, 0, 700), c.add_piece(2, 0, 1, 700), c.add_piece(3, 0, 33, 701);
  c.add_piece(4, 0, 500, 734);
  c.add_block(1536, 2000, 130);
  c.add_piece(4, 500, 2000, 1536);
  c.add_block(4096, 0, 3);
  const int64_t far = (int64_t{1} << 39) + 7 * 512;
  c.add_block(far, 3000, 33);
  c.add_piece(5, 0, 100, far), c.add_piece(5, 100, 540, far + 1900), c.add_piece(6, 0, 77, far + 2440);
  c.add_block(far + 4096, 1, 1);
  return c;
}

// One block of pieces that last for many tiles, with what lies between: a gap of several stages of tiles, another that starts
// and ends in a tile, pieces of nothing, a single element, and a tensor that lies badly for vectors.
inline Case long_pieces(int64_t columns) {
  Case c;
  c.tensors.emplace_back(Dtype::float32, 9000), c.tensors.emplace_back(Dtype::bfloat16, 7003);
  c.tensors.emplace_back(Dtype::float16, 5), c.tensors.emplace_back(Dtype::float32, 4100);
  c.add_block(512, 60000, columns);
  c.add_piece(0, 0, 8192, 512), c.add_piece(0, 8192, 0, 8704), c.add_piece(0, 8192, 300, 8704);
  c.add_piece(1, 3, 6000, 9100), c.add_piece(2, 4, 1, 15100), c.add_piece(2, 0, 0, 15101);
  c.add_piece(3, 1, 4096, 15101 + 9 * 1024), c.add_piece(1, 6003, 1000, 30000);
  return c;
}

// ---- what a backend should give ----

// The elements of a block from its first piece to its last, 0 in holes.
template <class Real, class Get>
std::vector<Real> gather(const Case& c, size_t block, uint64_t* offset, Get get) {
  std::vector<Real> x;
  *offset = 0;
  for (const Piece& piece : c.pieces) {
    if (piece.block != static_cast<int64_t>(block) || piece.length == 0) continue;
    if (x.empty()) *offset = piece.offset;
    x.resize(piece.offset + piece.length - *offset);
    for (int64_t i = 0; i < piece.length; ++i) x[piece.offset - *offset + i] = get(piece.tensor, piece.start + i);
  }
  return x;
}

template <class Real>
std::vector<Real> expected_gamma(Case& now, Case* before, Stream stream) {
  std::vector<Real> gamma;
  for (size_t b = 0; b < now.blocks.size(); ++b) {
    uint64_t offset;
    const auto x = gather<Real>(now, b, &offset, [&](int64_t t, int64_t i) {
      const Real value = static_cast<Real>(now.tensors[t].get(i));
      return before == nullptr ? value : static_cast<Real>(before->tensors[t].get(i)) - value;
    });
    const auto part = contract::project(x, offset, now.blocks[b].numel, stream, now.blocks[b].columns);
    gamma.insert(gamma.end(), part.begin(), part.end());
  }
  return gamma;
}

template <class Real>
using Updates = std::vector<contract::Received<Real>>;

template <class Real>
void expected_apply(Case& c, const Updates<Real>& updates, Basis basis, double alpha, bool overwrite) {
  for (size_t b = 0; b < c.blocks.size(); ++b) {
    const Block& block = c.blocks[b];
    Updates<Real> of_block;
    for (const auto& update : updates) {
      const auto from = update.gamma.begin() + block.start;
      of_block.push_back({update.seed, update.weight, {from, from + block.columns}});
      if (update.columns != nullptr) of_block.back().columns = update.columns + block.start;
    }
    uint64_t offset;
    auto x = gather<Real>(c, b, &offset, [&](int64_t t, int64_t i) {
      return overwrite ? Real(0) : static_cast<Real>(c.tensors[t].get(i));
    });
    contract::apply(x, offset, block.numel, basis, alpha, of_block);
    for (const Piece& piece : c.pieces) {
      if (piece.block != static_cast<int64_t>(b)) continue;
      for (int64_t i = 0; i < piece.length; ++i) {
        c.tensors[piece.tensor].set(piece.start + i, x[piece.offset - offset + i]);
      }
    }
  }
}

inline bool same_bits(const Case& a, const Case& b) {
  for (size_t t = 0; t < a.tensors.size(); ++t) {
    if (a.tensors[t].bytes() != b.tensors[t].bytes()) return false;
  }
  return true;
}

}  // namespace cases
