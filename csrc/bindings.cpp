// The module synthfast._C: the schema of every operation, grouped by domain. Importing it registers the CPU kernels;
// synthfast._cuda adds the CUDA ones. Both use torch's stable ABI only, so one build serves torch 2.11 and newer.
#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(synthfast, m) {
  // sampling
  m.def("philox_normal_(Tensor(a!) out, Tensor index, SymInt seed, SymInt stream, SymInt step) -> ()");
  m.def("philox_uniform_(Tensor(a!) out, Tensor index, SymInt seed, SymInt stream, SymInt step) -> ()");
  m.def(
      "solver_step(Tensor x, Tensor model_output, Tensor coefficients, Tensor index, SymInt seed, SymInt step, "
      "Tensor? unconditional=None, Tensor? previous=None) -> (Tensor, Tensor)");
  m.def(
      "solver_step_(Tensor(a!) x, Tensor model_output, Tensor coefficients, Tensor index, SymInt seed, SymInt step, "
      "Tensor? unconditional=None, Tensor(b!)? history=None) -> ()");
  m.def("quantize_uint8(Tensor x) -> Tensor");

  // attacks; norm: 0 l-infinity, 1 l2
  m.def(
      "linf_step(Tensor x, Tensor gradient, Tensor origin, Tensor eps, Tensor step_size, float lo=0., float hi=1.) "
      "-> Tensor");
  m.def(
      "linf_step_(Tensor(a!) x, Tensor gradient, Tensor origin, Tensor eps, Tensor step_size, float lo=0., float hi=1.) "
      "-> ()");
  m.def(
      "l2_step(Tensor x, Tensor gradient, Tensor origin, Tensor eps, Tensor step_size, float lo=0., float hi=1.) "
      "-> Tensor");
  m.def(
      "l2_step_(Tensor(a!) x, Tensor gradient, Tensor origin, Tensor eps, Tensor step_size, float lo=0., float hi=1.) "
      "-> ()");
  m.def(
      "apgd_step(Tensor x, Tensor previous, Tensor gradient, Tensor origin, Tensor eps, Tensor step_size, Tensor momentum, "
      "int norm, float lo=0., float hi=1.) -> Tensor");
  m.def(
      "apgd_step_(Tensor(a!) previous, Tensor x, Tensor gradient, Tensor origin, Tensor eps, Tensor step_size, "
      "Tensor momentum, int norm, float lo=0., float hi=1.) -> ()");
  m.def(
      "ball_start(Tensor origin, Tensor index, Tensor eps, int norm, SymInt seed, SymInt step=0, float lo=0., float hi=1.) "
      "-> Tensor");

  // data
  m.def(
      "gather_augment(Tensor images, Tensor items, Tensor index, SymInt seed, SymInt padding, bool flip, "
      "ScalarType dtype) -> Tensor");

  // nn
  m.def("winograd_weights_(Tensor(a!) out, Tensor weight, bool rotated=False) -> ()");
  m.def(
      "winograd_conv3x3(Tensor x, Tensor transformed, SymInt channels, Tensor? bias=None, Tensor? scale=None, "
      "Tensor? shift=None, bool relu=False, Tensor? residual=None) -> Tensor");
  m.def(
      "winograd_conv3x3_gradient(Tensor gradient, Tensor transformed, SymInt channels, Tensor? x=None, "
      "Tensor? scale=None, Tensor? shift=None, bool relu=False) -> Tensor");
}

namespace {
PyModuleDef module_definition = {PyModuleDef_HEAD_INIT, "_C", "CPU kernels of synthfast", -1, nullptr};
}

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module_definition); }
