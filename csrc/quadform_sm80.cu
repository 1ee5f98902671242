// The products of diag(Vᵀ S V) on compute capability 8.0 and later, from tiles
// (filet/quadform_tiles.h) to partial sums: what csrc/quadform_sm90.cu says, with cp.async and mma.
//
// A block computes one block row of S times 128 columns of V; long tasks start first.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "filet/quadform_tiles.h"

namespace {

using namespace filet;

constexpr int STEP = QUADFORM_STEP, BOX_BYTES = QUADFORM_BOX_BYTES;
constexpr int COLUMNS = QUADFORM_COLUMNS_SM80, PIECE_BYTES = 2 * BOX_BYTES;  // of S and of V
constexpr int WARP_ROWS = 64, WARP_COLUMNS = 32, THREADS = 256;
constexpr int M_TILES = WARP_ROWS / 16, N_TILES = WARP_COLUMNS / 8;

__device__ __forceinline__ uint32_t smem_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void copy_async(uint32_t target, const void* source) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}

template <int N>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8 × 8 matrices of 16-bit numbers; lane l names row l % 8 of matrix l / 8.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(uint32_t address, uint32_t (&r)[4]) {
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
}

template <typename T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
    if constexpr (std::is_same_v<T, __half>)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
            " {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
            " {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float2 to_float2(uint32_t word, __nv_bfloat16) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000));
}

__device__ __forceinline__ float2 to_float2(uint32_t word, __half) {
    return __half22float2(*reinterpret_cast<const __half2*>(&word));
}

template <bool ACCURATE, int V_PIECES>
struct Shape {
    using T = std::conditional_t<ACCURATE, __half, __nv_bfloat16>;
    static constexpr int S_PIECES = ACCURATE ? 2 : 1;
    static constexpr int V_OFFSET = S_PIECES * PIECE_BYTES;
    static constexpr int V_STORED = (V_PIECES == 1 ? 1 : QUADFORM_FP32_PIECES) * PIECE_BYTES;
    static constexpr int STAGE_BYTES = V_OFFSET + V_PIECES * PIECE_BYTES;
    static constexpr int STAGES = 6 - S_PIECES - V_PIECES;
    static constexpr int SMEM_BYTES = STAGES * STAGE_BYTES;
    static_assert(STAGES >= 2 && SMEM_BYTES <= 163 * 1024);
};

// d += the product of a step's piece of S and piece of V, for this warp's 64 × 32.
template <typename T>
__device__ __forceinline__ void add_product(float (&d)[M_TILES][N_TILES][4], uint32_t s, uint32_t v,
                                            int row, int column, int lane) {
#pragma unroll
    for (int k = 0; k < STEP / 16; ++k) {
        uint32_t b[N_TILES / 2][4];
#pragma unroll
        for (int j = 0; j < N_TILES / 2; ++j) {
            const int unit = column / 8 + 2 * j + lane / 16, r = 16 * k + lane % 16;
            load_matrices<true>(v + unit / 8 * BOX_BYTES + r * 128 + ((unit ^ r) % 8 << 4), b[j]);
        }
#pragma unroll
        for (int i = 0; i < M_TILES; ++i) {
            uint32_t a[4];
            const int r = row + 16 * i + lane % 16;
            load_matrices<false>(s + r * 128 + (((2 * k + lane / 16) ^ r) % 8 << 4), a);
#pragma unroll
            for (int j = 0; j < N_TILES; ++j)
                multiply<T>(d[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
    }
}

// P ⊙ V over a thread's rows, of 8 columns: unit `unit` of V, j of this warp.
template <bool ACCURATE, int V_PIECES>
__device__ __forceinline__ void multiply_by_v(
    float (&form)[2], const float (&d)[M_TILES][N_TILES][4],
    const float (&sum)[ACCURATE ? M_TILES : 1][N_TILES][4], const uint8_t* rows_of_v,
    const uint8_t* third, int unit, int j, int lane) {
    using T = typename Shape<ACCURATE, V_PIECES>::T;
#pragma unroll
    for (int i = 0; i < M_TILES; ++i) {
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
            const int r = 16 * i + lane / 4 + 4 * e;
            const uint32_t offset =
                unit / 8 * BOX_BYTES + r * 128 + ((unit ^ r) % 8 << 4) + lane % 4 * 4;
            const auto word = [&](const uint8_t* piece) {
                return to_float2(*reinterpret_cast<const uint32_t*>(piece + offset), T());
            };
            float2 value = word(rows_of_v);
            if constexpr (V_PIECES == 2) {
                const float2 low = word(rows_of_v + PIECE_BYTES), rest = word(third);
                value.x += low.x + rest.x;
                value.y += low.y + rest.y;
            }
            if constexpr (ACCURATE) {
                form[0] += sum[i][j][e] * value.x;
                form[1] += sum[i][j][e + 1] * value.y;
            } else {
                form[0] += d[i][j][e] * value.x;
                form[1] += d[i][j][e + 1] * value.y;
            }
        }
    }
}

// sum += d, which starts anew.
__device__ __forceinline__ void take_over(float (&sum)[M_TILES][N_TILES][4],
                                          float (&d)[M_TILES][N_TILES][4]) {
#pragma unroll
    for (int i = 0; i < M_TILES; ++i)
#pragma unroll
        for (int j = 0; j < N_TILES; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[i][j][e] += d[i][j][e], d[i][j][e] = 0;
}

// Copies a step's pieces of S and V into its stage.
template <bool ACCURATE, int V_PIECES>
__device__ __forceinline__ void fetch_stage(uint32_t smem, const uint8_t* s, const uint8_t* v,
                                            int step) {
    using S = Shape<ACCURATE, V_PIECES>;
    const uint32_t stage = smem + step % S::STAGES * S::STAGE_BYTES + threadIdx.x * 16;
    const uint8_t* from_s = s + static_cast<int64_t>(step) * S::V_OFFSET + threadIdx.x * 16;
    const uint8_t* from_v = v + static_cast<int64_t>(step) * S::V_STORED + threadIdx.x * 16;
#pragma unroll
    for (int i = 0; i < S::V_OFFSET; i += THREADS * 16) copy_async(stage + i, from_s + i);
#pragma unroll
    for (int i = 0; i < V_PIECES * PIECE_BYTES; i += THREADS * 16)
        copy_async(stage + S::V_OFFSET + i, from_v + i);
}

template <bool ACCURATE, int V_PIECES>
__global__ void __launch_bounds__(THREADS, 1)
    quadform_kernel(const uint8_t* s_tiles, const uint8_t* v_tiles, float* partial,
                    int64_t stride_partial, int rows, int columns) {
    using S = Shape<ACCURATE, V_PIECES>;
    using T = typename S::T;
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ float sums[2][COLUMNS];
    const uint32_t smem = smem_address(shared);
    const int block_row = rows - 1 - static_cast<int>(blockIdx.x) / columns;
    const int tile = blockIdx.x % columns, steps = 2 * (block_row + 1);
    const uint8_t* s = s_tiles + static_cast<int64_t>(block_row) * (block_row + 1) * S::V_OFFSET;
    const uint8_t* v = v_tiles + static_cast<int64_t>(tile) * 2 * rows * S::V_STORED;

    const auto fetch = [&](int step) {
        fetch_stage<ACCURATE, V_PIECES>(smem, s, v, step);
    };
    const auto commit = [] { asm volatile("cp.async.commit_group;" ::: "memory"); };

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int half = warp % 2, row = half * WARP_ROWS, column = warp / 2 * WARP_COLUMNS;
    float d[M_TILES][N_TILES][4] = {}, sum[ACCURATE ? M_TILES : 1][N_TILES][4] = {};
    for (int step = 0; step < S::STAGES - 1; ++step) {
        if (step < steps) fetch(step);
        commit();
    }
    for (int step = 0; step < steps; ++step) {
        copy_wait<S::STAGES - 2>();
        __syncthreads();  // the step has arrived, and the one before is done with
        if (step + S::STAGES - 1 < steps) fetch(step + S::STAGES - 1);
        commit();
        const uint32_t stage = smem + step % S::STAGES * S::STAGE_BYTES, piece = stage + S::V_OFFSET;
        if constexpr (ACCURATE) {
            if constexpr (V_PIECES == 2)
                add_product<T>(d, stage, piece + PIECE_BYTES, row, column, lane);
            add_product<T>(d, stage + PIECE_BYTES, piece, row, column, lane);
        }
        add_product<T>(d, stage, piece, row, column, lane);
        if constexpr (ACCURATE) {
            take_over(sum, d);
        }
    }

    // P ⊙ V, summed over this warp's rows; V has them in the stage of the last step but one, or the
    // last. A thread has rows lane / 4 and 8 below of every 16, and two of every 8 columns.
    const uint8_t* rows_of_v =
        shared + (steps - 2 + half) % S::STAGES * S::STAGE_BYTES + S::V_OFFSET;
    const uint8_t* third = v + (steps - 2 + half) * static_cast<int64_t>(S::V_STORED) + 2 * PIECE_BYTES;
#pragma unroll
    for (int j = 0; j < N_TILES; ++j) {
        const int unit = column / 8 + j;
        float form[2] = {};
        multiply_by_v<ACCURATE, V_PIECES>(form, d, sum, rows_of_v, third, unit, j, lane);
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) {
            form[0] += __shfl_xor_sync(~0u, form[0], lanes);
            form[1] += __shfl_xor_sync(~0u, form[1], lanes);
        }
        if (lane < 4) {
            sums[half][column + 8 * j + 2 * lane] = form[0];
            sums[half][column + 8 * j + 2 * lane + 1] = form[1];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * COLUMNS; i += THREADS)
        partial[(2 * block_row + i / COLUMNS) * stride_partial + tile * COLUMNS + i % COLUMNS] =
            sums[i / COLUMNS][i % COLUMNS];
}

template <bool ACCURATE, int V_PIECES>
int launch(const QuadformTiles& tiles) {
    const auto kernel = quadform_kernel<ACCURATE, V_PIECES>;
    constexpr int SMEM_BYTES = Shape<ACCURATE, V_PIECES>::SMEM_BYTES;
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SMEM_BYTES);
    if (status) return status;
    kernel<<<tiles.rows * tiles.columns, THREADS, SMEM_BYTES, tiles.stream>>>(
        tiles.s, tiles.v, tiles.partial, tiles.stride_partial, tiles.rows, tiles.columns);
    return cudaGetLastError();
}

}  // namespace

int filet::quadform_sm80(const QuadformTiles& tiles) {
    if (!tiles.accurate) return launch<false, 1>(tiles);
    return tiles.v_pieces > 1 ? launch<true, 2>(tiles) : launch<true, 1>(tiles);
}
