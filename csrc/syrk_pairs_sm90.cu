// Second moments on Hopper, pairs: tiles of 128 × 256, for a C of any size.
//
// Two blocks of a cluster compute two tiles with the same 256 columns of B and multicast those to each
// other. The tiles that do not divide evenly among the pairs are cut along the tokens (stream-K), so
// that all pairs end together. Where several pairs contribute to a tile they add in a fixed order, each
// waiting for the one before.
#include "filet/syrk_kernels.cuh"

namespace {

using namespace filet;
using namespace filet::syrk;

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

// C's tile into L2 during a tile's last steps, as all blocks come to add to C at the same time: the
// chunk that is wanted so many steps before the end.
__device__ __forceinline__ void prefetch_tile(const CUtensorMap* map_c, const Tile& tile, int chunk) {
    if (chunk >= 2 * CHUNKS || tile.transposed) return;
    const int column = tile.b[chunk / CHUNKS] + chunk % CHUNKS * OUT_COLUMNS;
    tma_prefetch(map_c, column, tile.a);
    tma_prefetch(map_c, column, tile.a + 64);
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

// C += alpha d, this warpgroup's half of a tile.
__device__ __forceinline__ void add_tile(const CUtensorMap* map_c, const Problem& problem,
                                         const float (&d)[2][64], uint32_t out, int& sent,
                                         const Tile& tile, int group) {
    if (tile.transposed) {
        add_transposed(problem, d[0], tile.b[0], group * 64);
        add_transposed(problem, d[1], tile.b[1], group * 64);
    } else {
#pragma unroll
        for (int chunk = 0; chunk < 2 * CHUNKS; ++chunk)
            add_chunk(map_c, problem, d[chunk / CHUNKS] + chunk % CHUNKS * CHUNK, out, sent,
                      tile.a + group * 64,
                      tile.b[chunk / CHUNKS] + chunk % CHUNKS * OUT_COLUMNS, group, chunk);
    }
}

template <typename T>
__global__ void __cluster_dims__(2) __launch_bounds__(THREADS, 1)
    pairs_kernel(const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_c,
                const Problem problem) {
    extern __shared__ uint8_t shared[];
    __shared__ uint64_t barriers[2 * STAGES];
    const uint32_t smem = (smem_address(shared) + 1023) & ~1023u;
    const uint32_t full = smem_address(barriers), empty = full + 8 * STAGES;
    const int rank = cluster_rank(), pair = blockIdx.x / 2;
    if (threadIdx.x == 0) {
        init_stages<STAGES>(full, empty, 2 * CONSUMERS);
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
                    prefetch_tile(&map_c, tile, end - 1 - step);
                }
            }
        }
        __syncwarp();
    } else {
        registers_up<232>();
        const int thread = threadIdx.x % WARPGROUP;
        const uint32_t out = smem + OUT_OFFSET + group * 2 * OUT_BYTES;
        int* flags = problem.flags + (schedule.worker * 2 + rank) * CONSUMERS + group;
        // Both blocks write into both blocks' stages: both are told of every stage that is free again.
        Consumer<STAGE_BYTES, BOX, true, Ring<STAGES>> consumer(
            smem, full, thread < 2 ? peer_address(empty, thread) : 0, {});
        int sent = 0;
        for (int i = 0; i < schedule.count(); ++i) {
            int unit, begin, end;
            schedule.piece(i, pair, unit, begin, end);
            const Tile tile(unit, rank, fours);
            float d[2][64];
            consumer.template run<T>(d, group, end - begin);
            if (problem.flags && end < schedule.steps) {
                if (thread == 0) wait_for_turn(flags + 2 * CONSUMERS);
                named_sync(1 + group, WARPGROUP);
            }
            add_tile(&map_c, problem, d, out, sent, tile, group);
            if (problem.flags && begin > 0) {
                named_sync(1 + group, WARPGROUP);
                if (thread == 0) give_turn(flags);
            }
        }
        if (thread == 0) tma_wait_done();
    }
    cluster_sync_relaxed();  // no block ends while the other still writes its shared memory
}

template <typename T>
int launch(const Launch& launch) {
    const auto kernel = pairs_kernel<T>;
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SMEM_BYTES);
    if (status) return status;
    kernel<<<multiprocessors() / 2 * 2, THREADS, SMEM_BYTES, launch.stream()>>>(
        launch.map_x, launch.map_c, launch.problem);
    return cudaGetLastError();
}

}  // namespace

int filet::syrk::launch_pairs(const Launch& args) {
    return args.half() ? launch<__half>(args) : launch<__nv_bfloat16>(args);
}
