/* libcuda.so.1: as much of CUDA's driver as torch and Triton look for. Its kernels are Triton's. */

#include <stdint.h>

#include "counts.h"

#define SUCCEEDS(name) int name(void) { return 0; }
#define COUNTS(name, what) int name(void) { fake_count(what); return 0; }
#define GIVES_HANDLE(name) int name(void **handle) { *handle = new_handle(); return 0; }

static void *new_handle(void) {
    static uintptr_t last = 0x1000;
    return (void *)__atomic_add_fetch(&last, 16, __ATOMIC_RELAXED);
}

COUNTS(cuLaunchKernel, LAUNCHES)
COUNTS(cuLaunchKernelEx, LAUNCHES)
COUNTS(cuLaunchCooperativeKernel, LAUNCHES)
COUNTS(cuStreamSynchronize, STREAM_SYNCS)
COUNTS(cuCtxSynchronize, DEVICE_SYNCS)
GIVES_HANDLE(cuCtxGetCurrent)
GIVES_HANDLE(cuDevicePrimaryCtxRetain)
GIVES_HANDLE(cuModuleLoad)
GIVES_HANDLE(cuModuleLoadData)
GIVES_HANDLE(cuModuleLoadDataEx)
GIVES_HANDLE(cuModuleGetFunction)
SUCCEEDS(cuInit)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuCtxPushCurrent_v2)
SUCCEEDS(cuCtxPopCurrent_v2)
SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuMemcpyHtoD_v2)
SUCCEEDS(cuOccupancyMaxActiveClusters)
SUCCEEDS(cuTensorMapEncodeTiled)
SUCCEEDS(cuTensorMapEncodeIm2col)

int cuDriverGetVersion(int *version) {
    *version = 13020;
    return 0;
}

int cuDeviceGetCount(int *count) {
    *count = 1;
    return 0;
}

int cuDeviceGet(int *device, int number) {
    *device = number;
    return 0;
}

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 1;
    return 0;
}

/* Numbers of CUdevice_attribute in cuda.h. */
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
        case 75: *value = 9; break;          /* compute capability 9.0 */
        case 76: *value = 0; break;
        case 10: *value = 32; break;         /* threads of a warp */
        case 16: *value = 132; break;        /* multiprocessors */
        case 97: *value = 227 << 10; break;  /* bytes of shared memory that a block may have */
        case 12: case 82: *value = 65536; break; /* registers of a block and of a multiprocessor */
        default: *value = 1;
    }
    return 0;
}

/* 0: threads that a block may have; 4: registers of a thread. */
int cuFuncGetAttribute(int *value, int attribute, void *function) {
    *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : 0;
    return 0;
}

int cuPointerGetAttribute(uint64_t *data, int attribute, uint64_t place) {
    *data = place;
    return 0;
}

int cuStreamIsCapturing(void *stream, int *status) {
    *status = 0;
    return 0;
}

int cuGetErrorString(int error, const char **text) {
    *text = "an error of the fake driver";
    return 0;
}
