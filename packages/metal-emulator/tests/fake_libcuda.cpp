// A fake of NVIDIA's driver. Device memory is host memory. The only kernel computes buffer 1 = 2 *
// buffer 0 on floats, one element per thread. FAKE_CUDA selects a fault: `none` has no GPU,
// `unsteady` returns different results per launch, `fails` refuses to launch.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

static std::map<uint64_t, size_t> allocated;
static int launches;

static bool fault_is(const char* name) {
  const char* value = getenv("FAKE_CUDA");
  return value != nullptr && strcmp(value, name) == 0;
}

// Whether [address, address + size) lies within one allocation.
static bool valid(uint64_t address, size_t size) {
  auto after = allocated.upper_bound(address);
  if (after == allocated.begin()) {
    return false;
  }
  auto block = --after;
  return address + size <= block->first + block->second;
}

extern "C" {
int cuInit(unsigned flags) {
  return flags;
}
int cuDeviceGetCount(int* count) {
  *count = fault_is("none") ? 0 : 1;
  return 0;
}
int cuDeviceGet(int* device, int number) {
  *device = number;
  return 0;
}
int cuDeviceGetName(char* name, int size, int) {
  snprintf(name, size, "Fake GPU");
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 75 ? 9 : 0;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int) {
  *context = &allocated;
  return 0;
}
int cuDevicePrimaryCtxRelease_v2(int) {
  return 0;
}
int cuCtxSetCurrent(void* context) {
  return context == &allocated ? 0 : 201;
}
int cuCtxSynchronize() {
  return 0;
}
int cuGetErrorName(int, const char** name) {
  *name = "CUDA_ERROR_FAKE";
  return 0;
}
int cuModuleLoadData(void** module, const char* image) {
  *module = &launches;
  return strcmp(image, "code for 90") ? 218 : 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = module;
  return strcmp(name, "metal_entry") ? 500 : 0;
}
int cuModuleUnload(void*) {
  return 0;
}
int cuMemAlloc_v2(uint64_t* address, size_t size) {
  *address = reinterpret_cast<uint64_t>(malloc(size));
  allocated[*address] = size;
  return 0;
}
int cuMemFree_v2(uint64_t address) {
  free(reinterpret_cast<void*>(address));
  return allocated.erase(address) ? 0 : 1;
}
int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t size) {
  if (!valid(to, size)) {
    return 1;
  }
  memcpy(reinterpret_cast<void*>(to), from, size);
  return 0;
}
int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t size) {
  if (!valid(from, size)) {
    return 1;
  }
  memcpy(to, reinterpret_cast<void*>(from), size);
  return 0;
}
int cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t size) {
  return valid(to, size) && valid(from, size) ? 0 : 1;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void*, void** parameters, void**) {
  if (function != &launches || shared != 0 || fault_is("fails")) {
    return 719;
  }
  const size_t count = static_cast<size_t>(gx) * gy * gz * bx * by * bz;
  const uint64_t x = *static_cast<uint64_t*>(parameters[0]);
  const uint64_t y = *static_cast<uint64_t*>(parameters[1]);
  if (!valid(x, 4 * count) || !valid(y, 4 * count)) {
    return 700;
  }
  ++launches;
  for (size_t i = 0; i < count; ++i) {
    reinterpret_cast<float*>(y)[i] =
        2 * reinterpret_cast<float*>(x)[i] + (fault_is("unsteady") ? launches : 0);
  }
  return 0;
}
int cuEventCreate(void** event, unsigned) {
  *event = &launches;
  return 0;
}
int cuEventRecord(void*, void*) {
  return 0;
}
int cuEventSynchronize(void*) {
  return 0;
}
int cuEventElapsedTime(float* milliseconds, void*, void*) {
  *milliseconds = 20;
  return 0;
}
int cuEventDestroy_v2(void*) {
  return 0;
}
}
