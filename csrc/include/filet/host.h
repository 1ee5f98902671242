// What the launching sides of the kernels share.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <algorithm>

namespace filet {

// Describes a row-major matrix to the bulk copy engine, in boxes whose rows of 64 or 128 bytes are
// swizzled. Returns a status.
inline int encode_matrix(CUtensorMap* map, CUtensorMapDataType type, int element_bytes,
                         const void* data, int64_t rows, int64_t columns, int64_t stride,
                         int box_columns, int box_rows) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static Encode encode = nullptr;
    if (!encode) {
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
        const cudaError_t status = cudaGetDriverEntryPointByVersion(
            "cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
#else
        const cudaError_t status =
            cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
        if (status != cudaSuccess) return status;
        if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
        encode = reinterpret_cast<Encode>(entry);
    }
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride) * element_bytes};
    const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns),
                              static_cast<cuuint32_t>(box_rows)};
    const cuuint32_t ones[] = {1, 1};
    const CUresult result =
        encode(map, type, 2, const_cast<void*>(data), sizes, strides, box, ones,
               CU_TENSOR_MAP_INTERLEAVE_NONE,
               box_columns * element_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return -static_cast<int>(result);
}

// Of the current device; 2 where that cannot be found out, so that the launch can say why.
inline int multiprocessors() {
    int device = 0, count = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
        return 2;
    return std::max(count, 2);
}

// Whether kernels may be launched before the one ahead of them has ended.
inline bool starts_early() {
    int device = 0, major = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) ==
               cudaSuccess &&
           major >= 9;
}

}  // namespace filet
