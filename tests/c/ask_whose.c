// Says who is called by a program that is linked to NCCL, and by one that opens the shim by its path; and how many calls the
// shim has seen. usage: ask_whose SHIM
#include <dlfcn.h>
#include <flashcomm.h>
#include <stddef.h>
#include <stdio.h>

int ncclAllReduce(const void*, void*, size_t, int, int, void*, void*);

int main(int argc, char** argv) {
  int comm;
  (void)argc;
  printf("linked:");
  int result = ncclAllReduce(NULL, NULL, 1, 7, 0, &comm, NULL);
  printf(", opened:");
  void* shim = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (!shim) return puts(dlerror());
  result |= ((__typeof__(ncclAllReduce)*)dlsym(shim, "ncclAllReduce"))(NULL, NULL, 1, 7, 0, &comm, NULL);
  flashcommStats_t stats;
  stats.size = sizeof stats;
  ((__typeof__(flashcommGetStats)*)dlsym(shim, "flashcommGetStats"))(&stats);
  printf(", seen %d", (int)stats.allReducesForwarded);
  return result;
}
