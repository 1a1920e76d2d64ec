// A stub in place of the real NCCL that calls its own public functions, as the real one does (ncclBcast calls
// ncclBroadcast in 2.32.3; 2.18.3 calls its own group functions). By preload such calls land in the shim again.
#include <stddef.h>
#include <stdio.h>

int ncclGetVersion(int* version) { *version = 23203; return 0; }
int ncclGroupStart(void) { return 0; }
int ncclGroupEnd(void) { return 0; }
int ncclBroadcast(const void* s, void* r, size_t n, int t, int root, void* c, void* st) {
  (void)s, (void)r, (void)n, (void)t, (void)root, (void)c, (void)st;
  puts("broadcast");
  return 0;
}
int ncclBcast(void* b, size_t n, int t, int root, void* c, void* st) {
  return ncclBroadcast(b, b, n, t, root, c, st);
}
int ncclAllReduce(const void* s, void* r, size_t n, int t, int o, void* c, void* st) {
  printf("all-reduce of type %d\n", t);
  if (t != 7) return 0;
  // An all-reduce of fp32 by way of one of fp16, in a group: what the shim would take if an application asked for it.
  ncclGroupStart();
  int result = ncclAllReduce(s, r, n, 6, o, c, st);
  return result ? result : ncclGroupEnd();
}
