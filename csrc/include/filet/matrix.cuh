// Reading matrices of any strides, eight numbers of a row at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace filet {

constexpr int UNIT = 8;  // numbers that a thread handles at a time: 16 bytes of 16-bit numbers

struct Matrix {
    const void* data;
    int64_t stride_row, stride_column, rows, columns;
    bool vector;  // rows can be read 16 bytes at a time
};

template <typename T>
__device__ __forceinline__ float to_float(T x) {
    return static_cast<float>(x);
}
template <>
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
    return __bfloat162float(x);
}
template <>
__device__ __forceinline__ float to_float(__half x) {
    return __half2float(x);
}

// COUNT units, `stride` numbers apart, of a matrix whose rows can be read 16 bytes at a time.
template <typename T, int COUNT>
__device__ __forceinline__ void load_vectors(const T* source, int64_t stride, float (&x)[COUNT][UNIT]) {
    constexpr int WORDS = UNIT * sizeof(T) / 16;
    uint4 words[COUNT][WORDS];  // all under way before the first is used
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
#pragma unroll
        for (int j = 0; j < WORDS; ++j)
            words[i][j] = reinterpret_cast<const uint4*>(source + i * stride)[j];
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
#pragma unroll
        for (int e = 0; e < UNIT; ++e) x[i][e] = to_float(reinterpret_cast<const T*>(words[i])[e]);
}

// Units of the same columns in COUNT rows, `row_step` apart; zero outside of the matrix.
template <typename T, int COUNT>
__device__ __forceinline__ void load_units(const Matrix& m, int64_t row, int row_step, int64_t column,
                                           float (&x)[COUNT][UNIT]) {
    const T* source = static_cast<const T*>(m.data) + row * m.stride_row + column * m.stride_column;
    if (m.vector && row + (COUNT - 1) * row_step < m.rows && column + UNIT <= m.columns) {
        load_vectors(source, row_step * m.stride_row, x);
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
#pragma unroll
            for (int e = 0; e < UNIT; ++e)
                x[i][e] = row + i * row_step < m.rows && column + e < m.columns
                              ? to_float(source[i * row_step * m.stride_row + e * m.stride_column])
                              : 0.0f;
    }
}

__device__ __forceinline__ uint32_t pack(__nv_bfloat16 a, __nv_bfloat16 b) {
    return static_cast<uint32_t>(__bfloat16_as_ushort(b)) << 16 | __bfloat16_as_ushort(a);
}

__device__ __forceinline__ uint32_t pack(__half a, __half b) {
    return static_cast<uint32_t>(__half_as_ushort(b)) << 16 | __half_as_ushort(a);
}

inline Matrix matrix(const void* data, int bytes, int64_t stride_row, int64_t stride_column,
                     int64_t rows, int64_t columns) {
    const bool vector = stride_column == 1 && stride_row * bytes % 16 == 0 &&
                        reinterpret_cast<uintptr_t>(data) % 16 == 0;
    return {data, stride_row, stride_column, rows, columns, vector};
}

inline int64_t up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

}  // namespace filet
