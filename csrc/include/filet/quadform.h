// Quadratic forms, diag(Vᵀ S V) from the lower triangle of S: the C interface of csrc/quadform.cu.
#pragma once

#include <stdint.h>

#include "filet/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    const float* s;  // (n, n); what lies above the diagonal is not used
    int64_t stride_s_row, stride_s_column;
    const void* v;   // (n, p)
    int64_t stride_v_row, stride_v_column;
    FiletDtype dtype;  // of V
    int64_t n, p;
    int32_t accurate;  // 0: S and V rounded to bf16
    int32_t portable;  // 1: the kernel for compute capability 8.0, on any later GPU too
    int64_t least_bytes;  // that the second workspace may have, however small S is
    double* out;          // (p,), overwritten
    void* workspaces[2];  // of filet_quadform_workspaces(args) bytes, 256-byte aligned
    void* stream;         // cudaStream_t
} FiletQuadform;

// The first is for S as the tensor cores take it, half of its bytes (a quarter if not accurate) and a
// little. The second, for columns of V and partial sums, has what that leaves of S's bytes or
// `least_bytes`; more only where the partial sums of very many columns take most of it.
typedef struct {
    int64_t bytes[2];
} FiletQuadformWorkspaces;

FiletQuadformWorkspaces filet_quadform_workspaces(const FiletQuadform* args);

// Enqueues the kernels on `stream` of the current device; returns a status (filet_status_text).
int filet_quadform(const FiletQuadform* args);

#ifdef __cplusplus
}
#endif
