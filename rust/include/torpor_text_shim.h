/* C ABI of the Rust text shim: tokenizers and chat templates.
 *
 * Every function that can fail returns a torpor_text_status and, when it isn't TORPOR_TEXT_OK, writes one sentence of
 * UTF-8 to `error`, which the caller frees with torpor_text_bytes_free. `error` may be NULL. Other out-parameters are
 * required, are written only on success, and what they receive is the caller's to free with the function named for it;
 * freeing NULL is allowed. Nothing unwinds out of these functions.
 *
 * Text goes in as pointer and size, needs no terminator, and may be NULL when empty.
 * Tokenizers and templates may be used from many threads at once; a detokenizer from one at a time.
 */
#ifndef TORPOR_TEXT_SHIM_H
#define TORPOR_TEXT_SHIM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef int32_t torpor_text_status;
enum {
  TORPOR_TEXT_OK = 0,
  TORPOR_TEXT_INVALID = 1, /* the input, or a file of the model, can't be used */
  TORPOR_TEXT_INTERNAL = 2 /* a panic was caught: a defect of the shim or of its crates */
};

typedef struct {
  char* data;
  size_t size;
} torpor_text_bytes;
void torpor_text_bytes_free(torpor_text_bytes bytes);

typedef struct {
  int32_t* data;
  size_t size;
} torpor_text_ids;
void torpor_text_ids_free(torpor_text_ids ids);

/* The texts of a model directory's files; `data` is NULL where there is no such file. */
typedef struct {
  const char* data;
  size_t size;
} torpor_text_file;
typedef struct {
  torpor_text_file tokenizer;          /* tokenizer.json */
  torpor_text_file tokenizer_config;   /* tokenizer_config.json */
  torpor_text_file special_tokens_map; /* special_tokens_map.json and added_tokens.json, of older directories */
  torpor_text_file added_tokens;
  torpor_text_file jinja;         /* chat_template.jinja */
  torpor_text_file tool_use;      /* additional_chat_templates/tool_use.jinja */
  torpor_text_file chat_template; /* chat_template.json, of processors */
} torpor_text_files;

typedef struct torpor_text_tokenizer torpor_text_tokenizer;

/* Needs `tokenizer`, whose truncation and padding are not used. `changes` receives what the other files change of it, or an
 * empty text. */
torpor_text_status torpor_text_tokenizer_new(const torpor_text_files* files, torpor_text_tokenizer** out,
                                             torpor_text_bytes* changes, torpor_text_bytes* error);
void torpor_text_tokenizer_free(torpor_text_tokenizer* tokenizer);

/* Where a text stands: by itself, at the beginning (then the post-processor's tokens are added, unless the text begins with
 * them), or, with an id instead, after the token of that id. */
enum { TORPOR_TEXT_ALONE = -1, TORPOR_TEXT_BEGINNING = -2 };
/* No token is recognised across a `joint`, a character that may be empty; all joints are taken out. */
torpor_text_status torpor_text_tokenizer_encode(const torpor_text_tokenizer* tokenizer, const char* text,
                                                size_t text_size, int64_t place, const char* joint, size_t joint_size,
                                                torpor_text_ids* out, torpor_text_bytes* error);
/* Ids without a token give no text; negative ones are TORPOR_TEXT_INVALID. */
torpor_text_status torpor_text_tokenizer_decode(const torpor_text_tokenizer* tokenizer, const int32_t* ids,
                                                size_t ids_size, bool skip_special, torpor_text_bytes* out,
                                                torpor_text_bytes* error);
/* -1 when no token has that text. */
torpor_text_status torpor_text_tokenizer_token_to_id(const torpor_text_tokenizer* tokenizer, const char* token,
                                                     size_t token_size, int32_t* out, torpor_text_bytes* error);
/* Added tokens included. */
torpor_text_status torpor_text_tokenizer_vocab_size(const torpor_text_tokenizer* tokenizer, size_t* out,
                                                    torpor_text_bytes* error);

typedef struct torpor_text_detokenizer torpor_text_detokenizer;

/* Shares the tokenizer, which may be freed first. */
torpor_text_status torpor_text_detokenizer_new(const torpor_text_tokenizer* tokenizer, bool skip_special,
                                               torpor_text_detokenizer** out, torpor_text_bytes* error);
void torpor_text_detokenizer_free(torpor_text_detokenizer* detokenizer);
/* The text `id` completes. */
torpor_text_status torpor_text_detokenizer_push(torpor_text_detokenizer* detokenizer, int32_t id,
                                                torpor_text_bytes* out, torpor_text_bytes* error);
/* What is still open; the next push starts a new text. */
torpor_text_status torpor_text_detokenizer_finish(torpor_text_detokenizer* detokenizer, torpor_text_bytes* out,
                                                  torpor_text_bytes* error);

typedef struct torpor_text_template torpor_text_template;

/* `*out` is NULL when no file has a template; otherwise `source` receives the text of all that there are. */
torpor_text_status torpor_text_template_new(const torpor_text_files* files, torpor_text_template** out,
                                            torpor_text_bytes* source, torpor_text_bytes* error);
void torpor_text_template_free(torpor_text_template* chat_template);
/* `messages` is a JSON array of objects, `extra` a JSON object or empty. With a tokenizer the strings of its special tokens, and
 * of the template's own markers, are broken up by `joint` where they stand in messages and variables. */
torpor_text_status torpor_text_template_render(const torpor_text_template* chat_template, const char* messages,
                                               size_t messages_size, bool add_generation_prompt, const char* extra,
                                               size_t extra_size, const torpor_text_tokenizer* guarded_by,
                                               torpor_text_bytes* out, torpor_text_bytes* joint,
                                               torpor_text_bytes* error);

#ifdef __cplusplus
}
#endif

#endif
