// What is not a tensor operator: words and elements of the stream for tests and tools, the processor's paths, build information.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cpu/cpu.h"

namespace py = pybind11;

namespace ferret {
namespace {

Basis checked_basis(int kind) {
  if (kind < 1 || kind > 3) throw py::value_error("kind must be 1, 2 or 3, got " + std::to_string(kind));
  return static_cast<Basis>(kind);
}

std::vector<uint32_t> words(uint64_t seed, int kind, uint64_t t, uint32_t k) {
  const Words result = stream_words(seed, checked_basis(kind), t, k);
  return {result.w, result.w + 4};
}

std::vector<int32_t> integers(uint64_t seed, int kind, uint64_t offset, uint64_t count, uint32_t k) {
  const Basis basis = checked_basis(kind);
  const uint64_t e = elements_per_call(basis);
  std::vector<int32_t> result;
  for (uint64_t j = offset; j < offset + count; ++j) {
    result.push_back(basis_integer(basis, stream_words(seed, basis, j / e, k), static_cast<int>(j % e)));
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Host-side tools of ferret_ext: the stream's words and elements, CPU paths, build information.";
  module.def(
      "philox",
      [](std::vector<uint32_t> ctr, uint32_t key0, uint32_t key1) {
        if (ctr.size() != 4) throw py::value_error("ctr must hold 4 words, got " + std::to_string(ctr.size()));
        const Words result = philox4x32_10({{ctr[0], ctr[1], ctr[2], ctr[3]}}, key0, key1);
        return std::vector<uint32_t>(result.w, result.w + 4);
      },
      py::arg("ctr"), py::arg("key0"), py::arg("key1"), "Philox4x32-10 of four counter words and two key words.");
  module.def("words", &words, py::arg("seed"), py::arg("kind"), py::arg("t"), py::arg("k"),
             "The four words of call t of column k.");
  module.def("integers", &integers, py::arg("seed"), py::arg("kind"), py::arg("offset"), py::arg("count"), py::arg("k"),
             "The integers b(j, k) for j = offset, offset + 1, ..");
  module.def("philox_checksum", &cpu::philox_checksum, py::arg("seed"), py::arg("columns"), py::arg("calls"),
             py::call_guard<py::gil_scoped_release>(),
             "The exclusive or of all words of some calls of some columns, on the active CPU path and one thread.");
  module.def("available_isas", &cpu::available_isas, "Instruction sets this processor can run, best last.");
  module.attr("version") = FERRET_VERSION;
}

}  // namespace ferret
