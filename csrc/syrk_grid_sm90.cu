// Second moments on Hopper, grid: where so many tiles of 128 × 128, 160 or 192 as there are
// multiprocessors just about make C, one a block. The blocks of a cluster share what they load, since
// the L2 cache cannot feed all.
#include "filet/syrk_kernels.cuh"

namespace {

using namespace filet;
using namespace filet::syrk;

// A cluster computes 2 × WIDE tiles of 128 × COLUMNS, a block each, from the left in each strip of
// two block rows, the last across the diagonal. Blocks side by side share A, blocks one above the
// other share B: each loads its part of a panel into all that share it.
template <int COLUMNS_, int WIDE_>
struct Shape {
    static constexpr int COLUMNS = COLUMNS_, HIGH = 2, WIDE = WIDE_, BLOCKS = HIGH * WIDE;
    static_assert(WIDE <= 2);
    static constexpr int B_BOX = COLUMNS % BOX ? BOX / 2 : BOX;  // columns of a box of B
    static constexpr int B_BOX_BYTES = TILE_K * B_BOX * 2;
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

// This block's part of A and of B, into all that share them.
template <typename S>
__device__ __forceinline__ void load_stage(const CUtensorMap* map_a, const CUtensorMap* map_b,
                                           uint32_t stage, uint32_t barrier, int row0, int column0,
                                           int high, int wide, uint16_t beside, uint16_t above,
                                           int step) {
    mbarrier_expect(barrier, S::STAGE_BYTES);
#pragma unroll
    for (int i = 0; i < 2; i += S::WIDE) {
        const int box = i + wide;
        const uint32_t target = stage + box * BOX_BYTES;
        if constexpr (S::WIDE > 1)
            tma_load_multicast(target, map_a, row0 + box * BOX, step * TILE_K, barrier,
                               beside);
        else
            tma_load(target, map_a, row0 + box * BOX, step * TILE_K, barrier);
    }
    for (int box = high; box < S::COLUMNS / S::B_BOX; box += S::HIGH)
        tma_load_multicast(stage + PANEL_BYTES + box * S::B_BOX_BYTES, map_b,
                           column0 + box * S::B_BOX, step * TILE_K, barrier, above);
}

// The main loop of a block that loads for the others only.
template <typename S>
__device__ __forceinline__ void pass(Ring<S::STAGES>& ring, uint32_t full, uint32_t release,
                                     int steps) {
    for (int step = 0; step < steps; ++step) {
        mbarrier_wait(full + 8 * ring.stage, ring.phase);
        if (release) mbarrier_arrive(release + 8 * ring.stage);
        ring.next();
    }
}

// C += alpha d, this warpgroup's 64 rows from `row` on.
template <typename S>
__device__ __forceinline__ void add_tile(const CUtensorMap* map_c, const Problem& problem,
                                         const float (&d)[S::COLUMNS / 2], uint32_t smem, int row,
                                         int column0, int group) {
    const int thread = threadIdx.x % WARPGROUP;
    // Even chunks below the diagonal by the copy engine, the rest from registers meanwhile.
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
                tma_add(map_c, column0 + chunk * OUT_COLUMNS, row, out + chunk / 2 * OUT_BYTES);
#pragma unroll
    for (int chunk = 0; chunk < S::CHUNKS; ++chunk) {
        const int column = column0 + chunk * OUT_COLUMNS;
        const bool below = column + OUT_COLUMNS - 1 <= row;
        if ((below && chunk % 2 == 0) || column > row + 63) continue;
        add_registers(problem, d + chunk * CHUNK, row, column, below);
    }
    if (thread == 0) tma_wait_read<0>();
}

template <typename T, typename S>
__global__ void __launch_bounds__(THREADS, 1)
    grid_kernel(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
                const __grid_constant__ CUtensorMap map_c, const Problem problem) {
    extern __shared__ uint8_t shared[];
    __shared__ uint64_t barriers[2 * S::STAGES];
    const uint32_t smem = (smem_address(shared) + 1023) & ~1023u;
    const uint32_t full = smem_address(barriers), empty = full + 8 * S::STAGES;
    const int rank = cluster_rank();
    const int high = rank / S::WIDE, wide = rank % S::WIDE;
    if (threadIdx.x == 0) {
        init_stages<S::STAGES>(full, empty, CONSUMERS * (S::HIGH + S::WIDE - 1));
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
                load_stage<S>(&map_a, &map_b, stage, barrier, row0, column0, high, wide, beside, above,
                              step);
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
            pass<S>(ring, full, release, problem.steps);
        } else {
            float d[S::COLUMNS / 2];  // 64 rows of the tile
            Consumer<S::STAGE_BYTES, S::B_BOX, false, Ring<S::STAGES>&> consumer(smem, full, release,
                                                                                 ring);
            consumer.template run<T>(d, group, problem.steps);
            named_sync(1, CONSUMERS * WARPGROUP);  // both warpgroups are done with the stages

            add_tile<S>(&map_c, problem, d, smem, row0 + group * 64, column0, group);
        }
        __syncwarp();
    }
    cluster_sync_relaxed();  // no block ends while another still writes its shared memory
}

template <typename T, typename S>
int launch(const Launch& launch) {
    const FiletSyrk& args = launch.args;
    const auto kernel = grid_kernel<T, S>;
    CUtensorMap map_b;
    int status = encode_x(&map_b, args, S::B_BOX);
    if (status) return status;
    cudaLaunchConfig_t config;
    cudaLaunchAttribute cluster;
    status = cluster_config(kernel, S::clusters(args.n), S::BLOCKS, S::SMEM_BYTES, launch.stream(),
                            config, cluster);
    if (status) return status;
    return cudaLaunchKernelEx(&config, kernel, launch.map_x, map_b, launch.map_c, launch.problem);
}

// Calls `with` with the shape whose tiles have so many columns; `otherwise` where there is none.
template <typename Result, typename With>
Result for_shape(int columns, Result otherwise, With with) {
    switch (columns) {
        case 128: return with(Shape<128, 2>());
        case 160: return with(Shape<160, 1>());
        case 192: return with(Shape<192, 1>());
        default: return otherwise;
    }
}

}  // namespace

int filet::syrk::launch_grid(const Launch& args, int columns) {
    return for_shape<int>(columns, cudaErrorInvalidValue, [&](auto shape) {
        using S = decltype(shape);
        return args.half() ? launch<__half, S>(args) : launch<__nv_bfloat16, S>(args);
    });
}

bool filet::syrk::grid_fits(int64_t n, int columns) {
    return for_shape(columns, false, [&](auto shape) {
        using S = decltype(shape);
        return fits(grid_kernel<__nv_bfloat16, S>, S::clusters(n), S::BLOCKS, S::SMEM_BYTES);
    });
}
