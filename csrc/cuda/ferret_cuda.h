// The CUDA backend: jobs of core/job.h on the caller's stream and device. Tensors and gammas are device pointers, the
// job's tables and updates are host arrays that may go when a call returns. Nothing here waits for the device.
//
// Results are bit for bit those of docs/streams.md on every GPU. A non-finite element makes its block's coordinates
// NaN; a non-finite coordinate leaves every parameter untouched, or, with `overwrite`, makes all of them NaN.
#pragma once

#include <cstddef>

#include "../core/job.h"

struct CUstream_st;  // a cudaStream_t is a CUstream_st*

namespace ferret::cuda {

struct Status {
  int code;           // a cudaError_t, 0 for success
  const char* text;   // what the runtime calls that error
  const char* where;  // the step that failed

  bool ok() const { return code == 0; }
};

// Bytes of device memory that project or apply need in `workspace`; it must start at a multiple of 256 and stay
// allocated until the stream has passed the call.
size_t project_workspace(const ProjectJob& job);
size_t apply_workspace(const ApplyJob& job);

// A CUDA graph may capture these calls. It keeps the job's tables, seeds, weights and addresses as they were; what lies
// at the addresses is read when the graph is replayed.
Status project(const ProjectJob& job, void* workspace, size_t bytes, CUstream_st* stream);
Status apply(const ApplyJob& job, void* workspace, size_t bytes, CUstream_st* stream);

Status basis(const BasisJob& job, CUstream_st* stream);

}  // namespace ferret::cuda
