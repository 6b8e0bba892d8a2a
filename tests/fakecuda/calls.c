/* Calls of the CUDA runtime, cuBLAS and NCCL that need no more than to succeed, to be counted, or to hand out a handle.

   No header declares them here: what such a function does not look at need not be named. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "counts.h"

#define SUCCEEDS(name) int name(void) { return 0; }
#define COUNTS(name, what) int name(void) { fake_count(what); return 0; }
#define GIVES_HANDLE(name) int name(void **handle) { *handle = new_handle(); return 0; }
#define GIVES_NUMBER(name, value) int name(void *of, int *number) { *number = value; return 0; }

/* Of objects in which nothing is kept. Not memory: nobody may look into them. */
static void *new_handle(void) {
    static uintptr_t last = 0x1000;
    return (void *)__atomic_add_fetch(&last, 16, __ATOMIC_RELAXED);
}

/* Kernels. What the compiler generated for torch registers them and passes their launch configuration by the way. */

COUNTS(cudaLaunchKernel, LAUNCHES)
COUNTS(cudaLaunchKernelExC, LAUNCHES)
COUNTS(cudaLaunchCooperativeKernel, LAUNCHES)
COUNTS(__cudaLaunchKernel, LAUNCHES)
SUCCEEDS(__cudaPushCallConfiguration)
SUCCEEDS(__cudaPopCallConfiguration)
SUCCEEDS(__cudaRegisterFatBinaryEnd)
SUCCEEDS(__cudaUnregisterFatBinary)
SUCCEEDS(__cudaRegisterFunction)
SUCCEEDS(__cudaRegisterVar)
SUCCEEDS(cudaFuncSetAttribute)
SUCCEEDS(cudaKernelSetAttributeForDevice)
GIVES_HANDLE(__cudaGetKernel)

void **__cudaRegisterFatBinary(void) {
    static void *binary;
    return &binary;
}

int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks) {
    *blocks = 2;
    return 0;
}

int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks) {
    *blocks = 2;
    return 0;
}

int cudaGetSymbolAddress(void **place) {
    static char symbols[1 << 20];
    *place = symbols;
    return 0;
}

/* Devices, streams and events */

COUNTS(cudaDeviceSynchronize, DEVICE_SYNCS)
COUNTS(cudaStreamSynchronize, STREAM_SYNCS)
COUNTS(cudaEventSynchronize, EVENT_SYNCS)
COUNTS(cudaMemset, MEMSETS)
COUNTS(cudaMemsetAsync, MEMSETS)
GIVES_HANDLE(cudaStreamCreate)
GIVES_HANDLE(cudaStreamCreateWithFlags)
GIVES_HANDLE(cudaStreamCreateWithPriority)
GIVES_HANDLE(cudaEventCreate)
GIVES_HANDLE(cudaEventCreateWithFlags)
GIVES_NUMBER(cudaStreamGetPriority, 0)
GIVES_NUMBER(cudaStreamIsCapturing, 0)
GIVES_NUMBER(cudaStreamGetCaptureInfo, 0)
SUCCEEDS(cudaStreamDestroy)
SUCCEEDS(cudaStreamWaitEvent)
SUCCEEDS(cudaThreadExchangeStreamCaptureMode)
SUCCEEDS(cudaEventDestroy)
SUCCEEDS(cudaEventRecord)
SUCCEEDS(cudaEventRecordWithFlags)
SUCCEEDS(cudaDeviceEnablePeerAccess)
SUCCEEDS(cudaGetLastError)
SUCCEEDS(cudaPeekAtLastError)
SUCCEEDS(cudaHostRegister)
SUCCEEDS(cudaHostUnregister)
SUCCEEDS(cudaProfilerStart)
SUCCEEDS(cudaProfilerStop)

int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return 0;
}

int cudaDeviceCanAccessPeer(int *can) {
    *can = 1;
    return 0;
}

int cudaEventElapsedTime(float *milliseconds) {
    *milliseconds = 1;
    return 0;
}

int cudaLaunchHostFunc(void *stream, void (*function)(void *), void *argument) {
    function(argument);
    return 0;
}

int cudaStreamAddCallback(void *stream, void (*function)(void *, int, void *), void *argument) {
    function(stream, 0, argument);
    return 0;
}

/* cuBLAS */

COUNTS(cublasGemmEx, PRODUCTS)
COUNTS(cublasGemmStridedBatchedEx, PRODUCTS)
COUNTS(cublasSgemm_v2, PRODUCTS)
COUNTS(cublasSgemmEx, PRODUCTS)
COUNTS(cublasSgemmStridedBatched, PRODUCTS)
COUNTS(cublasSgemv_v2, PRODUCTS)
COUNTS(cublasSdot_v2, PRODUCTS)
COUNTS(cublasDgemm_v2, PRODUCTS)
COUNTS(cublasLtMatmul, PRODUCTS)
GIVES_HANDLE(cublasCreate_v2)
GIVES_HANDLE(cublasLtCreate)
GIVES_HANDLE(cublasLtMatmulDescCreate)
GIVES_HANDLE(cublasLtMatmulPreferenceCreate)
GIVES_HANDLE(cublasLtMatrixLayoutCreate)
GIVES_NUMBER(cublasGetMathMode, 0)
GIVES_NUMBER(cublasGetPointerMode_v2, 0)
SUCCEEDS(cublasDestroy_v2)
SUCCEEDS(cublasSetStream_v2)
SUCCEEDS(cublasSetWorkspace_v2)
SUCCEEDS(cublasSetMathMode)
SUCCEEDS(cublasSetPointerMode_v2)
SUCCEEDS(cublasSetSmCountTarget)
SUCCEEDS(cublasLtMatmulDescDestroy)
SUCCEEDS(cublasLtMatmulDescSetAttribute)
SUCCEEDS(cublasLtMatmulPreferenceDestroy)
SUCCEEDS(cublasLtMatmulPreferenceSetAttribute)
SUCCEEDS(cublasLtMatrixLayoutDestroy)
SUCCEEDS(cublasLtMatrixLayoutSetAttribute)

/* One algorithm, whose description is 96 bytes of nothing. */
int cublasLtMatmulAlgoGetHeuristic(
    void *handle, void *description, void *a, void *b, void *c, void *d, void *preference, int most, char *results,
    int *found) {
    memset(results, 0, 96);
    *found = 1;
    return 0;
}

/* NCCL. Ranks do not meet: what one receives is as little computed as everything else. */

typedef struct {
    int size, rank;
} Communicator;

typedef struct {
    char bytes[128];
} Id;

COUNTS(ncclAllReduce, COLLECTIVES)
COUNTS(ncclBroadcast, COLLECTIVES)
COUNTS(ncclBcast, COLLECTIVES)
COUNTS(ncclReduce, COLLECTIVES)
COUNTS(ncclAllGather, COLLECTIVES)
COUNTS(ncclReduceScatter, COLLECTIVES)
COUNTS(ncclSend, COLLECTIVES)
COUNTS(ncclRecv, COLLECTIVES)
GIVES_NUMBER(ncclCommGetAsyncError, 0)
GIVES_NUMBER(ncclCommCuDevice, 0)
SUCCEEDS(ncclGroupStart)
SUCCEEDS(ncclGroupEnd)
SUCCEEDS(ncclCommAbort)
SUCCEEDS(ncclCommDestroy)
SUCCEEDS(ncclCommFinalize)
SUCCEEDS(ncclCommRegister)
SUCCEEDS(ncclCommDeregister)

int ncclGetUniqueId(Id *id) {
    memset(id, 1, sizeof *id);
    return 0;
}

int ncclCommInitRankConfig(Communicator **communicator, int size, Id id, int rank) {
    *communicator = malloc(sizeof **communicator);
    **communicator = (Communicator){size, rank};
    return 0;
}

int ncclCommInitRank(Communicator **communicator, int size, Id id, int rank) {
    return ncclCommInitRankConfig(communicator, size, id, rank);
}

int ncclCommInitRankScalable(Communicator **communicator, int size, int rank) {
    return ncclCommInitRankConfig(communicator, size, (Id){{0}}, rank);
}

int ncclCommSplit(Communicator *whole, int color, int key, Communicator **part) {
    return ncclCommInitRankConfig(part, whole->size, (Id){{0}}, whole->rank);
}

int ncclCommUserRank(Communicator *communicator, int *rank) {
    *rank = communicator->rank;
    return 0;
}

int ncclCommCount(Communicator *communicator, int *size) {
    *size = communicator->size;
    return 0;
}
