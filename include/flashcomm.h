// flashcomm's own calls. Everything else that libflashcomm.so exports is NCCL's, as nccl.h declares it.

#ifndef FLASHCOMM_H
#define FLASHCOMM_H

#include <stddef.h>
#include <stdint.h>

// Result of a flashcomm call, with the values of ncclResult_t.
typedef int flashcommResult_t;

// What the shim has done in this process so far. Set `size` to sizeof(flashcommStats_t) before the call; later
// versions add members at the end only.
typedef struct flashcommStats_t {
  // sizeof(flashcommStats_t), set by the caller.
  size_t size;
  // All-reduces that were compressed.
  uint64_t allReducesCompressed;
  // All-reduces that went to the real NCCL as they were.
  uint64_t allReducesForwarded;
  // Other collectives, sends and receives, all of which go to the real NCCL.
  uint64_t othersForwarded;
  // Bytes of the compressed all-reduces, as the application sees them.
  uint64_t bytesIn;
  // Bytes that this process put on the wire for them.
  uint64_t bytesOnWire;
} flashcommStats_t;

// The call did what it says.
#define FLASHCOMM_SUCCESS 0

// A bug in flashcomm.
#define FLASHCOMM_INTERNAL_ERROR 3

// A pointer was null, or a structure's size is not one that this version knows.
#define FLASHCOMM_INVALID_ARGUMENT 4

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Writes the version of flashcomm, major * 10000 + minor * 100 + patch, to `*version`.
//
// # Safety
// `version` is null or points to an int.
flashcommResult_t flashcommGetVersion(int *version);

// Writes the counts of this process to `*stats`. May be called at any time, from any thread.
//
// # Safety
// `stats` is null or points to a flashcommStats_t whose `size` is set.
flashcommResult_t flashcommGetStats(struct flashcommStats_t *stats);

// What went wrong last, in words: for `comm`, an ncclComm_t, if it is not null and something did, else in this process.
// An empty string where nothing has gone wrong. Names the rank that was waited for where a wait was given up.
//
// The string is good until the calling thread calls this again.
//
// # Safety
// `comm` is null or a communicator that has not been destroyed.
const char *flashcommGetLastError(const void *comm);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* FLASHCOMM_H */
