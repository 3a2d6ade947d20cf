// The module synthfast._cuda: importing it registers the CUDA kernels of all operations.
#include <Python.h>

namespace {
PyModuleDef module_definition = {PyModuleDef_HEAD_INIT, "_cuda", "CUDA kernels of synthfast", -1, nullptr};
}

PyMODINIT_FUNC PyInit__cuda(void) { return PyModule_Create(&module_definition); }
