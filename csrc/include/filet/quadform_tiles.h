// Between csrc/quadform.cu, which packs S and V into tiles, and the kernels that multiply them.
//
// S: block row r of 128 rows has 2 (r + 1) tiles of 128 rows × 64 columns, one after another, r after
// r; off the diagonal doubled, above it zero, so that vᵀ L v = vᵀ S v. V: tiles of 64 rows × `columns`
// columns, all those of some columns one after another. A tile is made of boxes of rows of 64
// numbers, 128 bytes whose eight 16-byte units are swizzled: unit u of row r lies at u ^ (r % 8).
// When accurate, in pieces of fp16, high before low, a tile of each in turn: S in two; V, if it is
// float32, in three, of which two enter the products and all three what the products are multiplied
// with. Otherwise bf16.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "filet/matrix.cuh"

namespace filet {

constexpr int QUADFORM_FP32_PIECES = 3;
constexpr int QUADFORM_TILE = 128, QUADFORM_STEP = 64, QUADFORM_BOX_BYTES = 64 * 128;

struct QuadformTiles {
    uint8_t* s;
    Matrix s_matrix;           // S itself
    int late_begin, late_end;  // block rows that are not in tiles yet: the kernel for 9.0 packs them
    unsigned* counters;        // quadform_counters(rows); where there are such rows, zero
    const uint8_t* v;  // null: V itself is read, as bf16
    const void* v_matrix;
    int64_t stride_v, n, p;  // of V itself
    float* partial;          // (2 rows, stride_partial): of every form, the part of each 64 rows
    int64_t stride_partial;
    int rows, columns;  // in tiles
    bool accurate;
    int v_pieces;  // 1 or QUADFORM_FP32_PIECES
    cudaStream_t stream;
};

// Columns of a tile of V; the kernel for 9.0 works on two tiles at a time.
inline int quadform_columns_sm90(bool accurate) { return accurate ? 128 : 256; }
constexpr int QUADFORM_COLUMNS_SM80 = 128;

// The first block row that the kernel for 9.0, fast, may as well pack itself.
int quadform_late_sm90(int rows, int columns);

// Boxes of S handed out for packing; of every block row, boxes packed.
inline int64_t quadform_counters(int rows) { return rows + 1; }

int quadform_sm90(const QuadformTiles& tiles);
int quadform_sm80(const QuadformTiles& tiles);

}  // namespace filet
