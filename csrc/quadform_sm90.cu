// The products of diag(Vᵀ S V) on Hopper, from tiles (filet/quadform_tiles.h) to partial sums.
//
// A task is a block row of S times some columns of V: P = L V, 128 × 256 (fast) or 128 × 128
// (accurate), whose elementwise product with V, summed over the 128 rows, is the block row's part of
// vᵀSv. These rows of V are those of the last two steps, which are still in shared memory: P is
// reduced in registers and never written. Two blocks of a cluster have the same block row and
// multicast the tiles of S to each other. Clusters are persistent, and each has its tasks from the
// beginning; each warpgroup writes the part of its 64 rows to a place of its own, so the result does not
// depend on their order, and one can reduce while the other multiplies.
//
// Fast: the idle warps of the producer's warpgroup pack S while the others multiply, short block rows
// first, and the tasks are taken in that order too: a short one needs little of S, and the time it
// takes is time to pack the next. These warps claim box after box from one counter, wait for nothing,
// and run in every block until none is left. So whoever waits for a block row waits for warps that are
// running, no matter how many of the clusters are: other streams' kernels may hold the rest of the GPU.
//
// Accurate: three products of pieces (two where V has one), the small ones first, summed over 64
// columns from zero and rounded into the sum: the tensor cores cut off what they add below the last
// bit of a sum.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "filet/host.h"
#include "filet/matrix.cuh"
#include "filet/quadform_pack.cuh"
#include "filet/quadform_tiles.h"
#include "filet/sm90.cuh"

namespace {

using namespace filet;
using namespace filet::sm90;

constexpr int STEP = QUADFORM_STEP, BOX = 64, BOX_BYTES = QUADFORM_BOX_BYTES;
constexpr int WARPGROUP = 128, CONSUMERS = 2, THREADS = (CONSUMERS + 1) * WARPGROUP;
constexpr int A_STEP = 32 >> 4, B_STEP = 2048 >> 4;  // 16 on along the sum, in wgmma descriptors

template <bool ACCURATE, int V_PIECES>
struct Shape {
    using T = std::conditional_t<ACCURATE, __half, __nv_bfloat16>;
    static constexpr int COLUMNS = ACCURATE ? 128 : 256;
    static constexpr int S_PIECES = ACCURATE ? 2 : 1;
    static constexpr int S_BYTES = 2 * BOX_BYTES;  // of a piece
    static constexpr int V_BYTES = COLUMNS / BOX * BOX_BYTES;
    static constexpr int V_STORED = (V_PIECES == 1 ? 1 : QUADFORM_FP32_PIECES) * V_BYTES;
    static constexpr int V_OFFSET = S_PIECES * S_BYTES;
    // Of a thread of the producer's warpgroup and of a consumer: 168 on average. Fast, where the former
    // pack S, with less ptxas would not have four loads under way, and would spill.
    static constexpr int PRODUCER_REGISTERS = ACCURATE ? 40 : 88;
    static constexpr int CONSUMER_REGISTERS = ACCURATE ? 232 : 208;
    static constexpr int STAGE_BYTES = V_OFFSET + V_PIECES * V_BYTES;
    static constexpr int STAGES = STAGE_BYTES > 49152 ? 3 : 4;
    static constexpr int SUM_BYTES = 4 * COLUMNS * sizeof(float);  // of the warps of a warpgroup
    static constexpr int SUM_OFFSET = STAGES * STAGE_BYTES;
    static constexpr int SMEM_BYTES = SUM_OFFSET + 2 * CONSUMERS * SUM_BYTES + 1024;  // and its alignment
    static_assert(SMEM_BYTES <= 232448);
};

struct Problem {
    uint8_t* s;
    const uint8_t* v;
    float* partial;
    int64_t stride_partial;
    int rows, pairs;  // block rows; pairs of tiles of V
    int group;        // block rows that are walked together, for reuse of V in L2
    Matrix s_matrix;
    int late_begin, late_end;  // fast: block rows that are packed here
    unsigned* counters;        // fast: boxes handed out; of every block row, boxes packed
};

// Lets the next kernel start, and waits for the results of the one before.
__device__ __forceinline__ void follow() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// In the tiles of the block rows above one.
__device__ __forceinline__ int boxes_above(int row) { return 2 * row * (row + 1); }

// A warp packs boxes of S as long as there are any, in the order of the block rows.
//
// How a box reaches the bulk engine of any block: the stores of all lanes come before lane 0's release
// (__syncwarp), and that before whatever follows an acquire that has seen the count (wait_packed).
// Accesses of the engine are ordered with others only across a proxy fence. There is one at both ends:
// after the stores, and before the first copy.
__device__ __forceinline__ void pack_boxes(const Problem& problem) {
    constexpr int ROWS = 64, COUNT = 4, ROW_STEP = 32 / 8;  // of a box; a lane's at a time; between them
    const int lane = threadIdx.x % 32;
    const int first = boxes_above(problem.late_begin), end = boxes_above(problem.late_end);
    const auto claim = [&] { return lane == 0 ? atomicAdd(problem.counters, 1u) : 0u; };
    unsigned next = first < end ? claim() : 0;
    while (true) {
        const int box = first + static_cast<int>(__shfl_sync(~0u, next, 0));
        if (box >= end) break;
        next = claim();  // on its way while this one is packed
        const int tile = box / 2;
#pragma unroll 1
        for (int row = box % 2 * ROWS; row < (box % 2 + 1) * ROWS; row += COUNT * ROW_STEP)
            pack_s_rows<true, COUNT>(problem.s_matrix, tile, row + lane / 8, ROW_STEP, problem.s);
        fence_async_proxy_global();
        __syncwarp();
        if (lane == 0) add_release(problem.counters + 1 + quadform_block_row(tile), 1);
    }
}

// Waits until a block row of S is in tiles that this thread may have copied.
__device__ __forceinline__ void wait_packed(const Problem& problem, int row) {
    if (row < problem.late_begin || row >= problem.late_end) return;  // before this kernel
    const unsigned boxes = boxes_above(row + 1) - boxes_above(row);
    while (load_acquire(problem.counters + 1 + row) != boxes) __nanosleep(100);
    fence_async_proxy_global();
}

__host__ __device__ __forceinline__ int rounds_of(int rows, int pairs, int workers) {
    return (rows * pairs + workers - 1) / workers;
}

// Task `round` of a worker: in descending order of the rows, dealt to and fro, so that the sums of
// their lengths are even. The last round may leave some workers out.
__device__ __forceinline__ bool find_task(const Problem& problem, int round, int worker, int workers,
                                          int& row, int& pair) {
    const int task = round * workers + (round % 2 ? workers - 1 - worker : worker);
    if (task >= problem.rows * problem.pairs) return false;
    const int strip = task / (problem.group * problem.pairs);
    const int local = task - strip * problem.group * problem.pairs;
    const int last = problem.rows - 1 - strip * problem.group;
    const int height = min(problem.group, last + 1);
    row = last - local % height;
    pair = local / height;
    return true;
}

__device__ __forceinline__ float2 to_float2(uint32_t word, __nv_bfloat16) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000));
}

__device__ __forceinline__ float2 to_float2(uint32_t word, __half) {
    return __half22float2(*reinterpret_cast<const __half2*>(&word));
}

// v[k] of lanes that differ in the bits 2-4 of their number, summed; each keeps N / 8 of the sums,
// those from (lane / 16 * 4 + lane / 8 % 2 * 2 + lane / 4 % 2) N / 8 on.
template <int BIT = 16, int N>
__device__ __forceinline__ void sum_over_rows(float (&v)[N], int lane) {
    constexpr int HALF = N * BIT / 32;
    const bool upper = lane & BIT;
#pragma unroll
    for (int k = 0; k < HALF; ++k) {
        const float send = upper ? v[k] : v[k + HALF], keep = upper ? v[k + HALF] : v[k];
        v[k] = keep + __shfl_xor_sync(~0u, send, BIT);
    }
    if constexpr (BIT > 4) sum_over_rows<BIT / 2>(v, lane);
}

// The sums over a warpgroup's rows, from those of its warps.
template <int COLUMNS>
__device__ __forceinline__ void write_partial(float* partial, uint32_t sums, int thread) {
#pragma unroll
    for (int column = thread; column < COLUMNS; column += WARPGROUP) {
        float total = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            total += __uint_as_float(load_shared(sums + (i * COLUMNS + column) * 4));
        partial[column] = total;
    }
}

// d = the products of a step's pieces, the small ones first.
template <int V_PIECES>
__device__ __forceinline__ void multiply_pieces(float (&d)[64], uint64_t a, uint64_t b) {
    using S = Shape<true, V_PIECES>;
    using T = typename S::T;
    constexpr int A_LOW = S::S_BYTES >> 4, B_LOW = S::V_BYTES >> 4;
    if constexpr (V_PIECES == 2) {
#pragma unroll
        for (int k = 0; k < STEP / 16; ++k)
            wgmma_m64k16<T, true>(d, a + k * A_STEP, b + B_LOW + k * B_STEP, k > 0);
    }
#pragma unroll
    for (int k = 0; k < STEP / 16; ++k)
        wgmma_m64k16<T, true>(d, a + A_LOW + k * A_STEP, b + k * B_STEP,
                              V_PIECES == 2 || k > 0);
#pragma unroll
    for (int k = 0; k < STEP / 16; ++k)
        wgmma_m64k16<T, true>(d, a + k * A_STEP, b + k * B_STEP, 1);
}

// This block's half of S's pieces, into both blocks, and its tile of V.
template <bool ACCURATE, int V_PIECES>
__device__ __forceinline__ void load_stage(const CUtensorMap* map_v, const Problem& problem,
                                           const uint8_t* s, uint32_t stage, uint32_t barrier,
                                           int tile, int rank, int step) {
    using S = Shape<ACCURATE, V_PIECES>;
#pragma unroll
    for (int piece = 0; piece < S::S_PIECES; ++piece) {
        const int part = (2 * piece + rank) * BOX_BYTES;
        bulk_load_multicast(stage + part,
                            s + step * S::S_PIECES * S::S_BYTES + part, BOX_BYTES,
                            barrier, 3);
    }
    if (problem.v) {
        const int64_t index = static_cast<int64_t>(tile) * 2 * problem.rows + step;
        bulk_load(stage + S::V_OFFSET, problem.v + index * S::V_STORED,
                  V_PIECES * S::V_BYTES, barrier);
    } else {
#pragma unroll
        for (int box = 0; box < S::COLUMNS / BOX; ++box)
            tma_load(stage + S::V_OFFSET + box * BOX_BYTES, map_v,
                     tile * S::COLUMNS + box * BOX, step * STEP, barrier);
    }
}

// What sum_over_rows left to this lane, beside that of the other warps.
template <int COLUMNS>
__device__ __forceinline__ void store_sums(uint32_t sums, const float (&form)[COLUMNS / 4], int lane,
                                           int warp) {
    const int first = (lane / 16 * 4 + lane / 8 % 2 * 2 + lane / 4 % 2) * (COLUMNS / 32);
#pragma unroll
    for (int k = 0; k < COLUMNS / 32; k += 2)
        store_shared(sums + (warp * COLUMNS + (first + k) / 2 * 8 + lane % 4 * 2) * 4, form[k],
                     form[k + 1]);
}

// It is long: with the producer's loop in a function, or the products with V, the compiler makes other
// code of it.
template <bool ACCURATE, int V_PIECES>
__global__ void __cluster_dims__(2) __launch_bounds__(THREADS, 1)
    quadform_kernel(const __grid_constant__ CUtensorMap map_v, const Problem problem) {
    using S = Shape<ACCURATE, V_PIECES>;
    using T = typename S::T;
    constexpr int COLUMNS = S::COLUMNS;
    extern __shared__ uint8_t shared[];
    __shared__ uint64_t barriers[2 * S::STAGES];
    const uint32_t smem = (smem_address(shared) + 1023) & ~1023u;
    const uint32_t full = smem_address(barriers), empty = full + 8 * S::STAGES;
    const int rank = cluster_rank(), worker = blockIdx.x / 2, workers = gridDim.x / 2;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < S::STAGES; ++stage) {
            mbarrier_init(full + 8 * stage, 1);
            mbarrier_init(empty + 8 * stage, 2 * CONSUMERS);
        }
        mbarrier_init_done();
        prefetch_map(&map_v);
    }
    cluster_sync_relaxed();
    follow();

    const int group = static_cast<int>(threadIdx.x / WARPGROUP) - 1;  // -1: the producer
    const int rounds = rounds_of(problem.rows, problem.pairs, workers);
    const auto next_task = [&](int turn, int& row, int& pair) {
        return find_task(problem, ACCURATE ? turn : rounds - 1 - turn, worker, workers, row, pair);
    };
    Ring<S::STAGES> ring;
    int row, pair;
    if (group < 0) {
        registers_down<S::PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) {
            for (int turn = 0; turn < rounds; ++turn) {
                if (!next_task(turn, row, pair)) continue;
                if constexpr (!ACCURATE) wait_packed(problem, row);
                const int tile = 2 * pair + rank;
                const uint8_t* s =
                    problem.s + static_cast<int64_t>(row) * (row + 1) * S::S_PIECES * S::S_BYTES;
                for (int step = 0; step < 2 * (row + 1); ++step) {
                    mbarrier_wait(empty + 8 * ring.stage, ring.phase ^ 1);
                    const uint32_t barrier = full + 8 * ring.stage;
                    const uint32_t stage = smem + ring.stage * S::STAGE_BYTES;
                    mbarrier_expect(barrier, S::STAGE_BYTES);
                    load_stage<ACCURATE, V_PIECES>(&map_v, problem, s, stage, barrier, tile, rank,
                                                   step);
                    ring.next();
                }
            }
        } else if (!ACCURATE && threadIdx.x >= 32) {
            pack_boxes(problem);
        }
        __syncwarp();
    } else {
        registers_up<S::CONSUMER_REGISTERS>();
        const int thread = threadIdx.x % WARPGROUP, lane = threadIdx.x % 32, warp = thread / 32;
        // Both blocks write into both blocks' stages: both are told of every stage that is free again.
        const uint32_t release = thread < 2 ? peer_address(empty, thread) : 0;
        for (int turn = 0; turn < rounds; ++turn) {
            if (!next_task(turn, row, pair)) continue;
            const int steps = 2 * (row + 1), mine = steps - (!ACCURATE && group == 0);
            std::conditional_t<ACCURATE, float[64], float[2][64]> d;
            float sum[ACCURATE ? 64 : 1];
            if constexpr (ACCURATE) {
#pragma unroll
                for (int i = 0; i < 64; ++i) sum[i] = 0;
            }
            int previous = 0, last = 0;
            for (int step = 0; step < mine; ++step) {
                mbarrier_wait(full + 8 * ring.stage, ring.phase);
                const uint32_t stage = smem + ring.stage * S::STAGE_BYTES;
                const uint64_t a = wgmma_descriptor_by_k(stage + group * BOX_BYTES);
                const uint64_t b = wgmma_descriptor(stage + S::V_OFFSET, BOX_BYTES);
                wgmma_begin();
                if constexpr (ACCURATE) {
                    multiply_pieces<V_PIECES>(d, a, b);
                    wgmma_commit();
                    wgmma_wait<0>();
                    wgmma_pin(d);
                    if (step < steps - 2 && release) mbarrier_arrive(release + 8 * ring.stage);
#pragma unroll
                    for (int i = 0; i < 64; ++i) sum[i] += d[i];
                } else {
#pragma unroll
                    for (int k = 0; k < STEP / 16; ++k)
                        wgmma_m64k16<T, true>(d, a + k * A_STEP, b + k * B_STEP, step > 0 || k > 0);
                    wgmma_commit();
                    wgmma_wait<1>();
                    if (step > 0 && step < steps - 1 && release)
                        mbarrier_arrive(release + 8 * last);
                }
                previous = last;
                last = ring.stage;
                ring.next();
            }
            if (mine < steps) {  // where this warpgroup's rows of S are zero
                previous = last;
                last = ring.stage;
                ring.next();
            }
            if constexpr (!ACCURATE) {
                wgmma_wait<0>();
                wgmma_pin(d[0]);
                wgmma_pin(d[1]);
            }

            // P ⊙ V over this warpgroup's 64 rows. V has them in the stage of the last step but one,
            // or the last. A thread has two rows of 2 of every 8 columns.
            float form[COLUMNS / 4];
            const int offset = (warp * 16 + lane / 4) * 128 + lane % 4 * 4;
            const uint32_t v =
                smem + (group ? last : previous) * S::STAGE_BYTES + S::V_OFFSET + offset;
            // The third piece, which takes no part in the products, is not there.
            const uint8_t* third = problem.v +
                                   ((2 * pair + rank) * 2ll * problem.rows + steps - 2 + group) *
                                       S::V_STORED +
                                   2 * S::V_BYTES + offset;
#pragma unroll
            for (int i = 0; i < COLUMNS / 8; ++i) {
                const int unit = i / 8 * BOX_BYTES + ((i % 8 ^ lane / 4) << 4);
                form[2 * i] = form[2 * i + 1] = 0;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float2 value = to_float2(load_shared(v + unit + half * 1024), T());
                    if constexpr (V_PIECES == 2) {
                        const float2 low =
                            to_float2(load_shared(v + unit + half * 1024 + S::V_BYTES), T());
                        const float2 rest = to_float2(
                            __ldg(reinterpret_cast<const uint32_t*>(third + unit + half * 1024)), T());
                        value.x += low.x + rest.x;
                        value.y += low.y + rest.y;
                    }
                    const int index = 4 * i + 2 * half;
                    if constexpr (ACCURATE) {
                        form[2 * i] += sum[index] * value.x;
                        form[2 * i + 1] += sum[index + 1] * value.y;
                    } else {
                        form[2 * i] += d[index / 64][index % 64] * value.x;
                        form[2 * i + 1] += d[index / 64][index % 64 + 1] * value.y;
                    }
                }
            }
            sum_over_rows(form, lane);
            const uint32_t sums = smem + S::SUM_OFFSET + (group * 2 + turn % 2) * S::SUM_BYTES;
            store_sums<COLUMNS>(sums, form, lane, warp);
            // In step when accurate: 640 instead of 522 effective TFLOP/s at n = p = 14336 (H200).
            if constexpr (ACCURATE)
                named_sync(1, CONSUMERS * WARPGROUP);
            else
                named_sync(1 + group, WARPGROUP);
            if (release) {
                mbarrier_arrive(release + 8 * previous);
                mbarrier_arrive(release + 8 * last);
            }
            float* partial = problem.partial + (2 * row + group) * problem.stride_partial +
                             (2 * pair + rank) * COLUMNS;
            write_partial<COLUMNS>(partial, sums, thread);
        }
    }
    cluster_sync_relaxed();  // no block ends while the other still writes its shared memory
}

// Block rows that are walked together share V's columns in L2, but their lengths are dealt out less
// evenly. Fast, effective TFLOP/s on an H100, of groups of 1, 4, 8, 33: n = p = 4096: 1211, 1174, 1153,
// 813; 4096 × 14336: 1189, 1323, 1294, 1199; 8192: 1289, 1259, 1264, 1226; 14336: 845, 1013, 1078, 1311
// (groups of 8 read 10.7 GB of V from memory there, which has 0.4). Measured with the longest tasks
// first and S packed beforehand. Accurate, where products take longer, 1 is as good as any.
int fast_group(int rows, int pairs, int workers) {
    return rows > 96 ? std::max(workers / 2, 1) : 4 * pairs > workers ? 4 : 1;
}

template <bool ACCURATE, int V_PIECES>
int launch(const QuadformTiles& tiles) {
    using S = Shape<ACCURATE, V_PIECES>;
    const auto kernel = quadform_kernel<ACCURATE, V_PIECES>;
    CUtensorMap map_v = {};
    if (!tiles.v) {
        const int status = encode_matrix(&map_v, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, tiles.v_matrix,
                                         tiles.n, tiles.p, tiles.stride_v, BOX, STEP);
        if (status) return status;
    }
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::SMEM_BYTES);
    if (status) return status;
    const int workers = multiprocessors() / 2, pairs = tiles.columns / 2;
    const int group = ACCURATE ? 1 : fast_group(tiles.rows, pairs, workers);
    const Problem problem = {tiles.s,          tiles.v,        tiles.partial, tiles.stride_partial,
                             tiles.rows,       pairs,          group,         tiles.s_matrix,
                             tiles.late_begin, tiles.late_end, tiles.counters};
    cudaLaunchAttribute early;
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = 2 * workers;
    config.blockDim = THREADS;
    config.dynamicSmemBytes = S::SMEM_BYTES;
    config.stream = tiles.stream;
    config.attrs = &early;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, map_v, problem);
}

}  // namespace

int filet::quadform_late_sm90(int rows, int columns) {
    const int workers = multiprocessors() / 2, pairs = columns / 2;
    // A tile of S takes 16 ns at the memory's rate, about 40 behind the products (a guess from what its
    // warps have under way), 11 in the products of a pair: with fewer pairs a kernel that only packs
    // is done with S sooner than they are.
    if (pairs < 4) return rows;
    // A worker's first task is of the last round, or of that before; find_task says which row.
    const int task = std::max(rounds_of(rows, pairs, workers) - 2, 0) * workers;
    const int group = fast_group(rows, pairs, workers);
    return rows - task / (group * pairs) * group;
}

int filet::quadform_sm90(const QuadformTiles& tiles) {
    if (!tiles.accurate) return launch<false, 1>(tiles);
    return tiles.v_pieces > 1 ? launch<true, 2>(tiles) : launch<true, 1>(tiles);
}
