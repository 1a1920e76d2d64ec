// Asks an NCCL what can be asked without a GPU and prints every answer, a line each.
// usage: answers LIBRARY   (opened by dlopen and asked by dlsym)   or, linked with -lnccl and -DLINKED: answers
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

typedef struct { char internal[128]; } unique_id;

#ifdef LINKED
int ncclGetVersion(int*);
const char* ncclGetErrorString(int);
int ncclGetUniqueId(unique_id*);
const char* ncclGetLastError(void*);
int ncclGroupStart(void);
int ncclGroupEnd(void);
int ncclCommInitRank(void**, int, unique_id, int);
int ncclAllReduce(const void*, void*, size_t, int, int, void*, void*);
int ncclBroadcast(const void*, void*, size_t, int, int, void*, void*);
int ncclCommDestroy(void*);
int ncclCommCount(void*, int*);
#define FIND(name) name
#else
static void* library;
#define FIND(name) ((__typeof__(name)*)find(#name))
int ncclGetVersion(int*);
const char* ncclGetErrorString(int);
int ncclGetUniqueId(unique_id*);
const char* ncclGetLastError(void*);
int ncclGroupStart(void);
int ncclGroupEnd(void);
int ncclCommInitRank(void**, int, unique_id, int);
int ncclAllReduce(const void*, void*, size_t, int, int, void*, void*);
int ncclBroadcast(const void*, void*, size_t, int, int, void*, void*);
int ncclCommDestroy(void*);
int ncclCommCount(void*, int*);
static void* find(const char* name) {
  void* symbol = dlsym(library, name);
  if (!symbol) printf("%s is missing\n", name);
  return symbol;
}
#endif

int main(int argc, char** argv) {
#ifndef LINKED
  library = dlopen(argc > 1 ? argv[1] : "libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    printf("%s\n", dlerror());
    return 1;
  }
#endif
  (void)argc, (void)argv;
  int version = -1;
  printf("ncclGetVersion %d", FIND(ncclGetVersion)(&version));
  printf(" %d\n", version);
  for (int code = 0; code <= 10; ++code) printf("ncclGetErrorString(%d) %s\n", code, FIND(ncclGetErrorString)(code));
  unique_id id;
  memset(&id, 0, sizeof id);
  printf("ncclGetUniqueId %d", FIND(ncclGetUniqueId)(&id));
  int nonzero = 0;
  for (int i = 0; i < 128; ++i) nonzero |= id.internal[i];
  printf(" %d\n", nonzero != 0);
  printf("ncclGroupEnd without a start %d\n", FIND(ncclGroupEnd)());
  printf("ncclGroupStart %d %d\n", FIND(ncclGroupStart)(), FIND(ncclGroupStart)());
  printf("ncclGroupEnd %d %d\n", FIND(ncclGroupEnd)(), FIND(ncclGroupEnd)());
  void* comm = NULL;
  printf("ncclCommInitRank %d", FIND(ncclCommInitRank)(&comm, 1, id, 0));
  printf(" %d\n", comm != NULL);
  char buffer[64];
  for (int dtype = 0; dtype <= 10; ++dtype) {
    for (int op = 0; op <= 5; ++op) {
      printf("ncclAllReduce(NULL comm, type %d, op %d) %d\n", dtype, op,
             FIND(ncclAllReduce)(buffer, buffer, 4, dtype, op, NULL, NULL));
    }
  }
  printf("ncclGetLastError %s\n", FIND(ncclGetLastError)(NULL));
  printf("ncclBroadcast(NULL comm) %d\n", FIND(ncclBroadcast)(buffer, buffer, 4, 0, 0, NULL, NULL));
  printf("ncclCommDestroy(NULL) %d\n", FIND(ncclCommDestroy)(NULL));
  int count = 0;
  printf("ncclCommCount(NULL) %d\n", FIND(ncclCommCount)(NULL, &count));
  return 0;
}
