/* The part of CUDA's driver API that Triton calls, without a GPU: descriptors hold what they were made of, launches are
   reported. Device 1 has little shared memory. tests/test_launch.py compiles it as libcuda.so.1. */

#include <string.h>

#include "cuda.h"

#define STUB(name, ...) CUresult name(__VA_ARGS__) { return CUDA_SUCCESS; }

typedef void (*Report)(const unsigned *numbers, CUstream stream, CUfunction function, void **parameters);

static Report report;
int unloaded; // modules

void set_report(Report function) { report = function; }

CUresult cuModuleUnload(CUmodule module) {
  ++unloaded;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **parameters, void **extra) {
  unsigned numbers[8] = {c->gridDimX,  c->gridDimY,  c->gridDimZ,       c->blockDimX,
                         c->blockDimY, c->blockDimZ, c->sharedMemBytes, c->numAttrs};
  report(numbers, c->hStream, function, parameters);
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *shape, const cuuint64_t *strides, const cuuint32_t *block,
                                const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion l2, CUtensorMapFloatOOBfill fill) {
  struct {
    void *address;
    cuuint64_t shape[5], strides[4];
    cuuint32_t block[5];
    unsigned char element_strides[5], type, rank, interleave, swizzle, l2, fill;
  } made;
  _Static_assert(sizeof made <= sizeof *map, "all of it is kept");
  memset(&made, 0, sizeof made);
  made.address = address, made.type = type, made.rank = rank;
  made.interleave = interleave, made.swizzle = swizzle, made.l2 = l2, made.fill = fill;
  for (unsigned i = 0; i < rank; ++i) {
    made.shape[i] = shape[i], made.block[i] = block[i], made.element_strides[i] = element_strides[i];
    if (i + 1 < rank)
      made.strides[i] = strides[i];
  }
  memset(map, 0, sizeof *map);
  memcpy(map, &made, sizeof made);
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  static char functions[1 << 16];
  static size_t next;
  *function = (CUfunction)(functions + next++);
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int index) {
  *device = index;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? 9
           : attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR ? 0
                                                                       : device ? 1024 : 227 * 1024; // shared memory
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)&report;
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "an error";
  return CUDA_SUCCESS;
}

STUB(cuCtxGetDevice, CUdevice *device)
STUB(cuCtxGetLimit, size_t *value, CUlimit limit)
STUB(cuCtxSetCurrent, CUcontext context)
STUB(cuCtxSetLimit, CUlimit limit, size_t value)
STUB(cuDevicePrimaryCtxRetain, CUcontext *context, CUdevice device)
STUB(cuFuncSetAttribute, CUfunction function, CUfunction_attribute attribute, int value)
STUB(cuFuncSetCacheConfig, CUfunction function, CUfunc_cache config)
STUB(cuModuleLoadData, CUmodule *module, const void *image)
STUB(cuOccupancyMaxActiveClusters, int *clusters, CUfunction function, const CUlaunchConfig *config)
STUB(cuStreamIsCapturing, CUstream stream, CUstreamCaptureStatus *status)
