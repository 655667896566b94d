// Element-wise operations: gated activations, sigmoid, sums, bias, and the softmax of rows.
//
// All are bound by memory: 8 to 12 bytes an element. Threads walk the elements four at a time where
// addresses and widths allow it. A NaN passes through as IEEE arithmetic has it: minima and maxima are
// written as comparisons, because fminf drops NaN.
#include "reduce.cuh"

enum Gated { SWIGLU = 0, CLAMPED_SWIGLU = 1 };

__device__ __forceinline__ float sigmoid_of(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ __forceinline__ float gated_of(int kind, float gate, float up, float alpha, float limit) {
    if (kind == SWIGLU) return gate / (1.0f + expf(-gate)) * up;
    float g = gate > limit ? limit : gate;
    float u = up > limit ? limit : (up < -limit ? -limit : up);
    return g / (1.0f + expf(-alpha * g)) * (u + 1.0f);
}

// out[r, i] = activation(gate[r, i], up[r, i]); rows of gate and up lie `in_stride` apart, so that they can
// be the halves of one joined product; rows of out lie one after the other. out may be gate where
// in_stride is width.
extern "C" __global__ void ktx_gated(const float* gate, const float* up, float* out, unsigned rows,
                                     unsigned width, unsigned in_stride, int kind, float alpha,
                                     float limit) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const size_t step = (size_t)gridDim.x * blockDim.x;
    const size_t first = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (width % 4 == 0 && in_stride % 4 == 0 && aligned16(gate) && aligned16(up) && aligned16(out)) {
        const unsigned quads = width / 4;
        for (size_t i = first; i < (size_t)rows * quads; i += step) {
            const size_t row = i / quads, at = row * in_stride + (i - row * quads) * 4;
            const float4 g = *reinterpret_cast<const float4*>(gate + at);
            const float4 u = *reinterpret_cast<const float4*>(up + at);
            reinterpret_cast<float4*>(out)[i] = make_float4(
                gated_of(kind, g.x, u.x, alpha, limit), gated_of(kind, g.y, u.y, alpha, limit),
                gated_of(kind, g.z, u.z, alpha, limit), gated_of(kind, g.w, u.w, alpha, limit));
        }
        return;
    }
    for (size_t i = first; i < (size_t)rows * width; i += step) {
        const size_t row = i / width, at = row * in_stride + (i - row * width);
        out[i] = gated_of(kind, gate[at], up[at], alpha, limit);
    }
}

extern "C" __global__ void ktx_sigmoid(float* x, size_t len) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const size_t step = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < len; i += step)
        x[i] = sigmoid_of(x[i]);
}

// y += x
extern "C" __global__ void ktx_add(float* y, const float* x, size_t len) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const size_t step = (size_t)gridDim.x * blockDim.x;
    const size_t first = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    size_t done = 0;
    if (aligned16(x) && aligned16(y)) {
        for (size_t i = first; i < len / 4; i += step) {
            const float4 a = reinterpret_cast<const float4*>(x)[i];
            float4 b = reinterpret_cast<float4*>(y)[i];
            b.x += a.x, b.y += a.y, b.z += a.z, b.w += a.w;
            reinterpret_cast<float4*>(y)[i] = b;
        }
        done = len / 4 * 4;
    }
    for (size_t i = done + first; i < len; i += step) y[i] += x[i];
}

// y[r] += bias, the same for every row
extern "C" __global__ void ktx_add_bias(float* y, const float* bias, unsigned rows, unsigned width) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const size_t step = (size_t)gridDim.x * blockDim.x, len = (size_t)rows * width;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < len; i += step)
        y[i] += bias[i % width];
}

// y[r] += scale[r] * x[r], or sigmoid(scale[r]) * x[r]: a shared expert behind its gate.
extern "C" __global__ void ktx_add_scaled_rows(float* y, const float* x, const float* scale,
                                               unsigned rows, unsigned width, int through_sigmoid) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const size_t step = (size_t)gridDim.x * blockDim.x, len = (size_t)rows * width;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < len; i += step) {
        const float s = scale[i / width];
        y[i] += (through_sigmoid ? sigmoid_of(s) : s) * x[i];
    }
}

// Softmax of each row in place, a block a row.
extern "C" __global__ void ktx_softmax_rows(float* x, unsigned width) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    __shared__ float partial[32];
    float* row = x + (size_t)blockIdx.x * width;
    float highest = -KTX_INFINITY;
    for (unsigned i = threadIdx.x; i < width; i += blockDim.x) highest = fmaxf(highest, row[i]);
    highest = block_max(highest, partial);
    float sum = 0.0f;
    for (unsigned i = threadIdx.x; i < width; i += blockDim.x) {
        const float e = expf(row[i] - highest);
        row[i] = e;
        sum += e;
    }
    const float inverse = 1.0f / block_sum(sum, partial);
    for (unsigned i = threadIdx.x; i < width; i += blockDim.x) row[i] *= inverse;
}
