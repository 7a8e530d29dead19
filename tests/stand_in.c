/* Stands in for libcuda.so.1: remembers launches, as the driver is given them. */
#include <stdint.h>
#include <string.h>

typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned attribute_count;
} Config;

struct {
  void *function;
  int count, sizes[512];      /* of its parameters */
} kernels[64];                /* set by the test */
unsigned char bytes[1 << 18]; /* of each launch, and of its parameters if they are known */
int known, launches, used;
Config config;

int cuCtxGetCurrent(void **context) { *context = &config; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 232448; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &config; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 0; return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int value) { return 0; }
int cuGetErrorString(int error, const char **text) { *text = "an error of the stand-in"; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = module; return 0; }
int cuModuleLoadData(void **module, const void *data) { static char loaded[1024]; static int n; *module = &loaded[n++]; return 0; }
int cuModuleUnload(void *module) { return 0; }
int cuOccupancyMaxActiveClusters(int *number, void *function, const void *launch) { return 1; }
int cuPointerGetAttribute(uint64_t *value, int attribute, uint64_t address) { *value = address; return 0; }
int cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cuTensorMapEncodeIm2col(void) { return 1; }

static uint64_t mixed(uint64_t hash, const void *data, int size) {
  for (const unsigned char *byte = data; size--; byte++)
    hash = (hash ^ *byte) * 1099511628211ull;
  return hash;
}

/* A map is a digest of all that it is made of. */
int cuTensorMapEncodeTiled(uint64_t *map, int type, unsigned rank, void *address, const uint64_t *shape, const uint64_t *strides,
                           const unsigned *box, const unsigned *steps, int interleave, int swizzle, int promotion, int fill) {
  int numbers[] = {type, rank, interleave, swizzle, promotion, fill};
  uint64_t hash = mixed(14695981039346656037ull, numbers, sizeof numbers);
  hash = mixed(hash, &address, 8);
  hash = mixed(hash, shape, 8 * rank);
  hash = mixed(hash, strides, 8 * (rank - 1));
  hash = mixed(hash, box, 4 * rank);
  hash = mixed(hash, steps, 4 * rank);
  for (int place = 0; place < 16; place++)
    map[place] = hash = mixed(hash, &place, sizeof place);
  return 0;
}

static void note(const void *data, int size) {
  memcpy(bytes + used, data, size);
  used += size;
}

int cuLaunchKernelEx(const Config *launch, void *function, void **parameters, void **extra) {
  memcpy(&config, launch, 7 * sizeof(unsigned)); /* the gap behind holds anything */
  config.stream = launch->stream;
  config.attributes = function;
  note(&config, sizeof config);
  for (int n = 0; n < known; n++)
    if (kernels[n].function == function)
      for (int k = 0; k < kernels[n].count; k++)
        note(parameters[k], kernels[n].sizes[k]);
  launches++;
  return 0;
}
