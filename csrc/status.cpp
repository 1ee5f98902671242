#include "filet/status.h"

#include <cuda.h>
#include <cuda_runtime.h>

extern "C" const char* filet_status_text(int status) {
    if (status >= 0) return cudaGetErrorString(static_cast<cudaError_t>(status));
    switch (-status) {
        case CUDA_ERROR_INVALID_VALUE:
            return "invalid tensor map: address, stride or size";
        case CUDA_ERROR_NOT_INITIALIZED:
        case CUDA_ERROR_DEINITIALIZED:
            return "the CUDA driver is not initialised";
        default:
            return "the CUDA driver refused the tensor map";
    }
}
