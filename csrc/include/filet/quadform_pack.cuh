// S into tiles of bf16 (filet/quadform_tiles.h), for the kernel that packs the first block rows and
// for that which packs the others while it multiplies.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "filet/matrix.cuh"
#include "filet/quadform_tiles.h"
#include "filet/triangle.cuh"

namespace filet {

// Of a tile of S; block row r has 2 (r + 1).
__device__ __forceinline__ int quadform_block_row(int tile) { return triangular_row(tile / 2); }

// Where a unit of a box's row lies.
__device__ __forceinline__ int swizzled(int row, int unit) {
    return row * 128 + ((unit ^ (row & 7)) << 4);
}

__device__ __forceinline__ void store_bf16(uint8_t* target, const float (&x)[UNIT]) {
    uint32_t words[UNIT / 2];
#pragma unroll
    for (int i = 0; i < UNIT / 2; ++i)
        words[i] = pack(__float2bfloat16(x[2 * i]), __float2bfloat16(x[2 * i + 1]));
    *reinterpret_cast<uint4*>(target) = make_uint4(words[0], words[1], words[2], words[3]);
}

// Rows `row`, `row + row_step` and so on, COUNT of them, of a tile of S: unit threadIdx.x % 8 of each.
// INSIDE: S is a vector matrix (matrix.cuh) and has all of the tile.
template <bool INSIDE, int COUNT>
__device__ __forceinline__ void pack_s_rows(const Matrix& s, int index, int row, int row_step,
                                            uint8_t* tiles) {
    const int block_row = quadform_block_row(index), unit = threadIdx.x % 8;
    const int64_t column = (index - block_row * (block_row + 1ll)) * QUADFORM_STEP + unit * UNIT;
    const int64_t first = static_cast<int64_t>(block_row) * QUADFORM_TILE + row;
    uint8_t* tile = tiles + static_cast<int64_t>(index) * 2 * QUADFORM_BOX_BYTES;
    float x[COUNT][UNIT];
    if constexpr (INSIDE)
        load_vectors(static_cast<const float*>(s.data) + first * s.stride_row + column,
                     row_step * s.stride_row, x);
    else
        load_units<float>(s, first, row_step, column, x);
    const int diagonal = static_cast<int>(first - column);  // where it crosses the first row's unit
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
#pragma unroll
        for (int e = 0; e < UNIT; ++e) {
            const int below = diagonal + i * row_step - e;
            x[i][e] = below > 0 ? 2 * x[i][e] : below == 0 ? x[i][e] : 0.0f;
        }
        store_bf16(tile + swizzled(row + i * row_step, unit), x[i]);
    }
}

}  // namespace filet
