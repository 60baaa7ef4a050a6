// Block plans as flat rows: which elements of which tensors form which block of the stream, and who owns which coordinates.
#pragma once

#include <cstdint>

#include "fixed_point.h"

namespace ferret {

struct Block {
  int64_t offset;   // stream index of its first element; blocks start at multiples of kTile
  int64_t numel;    // its whole length d, also when only a shard of it is at hand
  int64_t columns;  // K_l
  int64_t start;    // its first coordinate in the flat gamma
};

// A run of consecutive elements of one tensor: elements [start, start + length) are stream elements [offset, offset + length).
struct Piece {
  int64_t tensor;
  int64_t start;
  int64_t length;
  int64_t offset;
  int64_t block;
};

struct Range {
  uint64_t begin, end;
};

// The tree of the fold: a node of level n covers kTile * 64^n consecutive stream elements, level 0 being a tile.
FERRET_HD constexpr int node_shift(int level) { return 9 + 6 * level; }
static_assert((1 << node_shift(0)) == kTile && (1 << 6) == kFoldRadix);
inline constexpr int kTopLevel = 9;  // one node covers 2^63 elements

// The nodes of a level that a range of elements touches.
FERRET_HD constexpr Range nodes_of(Range elements, int level) {
  return {elements.begin >> node_shift(level), ((elements.end - 1) >> node_shift(level)) + 1};
}

}  // namespace ferret
