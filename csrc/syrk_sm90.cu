// C += alpha Xᵀ X, lower triangle, in place, on Hopper: X (tokens, n) bf16 or fp16, C (n, n) fp32.
//
// A producer warp copies boxes of X (64 tokens × 64 columns) through a ring of stages, two consumer
// warpgroups multiply with wgmma, both operands straight from X's rows (M- and N-major). Three kernels
// do so, each in its file: pairs, grid and share (csrc/syrk_*_sm90.cu). Here one is chosen and called.
//
// Every element of C has one owner at a time and a fixed order of additions: deterministic.
#include "filet/syrk.h"

#include "filet/syrk_launch.h"

namespace {

using namespace filet;
using namespace filet::syrk;

constexpr int WIDEST = 4096;  // columns of a C for which another kernel than pairs is looked for

}  // namespace

extern "C" int64_t filet_syrk_sm90_flags(void) {
    return static_cast<int64_t>(multiprocessors() / 2 + 1) * 2 * CONSUMERS;
}

extern "C" FiletSyrkPlan filet_syrk_sm90_plan(int64_t n) {
    if (n > WIDEST) return {FILET_SYRK_PAIRS, 0};
    if (const int size = largest_share(n)) return {FILET_SYRK_SHARE, size};
    for (const int columns : {128, 160, 192})
        if (grid_fits(n, columns)) return {FILET_SYRK_GRID, columns};
    return {FILET_SYRK_PAIRS, 0};
}

extern "C" int filet_syrk_sm90(const FiletSyrk* args) {
    if (args->n <= 0 || args->tokens <= 0) return cudaSuccess;
    Launch launch = {*args,
                     {},
                     {},
                     {args->c, args->stride_c, static_cast<int>(args->n),
                      static_cast<int>((args->tokens + TILE_K - 1) / TILE_K), args->alpha,
                      args->flags}};
    int status = encode_x(&launch.map_x, *args, BOX);
    if (status) return status;
    status = encode_matrix(&launch.map_c, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, args->c, args->n,
                           args->n, args->stride_c, OUT_COLUMNS, OUT_ROWS);
    if (status) return status;
    switch (args->plan.kernel) {
        case FILET_SYRK_PAIRS: return launch_pairs(launch);
        case FILET_SYRK_GRID: return launch_grid(launch, args->plan.size);
        case FILET_SYRK_SHARE: return launch_share(launch, args->plan.size);
    }
    return cudaErrorInvalidValue;
}
