// The module synthfast._host: build facts and host-side helpers, by pybind11.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>

#include "common/philox.h"
#include "common/vectorize.h"

#ifndef SF_BUILD_CUDA
#define SF_BUILD_CUDA "not built"
#endif
#ifndef SF_BUILD_TORCH
#define SF_BUILD_TORCH "unknown"
#endif

namespace py = pybind11;

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build facts and host-side helpers of synthfast";
  m.def(
      "build_facts",
      [] {
        py::dict facts;
#if defined(__clang__)
        facts["compiler"] = std::string("clang ") + __clang_version__;
#else
        facts["compiler"] = std::string("gcc ") + __VERSION__;
#endif
        facts["torch"] = SF_BUILD_TORCH;
        facts["cuda"] = SF_BUILD_CUDA;
        return facts;
      },
      "Compiler, torch version and CUDA architectures of this build (or why CUDA was left out).");
  m.def("cpu_capability", [] { return synthfast::cpu_capability_name(); },
        "The instruction set that the CPU kernels use here: 'default', 'avx2' or 'avx512'.");
  m.def(
      "philox4x32",
      [](std::tuple<uint32_t, uint32_t, uint32_t, uint32_t> counter, std::tuple<uint32_t, uint32_t> key) {
        const auto [c0, c1, c2, c3] = counter;
        const synthfast::PhiloxWords w = synthfast::philox4x32(c0, c1, c2, c3, {std::get<0>(key), std::get<1>(key)});
        return std::make_tuple(w.word[0], w.word[1], w.word[2], w.word[3]);
      },
      py::arg("counter"), py::arg("key"), "Philox4x32-10 of one counter block: four 32-bit words.");
}
