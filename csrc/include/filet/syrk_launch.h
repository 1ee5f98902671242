// Between csrc/syrk_sm90.cu, which chooses a kernel, and the kernels (csrc/syrk_*_sm90.cu).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "filet/host.h"
#include "filet/syrk.h"

namespace filet::syrk {

constexpr int TILE = 128, TILE_K = 64, BOX = 64;
constexpr int WARPGROUP = 128, CONSUMERS = 2, THREADS = (CONSUMERS + 1) * WARPGROUP;
constexpr int OUT_ROWS = 64, OUT_COLUMNS = 32;  // of C, that the copy engine takes at a time

struct Problem {
    float* c;
    long long stride_c;
    int n, steps;
    float alpha;
    int* flags;
};

// What every kernel is launched with.
struct Launch {
    const FiletSyrk& args;
    CUtensorMap map_x, map_c;  // by boxes of BOX columns, and as C is added to
    Problem problem;

    bool half() const { return args.dtype == FILET_FP16; }
    cudaStream_t stream() const { return static_cast<cudaStream_t>(args.stream); }
};

int launch_pairs(const Launch& launch);
int launch_grid(const Launch& launch, int columns);
int launch_share(const Launch& launch, int size);

// Whether all blocks of such a grid run at once.
bool grid_fits(int64_t n, int columns);

// The most blocks that may share a tile so that all run at once; 0 where not even two may.
int largest_share(int64_t n);

// Describes X in boxes of so many columns. Returns a status.
inline int encode_x(CUtensorMap* map, const FiletSyrk& args, int box_columns) {
    const auto type = args.dtype == FILET_FP16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                               : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    return encode_matrix(map, type, 2, args.x, args.tokens, args.n, args.stride_x, box_columns,
                         TILE_K);
}

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

}  // namespace filet::syrk
