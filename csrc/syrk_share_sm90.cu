// Second moments on Hopper, share: tiles of 128 × 128, where there are fewer of them than
// multiprocessors. The blocks of a cluster share a tile's tokens, send each other their sums and add
// them in a fixed order.
#include "filet/syrk_kernels.cuh"
#include "filet/triangle.cuh"

namespace {

using namespace filet;
using namespace filet::syrk;

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

// What C has where this thread will add.
__device__ __forceinline__ void read_c(const Problem& problem, const long long (&at)[BATCH],
                                       const int (&before)[BATCH], float4 (&old)[BATCH]) {
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
}

// C = what it had + alpha times the sums.
__device__ __forceinline__ void write_c(const Problem& problem, const long long (&at)[BATCH],
                                        const int (&before)[BATCH], const float4 (&old)[BATCH],
                                        const float (&sum)[BATCH][4]) {
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

// The others' sums, in the order of the blocks.
__device__ __forceinline__ void add_received(const Share& share, uint32_t received, int size,
                                             const int (&before)[BATCH], float (&sum)[BATCH][4]) {
    const int thread = threadIdx.x % WARPGROUP;
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
}

// The sums into shared memory, and of each warp's rows the units from ... to on, as soon as they are
// written, to another block.
__device__ __forceinline__ void send_sums(const float (&d)[64], int thread, int lane, uint32_t sums,
                                          int from, int to, uint32_t target,
                                          uint32_t target_received) {
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
}

// What a thread will add to: where it lies in C, and from its first column to the diagonal. Units lie
// in shared memory by rows of 32, swizzled so that the rows of d fall on other banks.
__device__ __forceinline__ void find_places(const Problem& problem, int thread, int first, int last,
                                            int row0, int column0, long long (&at)[BATCH],
                                            int (&before)[BATCH]) {
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
        const int unit = first + thread + i * WARPGROUP, row = unit / 32;
        const int r = row0 + row, c = column0 + (unit % 32 ^ row % 8 * 2) * 4;
        at[i] = r * problem.stride_c + c;
        before[i] = unit < last && r < problem.n ? r - c : -1;
        asm volatile("" : "+l"(at[i]), "+r"(before[i]));  // not put off
    }
}

// The main loop of a consumer warpgroup: as Consumer's, of a block of its own ring and with sums from
// zero on, in a loop that is not unrolled.
template <typename T>
__device__ __forceinline__ void multiply(float (&d)[64], Ring<STAGES>& ring, uint32_t smem,
                                         uint32_t full, uint32_t empty, int begin, int end,
                                         bool diagonal, int group, int thread) {
    int previous = -1;
#pragma unroll 1
    for (int step = begin; step < end; ++step) {
        mbarrier_wait(full + 8 * ring.stage, ring.phase);
        const uint32_t stage = smem + ring.stage * STAGE_BYTES;
        const uint64_t a = wgmma_descriptor(
            (diagonal ? stage : stage + PANEL_BYTES) + group * BOX_BYTES, BOX_BYTES);
        const uint64_t b = wgmma_descriptor(stage, BOX_BYTES);
        multiply_stage<T, BOX>(d, a, b, false);
        if (previous >= 0 && thread == 0) mbarrier_arrive(empty + 8 * previous);
        previous = ring.stage;
        ring.next();
    }
}

// The barriers of what is free again, and of what the others send: so many bytes.
__device__ __forceinline__ void init_received(uint32_t empty, uint32_t all_received, int bytes) {
    for (int stage = 0; stage < STAGES; ++stage) mbarrier_init(empty + 8 * stage, CONSUMERS);
    for (int group = 0; group < CONSUMERS; ++group) mbarrier_init(all_received + 8 * group, 1);
    mbarrier_init_done();
    for (int group = 0; group < CONSUMERS; ++group)
        mbarrier_expect(all_received + 8 * group, bytes);
}

// It is long: with the producer's loop in a function the compiler makes other code of it.
template <typename T>
__global__ void __launch_bounds__(THREADS, 1)
    share_kernel(const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_c,
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
        init_received(empty, all_received, (size - 1) * (last - first) * 16);
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
        // What this thread will add to, found out while there is time.
        long long at[BATCH];  // in C
        int before[BATCH];    // columns from the unit's first to the diagonal; < 0: nothing there
        find_places(problem, thread, first, last, row0 + group * 64, column0, at, before);
        // What this thread sends: units of block `lane`, to there.
        const bool sends = lane < size && lane != rank;
        const int peer = sends ? lane : rank;
        const int from = share.first_unit(peer), to = sends ? share.first_unit(peer + 1) : from;
        const uint32_t received = smem + RECEIVED_OFFSET + group * RECEIVED_BYTES;
        const uint32_t target = peer_address(share.slot(received, rank, peer), peer);
        const uint32_t target_received = peer_address(all_received + 8 * group, peer);
        cluster_wait();    // the others have come long before the first data
        float d[64] = {};  // 64 rows of the tile
        multiply<T>(d, ring, smem, full, empty, begin, end, diagonal, group, thread);
        // The sums take the places of the stages that would be next, once both warpgroups have done
        // with those: they need not wait for each other's last products.
        if (group > 0) ring.next();
        mbarrier_wait(empty + 8 * ring.stage, ring.phase ^ 1);
        const uint32_t sums = smem + ring.stage * STAGE_BYTES;
        wgmma_wait<0>();
        wgmma_pin(d);
        send_sums(d, thread, lane, sums, from, to, target, target_received);
        // C is read while the sums travel. Not sooner: the fences above would wait for it.
        float4 old[BATCH] = {};
        read_c(problem, at, before, old);
        named_sync(1 + group, WARPGROUP);

        // The block's own sums, the others' in the order of the blocks, and then to C.
        float sum[BATCH][4] = {};
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
            if (before[i] >= 0) load_shared(sums + (first + thread + i * WARPGROUP) * 16, sum[i]);
        mbarrier_wait(all_received + 8 * group, 0);
        __syncwarp();
        cluster_arrive_relaxed();  // what the others sent has left them
        add_received(share, received, size, before, sum);
        write_c(problem, at, before, old, sum);
    }
    __syncwarp();
    cluster_wait();  // no block ends while what it sent is on its way
}

int tiles(int64_t n) {
    const int blocks = static_cast<int>((n + TILE - 1) / TILE);
    return blocks * (blocks + 1) / 2;
}

template <typename T>
int launch(const Launch& launch, int size) {
    const auto kernel = share_kernel<T>;
    cudaLaunchConfig_t config;
    cudaLaunchAttribute cluster;
    const int status = cluster_config(kernel, tiles(launch.args.n), size, SMEM_BYTES, launch.stream(),
                                      config, cluster);
    if (status) return status;
    const Share share = {(launch.problem.steps + size - 1) / size, (UNITS + size - 1) / size};
    return cudaLaunchKernelEx(&config, kernel, launch.map_x, launch.map_c, launch.problem, share);
}

}  // namespace

int filet::syrk::launch_share(const Launch& args, int size) {
    if (size < 2 || size > MAX_SIZE) return cudaErrorInvalidValue;
    return args.half() ? launch<__half>(args, size) : launch<__nv_bfloat16>(args, size);
}

int filet::syrk::largest_share(int64_t n) {
    for (int size = MAX_SIZE; size > 1; --size)
        if (fits(share_kernel<__nv_bfloat16>, tiles(n), size, SMEM_BYTES)) return size;
    return 0;
}
