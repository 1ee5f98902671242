// What an energy needs beside its large products: the C interface of csrc/columns.cu.
#pragma once

#include <stdint.h>

#include "filet/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    const void* x;  // (rows, columns)
    int64_t stride_row, stride_column;
    FiletDtype dtype;
    int64_t rows, columns;
    int32_t by_column;  // 1: a scale for each column; 0: one
    uint32_t* largest;  // (columns,) or (1,), overwritten: the bits of the largest |x|
    double* scale;      // (columns,) or (1,), overwritten: the power of two that puts it at 2^14
    void* first;        // (rows, columns) fp16, contiguous, overwritten: x scale
    void* second;       // the same of 2^11 times what is left; null: nothing is
    void* stream;       // cudaStream_t
} FiletSplit;

int filet_split(const FiletSplit* args);

typedef struct {
    const float* v;  // (rows, columns), contiguous
    const void* w;   // (rows, columns), or null
    int64_t stride_w_row, stride_w_column;
    FiletDtype dtype;  // of w
    int64_t rows, columns;
    float* parts;      // filet_column_sums_parts(rows) × 2 × columns
    double* squares;   // (columns,), overwritten: of the squares of v
    double* products;  // (columns,), overwritten: of v w, where w is given
    void* stream;
} FiletColumnSums;

int64_t filet_column_sums_parts(int64_t rows);
int filet_column_sums(const FiletColumnSums* args);

// Copies an (rows, columns) matrix of 2- or 4-byte elements and unit column stride, transposed, into a
// contiguous `out`.
int filet_transpose(const void* x, int64_t stride, int64_t rows, int64_t columns, int32_t bytes,
                    void* out, void* stream);

// Copies what lies below the diagonal of an (n, n) matrix of row stride `stride` above it.
int filet_mirror(float* c, int64_t n, int64_t stride, void* stream);

#ifdef __cplusplus
}
#endif
