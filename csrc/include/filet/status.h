// What the C interface shares: element types and statuses.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { FILET_BF16 = 0, FILET_FP16 = 1, FILET_FP32 = 2 } FiletDtype;

// 0 is success, a positive status is a cudaError_t, a negative one minus a CUresult.
const char* filet_status_text(int status);

#ifdef __cplusplus
}
#endif
