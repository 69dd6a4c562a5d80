/* C ABI of lines that are typed at a terminal: rustyline. Built with the cargo feature `line`.
 *
 * Functions that can fail return a torpor_text_status and write one sentence to `error`, as in torpor_text_shim.h, whose rules
 * on pointers hold here too. An editor is used by one thread at a time.
 */
#ifndef TORPOR_LINE_SHIM_H
#define TORPOR_LINE_SHIM_H

#include <stdbool.h>

#include "torpor_text_shim.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct torpor_line_editor torpor_line_editor;

/* What torpor_line_read came to. */
enum {
  TORPOR_LINE_TEXT = 0,
  TORPOR_LINE_END = 1,        /* Ctrl-D on an empty line, or the terminal is gone */
  TORPOR_LINE_INTERRUPTED = 2 /* Ctrl-C, which sends no signal meanwhile */
};

/* What Tab may make of the last word before the cursor; UTF-8. It is called within torpor_line_read, and returns normally. */
typedef struct torpor_line_offers torpor_line_offers;
typedef void (*torpor_line_complete)(void* context, const char* before, size_t size, torpor_line_offers* offers);
void torpor_line_offer(torpor_line_offers* offers, const char* word, size_t size);

/* Standard input and output must be a terminal. `complete`, which may be null, and its `context` outlive the editor. With `bold`
 * prompts are so. */
torpor_text_status torpor_line_editor_new(torpor_line_complete complete, void* context, bool bold,
                                          torpor_line_editor** out, torpor_text_bytes* error);
void torpor_line_editor_free(torpor_line_editor* editor);

/* Adds a text to what the arrow keys bring back, unless it is that of the last call. */
torpor_text_status torpor_line_remember(torpor_line_editor* editor, const char* text, size_t size,
                                        torpor_text_bytes* error);

/* Writes `prompt` and waits for a line, which no history has yet. A text that is pasted into a line keeps its line
 * ends, as "\n". The wait goes on whatever signals the process handles. `text` is written for TORPOR_LINE_TEXT only. */
torpor_text_status torpor_line_read(torpor_line_editor* editor, const char* prompt, size_t prompt_size, int32_t* outcome,
                                    torpor_text_bytes* text, torpor_text_bytes* error);

#ifdef __cplusplus
}
#endif

#endif
