// Blocks of the lower triangle, in the order of rows.
#pragma once

namespace filet {

// The row of a block, of which row r has r + 1.
__device__ __forceinline__ int triangular_row(int index) {
    int row = static_cast<int>((sqrtf(8.0f * index + 1.0f) - 1.0f) * 0.5f);
    if (row * (row + 1) / 2 > index) --row;
    if ((row + 1) * (row + 2) / 2 <= index) ++row;
    return row;
}

}  // namespace filet
