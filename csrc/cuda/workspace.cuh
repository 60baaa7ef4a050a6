// A call's device memory: tables that the host makes, and room for results of kernels.
//
// Tables travel as parameters of a small kernel. A launch copies its parameters, so the host's memory may go when the
// call returns, nothing waits for the device, and a CUDA graph that captures the call keeps the tables with it. A copy
// from pageable memory would do none of that.
#pragma once

#include "launch.h"

namespace ferret::cuda {

// As much as a kernel's parameters hold: 32,764 bytes from CUDA 12.1 on, 4096 before.
#if defined(CUDART_VERSION) && CUDART_VERSION >= 12010
inline constexpr int kPacket = 4080;
#else
inline constexpr int kPacket = 500;
#endif

struct Packet {
  uint64_t* to;
  int64_t count;
  uint64_t data[kPacket];
};

static __global__ void __launch_bounds__(kThreads) upload_kernel(const __grid_constant__ Packet packet) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < packet.count; i += stride) {
    packet.to[i] = packet.data[i];
  }
}

// Lays out a workspace: tables first, which are also kept on the host until upload(), then room for results of kernels.
// With a null base it only measures.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  const T* table(const T* values, int64_t n) {
    const T* place = room<T>(n);
    if (base_ == nullptr) return place;
    const auto* bytes = reinterpret_cast<const char*>(values);
    image_.insert(image_.end(), bytes, bytes + n * sizeof(T));
    image_.resize(used_);
    return place;
  }
  template <class T>
  const T* table(const std::vector<T>& values) {
    return table(values.data(), static_cast<int64_t>(values.size()));
  }

  template <class T>
  T* room(int64_t n) {
    T* place = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (n * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return place;
  }

  size_t bytes() const { return used_; }

  Status upload(size_t available, CUstream_st* stream) const {
    if (used_ == 0) return check(cudaSuccess, "upload_kernel");
    const bool fits = base_ != nullptr && available >= used_ && reinterpret_cast<uintptr_t>(base_) % kAlignment == 0;
    if (!fits) return check(cudaErrorInvalidValue, "the workspace is too small or not aligned");
    Status status = check(cudaSuccess, "upload_kernel");
    for (size_t at = 0; at < image_.size() && status.ok(); at += sizeof(Packet::data)) {
      Packet packet;
      const size_t bytes = std::min(image_.size() - at, sizeof packet.data);
      packet.to = reinterpret_cast<uint64_t*>(base_ + at);
      packet.count = static_cast<int64_t>(bytes / sizeof packet.data[0]);
      memcpy(packet.data, image_.data() + at, bytes);
      status = launch("upload_kernel", upload_kernel, divide_up(packet.count, kThreads), stream, packet);
    }
    return status;
  }

 private:
  static constexpr size_t kAlignment = 256;
  char* base_;
  size_t used_ = 0;
  std::vector<char> image_;
};

}  // namespace ferret::cuda
