// Second moments, C += alpha Xᵀ X on and below the diagonal: the C interface of csrc/syrk_sm90.cu.
#pragma once

#include <stdint.h>

#include "filet/status.h"

#ifdef __cplusplus
extern "C" {
#endif

// The kernels, each in its file (csrc/syrk_*_sm90.cu).
typedef enum { FILET_SYRK_PAIRS = 0, FILET_SYRK_GRID = 1, FILET_SYRK_SHARE = 2 } FiletSyrkKernel;

typedef struct {
    FiletSyrkKernel kernel;
    int32_t size;  // grid: 128, 160 or 192 columns of a tile, which one block computes; share: 2 to 8
                   // blocks that share a tile's tokens; others are refused. Pairs: not used
} FiletSyrkPlan;

typedef struct {
    float* c;             // (n, n), unit column stride, 16-byte aligned rows
    int64_t stride_c;     // elements from one row of C to the next
    const void* x;        // (tokens, n), unit column stride, 16-byte aligned rows
    int64_t stride_x;     // elements from one row of X to the next
    int64_t n, tokens;
    float alpha;
    FiletDtype dtype;     // of X: FILET_BF16 or FILET_FP16
    FiletSyrkPlan plan;
    int32_t* flags;       // filet_syrk_sm90_flags() zeros, zero again when the kernel ends; null:
                          // pairs add to a tile that they share in any order
    void* stream;         // cudaStream_t
} FiletSyrk;

// How many flags pairs need on the current device.
int64_t filet_syrk_sm90_flags(void);

// The plan that suits an n-wide C on the current device: as many blocks to a tile as still run at
// once, down to two; then one, of the narrowest tiles that do; pairs for larger C.
FiletSyrkPlan filet_syrk_sm90_plan(int64_t n);

// Enqueues the kernel on `stream` of the current device; returns a status (filet_status_text).
int filet_syrk_sm90(const FiletSyrk* args);

#ifdef __cplusplus
}
#endif
