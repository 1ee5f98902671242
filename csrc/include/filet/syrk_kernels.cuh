// What the kernels of second moments on Hopper share (csrc/syrk_*_sm90.cu): the ring of stages through
// which X flows, the main loop over it, and the ways of a tile into C.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "filet/sm90.cuh"
#include "filet/syrk_launch.h"

namespace filet::syrk {

using namespace filet::sm90;

constexpr int BOX_BYTES = TILE_K * BOX * 2;
constexpr int PANEL_BYTES = 2 * BOX_BYTES;  // 64 tokens × 128 columns
constexpr int K_STEP = 2048 >> 4;           // 16 tokens on, in a wgmma descriptor

__device__ __forceinline__ void load_panel(uint32_t target, const CUtensorMap* map_x, int column,
                                           int step, uint32_t barrier) {
#pragma unroll
    for (int box = 0; box < 2; ++box)
        tma_load(target + box * BOX_BYTES, map_x, column + box * BOX, step * TILE_K, barrier);
}

// The barriers of a ring's stages, by one thread: one arrival fills a stage, `arrivals` free it.
template <int STAGES>
__device__ __forceinline__ void init_stages(uint32_t full, uint32_t empty, int arrivals) {
    for (int stage = 0; stage < STAGES; ++stage) {
        mbarrier_init(full + 8 * stage, 1);
        mbarrier_init(empty + 8 * stage, arrivals);
    }
    mbarrier_init_done();
}

// d = the products of a stage, or unless it is the first d + them, by the descriptors of A and of B
// in boxes of so many columns. They are under way afterwards, and those of the stage before are done.
template <typename T, int B_BOX, typename D>
__device__ __forceinline__ void multiply_stage(D& d, uint64_t a, uint64_t b, bool first) {
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < TILE_K / 16; ++k)
        wgmma_m64k16<T>(d, a + k * K_STEP, b + k * (16 * B_BOX * 2 >> 4), !first || k > 0);
    wgmma_commit();
    wgmma_wait<1>();
}

// A consumer warpgroup's side of the ring: a stage has A's panel, and B's after it in boxes of B_BOX
// columns. RingType is a ring or a reference to one: which of the two decides in what order the compiler
// puts a few instructions, and each kernel has the one that it was measured with.
template <int STAGE_BYTES, int B_BOX, bool RELEASE_LAST, typename RingType>
struct Consumer {
    uint32_t smem, full, release;  // release: the barrier of stage 0 that this thread arrives at, or 0
    RingType ring;

    __device__ Consumer(uint32_t smem_, uint32_t full_, uint32_t release_, RingType ring_)
        : smem(smem_), full(full_), release(release_), ring(ring_) {}

    // The main loop: d = the products of the next `steps` > 0 stages, as they become full. One group of
    // products stays in flight; the stage of the one before is free again.
    template <typename T, typename D>
    __device__ void run(D& d, int group, int steps) {
        int previous = 0;
        for (int step = 0; step < steps; ++step) {
            mbarrier_wait(full + 8 * ring.stage, ring.phase);
            const uint32_t stage = smem + ring.stage * STAGE_BYTES;
            const uint64_t a = wgmma_descriptor(stage + group * BOX_BYTES, BOX_BYTES);
            const uint64_t b = wgmma_descriptor<B_BOX>(stage + PANEL_BYTES, TILE_K * B_BOX * 2);
            multiply_stage<T, B_BOX>(d, a, b, step == 0);
            if (step > 0 && release) mbarrier_arrive(release + 8 * previous);
            previous = ring.stage;
            ring.next();
        }
        wgmma_wait<0>();
        wgmma_pin(d);
        if (RELEASE_LAST && release) mbarrier_arrive(release + 8 * previous);
    }
};

// What a warpgroup hands to the copy engine at a time: 64 rows × 32 columns of fp32, in turn from two
// buffers.
constexpr int OUT_BYTES = OUT_ROWS * OUT_COLUMNS * 4;
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

}  // namespace filet::syrk
