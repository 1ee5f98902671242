// Python's side of the C interface: addresses and sizes in, an exception for a bad status.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "filet/columns.h"
#include "filet/quadform.h"
#include "filet/status.h"
#include "filet/syrk.h"

namespace py = pybind11;

namespace {

void check(int status, const char* op) {
    if (status)
        throw std::runtime_error(std::string(op) + ": launch failed with status " +
                                 std::to_string(status) + ": " + filet_status_text(status));
}

void syrk_sm90(uintptr_t c, int64_t stride_c, uintptr_t x, int64_t stride_x, int64_t n,
               int64_t tokens, float alpha, bool half, const FiletSyrkPlan& plan, uintptr_t flags,
               uintptr_t stream) {
    const FiletSyrk args = {reinterpret_cast<float*>(c),
                            stride_c,
                            reinterpret_cast<const void*>(x),
                            stride_x,
                            n,
                            tokens,
                            alpha,
                            half ? FILET_FP16 : FILET_BF16,
                            plan,
                            reinterpret_cast<int32_t*>(flags),
                            reinterpret_cast<void*>(stream)};
    int status;
    {
        py::gil_scoped_release release;
        status = filet_syrk_sm90(&args);
    }
    check(status, "syrk_");
}

// The operands are named as in FiletQuadform; addresses as integers.
FiletQuadform quadform_args(uintptr_t s, int64_t stride_s_row, int64_t stride_s_column, uintptr_t v,
                            int64_t stride_v_row, int64_t stride_v_column, int dtype, int64_t n,
                            int64_t p, bool accurate, bool portable, int64_t least_bytes) {
    FiletQuadform args = {};
    args.s = reinterpret_cast<const float*>(s);
    args.stride_s_row = stride_s_row;
    args.stride_s_column = stride_s_column;
    args.v = reinterpret_cast<const void*>(v);
    args.stride_v_row = stride_v_row;
    args.stride_v_column = stride_v_column;
    args.dtype = static_cast<FiletDtype>(dtype);
    args.n = n;
    args.p = p;
    args.accurate = accurate;
    args.portable = portable;
    args.least_bytes = least_bytes;
    return args;
}

std::pair<int64_t, int64_t> quadform_workspaces(const FiletQuadform& operands) {
    const FiletQuadformWorkspaces found = filet_quadform_workspaces(&operands);
    return {found.bytes[0], found.bytes[1]};
}

void quadform(const FiletQuadform& operands, uintptr_t out,
              const std::pair<uintptr_t, uintptr_t>& workspaces, uintptr_t stream) {
    FiletQuadform args = operands;
    args.out = reinterpret_cast<double*>(out);
    args.workspaces[0] = reinterpret_cast<void*>(workspaces.first);
    args.workspaces[1] = reinterpret_cast<void*>(workspaces.second);
    args.stream = reinterpret_cast<void*>(stream);
    int status;
    {
        py::gil_scoped_release release;
        status = filet_quadform(&args);
    }
    check(status, "quadform_diag");
}

void split(uintptr_t x, int64_t stride_row, int64_t stride_column, int dtype, int64_t rows,
           int64_t columns, bool by_column, uintptr_t largest, uintptr_t scale, uintptr_t first,
           uintptr_t second, uintptr_t stream) {
    const FiletSplit args = {reinterpret_cast<const void*>(x),
                             stride_row,
                             stride_column,
                             static_cast<FiletDtype>(dtype),
                             rows,
                             columns,
                             by_column,
                             reinterpret_cast<uint32_t*>(largest),
                             reinterpret_cast<double*>(scale),
                             reinterpret_cast<void*>(first),
                             reinterpret_cast<void*>(second),
                             reinterpret_cast<void*>(stream)};
    check(filet_split(&args), "split");
}

void column_sums(uintptr_t v, uintptr_t w, int64_t stride_w_row, int64_t stride_w_column, int dtype,
                 int64_t rows, int64_t columns, uintptr_t parts, uintptr_t squares,
                 uintptr_t products, uintptr_t stream) {
    const FiletColumnSums args = {reinterpret_cast<const float*>(v),
                                  reinterpret_cast<const void*>(w),
                                  stride_w_row,
                                  stride_w_column,
                                  static_cast<FiletDtype>(dtype),
                                  rows,
                                  columns,
                                  reinterpret_cast<float*>(parts),
                                  reinterpret_cast<double*>(squares),
                                  reinterpret_cast<double*>(products),
                                  reinterpret_cast<void*>(stream)};
    check(filet_column_sums(&args), "column_sums");
}

void transpose(uintptr_t x, int64_t stride, int64_t rows, int64_t columns, int bytes, uintptr_t out,
               uintptr_t stream) {
    check(filet_transpose(reinterpret_cast<const void*>(x), stride, rows, columns, bytes,
                          reinterpret_cast<void*>(out), reinterpret_cast<void*>(stream)),
          "transpose");
}

void mirror(uintptr_t c, int64_t n, int64_t stride, uintptr_t stream) {
    check(filet_mirror(reinterpret_cast<float*>(c), n, stride, reinterpret_cast<void*>(stream)),
          "mirror");
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    using py::arg;
    module.doc() = "CUDA kernels of filet_kernels; all work on the current device.";
    py::enum_<FiletSyrkKernel>(module, "SyrkKernel")
        .value("pairs", FILET_SYRK_PAIRS)
        .value("grid", FILET_SYRK_GRID)
        .value("share", FILET_SYRK_SHARE);
    py::class_<FiletSyrkPlan>(module, "SyrkPlan")
        .def(py::init([](FiletSyrkKernel kernel, int size) { return FiletSyrkPlan{kernel, size}; }),
             arg("kernel"), arg("size") = 0)
        .def_readonly("kernel", &FiletSyrkPlan::kernel)
        .def_readonly("size", &FiletSyrkPlan::size);
    module.def("syrk_sm90", &syrk_sm90, arg("c"), arg("stride_c"), arg("x"), arg("stride_x"),
               arg("n"), arg("tokens"), arg("alpha"), arg("half"), arg("plan"), arg("flags"),
               arg("stream"));
    module.def("syrk_sm90_flags", &filet_syrk_sm90_flags);
    module.def("syrk_sm90_plan", &filet_syrk_sm90_plan, arg("n"));
    module.def("split", &split, py::kw_only(), arg("x"), arg("stride_row"), arg("stride_column"),
               arg("dtype"), arg("rows"), arg("columns"), arg("by_column"), arg("largest"),
               arg("scale"), arg("first"), arg("second"), arg("stream"));
    module.def("column_sums_parts", &filet_column_sums_parts, arg("rows"));
    module.def("column_sums", &column_sums, py::kw_only(), arg("v"), arg("w"),
               arg("stride_w_row"), arg("stride_w_column"), arg("dtype"), arg("rows"), arg("columns"),
               arg("parts"), arg("squares"), arg("products"), arg("stream"));
    module.def("transpose", &transpose, py::kw_only(), arg("x"), arg("stride"), arg("rows"),
               arg("columns"), arg("bytes"), arg("out"), arg("stream"));
    module.def("mirror", &mirror, py::kw_only(), arg("c"), arg("n"), arg("stride"), arg("stream"));
    py::class_<FiletQuadform>(module, "Quadform")
        .def(py::init(&quadform_args), py::kw_only(), arg("s"), arg("stride_s_row"),
             arg("stride_s_column"), arg("v"), arg("stride_v_row"), arg("stride_v_column"),
             arg("dtype"), arg("n"), arg("p"), arg("accurate"), arg("portable"),
             arg("least_bytes"))
        .def("workspaces", &quadform_workspaces)
        .def("run", &quadform, py::kw_only(), arg("out"), arg("workspaces"), arg("stream"));
}
