// Handing work over between a GPU and the CPU by flags in pinned memory, and copies that can be recorded.

// The GPU's clock.
__device__ __forceinline__ unsigned long long nanoseconds() {
    unsigned long long now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}

// Copies n floats.
extern "C" __global__ void ktx_copy(float* __restrict__ to, const float* __restrict__ from, unsigned n) {
    unsigned step = gridDim.x * blockDim.x;
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if ((((unsigned long long)to | (unsigned long long)from) & 15) == 0) {
        unsigned quads = n / 4;
        const float4* from4 = reinterpret_cast<const float4*>(from);
        float4* to4 = reinterpret_cast<float4*>(to);
        for (unsigned q = i; q < quads; q += step) to4[q] = from4[q];
        for (unsigned r = quads * 4 + i; r < n; r += step) to[r] = from[r];
    } else {
        for (; i < n; i += step) to[i] = from[i];
    }
}

// Tells the CPU that everything before this is done: its flag becomes the step's number.
extern "C" __global__ void ktx_signal(volatile unsigned* flag, const unsigned* step) {
    __threadfence_system();
    *flag = *step;
    __threadfence_system();
}

// One block: copies up to three arrays to pinned memory and then tells the CPU.
extern "C" __global__ void ktx_submit(float* to0, const float* from0, unsigned n0, float* to1, const float* from1,
                                      unsigned n1, float* to2, const float* from2, unsigned n2,
                                      volatile unsigned* flag, const unsigned* step) {
    for (unsigned i = threadIdx.x; i < n0; i += blockDim.x) to0[i] = from0[i];
    for (unsigned i = threadIdx.x; i < n1; i += blockDim.x) to1[i] = from1[i];
    for (unsigned i = threadIdx.x; i < n2; i += blockDim.x) to2[i] = from2[i];
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x == 0) {
        *flag = *step;
        __threadfence_system();
    }
}

// Waits until the CPU's flag is the step's number, for `limit` nanoseconds at most; then the fault is set and
// nobody waits any more. With n > 0 the block copies the CPU's result.
extern "C" __global__ void ktx_wait(const volatile unsigned* flag, const unsigned* step, volatile unsigned* fault,
                                    unsigned long long limit, float* to, const volatile float* from, unsigned n) {
    if (threadIdx.x == 0) {
        unsigned wanted = *step;
        unsigned long long start = nanoseconds();
        while (*flag != wanted) {
            if (*fault != 0) break;
            if (nanoseconds() - start > limit) {
                *fault = 1;
                __threadfence_system();
                break;
            }
        }
        __threadfence_system();
    }
    __syncthreads();
    for (unsigned i = threadIdx.x; i < n; i += blockDim.x) to[i] = from[i];
}
