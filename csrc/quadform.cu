// diag(Vᵀ S V): packs the operands for the tensor cores, multiplies, adds up.
//
// Accurate: S and V are scaled by powers of two and split into two fp16 numbers, which carry 22 bits.
// The scale e_i of a row of S comes from S_ii, so that |S_ij| < 2^(e_i + e_j), as a second moment has
// it; where any element has not, from the largest element of each row. A column of V, with 2^e_i
// taken into it, is scaled by its own largest element. All this is exact. V is packed and multiplied
// some columns at a time.
//
// Fast, on Hopper: the products' kernel packs most of S itself (csrc/quadform_sm90.cu); only the block
// rows that its first tasks need are packed before it.
//
// Every kernel but the first is launched while the one before still runs, and waits for its results.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "filet/host.h"
#include "filet/matrix.cuh"
#include "filet/quadform.h"
#include "filet/quadform_pack.cuh"
#include "filet/quadform_tiles.h"
#include "filet/triangle.cuh"

namespace {

using namespace filet;

constexpr int TILE = QUADFORM_TILE, STEP = QUADFORM_STEP, BOX = 64, BOX_BYTES = QUADFORM_BOX_BYTES;
constexpr int THREADS = 256;
constexpr int S_REPEATS = TILE * STEP / UNIT / THREADS, V_REPEATS = STEP * TILE / UNIT / THREADS;
constexpr int HEADROOM = 14;  // scaled numbers are below 2^14, doubled ones below fp16's 2^16

__device__ __forceinline__ int exponent(float x) {  // |x| < 2^(exponent + 1)
    return static_cast<int>(__float_as_uint(x) >> 23 & 255) - 127;
}

// What the scales of the rows of S come from, as bits of |x| (which are in the same order as |x|).
struct Scales {
    unsigned *diagonal, *largest;
    int* general;  // whether S is no second moment: `largest` counts
};

__device__ __forceinline__ int row_exponent(unsigned bits) {
    return (exponent(__uint_as_float(bits)) + 2) >> 1;
}

__device__ __forceinline__ int row_exponent(const Scales& scales, int64_t row) {
    return row_exponent((*scales.general ? scales.largest : scales.diagonal)[row]);
}

// Lets the next kernel start, and waits for the results of the one before.
__device__ __forceinline__ void follow() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// x 2^e, in two exact factors, since one may be out of range.
__device__ __forceinline__ float scale(float x, int e) {
    const int half = max(-126, min(e >> 1, 126)), rest = max(-126, min(e - half, 126));
    return x * __int_as_float((half + 127) << 23) * __int_as_float((rest + 127) << 23);
}

// x as fp16, and what is left in the next tiles, `piece_bytes` further on each.
__device__ __forceinline__ void store_fp16(uint8_t* target, int pieces, int piece_bytes,
                                           float (&x)[UNIT]) {
    for (int piece = 0; piece < pieces; ++piece) {
        uint32_t words[UNIT / 2];
#pragma unroll
        for (int i = 0; i < UNIT / 2; ++i) {
            const __half a = __float2half_rn(x[2 * i]), b = __float2half_rn(x[2 * i + 1]);
            words[i] = pack(a, b);
            x[2 * i] -= __half2float(a);
            x[2 * i + 1] -= __half2float(b);
        }
        *reinterpret_cast<uint4*>(target + piece * piece_bytes) =
            make_uint4(words[0], words[1], words[2], words[3]);
    }
}

__global__ void __launch_bounds__(THREADS)
    start_kernel(const Matrix s, const Scales scales, int* exponents, int64_t width) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (i == 0) *scales.general = 0;
    if (i < width) exponents[i] = INT_MIN;
    if (i >= s.rows) return;
    scales.largest[i] = 0;
    scales.diagonal[i] = __float_as_uint(static_cast<const float*>(
                             s.data)[i * (s.stride_row + s.stride_column)]) & 0x7FFFFFFF;
}

// Largest |S_ij| of every row i of the whole symmetric S, where that counts.
__global__ void __launch_bounds__(THREADS) largest_kernel(const Matrix s, const Scales scales) {
    __shared__ unsigned columns[STEP];
    follow();
    if (!*scales.general) return;
    const int block_row = triangular_row(blockIdx.x / 2);
    const int step = blockIdx.x - block_row * (block_row + 1);
    if (threadIdx.x < STEP) columns[threadIdx.x] = 0;
    __syncthreads();
    const int unit = threadIdx.x % 8;
    const int64_t column = static_cast<int64_t>(step) * STEP + unit * UNIT;
    const int64_t row0 = static_cast<int64_t>(block_row) * TILE + threadIdx.x / 8;
    float x[S_REPEATS][UNIT];
    load_units<float>(s, row0, THREADS / 8, column, x);
    unsigned of_column[UNIT] = {};
#pragma unroll
    for (int i = 0; i < S_REPEATS; ++i) {
        const int64_t row = row0 + i * THREADS / 8;
        unsigned of_row = 0;
#pragma unroll
        for (int e = 0; e < UNIT; ++e) {
            const unsigned bits = column + e <= row ? __float_as_uint(x[i][e]) & 0x7FFFFFFF : 0;
            of_row = max(of_row, bits);
            of_column[e] = max(of_column[e], bits);
        }
#pragma unroll
        for (int lanes = 1; lanes < 8; lanes *= 2)
            of_row = max(of_row, __shfl_xor_sync(~0u, of_row, lanes));
        if (unit == 0 && row < s.rows) atomicMax(scales.largest + row, of_row);
    }
#pragma unroll
    for (int e = 0; e < UNIT; ++e) atomicMax(columns + unit * UNIT + e, of_column[e]);
    __syncthreads();
    const int64_t target = static_cast<int64_t>(step) * STEP + threadIdx.x;
    if (threadIdx.x < STEP && target < s.columns) atomicMax(scales.largest + target, columns[threadIdx.x]);
}

// Fast: the tiles of S before `late_begin` and from `late_end` on; the counters become zero.
__global__ void __launch_bounds__(THREADS)
    start_fast_kernel(const Matrix s, int late_begin, int late_end, unsigned* counters, int count,
                      uint8_t* tiles) {
    follow();
    if (blockIdx.x == 0)
        for (int i = threadIdx.x; i < count; i += THREADS) counters[i] = 0;
    const int tile = static_cast<int>(blockIdx.x);
    pack_s_rows<false, S_REPEATS>(s, tile < late_begin ? tile : tile - late_begin + late_end,
                                  threadIdx.x / 8, THREADS / 8, tiles);
}

// Accurate: the lower triangle of S in tiles, scaled by the diagonal; `again`, where that was not
// enough, by the largest elements.
__global__ void __launch_bounds__(THREADS)
    pack_s_kernel(const Matrix s, const Scales scales, bool again, uint8_t* tiles) {
    follow();
    if (again && !*scales.general) return;
    const int block_row = triangular_row(blockIdx.x / 2);
    const int step = blockIdx.x - block_row * (block_row + 1);
    const int unit = threadIdx.x % 8;
    const int64_t column = static_cast<int64_t>(step) * STEP + unit * UNIT;
    float x[S_REPEATS][UNIT];
    load_units<float>(s, static_cast<int64_t>(block_row) * TILE + threadIdx.x / 8, THREADS / 8, column,
                      x);
    const unsigned* bits = again ? scales.largest : scales.diagonal;
    int column_exponent[UNIT];
#pragma unroll
    for (int e = 0; e < UNIT; ++e)
        column_exponent[e] = column + e < s.columns ? row_exponent(bits[column + e]) : 0;
    bool general = false;
#pragma unroll
    for (int i = 0; i < S_REPEATS; ++i) {
        const int local = threadIdx.x / 8 + i * THREADS / 8;
        const int64_t row = static_cast<int64_t>(block_row) * TILE + local;
        const int e_row = row < s.rows ? row_exponent(bits[row]) : 0;
#pragma unroll
        for (int e = 0; e < UNIT; ++e) {
            const bool below = column + e < row;
            if (!below && column + e > row) {
                x[i][e] = 0;
            } else {
                x[i][e] = scale(x[i][e], HEADROOM - e_row - column_exponent[e]);
                general |= fabsf(x[i][e]) > 1 << HEADROOM;
                x[i][e] *= below ? 2 : 1;
            }
        }
        store_fp16(tiles + static_cast<int64_t>(blockIdx.x) * 4 * BOX_BYTES + swizzled(local, unit), 2,
                   2 * BOX_BYTES, x[i]);
    }
    if (general) *scales.general = 1;
}

// The exponent of the largest |v_i 2^e_i| of every column of V, plus 1.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    exponents_kernel(const Matrix v, const Scales scales, int* exponents) {
    __shared__ int of_warp[THREADS / 32][TILE];
    follow();
    const int unit = threadIdx.x % 16, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t column = static_cast<int64_t>(blockIdx.y) * TILE + unit * UNIT;
    int of_column[UNIT];
#pragma unroll
    for (int e = 0; e < UNIT; ++e) of_column[e] = INT_MIN;
    const int64_t row0 = static_cast<int64_t>(blockIdx.x) * STEP + threadIdx.x / 16;
    float x[V_REPEATS][UNIT];
    load_units<T>(v, row0, THREADS / 16, column, x);
#pragma unroll
    for (int i = 0; i < V_REPEATS; ++i) {
        const int64_t row = row0 + i * THREADS / 16;
        if (row >= v.rows) continue;
        const int e_row = row_exponent(scales, row);
#pragma unroll
        for (int e = 0; e < UNIT; ++e)
            if (x[i][e] != 0) of_column[e] = max(of_column[e], exponent(x[i][e]) + e_row + 1);
    }
#pragma unroll
    for (int e = 0; e < UNIT; ++e) {
        of_column[e] = max(of_column[e], __shfl_xor_sync(~0u, of_column[e], 16));
        if (lane < 16) of_warp[warp][unit * UNIT + e] = of_column[e];
    }
    __syncthreads();
    const int64_t target = static_cast<int64_t>(blockIdx.y) * TILE + threadIdx.x;
    if (threadIdx.x >= TILE || target >= v.columns) return;
    int largest = INT_MIN;
#pragma unroll
    for (int i = 0; i < THREADS / 32; ++i) largest = max(largest, of_warp[i][threadIdx.x]);
    atomicMax(exponents + target, largest);
}

// Columns of V in tiles. `exponents`: null for bf16.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    pack_v_kernel(const Matrix v, const Scales scales, const int* exponents, int pieces, int columns,
                  uint8_t* tiles) {
    follow();
    const int unit = threadIdx.x % 16;
    const int64_t column = static_cast<int64_t>(blockIdx.y) * TILE + unit * UNIT;
    const int tile = static_cast<int>(blockIdx.y) * TILE / columns;
    const int box = (static_cast<int>(blockIdx.y) * TILE % columns + unit * UNIT) / BOX;
    const int piece_bytes = columns / BOX * BOX_BYTES;
    uint8_t* target = tiles + (static_cast<int64_t>(tile) * gridDim.x + blockIdx.x) * pieces * piece_bytes +
                      box * BOX_BYTES;
    int column_exponent[UNIT];
    if (exponents) {
#pragma unroll
        for (int e = 0; e < UNIT; ++e)
            column_exponent[e] = column + e < v.columns ? exponents[column + e] : 0;
    }
    float x[V_REPEATS][UNIT];
    load_units<T>(v, static_cast<int64_t>(blockIdx.x) * STEP + threadIdx.x / 16, THREADS / 16, column,
                  x);
#pragma unroll
    for (int i = 0; i < V_REPEATS; ++i) {
        const int local = threadIdx.x / 16 + i * THREADS / 16;
        const int64_t row = static_cast<int64_t>(blockIdx.x) * STEP + local;
        if (exponents) {
            const int e_row = row < v.rows ? row_exponent(scales, row) : 0;
#pragma unroll
            for (int e = 0; e < UNIT; ++e)
                x[i][e] = x[i][e] == 0
                              ? 0.0f
                              : scale(x[i][e], HEADROOM + e_row - column_exponent[e]);
            store_fp16(target + swizzled(local, unit % 8), pieces, piece_bytes, x[i]);
        } else {
            store_bf16(target + swizzled(local, unit % 8), x[i]);
        }
    }
}

// out = the sum of a column of `partial`, in the order of its rows, without the scales.
__global__ void __launch_bounds__(THREADS)
    sum_kernel(const float* partial, int64_t stride, int rows, const int* exponents, int64_t p,
               double* out) {
    __shared__ double sums[THREADS / 32][32];
    follow();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + lane;
    double sum = 0;
    if (column < p)
        for (int row = warp; row < rows; row += THREADS / 32) sum += partial[row * stride + column];
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || column >= p) return;
    for (int i = 1; i < THREADS / 32; ++i) sum += sums[i][lane];
    // vᵀSv was multiplied by 2^(3 HEADROOM - 2 exponent); a column of zeros has no exponent.
    out[column] = exponents && sum != 0 ? ldexp(sum, 2 * exponents[column] - 3 * HEADROOM) : sum;
}

// --- host -----------------------------------------------------------------------------------------

struct Plan {
    int rows, v_pieces, columns;  // v_pieces: those stored; columns of a tile of V
    bool direct;                  // V is read where it is
    int64_t width, chunk;         // columns of `partial`; of V in one launch
    int64_t s_bytes;              // of the first workspace, the tiles of S
    int64_t partial, scales, exponents, counters, v, bytes;  // offsets in the second

    explicit Plan(const FiletQuadform& args) {
        rows = static_cast<int>(up(args.n, TILE) / TILE);
        v_pieces = args.accurate && args.dtype == FILET_FP32 ? QUADFORM_FP32_PIECES : 1;
        columns = args.portable ? QUADFORM_COLUMNS_SM80 : quadform_columns_sm90(args.accurate);
        direct = !args.portable && !args.accurate && args.dtype == FILET_BF16 &&
                 args.stride_v_column == 1 && args.stride_v_row >= args.p &&
                 args.stride_v_row % 8 == 0 && reinterpret_cast<uintptr_t>(args.v) % 16 == 0;
        width = up(args.p, 2 * columns);
        s_bytes = rows * (rows + 1ll) * (args.accurate ? 4 : 2) * BOX_BYTES;
        bytes = 0;
        partial = take(2 * rows * width * sizeof(float));
        scales = take(args.accurate ? (2 * args.n + 1) * sizeof(unsigned) : 0);
        exponents = take(args.accurate ? width * sizeof(int) : 0);
        counters = take(args.accurate ? 0 : quadform_counters(rows) * sizeof(unsigned));
        const int64_t limit = std::max(args.n * args.n * 4 - s_bytes, args.least_bytes);
        const int64_t left = std::max(limit - bytes, limit / 4);
        const int64_t pair_bytes = 2ll * columns * rows * TILE * v_pieces * 2;  // of two tiles' columns
        const int64_t fit = std::max<int64_t>(left / pair_bytes, 1);
        const int64_t pairs = std::max<int64_t>(width / (2 * columns), 1);
        const int64_t chunks = direct ? 1 : (pairs + fit - 1) / fit;
        // Of even size: a small last one would leave clusters without work.
        chunk = (pairs + chunks - 1) / chunks * 2 * columns;
        const int64_t steps = 2 * rows;
        v = take(direct ? 0 : chunk / BOX * steps * v_pieces * BOX_BYTES);
    }

    int64_t take(int64_t size) {
        const int64_t offset = bytes;
        bytes += up(size, 256);
        return offset;
    }
};

// Launches a kernel that calls follow().
template <typename... Parameters, typename... Arguments>
cudaError_t launch_next(void (*kernel)(Parameters...), dim3 grid, cudaStream_t stream,
                        const Arguments&... arguments) {
    cudaLaunchAttribute early;
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = THREADS;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = filet::starts_early() ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

template <typename T>
cudaError_t pack_v(const Matrix& v, const Plan& plan, int64_t width, const Scales& scales,
                   int* exponents, uint8_t* tiles, cudaStream_t stream) {
    const dim3 grid(2 * plan.rows, static_cast<unsigned>(width / TILE));
    if (exponents) {
        const cudaError_t status =
            launch_next(exponents_kernel<T>, grid, stream, v, scales, exponents);
        if (status) return status;
    }
    return launch_next(pack_v_kernel<T>, grid, stream, v, scales, exponents, plan.v_pieces,
                       plan.columns, tiles);
}

// S in tiles, but for the block rows late_begin ... late_end - 1, where the products' kernel is to pack
// any.
cudaError_t pack_s(const FiletQuadform& args, const Plan& plan, const Matrix& s, const Scales& scales,
                   int* exponents, unsigned* counters, uint8_t* tiles, int& late_begin,
                   int& late_end) {
    const auto stream = static_cast<cudaStream_t>(args.stream);
    const auto tiles_above = [](int row) { return row * (row + 1); };
    cudaError_t status;
    if (args.accurate) {
        const int64_t numbers = std::max(plan.width, args.n);
        start_kernel<<<static_cast<unsigned>(up(numbers, THREADS) / THREADS), THREADS, 0, stream>>>(
            s, scales, exponents, plan.width);
        status = cudaGetLastError();
        const int grid = tiles_above(plan.rows);
        if (!status) status = launch_next(pack_s_kernel, grid, stream, s, scales, false, tiles);
        if (!status) status = launch_next(largest_kernel, grid, stream, s, scales);
        if (!status) status = launch_next(pack_s_kernel, grid, stream, s, scales, true, tiles);
    } else {
        // Rows read 16 bytes at a time, and all 128 of them: the products cannot wait for more.
        if (!args.portable && s.vector) {
            late_begin =
                quadform_late_sm90(plan.rows, static_cast<int>(plan.chunk / plan.columns));
            late_end = std::max(late_begin, static_cast<int>(args.n / TILE));
        }
        const int begin = tiles_above(late_begin), end = tiles_above(late_end);
        start_fast_kernel<<<tiles_above(plan.rows) - (end - begin), THREADS, 0, stream>>>(
            s, begin, end, counters, static_cast<int>(quadform_counters(plan.rows)), tiles);
        status = cudaGetLastError();
    }
    return status;
}

}  // namespace

extern "C" FiletQuadformWorkspaces filet_quadform_workspaces(const FiletQuadform* args) {
    const Plan plan(*args);
    return {{plan.s_bytes, plan.bytes}};
}

extern "C" int filet_quadform(const FiletQuadform* args) {
    if (args->n <= 0 || args->p <= 0) return cudaSuccess;
    const Plan plan(*args);
    const auto stream = static_cast<cudaStream_t>(args->stream);
    auto* tiles_s = static_cast<uint8_t*>(args->workspaces[0]);
    auto* workspace = static_cast<uint8_t*>(args->workspaces[1]);
    auto* partial = reinterpret_cast<float*>(workspace + plan.partial);
    auto* bits = reinterpret_cast<unsigned*>(workspace + plan.scales);
    const Scales scales = {bits, bits + args->n, reinterpret_cast<int*>(bits + 2 * args->n)};
    int* exponents = args->accurate ? reinterpret_cast<int*>(workspace + plan.exponents) : nullptr;
    const Matrix s = matrix(args->s, 4, args->stride_s_row, args->stride_s_column, args->n, args->n);
    auto* counters = reinterpret_cast<unsigned*>(workspace + plan.counters);
    int late_begin = plan.rows, late_end = plan.rows;  // block rows that the products' kernel packs
    int status = pack_s(*args, plan, s, scales, exponents, counters, tiles_s, late_begin, late_end);
    for (int64_t column = 0; column < plan.width && !status; column += plan.chunk) {
        const int bytes = args->dtype == FILET_FP32 ? 4 : 2;
        const auto* data =
            static_cast<const uint8_t*>(args->v) + column * args->stride_v_column * bytes;
        const int64_t width = std::min(plan.chunk, plan.width - column);
        const Matrix v = matrix(data, bytes, args->stride_v_row, args->stride_v_column, args->n,
                                std::max<int64_t>(std::min(width, args->p - column), 0));
        if (!plan.direct) {
            int* of_chunk = exponents ? exponents + column : nullptr;
            uint8_t* tiles = workspace + plan.v;
            if (args->dtype == FILET_FP32)
                status = pack_v<float>(v, plan, width, scales, of_chunk, tiles, stream);
            else if (args->dtype == FILET_FP16)
                status = pack_v<__half>(v, plan, width, scales, of_chunk, tiles, stream);
            else
                status = pack_v<__nv_bfloat16>(v, plan, width, scales, of_chunk, tiles, stream);
            if (status) return status;
        }
        const QuadformTiles tiles = {tiles_s,
                                     s,
                                     late_begin,
                                     column == 0 ? late_end : late_begin,
                                     counters,
                                     plan.direct ? nullptr : workspace + plan.v,
                                     args->v,
                                     args->stride_v_row,
                                     args->n,
                                     args->p,
                                     partial + column,
                                     plan.width,
                                     plan.rows,
                                     static_cast<int>(width / plan.columns),
                                     args->accurate != 0,
                                     plan.v_pieces,
                                     stream};
        status = args->portable ? quadform_sm80(tiles) : quadform_sm90(tiles);
    }
    if (status) return status;
    return launch_next(sum_kernel, static_cast<unsigned>(up(args->p, 32) / 32), stream, partial,
                       plan.width, 2 * plan.rows, exponents, args->p, args->out);
}
