// Rotary position embedding of strided heads, in place.
//
// Bound by memory: 8 bytes an element; the cosines of a token are shared by its heads and come from the
// second-level cache. A thread rotates one pair. The products are not contracted, so that the result has
// the bits of the host's kernel.
#include "ptx.cuh"

enum Layout { INTERLEAVED = 0, HALF = 1 };

// Head h of token t starts at t * token_stride + h * head_stride + offset and has `dim` rotated elements.
// `table` is [positions, dim] with rows [cos dim/2 | sin dim/2]; token t is at positions[t].
extern "C" __global__ void ktx_rope(float* x, const float* table, const unsigned* positions,
                                    unsigned tokens, unsigned heads, unsigned head_stride,
                                    unsigned token_stride, unsigned offset, unsigned dim, int layout,
                                    unsigned table_positions) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const unsigned half = dim / 2;
    const size_t pairs = (size_t)tokens * heads * half;
    const size_t step = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < pairs; i += step) {
        const unsigned pair = i % half, head = i / half % heads, token = i / half / heads;
        const unsigned position = min(positions[token], table_positions - 1);
        const float c = table[(size_t)position * dim + pair];
        const float s = table[(size_t)position * dim + half + pair];
        float* at = x + (size_t)token * token_stride + (size_t)head * head_stride + offset;
        float* first = layout == INTERLEAVED ? at + 2 * pair : at + pair;
        float* second = layout == INTERLEAVED ? at + 2 * pair + 1 : at + half + pair;
        const float a = *first, b = *second;
        *first = __fsub_rn(__fmul_rn(a, c), __fmul_rn(b, s));
        *second = __fadd_rn(__fmul_rn(a, s), __fmul_rn(b, c));
    }
}
