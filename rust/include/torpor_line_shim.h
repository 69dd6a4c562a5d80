/* C ABI of lines that are typed at a terminal: rustyline. Built with the cargo feature `line`.
 *
 * Functions that can fail return a torpor_text_status and write one sentence to `error`, as in torpor_text_shim.h, whose rules
 * on pointers hold here too. An editor is used by one thread at a time.
 */
#ifndef TORPOR_LINE_SHIM_H
#define TORPOR_LINE_SHIM_H

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

/* Standard input and output must be a terminal. */
torpor_text_status torpor_line_editor_new(torpor_line_editor** out, torpor_text_bytes* error);
void torpor_line_editor_free(torpor_line_editor* editor);

/* Writes `prompt` and waits for a line, which the editor's history then has. A text that is pasted into a line keeps its line
 * ends, as "\n". The wait goes on whatever signals the process handles. `text` is written for TORPOR_LINE_TEXT only. */
torpor_text_status torpor_line_read(torpor_line_editor* editor, const char* prompt, size_t prompt_size, int32_t* outcome,
                                    torpor_text_bytes* text, torpor_text_bytes* error);

#ifdef __cplusplus
}
#endif

#endif
