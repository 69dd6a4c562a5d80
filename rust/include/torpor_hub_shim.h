/* C ABI of the client of the Hugging Face Hub: fetches a model into huggingface_hub's own cache. Built with the cargo
 * feature `hub`.
 *
 * The function returns a status and writes one sentence to `error`, as in torpor_text_shim.h, whose rules on pointers
 * hold here too. No sentence holds the token or a query of a URL.
 */
#ifndef TORPOR_HUB_SHIM_H
#define TORPOR_HUB_SHIM_H

#include "torpor_text_shim.h"

#ifdef __cplusplus
extern "C" {
#endif

/* torpor_text_status, and beyond it: */
enum {
  TORPOR_HUB_NOT_FOUND = 3, /* no such repository, revision or file */
  TORPOR_HUB_FAILED = 4,    /* the network or the disk: what has come stays, and the next call goes on from there */
  TORPOR_HUB_CORRUPT = 5    /* what came is not what the hub says it is; it was removed */
};

/* `done` of `total` bytes are there; called on the calling thread. `file` is the name of the one under way. */
typedef void (*torpor_hub_progress)(void* user, const char* file, size_t file_size, uint64_t done, uint64_t total);

/* `options` is a JSON object:
 *   endpoint   of the hub, http:// or https://
 *   token      sent to the endpoint alone; empty: none
 *   cache      directory of the cache ("~/.cache/huggingface/hub")
 *   repo       ORG/NAME
 *   file       a GGUF file of the repository, whose other pieces come too; empty: weights in safetensors with
 *              config, tokenizer and chat template
 *   revision   a branch, tag or commit
 * Blocks until all files are there and `refs` names the snapshot. `report` receives a JSON object {"snapshot",
 * "revision", "files", "bytes", "downloaded"}: the directory, the commit, and of the bytes those that came now.
 * Processes that fetch one file wait for each other, by huggingface_hub's locks. */
torpor_text_status torpor_hub_pull(const char* options, size_t options_size, torpor_hub_progress progress, void* user,
                                   torpor_text_bytes* report, torpor_text_bytes* error);

#ifdef __cplusplus
}
#endif

#endif
