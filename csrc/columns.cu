// Single passes over matrices that torch would take several for, or a slower one: numbers split into
// fp16 parts, sums over columns, a transposed copy, a lower triangle copied to the upper one.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "filet/columns.h"
#include "filet/matrix.cuh"

namespace {

using namespace filet;

constexpr int THREADS = 256, UNITS = 16;      // units of a block's columns
constexpr int COLUMNS = UNITS * UNIT, ROWS = 64;  // of a block
constexpr int REPEATS = ROWS * UNITS / THREADS, ROW_STEP = THREADS / UNITS;
constexpr int SUM_ROWS = 64;  // of a 1024 × 1024 matrix 128 blocks, each a few loads after another
constexpr int MIRROR = 32, TRANSPOSED = 64;

dim3 blocks(int64_t rows, int64_t columns, int block_rows) {
    return dim3(static_cast<unsigned>(up(columns, COLUMNS) / COLUMNS),
                static_cast<unsigned>(up(rows, block_rows) / block_rows));
}

// Bits of |x| are in the same order as |x|, NaN above all.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    largest_kernel(const Matrix x, bool by_column, uint32_t* largest) {
    __shared__ uint32_t of_block[COLUMNS];
    if (threadIdx.x < COLUMNS) of_block[threadIdx.x] = 0;
    __syncthreads();
    const int unit = threadIdx.x % UNITS;
    float values[REPEATS][UNIT];
    load_units<T>(x, static_cast<int64_t>(blockIdx.y) * ROWS + threadIdx.x / UNITS, ROW_STEP,
                  static_cast<int64_t>(blockIdx.x) * COLUMNS + unit * UNIT, values);
#pragma unroll
    for (int e = 0; e < UNIT; ++e) {
        uint32_t bits = 0;
#pragma unroll
        for (int i = 0; i < REPEATS; ++i)
            bits = max(bits, __float_as_uint(values[i][e]) & 0x7FFFFFFF);
        atomicMax(of_block + unit * UNIT + e, bits);
    }
    __syncthreads();
    if (threadIdx.x >= COLUMNS) return;
    const int64_t column = static_cast<int64_t>(blockIdx.x) * COLUMNS + threadIdx.x;
    if (by_column) {
        if (column < x.columns) atomicMax(largest + column, of_block[threadIdx.x]);
    } else {
        uint32_t bits = of_block[threadIdx.x];
        for (int lanes = 1; lanes < 32; lanes *= 2)
            bits = max(bits, __shfl_xor_sync(~0u, bits, lanes));
        if (threadIdx.x % 32 == 0) atomicMax(largest, bits);
    }
}

// 2^14 over the largest power of two in |x|.
__device__ __forceinline__ float scale_of(uint32_t largest) {
    const float power = __uint_as_float(largest & 0x7F800000);
    return 0x1p14f / fmaxf(power, 0x1p-100f);
}

__device__ __forceinline__ void store_unit(__half* target, int64_t column, int64_t columns,
                                           const float (&x)[UNIT]) {
    if (columns % UNIT == 0) {
        uint32_t words[UNIT / 2];
#pragma unroll
        for (int e = 0; e < UNIT; e += 2)
            words[e / 2] = pack(__float2half_rn(x[e]), __float2half_rn(x[e + 1]));
        *reinterpret_cast<uint4*>(target) = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
#pragma unroll
        for (int e = 0; e < UNIT; ++e)
            if (column + e < columns) target[e] = __float2half_rn(x[e]);
    }
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    split_kernel(const Matrix x, bool by_column, const uint32_t* largest, double* scales,
                 __half* first, __half* second) {
    const int64_t column =
        static_cast<int64_t>(blockIdx.x) * COLUMNS + threadIdx.x % UNITS * UNIT;
    const int64_t row0 = static_cast<int64_t>(blockIdx.y) * ROWS + threadIdx.x / UNITS;
    if (column >= x.columns) return;
    float values[REPEATS][UNIT];
    load_units<T>(x, row0, ROW_STEP, column, values);
    float scale[UNIT];
#pragma unroll
    for (int e = 0; e < UNIT; ++e) {
        const int64_t index = by_column ? column + e : 0;
        scale[e] = column + e < x.columns ? scale_of(largest[index]) : 1.0f;
        if (row0 == 0 && column + e < x.columns && (by_column || column + e == 0))
            scales[index] = scale[e];
    }
#pragma unroll
    for (int i = 0; i < REPEATS; ++i) {
        const int64_t row = row0 + i * ROW_STEP;
        if (row >= x.rows) return;
        float rest[UNIT];
#pragma unroll
        for (int e = 0; e < UNIT; ++e) {
            values[i][e] *= scale[e];
            rest[e] = 0x1p11f * (values[i][e] - __half2float(__float2half_rn(values[i][e])));
        }
        store_unit(first + row * x.columns + column, column, x.columns, values[i]);
        if (second) store_unit(second + row * x.columns + column, column, x.columns, rest);
    }
}

template <typename T, bool PRODUCTS>
__global__ void __launch_bounds__(COLUMNS)
    parts_kernel(const float* v, const T* w, int64_t stride_row, int64_t stride_column, int64_t rows,
                 int64_t columns, float* parts) {
    const int64_t column = static_cast<int64_t>(blockIdx.x) * COLUMNS + threadIdx.x;
    const int64_t begin = static_cast<int64_t>(blockIdx.y) * SUM_ROWS;
    const int64_t end = min(begin + SUM_ROWS, rows);
    if (column >= columns) return;
    float squares = 0, products = 0;
#pragma unroll 16
    for (int64_t row = begin; row < end; ++row) {
        const float x = v[row * columns + column];
        squares += x * x;
        if (PRODUCTS) products += x * to_float(w[row * stride_row + column * stride_column]);
    }
    float* target = parts + static_cast<int64_t>(blockIdx.y) * 2 * columns + column;
    target[0] = squares;
    target[columns] = products;
}

__global__ void __launch_bounds__(THREADS)
    sums_kernel(const float* parts, int count, int64_t columns, double* squares, double* products) {
    const int64_t column = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (column >= columns) return;
    double of_squares = 0, of_products = 0;
    for (int i = 0; i < count; ++i) {
        of_squares += parts[2 * i * columns + column];
        of_products += parts[(2 * i + 1) * columns + column];
    }
    squares[column] = of_squares;
    if (products) products[column] = of_products;
}

__global__ void __launch_bounds__(THREADS) mirror_kernel(float* c, int64_t n, int64_t stride) {
    __shared__ float tile[MIRROR][MIRROR + 1];
    const int64_t row0 = static_cast<int64_t>(blockIdx.y) * MIRROR;
    const int64_t column0 = static_cast<int64_t>(blockIdx.x) * MIRROR;
    if (column0 > row0) return;
    const int x = threadIdx.x % MIRROR;
    for (int y = threadIdx.x / MIRROR; y < MIRROR; y += THREADS / MIRROR)
        if (row0 + y < n && column0 + x < n) tile[y][x] = c[(row0 + y) * stride + column0 + x];
    __syncthreads();
    for (int y = threadIdx.x / MIRROR; y < MIRROR; y += THREADS / MIRROR) {
        const int64_t row = column0 + y, column = row0 + x;  // of the target
        if (row < column && column < n) c[row * stride + column] = tile[x][y];
    }
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    transpose_kernel(const T* x, int64_t stride, int64_t rows, int64_t columns, T* out) {
    __shared__ T tile[TRANSPOSED][TRANSPOSED + 4 / sizeof(T)];
    const int64_t row0 = static_cast<int64_t>(blockIdx.y) * TRANSPOSED;
    const int64_t column0 = static_cast<int64_t>(blockIdx.x) * TRANSPOSED;
    const int inner = threadIdx.x % TRANSPOSED, first = threadIdx.x / TRANSPOSED;
#pragma unroll 8
    for (int y = first; y < TRANSPOSED; y += THREADS / TRANSPOSED)
        if (row0 + y < rows && column0 + inner < columns)
            tile[y][inner] = x[(row0 + y) * stride + column0 + inner];
    __syncthreads();
#pragma unroll 8
    for (int y = first; y < TRANSPOSED; y += THREADS / TRANSPOSED)
        if (column0 + y < columns && row0 + inner < rows)
            out[(column0 + y) * rows + row0 + inner] = tile[inner][y];
}

template <typename T>
int split(const FiletSplit& args) {
    const Matrix x = matrix(args.x, sizeof(T), args.stride_row, args.stride_column, args.rows,
                            args.columns);
    const auto stream = static_cast<cudaStream_t>(args.stream);
    const cudaError_t status = cudaMemsetAsync(
        args.largest, 0, (args.by_column ? args.columns : 1) * sizeof(uint32_t), stream);
    if (status) return status;
    const dim3 grid = blocks(args.rows, args.columns, ROWS);
    largest_kernel<T><<<grid, THREADS, 0, stream>>>(x, args.by_column, args.largest);
    split_kernel<T><<<grid, THREADS, 0, stream>>>(x, args.by_column, args.largest, args.scale,
                                                  static_cast<__half*>(args.first),
                                                  static_cast<__half*>(args.second));
    return cudaGetLastError();
}

template <typename T, bool PRODUCTS>
void sum_parts(const FiletColumnSums& args, cudaStream_t stream) {
    parts_kernel<T, PRODUCTS><<<blocks(args.rows, args.columns, SUM_ROWS), COLUMNS, 0, stream>>>(
        args.v, static_cast<const T*>(args.w), args.stride_w_row, args.stride_w_column, args.rows,
        args.columns, args.parts);
}

}  // namespace

extern "C" int filet_split(const FiletSplit* args) {
    if (args->rows <= 0 || args->columns <= 0) return cudaSuccess;
    if (args->dtype == FILET_FP32) return split<float>(*args);
    return args->dtype == FILET_FP16 ? split<__half>(*args) : split<__nv_bfloat16>(*args);
}

extern "C" int64_t filet_column_sums_parts(int64_t rows) { return up(rows, SUM_ROWS) / SUM_ROWS; }

extern "C" int filet_column_sums(const FiletColumnSums* args) {
    if (args->columns <= 0) return cudaSuccess;
    const auto stream = static_cast<cudaStream_t>(args->stream);
    const int parts = static_cast<int>(filet_column_sums_parts(args->rows));
    if (parts) {
        if (!args->w)
            sum_parts<float, false>(*args, stream);
        else if (args->dtype == FILET_FP32)
            sum_parts<float, true>(*args, stream);
        else if (args->dtype == FILET_FP16)
            sum_parts<__half, true>(*args, stream);
        else
            sum_parts<__nv_bfloat16, true>(*args, stream);
    }
    sums_kernel<<<static_cast<unsigned>(up(args->columns, THREADS) / THREADS), THREADS, 0, stream>>>(
        args->parts, parts, args->columns, args->squares, args->w ? args->products : nullptr);
    return cudaGetLastError();
}

extern "C" int filet_transpose(const void* x, int64_t stride, int64_t rows, int64_t columns,
                               int32_t bytes, void* out, void* stream) {
    if (rows <= 0 || columns <= 0) return cudaSuccess;
    const dim3 grid(static_cast<unsigned>(up(columns, TRANSPOSED) / TRANSPOSED),
                    static_cast<unsigned>(up(rows, TRANSPOSED) / TRANSPOSED));
    const auto on = static_cast<cudaStream_t>(stream);
    if (bytes == 2)
        transpose_kernel<<<grid, THREADS, 0, on>>>(static_cast<const uint16_t*>(x), stride, rows,
                                                   columns, static_cast<uint16_t*>(out));
    else if (bytes == 4)
        transpose_kernel<<<grid, THREADS, 0, on>>>(static_cast<const uint32_t*>(x), stride, rows,
                                                   columns, static_cast<uint32_t*>(out));
    else
        return cudaErrorInvalidValue;
    return cudaGetLastError();
}

extern "C" int filet_mirror(float* c, int64_t n, int64_t stride, void* stream) {
    if (n <= 0) return cudaSuccess;
    const unsigned tiles = static_cast<unsigned>(up(n, MIRROR) / MIRROR);
    mirror_kernel<<<dim3(tiles, tiles), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(c, n, stride);
    return cudaGetLastError();
}
