// The part of the CUDA runtime that has to answer: memory, copies, and what the device is like.
//
// Nothing is computed. Device memory is reserved addresses that nobody can read or write, so host code that touches it
// dies as it would with a GPU. What is copied from the device is zero.

#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "counts.h"

extern "C" {

// Read and set from Python, see counting.py.
std::atomic<long> fake_counts[NUM_COUNTS];
const char *fake_names =
    "launches products memsets to_device to_host on_device stream_syncs device_syncs event_syncs collectives "
    "allocations";
void (*fake_on_sync)(int what) = nullptr;  // called in the thread that waits
int fake_flag = 0;                         // what a single byte, a bool, read from the device is
int fake_busy = 0;                         // whether recorded events have yet to happen

void fake_count(Count what) {
    ++fake_counts[what];
    bool waits = what == STREAM_SYNCS || what == DEVICE_SYNCS || what == EVENT_SYNCS;
    if (waits && fake_on_sync) fake_on_sync(what);
}

// Devices

static const size_t MEMORY_BYTES = 141ul << 30;
static thread_local int current_device = 0;

cudaError_t cudaGetDeviceCount(int *count) {
    const char *wanted = getenv("FAKE_GPUS");
    *count = wanted ? atoi(wanted) : 1;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) {
    *device = current_device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    current_device = device;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

// Of an H200, from NVIDIA's table of compute capability 9.0.
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *of, int device) {
    *of = {};
    strcpy(of->name, "NVIDIA H200");
    of->major = 9;
    of->multiProcessorCount = 132;
    of->totalGlobalMem = MEMORY_BYTES;
    of->warpSize = 32;
    of->maxThreadsPerBlock = 1024;
    of->maxThreadsPerMultiProcessor = 2048;
    of->maxBlocksPerMultiProcessor = 32;
    of->maxThreadsDim[0] = of->maxThreadsDim[1] = 1024;
    of->maxThreadsDim[2] = 64;
    of->maxGridSize[0] = 2147483647;
    of->maxGridSize[1] = of->maxGridSize[2] = 65535;
    of->regsPerBlock = of->regsPerMultiprocessor = 65536;
    of->sharedMemPerBlock = 48 << 10;
    of->sharedMemPerBlockOptin = 227 << 10;
    of->sharedMemPerMultiprocessor = 228 << 10;
    of->l2CacheSize = 50 << 20;
    of->memoryBusWidth = 6144;
    of->textureAlignment = 512;
    of->concurrentKernels = of->unifiedAddressing = of->managedMemory = of->cooperativeLaunch = 1;
    of->pciBusID = device + 1;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
    cudaDeviceProp of;
    cudaGetDeviceProperties(&of, device);
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = of.major; break;
        case cudaDevAttrComputeCapabilityMinor: *value = of.minor; break;
        case cudaDevAttrMultiProcessorCount: *value = of.multiProcessorCount; break;
        case cudaDevAttrWarpSize: *value = of.warpSize; break;
        case cudaDevAttrMaxThreadsPerBlock: *value = of.maxThreadsPerBlock; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = of.maxThreadsPerMultiProcessor; break;
        case cudaDevAttrMaxRegistersPerBlock: *value = of.regsPerBlock; break;
        case cudaDevAttrMaxRegistersPerMultiprocessor: *value = of.regsPerMultiprocessor; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = of.sharedMemPerBlock; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = of.sharedMemPerBlockOptin; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = of.sharedMemPerMultiprocessor; break;
        case cudaDevAttrMaxGridDimX: *value = of.maxGridSize[0]; break;
        default: *value = 1;
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device) {
    snprintf(id, length, "0000:%02x:00.0", device + 1);
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *of, const void *) {
    *of = {};
    of->maxThreadsPerBlock = 1024;
    of->numRegs = 32;
    of->binaryVersion = of->ptxVersion = 90;
    of->maxDynamicSharedSizeBytes = 227 << 10;
    return cudaSuccess;
}

// Torch asks for functions of the driver in this way, and does without those that it is not given.
cudaError_t cudaGetDriverEntryPointByVersion(
    const char *, void **function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult *result) {
    *function = nullptr;
    if (result) *result = cudaDriverEntryPointSymbolNotFound;
    return cudaErrorNotSupported;
}

// Memory

struct Block {
    size_t bytes;
    cudaMemoryType type;
    int device;
};

static std::mutex memory_lock;

static std::map<char *, Block> &blocks() {
    static auto *all = new std::map<char *, Block>;  // never destroyed: torch frees memory while the process ends
    return *all;
}

static cudaError_t allocate(void **place, size_t bytes, cudaMemoryType type) {
    fake_count(ALLOCATIONS);
    bytes = bytes ? bytes : 1;
    int protection = type == cudaMemoryTypeDevice ? PROT_NONE : PROT_READ | PROT_WRITE;
    *place = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*place == MAP_FAILED) return cudaErrorMemoryAllocation;
    std::lock_guard<std::mutex> held(memory_lock);
    blocks()[(char *)*place] = {bytes, type, current_device};
    return cudaSuccess;
}

static cudaError_t release(void *place) {
    std::lock_guard<std::mutex> held(memory_lock);
    auto found = blocks().find((char *)place);
    if (found == blocks().end()) return cudaSuccess;  // of a null pointer
    munmap(place, found->second.bytes);
    blocks().erase(found);
    return cudaSuccess;
}

static Block block_of(const void *place) {
    std::lock_guard<std::mutex> held(memory_lock);
    auto next = blocks().upper_bound((char *)place);
    if (next != blocks().begin()) {
        auto [start, block] = *--next;
        if ((char *)place < start + block.bytes) return block;
    }
    return {0, cudaMemoryTypeUnregistered, -1};
}

cudaError_t cudaMalloc(void **place, size_t bytes) { return allocate(place, bytes, cudaMemoryTypeDevice); }

cudaError_t cudaMallocAsync(void **place, size_t bytes, cudaStream_t) {
    return allocate(place, bytes, cudaMemoryTypeDevice);
}

cudaError_t cudaHostAlloc(void **place, size_t bytes, unsigned) { return allocate(place, bytes, cudaMemoryTypeHost); }

cudaError_t cudaMallocHost(void **place, size_t bytes) { return allocate(place, bytes, cudaMemoryTypeHost); }

cudaError_t cudaFree(void *place) { return release(place); }

cudaError_t cudaFreeAsync(void *place, cudaStream_t) { return release(place); }

cudaError_t cudaFreeHost(void *place) { return release(place); }

cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    *free = *total = MEMORY_BYTES;
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *of, const void *place) {
    Block block = block_of(place);
    *of = {};
    of->type = block.type;
    of->device = block.device;
    if (block.type == cudaMemoryTypeDevice) of->devicePointer = (void *)place;
    if (block.type == cudaMemoryTypeHost) of->devicePointer = of->hostPointer = (void *)place;
    return cudaSuccess;
}

// Copies. A stream's wait for one is the caller's, except for those calls that imply it.

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    bool leaves_device = block_of(from).type == cudaMemoryTypeDevice;
    if (block_of(to).type == cudaMemoryTypeDevice) {
        fake_count(leaves_device ? ON_DEVICE : TO_DEVICE);
    } else if (leaves_device) {
        fake_count(TO_HOST);
        memset(to, bytes == 1 ? fake_flag : 0, bytes);
    } else {
        memcpy(to, from, bytes);
    }
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    fake_count(STREAM_SYNCS);
    return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}

cudaError_t cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t bytes, cudaStream_t stream) {
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream);
}

cudaError_t cudaEventQuery(cudaEvent_t) { return fake_busy ? cudaErrorNotReady : cudaSuccess; }

cudaError_t cudaStreamQuery(cudaStream_t) { return fake_busy ? cudaErrorNotReady : cudaSuccess; }

}  // extern "C"
