// C += alpha Xᵀ X, lower triangle, in place, on Hopper: X (tokens, n) bf16 or fp16, C (n, n) fp32.
//
// A producer warp copies boxes of X (64 tokens × 64 columns) through a ring of stages, two consumer
// warpgroups multiply with wgmma, both operands straight from X's rows (M- and N-major). Three kernels:
//
// - pairs: tiles of 128 × 256. Two blocks of a cluster compute two tiles with the same 256 columns of
//   B and multicast those to each other. The tiles that do not divide evenly among the pairs are cut
//   along the tokens (stream-K), so that all pairs end together. Where several pairs contribute to a
//   tile they add in a fixed order, each waiting for the one before.
// - grid, where so many tiles of 128 × 128, 160 or 192 as there are multiprocessors just about make C:
//   one a block. The blocks of a cluster share what they load, since the L2 cache cannot feed all.
// - share, for fewer tiles: tiles of 128 × 128. The blocks of a cluster share a tile's tokens, send each
//   other their sums and add them in a fixed order.
//
// Every element of C has one owner at a time and a fixed order of additions: deterministic.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "filet/host.h"
#include "filet/sm90.cuh"
#include "filet/syrk.h"
#include "filet/triangle.cuh"

namespace {

using namespace filet;
using namespace filet::sm90;

constexpr int TILE = 128, TILE_K = 64, BOX = 64;
constexpr int WARPGROUP = 128, CONSUMERS = 2, THREADS = (CONSUMERS + 1) * WARPGROUP;
constexpr int BOX_BYTES = TILE_K * BOX * 2;
constexpr int PANEL_BYTES = 2 * BOX_BYTES;  // 64 tokens × 128 columns
constexpr int K_STEP = 2048 >> 4;           // 16 tokens on, in a wgmma descriptor

struct Problem {
    float* c;
    long long stride_c;
    int n, steps;
    float alpha;
    int* flags;
};

__device__ __forceinline__ void load_panel(uint32_t target, const CUtensorMap* map_x, int column,
                                           int step, uint32_t barrier) {
#pragma unroll
    for (int box = 0; box < 2; ++box)
        tma_load(target + box * BOX_BYTES, map_x, column + box * BOX, step * TILE_K, barrier);
}

// What a warpgroup hands to the copy engine at a time: 64 rows × 32 columns of fp32, in turn from two
// buffers.
constexpr int OUT_COLUMNS = 32, OUT_BYTES = 64 * OUT_COLUMNS * 4;
constexpr int CHUNK = OUT_COLUMNS / 2;  // registers of a chunk

// alpha v, this warpgroup's 64 rows and the 32 columns of a chunk, as the copy engine wants them.
__device__ __forceinline__ void stage_chunk(float alpha, const float* v, uint32_t buffer) {
    const int lane = threadIdx.x % 32, row = threadIdx.x % WARPGROUP / 32 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < CHUNK; i += 2) {
        const int r = row + i / 2 % 2 * 8;  // r % 8 == lane / 4: the 128-byte swizzle
        const int unit = (i / 4 * 2 + lane % 4 / 2) ^ (lane / 4);
        store_shared(buffer + r * 128 + unit * 16 + lane % 2 * 8, alpha * v[i], alpha * v[i + 1]);
    }
}

// C += alpha v from registers, for the 64 rows and 32 columns from (row0, column) on, of which none
// lies above the diagonal if `below`.
__device__ __forceinline__ void add_registers(const Problem& problem, const float* v, int row0,
                                              int column, bool below) {
    const int lane = threadIdx.x % 32, row = threadIdx.x % WARPGROUP / 32 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < CHUNK; i += 2) {
        const int r = row0 + row + i / 2 % 2 * 8, c = column + i / 4 * 8 + lane % 4 * 2;
        float* target = problem.c + r * problem.stride_c + c;
        if (r >= problem.n) continue;
        if (below || r > c) {
            add_global(target, problem.alpha * v[i], problem.alpha * v[i + 1]);
        } else if (r == c) {
            atomicAdd(target, problem.alpha * v[i]);
        }
    }
}

// C += alpha v for a chunk, without reading C here: below the diagonal in turns by the copy engine and
// from registers, which is faster than either alone; where the diagonal crosses, one by one.
__device__ __forceinline__ void add_chunk(const CUtensorMap* map_c, const Problem& problem,
                                          const float* v, uint32_t out, int& sent, int row0,
                                          int column, int group, int chunk) {
    if (column > row0 + 63 || row0 >= problem.n) return;
    const int thread = threadIdx.x % WARPGROUP;
    const bool below = column + OUT_COLUMNS - 1 <= row0;
    if (below && chunk % 2 == 0) {
        const uint32_t buffer = out + sent++ % 2 * OUT_BYTES;
        if (thread == 0) tma_wait_read<1>();  // this buffer was sent the time before last
        named_sync(1 + group, WARPGROUP);
        stage_chunk(problem.alpha, v, buffer);
        fence_async_shared();
        named_sync(1 + group, WARPGROUP);
        if (thread == 0) tma_add(map_c, column, row0, buffer);
    } else {
        add_registers(problem, v, row0, column, below);
    }
}

// --- pairs ----------------------------------------------------------------------------------------

namespace pairs {

constexpr int STAGES = 4, STAGE_BYTES = 3 * PANEL_BYTES;  // A, and B's two halves
constexpr int OUT_OFFSET = STAGES * STAGE_BYTES;
constexpr int CHUNKS = TILE / OUT_COLUMNS;  // of half a tile
constexpr int SMEM_BYTES = OUT_OFFSET + CONSUMERS * 2 * OUT_BYTES + 1024;  // and its alignment
static_assert(SMEM_BYTES <= 232448);
constexpr int GROUP = 4;      // fours of block rows that are walked together, for reuse in L2
constexpr int MIN_STEPS = 8;  // a part of a unit that is not worth another pair

// What a block computes: the 128 columns of X from a on times two sets of 128 from b[0] and b[1] on.
//
// Cut into blocks of 128, the lower triangle has r + 1 of them in block row r. Odd rows are covered by
// the windows (2j, 2j + 1), even rows by (2j - 1, 2j), each ending on the diagonal, which leaves block
// 0 of the even rows. A unit is two tiles for the two blocks of a pair, of four block rows 4f ... 4f+3:
// - the rows 4f + 1 and 4f + 3, or 4f and 4f + 2, of one window ("shared": B is the same);
// - the windows on the diagonal of 4f + 2 and 4f + 3, which have no such partner;
// - block 0 of the rows 4f and 4f + 2, as one tile of Cᵀ ("transposed"), for two f.
// So nothing above the diagonal is computed but in the tiles that the diagonal crosses.
struct Tile {
    int a, b[2];
    bool shared, transposed;

    __device__ Tile(int unit, int half, int fours) {
        const int shared_units = fours * (2 * fours - 1);  // the sum of 4f + 1
        shared = unit < shared_units;
        transposed = false;
        int row, window;
        if (shared) {
            int f, p;
            locate(unit, fours, f, p);
            row = 4 * f + 2 * half + (p % 2 == 0);
            window = p;  // even p: odd rows, window (p, p + 1); odd p: even rows, the same
        } else if (unit < shared_units + fours) {
            row = 4 * (unit - shared_units) + 2 + half;
            window = row - 1;
        } else {
            const int f = 2 * (unit - shared_units - fours) + half;
            transposed = true;
            a = 0;
            b[0] = 4 * f * TILE;
            b[1] = b[0] + 2 * TILE;
            return;
        }
        a = row * TILE;
        b[0] = window * TILE;
        b[1] = b[0] + TILE;
    }

    // The four and the window of a shared unit: strips of GROUP fours, each walked by columns.
    static __device__ void locate(int unit, int fours, int& f, int& p) {
        int strip = static_cast<int>((1.0f + sqrtf(1.0f + 8.0f * unit)) * 0.25f);
        if (strip * (2 * strip - 1) > unit) --strip;
        if ((strip + 1) * (2 * strip + 1) <= unit) ++strip;
        strip = strip / GROUP * GROUP;
        const int height = min(GROUP, fours - strip);
        int local = unit - strip * (2 * strip - 1);
        if (local < height * (4 * strip + 1)) {
            f = strip + local % height;
            p = local / height;
        } else {
            local -= height * (4 * strip + 1);
            int i = 1;  // row strip + i has 4 i windows more
            while (local >= 2 * i * (i + 1)) ++i;
            f = strip + i;
            p = 4 * strip + 1 + local - 2 * i * (i - 1);
        }
    }

    static __host__ __device__ int fours(int n) { return (n + 4 * TILE - 1) / (4 * TILE); }
    static __host__ __device__ int units(int fours) {
        return fours * (2 * fours - 1) + fours + (fours + 1) / 2;
    }
};

// What a pair does, in order: its share of the units that are cut, then whole units.
struct Schedule {
    int steps, cut, workers, worker, first_unit, pieces, whole;
    long long first, last;

    __device__ Schedule(int units, int steps_, int pairs, int pair) : steps(steps_) {
        const long long total = static_cast<long long>(units) * steps;
        workers = min(pairs, max(units, static_cast<int>(min(total / MIN_STEPS, 1ll << 20))));
        // Later pairs wait for earlier ones, which the hardware starts first: no deadlock.
        worker = workers - 1 - pair;
        // Cutting evens out the last round, and costs the wait for turns: about as long as 48 steps.
        const int rest = units % workers, idle = (workers - rest) % workers;
        if (static_cast<long long>(idle) * steps < 48ll * workers)
            cut = 0;
        else
            cut = units < workers ? units : rest + workers;
        const long long cut_steps = static_cast<long long>(cut) * steps;
        first = worker * cut_steps / workers;
        last = (worker + 1) * cut_steps / workers;
        first_unit = static_cast<int>(first / steps);
        pieces = last > first ? static_cast<int>((last + steps - 1) / steps) - first_unit : 0;
        whole = (units - cut - pair + workers - 1) / workers;
        if (worker < 0) pieces = whole = 0;
    }

    __device__ int count() const { return pieces + whole; }

    __device__ void piece(int i, int pair, int& unit, int& begin, int& end) const {
        if (i < pieces) {
            unit = first_unit + i;
            const long long base = static_cast<long long>(unit) * steps;
            begin = static_cast<int>(max(first - base, 0ll));
            end = static_cast<int>(min(last - base, static_cast<long long>(steps)));
        } else {
            unit = cut + pair + (i - pieces) * workers;
            begin = 0;
            end = steps;
        }
    }
};

// Copies one stage: this block's A, and B; of a shared B the half that both blocks then receive.
__device__ __forceinline__ void fetch(const CUtensorMap* map_x, uint32_t smem, uint32_t full,
                                      uint32_t empty, Ring<STAGES>& ring, int step, const Tile& tile,
                                      int rank) {
    mbarrier_wait(empty + 8 * ring.stage, ring.phase ^ 1);
    const uint32_t barrier = full + 8 * ring.stage, stage = smem + ring.stage * STAGE_BYTES;
    mbarrier_expect(barrier, STAGE_BYTES);
    load_panel(stage, map_x, tile.a, step, barrier);
    if (tile.shared) {
#pragma unroll
        for (int box = 0; box < 2; ++box)
            tma_load_multicast(stage + (1 + rank) * PANEL_BYTES + box * BOX_BYTES, map_x,
                               tile.b[rank] + box * BOX, step * TILE_K, barrier, 3);
    } else {
        load_panel(stage + PANEL_BYTES, map_x, tile.b[0], step, barrier);
        load_panel(stage + 2 * PANEL_BYTES, map_x, tile.b[1], step, barrier);
    }
    ring.next();
}

// A consumer warpgroup's side of the ring.
struct Consumer {
    uint32_t smem, full, release;  // release: the barrier of stage 0 that this thread arrives at, or 0
    Ring<STAGES> ring;

    // Both blocks write into both blocks' stages: both are told of every stage that is free again.
    __device__ Consumer(uint32_t smem_, uint32_t full_, uint32_t empty) : smem(smem_), full(full_) {
        const int thread = threadIdx.x % WARPGROUP;
        release = thread < 2 ? peer_address(empty, thread) : 0;
    }

    // d = the products of the next `steps` > 0 stages. One group of products stays in flight.
    template <typename T>
    __device__ void run(float (&d)[2][64], int group, int steps) {
        int previous = 0;
        for (int step = 0; step < steps; ++step) {
            mbarrier_wait(full + 8 * ring.stage, ring.phase);
            const uint32_t stage = smem + ring.stage * STAGE_BYTES;
            const uint64_t a = wgmma_descriptor(stage + group * BOX_BYTES, BOX_BYTES);
            const uint64_t b = wgmma_descriptor(stage + PANEL_BYTES, BOX_BYTES);
            wgmma_begin();
#pragma unroll
            for (int k = 0; k < TILE_K / 16; ++k)
                wgmma_m64k16<T>(d, a + k * K_STEP, b + k * K_STEP, step > 0 || k > 0);
            wgmma_commit();
            wgmma_wait<1>();
            if (step > 0 && release) mbarrier_arrive(release + 8 * previous);
            previous = ring.stage;
            ring.next();
        }
        wgmma_wait<0>();
        wgmma_pin(d[0]);
        wgmma_pin(d[1]);
        if (release) mbarrier_arrive(release + 8 * previous);
    }
};

// Blocks that share a tile add in turn, the one with the later tokens first.
__device__ __forceinline__ void wait_for_turn(int* flag) {
    int value;
    do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    } while (value == 0);
    *flag = 0;  // for the next launch
    fence_async_proxy();
}

__device__ __forceinline__ void give_turn(int* flag) {
    tma_wait_done();
    fence_async_proxy();
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(1) : "memory");
}

// add_chunk for a transposed tile: v holds columns of C from column0 on, by rows from row0 on.
__device__ __forceinline__ void add_transposed(const Problem& problem, const float (&v)[64],
                                               int row0, int column0) {
    const int thread = threadIdx.x % WARPGROUP, lane = threadIdx.x % 32;
    const int c = column0 + thread / 32 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < 64; ++i) {  // 8 columns of 4 rows at a time
        const int r = row0 + i / 4 * 8 + lane % 4 * 2 + i % 2, column = c + i / 2 % 2 * 8;
        if (r >= column && r < problem.n)
            atomicAdd(problem.c + r * problem.stride_c + column, problem.alpha * v[i]);
    }
}

template <typename T>
__global__ void __cluster_dims__(2) __launch_bounds__(THREADS, 1)
    syrk_kernel(const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_c,
                const Problem problem) {
    extern __shared__ uint8_t shared[];
    __shared__ uint64_t barriers[2 * STAGES];
    const uint32_t smem = (smem_address(shared) + 1023) & ~1023u;
    const uint32_t full = smem_address(barriers), empty = full + 8 * STAGES;
    const int rank = cluster_rank(), pair = blockIdx.x / 2;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            mbarrier_init(full + 8 * stage, 1);
            mbarrier_init(empty + 8 * stage, 2 * CONSUMERS);
        }
        mbarrier_init_done();
        prefetch_map(&map_x);
        prefetch_map(&map_c);
    }
    cluster_sync_relaxed();

    const int fours = Tile::fours(problem.n);
    const Schedule schedule(Tile::units(fours), problem.steps, gridDim.x / 2, pair);
    const int group = static_cast<int>(threadIdx.x / WARPGROUP) - 1;  // -1: the producer
    if (group < 0) {
        registers_down<40>();
        if (threadIdx.x == 0) {
            Ring<STAGES> ring;
            for (int i = 0; i < schedule.count(); ++i) {
                int unit, begin, end;
                schedule.piece(i, pair, unit, begin, end);
                const Tile tile(unit, rank, fours);
                for (int step = begin; step < end; ++step) {
                    fetch(&map_x, smem, full, empty, ring, step, tile, rank);
                    // C's tile into L2 meanwhile: all blocks come to add to C at the same time.
                    const int chunk = end - 1 - step;
                    if (chunk < 2 * CHUNKS && !tile.transposed) {
                        const int column =
                            tile.b[chunk / CHUNKS] + chunk % CHUNKS * OUT_COLUMNS;
                        tma_prefetch(&map_c, column, tile.a);
                        tma_prefetch(&map_c, column, tile.a + 64);
                    }
                }
            }
        }
        __syncwarp();
    } else {
        registers_up<232>();
        const int thread = threadIdx.x % WARPGROUP;
        const uint32_t out = smem + OUT_OFFSET + group * 2 * OUT_BYTES;
        int* flags = problem.flags + (schedule.worker * 2 + rank) * CONSUMERS + group;
        Consumer consumer(smem, full, empty);
        int sent = 0;
        for (int i = 0; i < schedule.count(); ++i) {
            int unit, begin, end;
            schedule.piece(i, pair, unit, begin, end);
            const Tile tile(unit, rank, fours);
            float d[2][64];
            consumer.run<T>(d, group, end - begin);
            if (problem.flags && end < schedule.steps) {
                if (thread == 0) wait_for_turn(flags + 2 * CONSUMERS);
                named_sync(1 + group, WARPGROUP);
            }
            if (tile.transposed) {
                add_transposed(problem, d[0], tile.b[0], group * 64);
                add_transposed(problem, d[1], tile.b[1], group * 64);
            } else {
#pragma unroll
                for (int chunk = 0; chunk < 2 * CHUNKS; ++chunk)
                    add_chunk(&map_c, problem, d[chunk / CHUNKS] + chunk % CHUNKS * CHUNK, out,
                              sent, tile.a + group * 64,
                              tile.b[chunk / CHUNKS] + chunk % CHUNKS * OUT_COLUMNS, group, chunk);
            }
            if (problem.flags && begin > 0) {
                named_sync(1 + group, WARPGROUP);
                if (thread == 0) give_turn(flags);
            }
        }
        if (thread == 0) tma_wait_done();
    }
    cluster_sync_relaxed();  // no block ends while the other still writes its shared memory
}

}  // namespace pairs

// --- grid -----------------------------------------------------------------------------------------

namespace grid {

// A cluster computes 2 × WIDE tiles of 128 × COLUMNS, a block each, from the left in each strip of
// two block rows, the last across the diagonal. Blocks side by side share A, blocks one above the
// other share B: each loads its part of a panel into all that share it.
template <int COLUMNS_, int WIDE_>
struct Shape {
    static constexpr int COLUMNS = COLUMNS_, HIGH = 2, WIDE = WIDE_, BLOCKS = HIGH * WIDE;
    static_assert(WIDE <= 2);
    static constexpr int B_BOX = COLUMNS % BOX ? BOX / 2 : BOX;  // columns of a box of B
    static constexpr int B_BOX_BYTES = TILE_K * B_BOX * 2, B_K_STEP = 16 * B_BOX * 2 >> 4;
    static constexpr int STAGE_BYTES = PANEL_BYTES + TILE_K * COLUMNS * 2;
    static constexpr int STAGES = (232448 - 1024 - 128) / STAGE_BYTES;  // alignment, barriers
    static constexpr int SMEM_BYTES = STAGES * STAGE_BYTES + 1024;      // and its alignment
    static constexpr int CHUNKS = COLUMNS / OUT_COLUMNS;
    // The sums are handed to the copy engine in the ring's place, all at once.
    static_assert(CONSUMERS * ((CHUNKS + 1) / 2) * OUT_BYTES <= STAGES * STAGE_BYTES);

    static __host__ __device__ int clusters_of_strip(int strip, int n) {
        const int columns = (strip + 1) * HIGH * TILE;
        return ((columns < n ? columns : n) + WIDE * COLUMNS - 1) / (WIDE * COLUMNS);
    }
    static int clusters(int64_t n) {
        int64_t count = 0;
        for (int strip = 0; strip * HIGH * TILE < n; ++strip)
            count += clusters_of_strip(strip, static_cast<int>(n));
        return static_cast<int>(count);
    }
};

template <typename T, typename S>
__global__ void __launch_bounds__(THREADS, 1)
    syrk_kernel(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
                const __grid_constant__ CUtensorMap map_c, const Problem problem) {
    extern __shared__ uint8_t shared[];
    __shared__ uint64_t barriers[2 * S::STAGES];
    const uint32_t smem = (smem_address(shared) + 1023) & ~1023u;
    const uint32_t full = smem_address(barriers), empty = full + 8 * S::STAGES;
    const int rank = cluster_rank();
    const int high = rank / S::WIDE, wide = rank % S::WIDE;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < S::STAGES; ++stage) {
            mbarrier_init(full + 8 * stage, 1);
            mbarrier_init(empty + 8 * stage, CONSUMERS * (S::HIGH + S::WIDE - 1));
        }
        mbarrier_init_done();
        prefetch_map(&map_a);
        prefetch_map(&map_b);
        prefetch_map(&map_c);
    }
    cluster_sync_relaxed();

    int strip = 0, column0 = blockIdx.x / S::BLOCKS;
    while (column0 >= S::clusters_of_strip(strip, problem.n))
        column0 -= S::clusters_of_strip(strip++, problem.n);
    const int row0 = (strip * S::HIGH + high) * TILE;
    column0 = (column0 * S::WIDE + wide) * S::COLUMNS;
    // A block without an element of C loads for the others only.
    const bool idle = column0 > row0 + TILE - 1 || row0 >= problem.n;
    const int group = static_cast<int>(threadIdx.x / WARPGROUP) - 1;  // -1: the producer
    Ring<S::STAGES> ring;
    if (group < 0) {
        registers_down<40>();
        if (threadIdx.x == 0) {
            const auto beside = static_cast<uint16_t>(((1 << S::WIDE) - 1) << high * S::WIDE);
            const auto above = static_cast<uint16_t>((1 | 1 << S::WIDE) << wide);
            for (int step = 0; step < problem.steps; ++step) {
                mbarrier_wait(empty + 8 * ring.stage, ring.phase ^ 1);
                const uint32_t barrier = full + 8 * ring.stage;
                const uint32_t stage = smem + ring.stage * S::STAGE_BYTES;
                mbarrier_expect(barrier, S::STAGE_BYTES);
#pragma unroll
                for (int i = 0; i < 2; i += S::WIDE) {
                    const int box = i + wide;
                    const uint32_t target = stage + box * BOX_BYTES;
                    if constexpr (S::WIDE > 1)
                        tma_load_multicast(target, &map_a, row0 + box * BOX, step * TILE_K, barrier,
                                           beside);
                    else
                        tma_load(target, &map_a, row0 + box * BOX, step * TILE_K, barrier);
                }
                for (int box = high; box < S::COLUMNS / S::B_BOX; box += S::HIGH)
                    tma_load_multicast(stage + PANEL_BYTES + box * S::B_BOX_BYTES, &map_b,
                                       column0 + box * S::B_BOX, step * TILE_K, barrier, above);
                ring.next();
                // C's tile into L2 meanwhile: all blocks come to add to C at the same time.
                const int part = problem.steps - 1 - step, column = column0 + part / 2 * OUT_COLUMNS;
                if (part < 2 * S::CHUNKS && !idle)
                    tma_prefetch(&map_c, column, row0 + part % 2 * 64);
            }
        }
        __syncwarp();
    } else {
        registers_up<232>();
        const int thread = threadIdx.x % WARPGROUP;
        // All blocks that write into this one's stages are told of every stage that is free again:
        // the barrier of stage 0 that this thread arrives at, or 0.
        uint32_t release = 0;
        if (thread < S::BLOCKS && (thread / S::WIDE == high || thread % S::WIDE == wide))
            release = peer_address(empty, thread);
        if (idle) {
            for (int step = 0; step < problem.steps; ++step) {
                mbarrier_wait(full + 8 * ring.stage, ring.phase);
                if (release) mbarrier_arrive(release + 8 * ring.stage);
                ring.next();
            }
        } else {
            float d[S::COLUMNS / 2];  // 64 rows of the tile
            int previous = 0;
            for (int step = 0; step < problem.steps; ++step) {
                mbarrier_wait(full + 8 * ring.stage, ring.phase);
                const uint32_t stage = smem + ring.stage * S::STAGE_BYTES;
                const uint64_t a = wgmma_descriptor(stage + group * BOX_BYTES, BOX_BYTES);
                const uint64_t b = wgmma_descriptor<S::B_BOX>(stage + PANEL_BYTES, S::B_BOX_BYTES);
                wgmma_begin();
#pragma unroll
                for (int k = 0; k < TILE_K / 16; ++k)
                    wgmma_m64k16<T>(d, a + k * K_STEP, b + k * S::B_K_STEP, step > 0 || k > 0);
                wgmma_commit();
                wgmma_wait<1>();
                if (step > 0 && release) mbarrier_arrive(release + 8 * previous);
                previous = ring.stage;
                ring.next();
            }
            wgmma_wait<0>();
            wgmma_pin(d);
            named_sync(1, CONSUMERS * WARPGROUP);  // both warpgroups are done with the stages

            // Even chunks below the diagonal by the copy engine, the rest from registers meanwhile.
            const int row = row0 + group * 64;
            const uint32_t out = smem + group * ((S::CHUNKS + 1) / 2) * OUT_BYTES;
#pragma unroll
            for (int chunk = 0; chunk < S::CHUNKS; chunk += 2)
                if (column0 + (chunk + 1) * OUT_COLUMNS - 1 <= row)
                    stage_chunk(problem.alpha, d + chunk * CHUNK, out + chunk / 2 * OUT_BYTES);
            fence_async_shared();
            named_sync(2 + group, WARPGROUP);
            if (thread == 0 && row < problem.n)
                for (int chunk = 0; chunk < S::CHUNKS; chunk += 2)
                    if (column0 + (chunk + 1) * OUT_COLUMNS - 1 <= row)
                        tma_add(&map_c, column0 + chunk * OUT_COLUMNS, row,
                                out + chunk / 2 * OUT_BYTES);
#pragma unroll
            for (int chunk = 0; chunk < S::CHUNKS; ++chunk) {
                const int column = column0 + chunk * OUT_COLUMNS;
                const bool below = column + OUT_COLUMNS - 1 <= row;
                if ((below && chunk % 2 == 0) || column > row + 63) continue;
                add_registers(problem, d + chunk * CHUNK, row, column, below);
            }
            if (thread == 0) tma_wait_read<0>();
        }
        __syncwarp();
    }
    cluster_sync_relaxed();  // no block ends while another still writes its shared memory
}

}  // namespace grid

// --- share ----------------------------------------------------------------------------------------

namespace share {

// The blocks with the same tile send each other their shares of their sums: what a block then adds up
// lies in its own shared memory. Each half of a tile, a warpgroup's, goes its own way, and of it the
// rows of a warp in two pieces: as soon as they have been written, since sending takes longest.
constexpr int MAX_SIZE = 8;  // blocks of a cluster
constexpr int STAGES = 5, STAGE_BYTES = 2 * PANEL_BYTES;
constexpr int UNITS = 64 * TILE / 4;  // of four floats, of half a tile
constexpr int HALF_BYTES = UNITS * 16;
constexpr int RECEIVED_OFFSET = STAGES * STAGE_BYTES;
constexpr int RECEIVED_BYTES = HALF_BYTES / MAX_SIZE * (MAX_SIZE - 1);  // shares of a half
constexpr int SMEM_BYTES = RECEIVED_OFFSET + CONSUMERS * RECEIVED_BYTES + 1024;  // and alignment
static_assert(SMEM_BYTES <= 232448 && HALF_BYTES <= STAGE_BYTES);
constexpr int BATCH = UNITS / 2 / WARPGROUP;  // units of a thread, at most

// What each of the blocks of a tile takes, the last what is left: tokens, in steps, and then units of
// each half. From the host, as divisions take long.
struct Share {
    int steps, units;

    __device__ int first_unit(int rank) const { return min(rank * units, UNITS); }
    // Where the others' units for a block lie in it, by sender.
    __device__ uint32_t slot(uint32_t received, int sender, int receiver) const {
        return received + (sender - (sender > receiver)) * units * 16;
    }
};

template <typename T>
__global__ void __launch_bounds__(THREADS, 1)
    syrk_kernel(const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_c,
                const Problem problem, const Share share) {
    extern __shared__ uint8_t shared[];
    __shared__ uint64_t barriers[2 * STAGES + CONSUMERS];
    const uint32_t smem = (smem_address(shared) + 1023) & ~1023u;
    const uint32_t full = smem_address(barriers), empty = full + 8 * STAGES;
    const uint32_t all_received = empty + 8 * STAGES;
    const int rank = cluster_rank(), size = cluster_size(), tile = cluster_index();
    const int tile_row = triangular_row(tile);
    const int row0 = tile_row * TILE, column0 = (tile - tile_row * (tile_row + 1) / 2) * TILE;
    const bool diagonal = row0 == column0;  // B is A
    const int first = share.first_unit(rank), last = share.first_unit(rank + 1);
    const int begin = min(rank * share.steps, problem.steps);
    const int end = min(begin + share.steps, problem.steps);
    Ring<STAGES> ring;
    const auto fetch = [&](int step) {
        const uint32_t barrier = full + 8 * ring.stage, stage = smem + ring.stage * STAGE_BYTES;
        mbarrier_expect(barrier, diagonal ? PANEL_BYTES : STAGE_BYTES);
        load_panel(stage, &map_x, column0, step, barrier);
        if (!diagonal) load_panel(stage + PANEL_BYTES, &map_x, row0, step, barrier);
        ring.next();
    };
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) mbarrier_init(full + 8 * stage, 1);
        mbarrier_init_done();
        // The first data take long to come: asked for before anything else. Loops are not unrolled
        // here, as the first use of an instruction costs more than a round of its loop.
#pragma unroll 1
        for (int step = begin; step < min(begin + STAGES, end); ++step) fetch(step);
    } else if (threadIdx.x == 32) {
        prefetch_map(&map_x);
        for (int stage = 0; stage < STAGES; ++stage) mbarrier_init(empty + 8 * stage, CONSUMERS);
        for (int group = 0; group < CONSUMERS; ++group) mbarrier_init(all_received + 8 * group, 1);
        mbarrier_init_done();
        for (int group = 0; group < CONSUMERS; ++group)
            mbarrier_expect(all_received + 8 * group, (size - 1) * (last - first) * 16);
        prefetch_map(&map_c);
    }
    __syncthreads();
    cluster_arrive_relaxed();  // the others may send as soon as all have come here

    const int group = static_cast<int>(threadIdx.x / WARPGROUP) - 1;  // -1: the producer
    if (group < 0) {
        registers_down<40>();
        if (threadIdx.x == 0) {
#pragma unroll 1
            for (int step = begin + STAGES; step < end; ++step) {
                mbarrier_wait(empty + 8 * ring.stage, ring.phase ^ 1);
                fetch(step);
                // C's tile into L2 once the first stages have come, 64 × 32 at a time.
                const int part = (step - begin - STAGES) * size + rank;
                if (part < 2 * TILE / OUT_COLUMNS)
                    tma_prefetch(&map_c, column0 + part / 2 * OUT_COLUMNS, row0 + part % 2 * 64);
            }
        }
        __syncwarp();
        cluster_wait();
        cluster_arrive_relaxed();
    } else {
        registers_up<232>();
        const int thread = threadIdx.x % WARPGROUP, lane = threadIdx.x % 32;
        // What this thread will add to, found out while there is time. Units lie in shared memory by
        // rows of 32, swizzled so that the rows of d fall on other banks.
        long long at[BATCH];  // in C
        int before[BATCH];    // columns from the unit's first to the diagonal; < 0: nothing there
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int unit = first + thread + i * WARPGROUP, row = unit / 32;
            const int r = row0 + group * 64 + row, c = column0 + (unit % 32 ^ row % 8 * 2) * 4;
            at[i] = r * problem.stride_c + c;
            before[i] = unit < last && r < problem.n ? r - c : -1;
            asm volatile("" : "+l"(at[i]), "+r"(before[i]));  // not put off
        }
        // What this thread sends: units of block `lane`, to there.
        const bool sends = lane < size && lane != rank;
        const int peer = sends ? lane : rank;
        const int from = share.first_unit(peer), to = sends ? share.first_unit(peer + 1) : from;
        const uint32_t received = smem + RECEIVED_OFFSET + group * RECEIVED_BYTES;
        const uint32_t target = peer_address(share.slot(received, rank, peer), peer);
        const uint32_t target_received = peer_address(all_received + 8 * group, peer);
        cluster_wait();    // the others have come long before the first data
        float d[64] = {};  // 64 rows of the tile
        int previous = -1;
#pragma unroll 1
        for (int step = begin; step < end; ++step) {
            mbarrier_wait(full + 8 * ring.stage, ring.phase);
            const uint32_t stage = smem + ring.stage * STAGE_BYTES;
            const uint64_t a = wgmma_descriptor(
                (diagonal ? stage : stage + PANEL_BYTES) + group * BOX_BYTES, BOX_BYTES);
            const uint64_t b = wgmma_descriptor(stage, BOX_BYTES);
            wgmma_begin();
#pragma unroll
            for (int k = 0; k < TILE_K / 16; ++k)
                wgmma_m64k16<T>(d, a + k * K_STEP, b + k * K_STEP, 1);
            wgmma_commit();
            wgmma_wait<1>();
            if (previous >= 0 && thread == 0) mbarrier_arrive(empty + 8 * previous);
            previous = ring.stage;
            ring.next();
        }
        // The sums take the places of the stages that would be next, once both warpgroups have done
        // with those: they need not wait for each other's last products.
        if (group > 0) ring.next();
        mbarrier_wait(empty + 8 * ring.stage, ring.phase ^ 1);
        const uint32_t sums = smem + ring.stage * STAGE_BYTES;
        wgmma_wait<0>();
        wgmma_pin(d);
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // of a warp's 16 rows
            const int row = thread / 32 * 16 + half * 8;
#pragma unroll
            for (int i = 0; i < TILE / 8; ++i) {
                const int unit = (i * 2 + lane % 4 / 2) ^ lane / 4 * 2;
                store_shared(sums + (row + lane / 4) * (TILE * 4) + unit * 16 + lane % 2 * 8,
                             d[4 * i + 2 * half], d[4 * i + 2 * half + 1]);
            }
            fence_async_shared();
            __syncwarp();
            const int piece = max(from, row * (TILE / 4));
            const int piece_end = min(to, (row + 8) * (TILE / 4));
            if (piece < piece_end)
                bulk_push(target + (piece - from) * 16, sums + piece * 16, (piece_end - piece) * 16,
                          target_received);
            __syncwarp();
        }
        // C is read while the sums travel. Not sooner: the fences above would wait for it.
        float4 old[BATCH] = {};
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const float* elements = problem.c + at[i];
            if (before[i] >= 3) {
                old[i] = *reinterpret_cast<const float4*>(elements);
            } else {
                if (before[i] >= 0) old[i].x = elements[0];
                if (before[i] >= 1) old[i].y = elements[1];
                if (before[i] >= 2) old[i].z = elements[2];
            }
        }
        named_sync(1 + group, WARPGROUP);

        // The block's own sums, the others' in the order of the blocks, and then to C.
        float sum[BATCH][4] = {};
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
            if (before[i] >= 0) load_shared(sums + (first + thread + i * WARPGROUP) * 16, sum[i]);
        mbarrier_wait(all_received + 8 * group, 0);
        __syncwarp();
        cluster_arrive_relaxed();  // what the others sent has left them
#pragma unroll 1
        for (int sender = 0; sender < size - 1; ++sender) {
            const uint32_t source = received + sender * share.units * 16;
            float v[BATCH][4] = {};
#pragma unroll
            for (int i = 0; i < BATCH; ++i)
                if (before[i] >= 0) load_shared(source + (thread + i * WARPGROUP) * 16, v[i]);
#pragma unroll
            for (int i = 0; i < BATCH; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e) sum[i][e] += v[i][e];
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const float* v = sum[i];
            const float4 value = {old[i].x + problem.alpha * v[0], old[i].y + problem.alpha * v[1],
                                  old[i].z + problem.alpha * v[2], old[i].w + problem.alpha * v[3]};
            float* elements = problem.c + at[i];
            if (before[i] >= 3) {
                *reinterpret_cast<float4*>(elements) = value;
            } else {
                if (before[i] >= 0) elements[0] = value.x;
                if (before[i] >= 1) elements[1] = value.y;
                if (before[i] >= 2) elements[2] = value.z;
            }
        }
    }
    __syncwarp();
    cluster_wait();  // no block ends while what it sent is on its way
}

int tiles(int64_t n) {
    const int blocks = static_cast<int>((n + TILE - 1) / TILE);
    return blocks * (blocks + 1) / 2;
}

}  // namespace share

// --- host -----------------------------------------------------------------------------------------

template <typename Kernel>
cudaError_t cluster_config(Kernel kernel, int clusters, int blocks, int smem, cudaStream_t stream,
                           cudaLaunchConfig_t& config, cudaLaunchAttribute& cluster) {
    config = {};
    config.gridDim = clusters * blocks;
    config.blockDim = THREADS;
    config.dynamicSmemBytes = smem;
    config.stream = stream;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = blocks;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = 1;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
}

template <typename T>
int launch_share(const FiletSyrk& args, const CUtensorMap& map_x, const CUtensorMap& map_c,
                 const Problem& problem) {
    const auto kernel = share::syrk_kernel<T>;
    cudaLaunchConfig_t config;
    cudaLaunchAttribute cluster;
    const int size = args.plan - 10;
    const int status = cluster_config(kernel, share::tiles(args.n), size, share::SMEM_BYTES,
                                      static_cast<cudaStream_t>(args.stream), config, cluster);
    if (status) return status;
    const share::Share share = {(problem.steps + size - 1) / size, (share::UNITS + size - 1) / size};
    return cudaLaunchKernelEx(&config, kernel, map_x, map_c, problem, share);
}

template <typename T, typename S>
int launch_grid(const FiletSyrk& args, CUtensorMapDataType type, const CUtensorMap& map_a,
                const CUtensorMap& map_c, const Problem& problem) {
    const auto kernel = grid::syrk_kernel<T, S>;
    CUtensorMap map_b;
    int status = encode_matrix(&map_b, type, 2, args.x, args.tokens, args.n, args.stride_x, S::B_BOX,
                               TILE_K);
    if (status) return status;
    cudaLaunchConfig_t config;
    cudaLaunchAttribute cluster;
    status = cluster_config(kernel, S::clusters(args.n), S::BLOCKS, S::SMEM_BYTES,
                            static_cast<cudaStream_t>(args.stream), config, cluster);
    if (status) return status;
    return cudaLaunchKernelEx(&config, kernel, map_a, map_b, map_c, problem);
}

// Whether so many clusters of these blocks run at once.
template <typename Kernel>
bool fits(Kernel kernel, int clusters, int blocks, int smem) {
    cudaLaunchConfig_t config;
    cudaLaunchAttribute cluster;
    int active = 0;
    return cluster_config(kernel, 1, blocks, smem, nullptr, config, cluster) == cudaSuccess &&
           cudaOccupancyMaxActiveClusters(&active, kernel, &config) == cudaSuccess &&
           active >= clusters;
}

template <int COLUMNS, int WIDE>
bool grid_fits(int64_t n) {
    using S = grid::Shape<COLUMNS, WIDE>;
    return fits(grid::syrk_kernel<__nv_bfloat16, S>, S::clusters(n), S::BLOCKS, S::SMEM_BYTES);
}

template <typename T>
int launch(const FiletSyrk& args, CUtensorMapDataType type) {
    CUtensorMap map_x, map_c;
    int status = encode_matrix(&map_x, type, 2, args.x, args.tokens, args.n, args.stride_x, BOX,
                               TILE_K);
    if (status) return status;
    const Problem problem = {args.c,
                             args.stride_c,
                             static_cast<int>(args.n),
                             static_cast<int>((args.tokens + TILE_K - 1) / TILE_K),
                             args.alpha,
                             args.flags};
    const auto stream = static_cast<cudaStream_t>(args.stream);
    status = encode_matrix(&map_c, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, args.c, args.n, args.n,
                           args.stride_c, OUT_COLUMNS, 64);
    if (status) return status;
    if (args.plan > 11 && args.plan <= 10 + share::MAX_SIZE)
        return launch_share<T>(args, map_x, map_c, problem);
    if (args.plan == 4128)
        return launch_grid<T, grid::Shape<128, 2>>(args, type, map_x, map_c, problem);
    if (args.plan == 2160)
        return launch_grid<T, grid::Shape<160, 1>>(args, type, map_x, map_c, problem);
    if (args.plan == 2192)
        return launch_grid<T, grid::Shape<192, 1>>(args, type, map_x, map_c, problem);
    if (args.plan) return cudaErrorInvalidValue;
    status = cudaFuncSetAttribute(pairs::syrk_kernel<T>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, pairs::SMEM_BYTES);
    if (status) return status;
    pairs::syrk_kernel<T><<<multiprocessors() / 2 * 2, THREADS, pairs::SMEM_BYTES, stream>>>(
        map_x, map_c, problem);
    return cudaGetLastError();
}

}  // namespace

extern "C" int64_t filet_syrk_sm90_flags(void) {
    return static_cast<int64_t>(multiprocessors() / 2 + 1) * 2 * CONSUMERS;
}

extern "C" int32_t filet_syrk_sm90_plan(int64_t n) {
    if (n > 4096) return 0;
    for (int size = share::MAX_SIZE; size > 1; --size)
        if (fits(share::syrk_kernel<__nv_bfloat16>, share::tiles(n), size, share::SMEM_BYTES))
            return 10 + size;
    if (grid_fits<128, 2>(n)) return 4128;
    if (grid_fits<160, 1>(n)) return 2160;
    if (grid_fits<192, 1>(n)) return 2192;
    return 0;
}

extern "C" int filet_syrk_sm90(const FiletSyrk* args) {
    if (args->n <= 0 || args->tokens <= 0) return cudaSuccess;
    return args->dtype == FILET_FP16
               ? launch<__half>(*args, CU_TENSOR_MAP_DATA_TYPE_FLOAT16)
               : launch<__nv_bfloat16>(*args, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16);
}
