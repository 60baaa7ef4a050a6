// The CUDA kernels on a GPU against the known answers and docs/streams.md evaluated plainly (contract.h), bit for bit.
// Nothing of torch, so that compute-sanitizer sees every allocation. Without a GPU it skips (exit status 77).
// Usage: test_cuda_device tests/golden.txt [--small]
#include <cuda_runtime.h>

#include <algorithm>
#include <memory>

#include "cuda/ferret_cuda.h"
#include "golden.h"
#include "plan_cases.h"

namespace {

using namespace cases;
using testing::check;

constexpr int kSkipped = 77;

void must(cudaError_t code, const char* where) {
  if (code == cudaSuccess) return;
  std::fprintf(stderr, "CUDA error %d (%s) in %s\n", code, cudaGetErrorString(code), where);
  std::exit(1);
}

void must(const cuda::Status& status) { must(static_cast<cudaError_t>(status.code), status.where); }

class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes) { must(cudaMalloc(&data_, bytes > 0 ? bytes : 1), "cudaMalloc"); }
  Buffer(const void* from, size_t bytes) : Buffer(bytes) {
    must(cudaMemcpy(data_, from, bytes, cudaMemcpyHostToDevice), "copying to the device");
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  char* data() const { return static_cast<char*>(data_); }
  void read(void* to) const {
    if (bytes_ > 0) must(cudaMemcpy(to, data_, bytes_, cudaMemcpyDeviceToHost), "copying from the device");
  }

 private:
  size_t bytes_;
  void* data_ = nullptr;
};

// Tensors of the host on the device, as little aligned as there, and back.
class Mirror {
 public:
  Mirror(const TensorRef* tensors, const Plan& plan) : tensors_(tensors) {
    std::vector<int64_t> lengths;
    for (int64_t p = 0; p < plan.num_pieces; ++p) {
      const Piece& piece = plan.pieces[p];
      lengths.resize(std::max<size_t>(lengths.size(), piece.tensor + 1));
      lengths[piece.tensor] = std::max(lengths[piece.tensor], piece.start + piece.length);
    }
    for (size_t t = 0; t < lengths.size(); ++t) {
      const size_t bytes = lengths[t] * size_of(tensors[t].dtype), off = size_of(tensors[t].dtype);
      std::vector<char> image(off + bytes);
      if (bytes > 0) std::memcpy(image.data() + off, tensors[t].data, bytes);
      buffers_.push_back(std::make_unique<Buffer>(image.data(), image.size()));
      refs_.push_back({buffers_.back()->data() + off, tensors[t].dtype});
      images_.push_back(std::move(image));
    }
  }

  const TensorRef* refs() const { return refs_.data(); }
  void read() {
    for (size_t t = 0; t < refs_.size(); ++t) {
      const size_t off = size_of(refs_[t].dtype);
      buffers_[t]->read(images_[t].data());
      if (images_[t].size() > off) std::memcpy(tensors_[t].data, images_[t].data() + off, images_[t].size() - off);
    }
  }

 private:
  const TensorRef* tensors_;
  std::vector<std::unique_ptr<Buffer>> buffers_;
  std::vector<std::vector<char>> images_;
  std::vector<TensorRef> refs_;
};

// Jobs over the host's memory, run on the device.
struct Device {
  static void project(const ProjectJob& job) {
    Mirror now(job.now, job.plan);
    std::unique_ptr<Mirror> before;
    if (job.before != nullptr) before = std::make_unique<Mirror>(job.before, job.plan);
    int64_t columns = 0;
    for (int64_t b = 0; b < job.plan.num_blocks; ++b) columns += job.plan.blocks[b].columns;
    Buffer gamma(columns * (job.wide ? sizeof(double) : sizeof(float)));
    ProjectJob there = job;
    there.now = now.refs(), there.gamma = gamma.data();
    if (before != nullptr) there.before = before->refs();
    const size_t bytes = cuda::project_workspace(there);
    Buffer workspace(bytes);
    must(cuda::project(there, workspace.data(), bytes, nullptr));
    must(cudaDeviceSynchronize(), "project");
    gamma.read(job.gamma);
  }

  static bool apply(const ApplyJob& job) {
    Mirror params(job.params, job.plan);
    const Buffer gammas(job.gammas.values, job.num_updates * job.total * (job.wide ? sizeof(double) : sizeof(float)));
    ApplyJob there = job;
    there.params = params.refs(), there.gammas.values = gammas.data();
    const size_t bytes = cuda::apply_workspace(there);
    Buffer workspace(bytes);
    must(cuda::apply(there, workspace.data(), bytes, nullptr));
    must(cudaDeviceSynchronize(), "apply");
    params.read();
    return true;
  }

  static void basis(const BasisJob& job) {
    const Buffer out(job.count * size_of(job.out.dtype));
    BasisJob there = job;
    there.out.data = out.data();
    must(cuda::basis(there, nullptr));
    must(cudaDeviceSynchronize(), "basis");
    out.read(job.out.data);
  }
};

// ---- plans ----

const Basis kBases[] = {Basis::rademacher, Basis::uniform, Basis::gaussian};

template <class Real>
void test_project(Case& now, Case* before, Basis basis, const std::string& what) {
  const Stream stream = {0xFEDCBA9876543210u, basis};
  const auto expected = expected_gamma<Real>(now, before, stream);
  std::vector<Real> gamma(expected.size(), Real(-7));
  const auto refs = now.refs();
  const auto before_refs = before == nullptr ? std::vector<TensorRef>() : before->refs();
  Device::project({now.plan(), refs.data(), before == nullptr ? nullptr : before_refs.data(), stream,
                   contract::is_wide<Real>, gamma.data()});
  check(std::memcmp(gamma.data(), expected.data(), gamma.size() * sizeof(Real)) == 0, what);
}

template <class Real>
void test_apply(Case& c, int count, Basis basis, const std::string& what) {
  Updates<Real> updates;
  std::vector<Update> list;
  std::vector<Real> gammas;
  Random random(99);
  for (int i = 0; i < count; ++i) {
    updates.push_back({random.bits(), 0.5 - i, {}});
    for (int64_t k = 0; k < c.total(); ++k) updates[i].gamma.push_back(static_cast<Real>(random.value()));
    list.push_back({updates[i].seed, updates[i].weight});
    gammas.insert(gammas.end(), updates[i].gamma.begin(), updates[i].gamma.end());
  }
  Case expected = c;
  expected_apply(expected, updates, basis, -0.3, false);
  const auto refs = c.refs();
  Device::apply({c.plan(),
                 refs.data(),
                 list.data(),
                 static_cast<int64_t>(list.size()),
                 {gammas.data()},
                 c.total(),
                 basis,
                 -0.3,
                 contract::is_wide<Real>,
                 false});
  check(same_bits(c, expected), what);
}

template <class Real>
void test_plans(Basis basis) {
  const std::string what = "kind " + std::to_string(static_cast<int>(basis)) + (contract::is_wide<Real> ? " wide" : "");
  Case now = packed(contract::is_wide<Real>), before = packed(contract::is_wide<Real>);
  now.fill(1), before.fill(2);
  test_project<Real>(now, nullptr, basis, "project, " + what);
  test_project<Real>(now, &before, basis, "project_difference, " + what);
  test_apply<Real>(now, 3, basis, "apply, " + what);
}

// Every way in which project and apply share out columns, and many tiles.
void test_columns(const std::vector<int64_t>& all, int64_t count) {
  for (const int64_t columns : all) {
    Case c = single(Dtype::float32, 512 + 77, 100000, count, columns);
    c.fill(columns);
    test_project<float>(c, nullptr, Basis::rademacher, "project, K = " + std::to_string(columns));
    test_apply<float>(c, 2, Basis::rademacher, "apply, K = " + std::to_string(columns));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool small = argc == 3 && std::strcmp(argv[2], "--small") == 0;
  if (argc != 2 && !small) {
    std::fprintf(stderr, "usage: %s tests/golden.txt [--small]\n", argv[0]);
    return 2;
  }
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::printf("skipped: no GPU is visible\n");
    return kSkipped;
  }
  // Sanitizers are slow: they see every kernel, on little.
  const auto columns =
      small ? std::vector<int64_t>{3, 12, 33} : std::vector<int64_t>{1, 2, 5, 8, 16, 17, 31, 32, 48, 64, 65, 128, 200};
  auto answers = golden::read(argv[1]);
  if (small) {
    answers.erase(std::remove_if(answers.begin(), answers.end(),
                                 [](const auto& r) { return r.kind() != "basis" && r.kind() != "round"; }),
                  answers.end());
  }
  Device backend;
  for (const char* path : {"simt", "mma"}) {
    setenv("FERRET_CUDA_PATH", path, 1);
    for (const Basis basis : kBases) {
      test_plans<float>(basis);
      test_plans<double>(basis);
    }
    test_columns(columns, small ? 3000 : 30000);
    golden::run(answers, backend, std::string("device, ") + path);
  }
  return testing::summary();
}
