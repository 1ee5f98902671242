// Python's side of the C interface: addresses and sizes in, an exception for a bad status.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "filet/status.h"
#include "filet/syrk.h"

namespace py = pybind11;

namespace {

void syrk_sm90(uintptr_t c, int64_t stride_c, uintptr_t x, int64_t stride_x, int64_t n,
               int64_t tokens, float alpha, bool half, int split, uintptr_t flags,
               uintptr_t stream) {
    const FiletSyrk args = {reinterpret_cast<float*>(c),
                            stride_c,
                            reinterpret_cast<const void*>(x),
                            stride_x,
                            n,
                            tokens,
                            alpha,
                            half ? FILET_FP16 : FILET_BF16,
                            split,
                            reinterpret_cast<int32_t*>(flags),
                            reinterpret_cast<void*>(stream)};
    int status;
    {
        py::gil_scoped_release release;
        status = filet_syrk_sm90(&args);
    }
    if (status)
        throw std::runtime_error("syrk_: launch failed with status " + std::to_string(status) +
                                 ": " + filet_status_text(status));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    using py::arg;
    module.doc() = "CUDA kernels of filet_kernels; all work on the current device.";
    module.def("syrk_sm90", &syrk_sm90, arg("c"), arg("stride_c"), arg("x"), arg("stride_x"),
               arg("n"), arg("tokens"), arg("alpha"), arg("half"), arg("split"), arg("flags"),
               arg("stream"));
    module.def("syrk_sm90_flags", &filet_syrk_sm90_flags);
    module.def("syrk_sm90_split", &filet_syrk_sm90_split, arg("n"));
}
