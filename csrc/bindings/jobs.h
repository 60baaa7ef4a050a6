// From the operators' tensors to the jobs of core/job.h: the same for CPU and CUDA. The Python wrappers have already turned bad
// input into ValueError and TypeError; what is checked here is what memory safety needs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../core/job.h"

namespace ferret {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const char* op, ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::Double: return Dtype::float64;
    default: STD_TORCH_CHECK(false, op, ": expected a float32, bfloat16, float16 or float64 tensor");
  }
}

inline Dtype dtype_of(const char* op, const Tensor& tensor) { return dtype_of(op, tensor.scalar_type()); }

inline ScalarType working_type(bool wide) { return wide ? ScalarType::Double : ScalarType::Float; }

inline Basis basis_of(const char* op, int64_t kind) {
  STD_TORCH_CHECK(kind >= 1 && kind <= 3, op, ": basis kind must be 1, 2 or 3, got ", kind);
  return static_cast<Basis>(kind);
}

// make() takes memory from torch, whose own error loses its text on the way through the stable ABI.
template <class F>
Tensor allocated(const char* op, F make) {
  try {
    return make();
  } catch (const std::exception&) {
    throw std::runtime_error(std::string(op) + ": out of memory (or, on a GPU, an earlier call failed)");
  }
}

// References to tensors that all live on one device; Tensors stay alive in the caller.
inline std::vector<TensorRef> references(const char* op, const std::vector<Tensor>& tensors, int32_t device) {
  std::vector<TensorRef> result;
  for (const Tensor& tensor : tensors) {
    STD_TORCH_CHECK(tensor.is_contiguous(), op, ": expected contiguous tensors");
    STD_TORCH_CHECK(tensor.get_device_index() == device, op, ": expected tensors on one device");
    result.push_back({tensor.data_ptr(), dtype_of(op, tensor)});
  }
  return result;
}

inline bool any_float64(const std::vector<Tensor>& tensors) {
  for (const Tensor& tensor : tensors) {
    if (tensor.scalar_type() == ScalarType::Double) return true;
  }
  return false;
}

// A single block whose first part, at `offset`, is one tensor.
class SinglePlan {
 public:
  SinglePlan(const char* op, int64_t offset, int64_t length, int64_t numel, int64_t columns)
      : block_{offset, numel, columns, 0}, piece_{0, 0, length, offset, 0} {
    STD_TORCH_CHECK(offset >= 0 && length >= 0 && offset <= INT64_MAX - length, op, ": offset out of range, got ",
                    offset);
    STD_TORCH_CHECK(numel >= 0, op, ": numel must not be negative, got ", numel);
    STD_TORCH_CHECK(columns >= 1 && columns < (int64_t{1} << 32), op, ": K must be in [1, 2^32), got ", columns);
  }
  Plan plan() const { return {&block_, 1, &piece_, piece_.length > 0 ? 1 : 0}; }

 private:
  Block block_;
  Piece piece_;
};

// The rows of BlockPlan.blocks_table and BlockPlan.pieces_table.
class TablePlan {
 public:
  // choice: see Packing.
  TablePlan(const char* op, const Tensor& blocks, const Tensor& pieces, const std::vector<Tensor>& tensors,
            int64_t total, int choice = 0)
      : plan_{blocks_of(op, blocks, total, choice), blocks.size(0), rows<Piece>(op, pieces), pieces.size(0)} {
    int64_t last_block = 0, end = 0;
    for (int64_t p = 0; p < plan_.num_pieces; ++p) {
      const Piece& piece = plan_.pieces[p];
      STD_TORCH_CHECK(piece.tensor >= 0 && piece.tensor < static_cast<int64_t>(tensors.size()), op, ": piece ", p,
                      " names tensor ", piece.tensor, " of ", tensors.size());
      STD_TORCH_CHECK(
          piece.start >= 0 && piece.length >= 1 && piece.start <= tensors[piece.tensor].numel() - piece.length, op,
          ": piece ", p, " does not fit its tensor of ", tensors[piece.tensor].numel(), " elements");
      STD_TORCH_CHECK(piece.block >= last_block && piece.block < plan_.num_blocks, op, ": piece ", p,
                      " is out of order");
      if (piece.block != last_block) end = 0;
      STD_TORCH_CHECK(piece.offset >= end && piece.offset <= INT64_MAX - piece.length, op, ": piece ", p,
                      " is out of order");
      last_block = piece.block;
      end = piece.offset + piece.length;
    }
  }
  const Plan& plan() const { return plan_; }

  // The rows of a table of blocks that fit so many coordinates.
  static const Block* blocks_of(const char* op, const Tensor& table, int64_t total, int choice) {
    const Block* blocks = rows<Block>(op, table);
    for (int64_t b = 0; b < table.size(0); ++b) {
      const Block& block = blocks[b];
      STD_TORCH_CHECK(block.offset >= 0 && block.numel >= 0 && block.columns >= 1 &&
                          block.columns < (int64_t{1} << (32 - choice)) && block.start >= 0 &&
                          block.start <= total - block.columns,
                      op, ": block ", b, " of the plan does not fit ", total, " coordinates");
    }
    return blocks;
  }

 private:
  template <class Row>
  static const Row* rows(const char* op, const Tensor& table) {
    STD_TORCH_CHECK(table.is_cpu() && table.is_contiguous() && table.scalar_type() == ScalarType::Long &&
                        table.dim() == 2 && table.size(1) == static_cast<int64_t>(sizeof(Row) / sizeof(int64_t)),
                    op, ": the plan's tables must be contiguous int64 CPU tensors");
    return static_cast<const Row*>(table.data_ptr());
  }
  Plan plan_;
};

inline Rounding rounding_of(std::optional<int64_t> seed) {
  return {seed.has_value(), static_cast<uint64_t>(seed.value_or(0))};
}

inline Packing packing_of(const char* op, int64_t bits, int64_t choice) {
  STD_TORCH_CHECK(bits == 1 || bits == 2 || bits == 4 || bits == 8, op, ": bits must be 1, 2, 4 or 8, got ", bits);
  STD_TORCH_CHECK(choice >= 0 && choice <= (bits == 1 ? kMaxChoice : 0), op, ": choice must be in [0, ", kMaxChoice,
                  "], and 0 unless bits is 1, got ", choice);
  return {static_cast<int32_t>(bits), static_cast<int32_t>(choice)};
}

// Codes [N, bytes of K codes] and scales [N, L], which stay alive in the caller.
inline AllGammas packed_gammas(const char* op, const Tensor& codes, const Tensor& scales, int64_t updates,
                               int64_t total, int64_t num_blocks, Packing packing) {
  const auto fits = [&](const Tensor& tensor, ScalarType type, int64_t width) {
    return tensor.scalar_type() == type && tensor.is_contiguous() && tensor.dim() == 2 && tensor.size(0) == updates &&
           tensor.size(1) == width && tensor.get_device_index() == codes.get_device_index();
  };
  STD_TORCH_CHECK(fits(codes, ScalarType::Byte, packing.bytes(total)), op, ": codes must be uint8 [", updates, ", ",
                  packing.bytes(total), "]");
  STD_TORCH_CHECK(fits(scales, ScalarType::Float, num_blocks), op, ": scales must be float32 [", updates, ", ",
                  num_blocks, "]");
  return {nullptr, static_cast<const uint8_t*>(codes.data_ptr()), static_cast<const float*>(scales.data_ptr()),
          packing};
}

inline std::vector<Update> updates_of(const char* op, const std::vector<int64_t>& seeds,
                                      const std::vector<double>& weights, const Tensor& rows) {
  STD_TORCH_CHECK(seeds.size() == weights.size() && rows.dim() == 2 && rows.is_contiguous() &&
                      rows.size(0) == static_cast<int64_t>(seeds.size()),
                  op, ": expected as many rows of coordinates as seeds and weights, contiguous");
  std::vector<Update> updates;
  for (size_t i = 0; i < seeds.size(); ++i) updates.push_back({static_cast<uint64_t>(seeds[i]), weights[i]});
  return updates;
}

inline BasisJob basis_job(const Tensor& out, int64_t seed, int64_t k, int64_t kind, int64_t offset, int64_t numel) {
  const char* op = "basis";
  STD_TORCH_CHECK(out.is_contiguous(), op, ": out must be contiguous");
  STD_TORCH_CHECK(k >= 0 && k < (int64_t{1} << 32), op, ": k must be in [0, 2^32), got ", k);
  STD_TORCH_CHECK(offset >= 0 && offset <= INT64_MAX - out.numel() && numel >= 0, op, ": offset or numel out of range");
  return {{static_cast<uint64_t>(seed), basis_of(op, kind)},
          static_cast<uint32_t>(k),
          offset,
          numel,
          out.numel(),
          {out.data_ptr(), dtype_of(op, out)}};
}

// A backend runs jobs on raw memory; these are the operators over it.
template <class Backend>
struct Operators {
  static Tensor project_job(const char* op, const Plan& plan, const std::vector<Tensor>& now,
                            const std::vector<Tensor>& before, const Tensor& like, int64_t total, int64_t seed,
                            int64_t kind) {
    const bool wide = any_float64(now) || any_float64(before);
    Tensor gamma = allocated(op, [&] { return torch::stable::new_zeros(like, {total}, working_type(wide)); });
    const auto now_refs = references(op, now, like.get_device_index());
    const auto before_refs = references(op, before, like.get_device_index());
    STD_TORCH_CHECK(before.empty() || before.size() == now.size(), op, ": expected as many old tensors as new ones");
    for (size_t i = 0; i < before.size(); ++i) {
      STD_TORCH_CHECK(before[i].numel() == now[i].numel(), op, ": old and new tensor ", i, " differ in length");
    }
    Backend::project({plan,
                      now_refs.data(),
                      before.empty() ? nullptr : before_refs.data(),
                      {static_cast<uint64_t>(seed), basis_of(op, kind)},
                      wide,
                      gamma.data_ptr()},
                     like);
    return gamma;
  }

  static Tensor project(Tensor delta, int64_t seed, int64_t k, int64_t kind, int64_t offset, int64_t numel) {
    const SinglePlan plan("project", offset, delta.numel(), numel, k);
    delta = allocated("project", [&] { return torch::stable::contiguous(delta); });
    return project_job("project", plan.plan(), {delta}, {}, delta, k, seed, kind);
  }

  static Tensor project_blocks(std::vector<Tensor> now, std::vector<Tensor> before, Tensor blocks, Tensor pieces,
                               int64_t total, int64_t seed, int64_t kind) {
    STD_TORCH_CHECK(!now.empty(), "project_blocks: expected at least one tensor");
    const TablePlan plan("project_blocks", blocks, pieces, now, total);
    return project_job("project_blocks", plan.plan(), now, before, now[0], total, seed, kind);
  }

  static void apply_job(const char* op, const Plan& plan, const std::vector<Tensor>& params, const Tensor& gammas,
                        const std::vector<Update>& updates, double alpha, int64_t kind, bool overwrite,
                        Rounding rounding = {}) {
    const auto refs = references(op, params, gammas.get_device_index());
    const bool wide = any_float64(params) || gammas.scalar_type() == ScalarType::Double;
    STD_TORCH_CHECK(gammas.scalar_type() == working_type(wide), op, ": gammas must be ", wide ? "float64" : "float32");
    Backend::apply({plan,
                    refs.data(),
                    updates.data(),
                    static_cast<int64_t>(updates.size()),
                    {gammas.data_ptr()},
                    gammas.size(-1),
                    basis_of(op, kind),
                    alpha,
                    wide,
                    overwrite,
                    rounding},
                   gammas);
  }

  static Tensor reconstruct(Tensor gamma, int64_t seed, int64_t count, int64_t kind, int64_t offset, int64_t numel,
                            ScalarType dtype) {
    STD_TORCH_CHECK(gamma.dim() == 1, "reconstruct: gamma must have one dimension, got ", gamma.dim());
    const SinglePlan plan("reconstruct", offset, count, numel, gamma.size(0));
    const bool wide = dtype == ScalarType::Double || gamma.scalar_type() == ScalarType::Double;
    gamma = allocated("reconstruct",
                      [&] { return torch::stable::to(torch::stable::contiguous(gamma), working_type(wide)); });
    Tensor out = allocated("reconstruct", [&] { return torch::stable::new_empty(gamma, {count}, dtype); });
    apply_job("reconstruct", plan.plan(), {out}, gamma, {{static_cast<uint64_t>(seed), 1.0}}, 1.0, kind, true);
    return out;
  }

  static void apply_blocks_(std::vector<Tensor> params, Tensor blocks, Tensor pieces, Tensor gammas,
                            std::vector<int64_t> seeds, std::vector<double> weights, double alpha, int64_t kind,
                            std::optional<int64_t> rounding_seed) {
    const TablePlan plan("apply_blocks_", blocks, pieces, params, gammas.size(-1));
    const auto updates = updates_of("apply_blocks_", seeds, weights, gammas);
    apply_job("apply_blocks_", plan.plan(), params, gammas, updates, alpha, kind, false, rounding_of(rounding_seed));
  }

  static void apply_packed_(std::vector<Tensor> params, Tensor blocks, Tensor pieces, int64_t total, Tensor codes,
                            Tensor scales, int64_t bits, int64_t choice, std::vector<int64_t> seeds,
                            std::vector<double> weights, double alpha, int64_t kind,
                            std::optional<int64_t> rounding_seed) {
    const char* op = "apply_packed_";
    const Packing packing = packing_of(op, bits, choice);
    const TablePlan table(op, blocks, pieces, params, total, packing.choice);
    const Plan& plan = table.plan();
    const auto updates = updates_of(op, seeds, weights, codes);
    const int64_t count = static_cast<int64_t>(updates.size());
    const AllGammas gammas = packed_gammas(op, codes, scales, count, total, plan.num_blocks, packing);
    const auto refs = references(op, params, codes.get_device_index());
    Backend::apply({plan, refs.data(), updates.data(), count, gammas, total, basis_of(op, kind), alpha,
                    any_float64(params), false, rounding_of(rounding_seed)},
                   codes);
  }

  static void basis_(Tensor out, int64_t seed, int64_t k, int64_t kind, int64_t offset, int64_t numel) {
    Backend::basis(basis_job(out, seed, k, kind, offset, numel), out);
  }

  static void implement(torch::stable::detail::StableLibrary& library) {
    library.impl("project", TORCH_BOX(&project));
    library.impl("project_blocks", TORCH_BOX(&project_blocks));
    library.impl("reconstruct", TORCH_BOX(&reconstruct));
    library.impl("apply_blocks_", TORCH_BOX(&apply_blocks_));
    library.impl("apply_packed_", TORCH_BOX(&apply_packed_));
    library.impl("basis_", TORCH_BOX(&basis_));
  }
};

}  // namespace ferret
