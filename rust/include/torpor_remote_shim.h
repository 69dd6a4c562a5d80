/* C ABI of the client of object stores (S3, Google Cloud Storage, Azure Blob Storage), over the crate object_store.
 * Built with the cargo feature `remote`.
 *
 * Functions that can fail return a status and write one sentence to `error`, as in torpor_text_shim.h, whose rules on
 * pointers hold here too. No sentence holds credentials. Nothing unwinds out of these functions.
 *
 * A store may be used by many threads at once. Calls block; the sockets are served by one thread that all stores share.
 * In a forked child a store of the parent's is of no use: calls are INVALID, and closing it does nothing.
 */
#ifndef TORPOR_REMOTE_SHIM_H
#define TORPOR_REMOTE_SHIM_H

#include "torpor_text_shim.h"

#ifdef __cplusplus
extern "C" {
#endif

/* torpor_text_status, and beyond it: */
enum {
  TORPOR_REMOTE_NOT_FOUND = 3,    /* there is no such object */
  TORPOR_REMOTE_PRECONDITION = 4, /* the condition of a put did not hold, or an earlier try of the same put did it */
  TORPOR_REMOTE_REFUSED = 5,      /* the store said no, for instance to the credentials: nothing was done */
  TORPOR_REMOTE_UNKNOWN = 6,      /* no answer came, or one of the store's defects: it may have been done or not */
  TORPOR_REMOTE_CANCELLED = 7,    /* torpor_remote_cancel; of a put or a removal likewise unknown */
  TORPOR_REMOTE_SHORT = 8,        /* the object ends before what was to be read */
  TORPOR_REMOTE_NO_BUCKET = 9,
  TORPOR_REMOTE_LARGE = 10,       /* the object has more bytes than were asked for */
  TORPOR_REMOTE_DAMAGED = 11,     /* a sealed object is not as it was sealed, under its name */
  TORPOR_REMOTE_INCOMPATIBLE = 12 /* it is sealed with a key that is not among these, or by a newer version */
};

typedef struct torpor_remote_store torpor_remote_store;

typedef struct {
  const char* data;
  size_t size;
} torpor_remote_view; /* text of the caller's; NULL when empty */

typedef struct {
  torpor_remote_view name, value;
} torpor_remote_pair;

/* `url` is s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX; credentials, endpoint and region come from
 * the environment and the files that it names (docs/fleet.md). `options` is a JSON object, each member optional:
 *   request_timeout_ms   of one request with its answer (30000); each MiB beyond the first has an eighth of it more
 *   connect_timeout_ms   (5000)
 *   retries              of a request that failed in a way that passes (10); a put that timed out is not retried
 *   retry_timeout_ms     no retry begins later (60000)
 *   seal                 {"keys": [KEY, ...], "names": ID}: objects and their names are sealed (docs/format.md, "A
 *                        sealed bucket"), new ones with the first key, names with the one of that id; sizes, offsets
 *                        and keys of objects are those of what is sealed, and lists leave out other names
 * No request is sent. INVALID: the URL, the options, the environment or one of the files can't be used. */
torpor_text_status torpor_remote_open(torpor_remote_view url, torpor_remote_view options, torpor_remote_store** out,
                                      torpor_text_bytes* error);
/* The id of a key, 32 hex digits. `key` is 64 hex digits, or 32 bytes in base64; else INVALID. */
torpor_text_status torpor_remote_key_id(torpor_remote_view key, torpor_text_bytes* id, torpor_text_bytes* error);
/* No call may be under way. */
void torpor_remote_close(torpor_remote_store* store);
/* Calls under way, and later ones, return CANCELLED. Any thread. */
void torpor_remote_cancel(torpor_remote_store* store);

/* A key is a path below PREFIX: parts that are not empty, `.` or `..`, with `/` between them. An object's description
 * is a JSON object {"key", "bytes", "tag", "modified_ms", "metadata"}; `metadata` is absent from lists and heads, and
 * `tag` is empty where the store names no version. */

typedef enum {
  TORPOR_REMOTE_ALWAYS = 0,
  TORPOR_REMOTE_IF_ABSENT = 1,
  TORPOR_REMOTE_IF_TAG = 2 /* the object is there, and has this tag */
} torpor_remote_condition;

/* Writes a whole object; readers see all of it or nothing. `tag` receives the new version's. */
torpor_text_status torpor_remote_put(torpor_remote_store* store, torpor_remote_view key, const uint8_t* data,
                                     size_t size, torpor_remote_condition condition, torpor_remote_view if_tag,
                                     const torpor_remote_pair* metadata, size_t metadata_size, torpor_text_bytes* tag,
                                     torpor_text_bytes* error);
/* Reads a whole object of at most `most` bytes, and its description. */
torpor_text_status torpor_remote_get(torpor_remote_store* store, torpor_remote_view key, uint64_t most,
                                     torpor_text_bytes* data, torpor_text_bytes* description,
                                     torpor_text_bytes* error);
torpor_text_status torpor_remote_head(torpor_remote_store* store, torpor_remote_view key,
                                      torpor_text_bytes* description, torpor_text_bytes* error);
/* Fills `data` with `size` bytes from `offset` on. SHORT: the object ends before. */
torpor_text_status torpor_remote_read(torpor_remote_store* store, torpor_remote_view key, uint64_t offset,
                                      uint8_t* data, size_t size, torpor_text_bytes* error);
/* All objects below `directory`, a key or empty, in the store's order: a JSON array of descriptions. Of Google Cloud
 * Storage the tags are those of lists alone: what get, head and put call the version is another number. */
torpor_text_status torpor_remote_list(torpor_remote_store* store, torpor_remote_view directory,
                                      torpor_text_bytes* descriptions, torpor_text_bytes* error);
/* OK also where there is no such object. */
torpor_text_status torpor_remote_remove(torpor_remote_store* store, torpor_remote_view key, torpor_text_bytes* error);

#ifdef __cplusplus
}
#endif

#endif
