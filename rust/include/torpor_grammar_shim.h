/* C ABI of grammars that answers are held to: llguidance. Built with the cargo feature `grammar`.
 *
 * Functions that can fail return a torpor_text_status and write one sentence to `error`, as in torpor_text_shim.h, whose rules
 * on pointers hold here too. A vocabulary may be used by many threads at once; a grammar by one at a time.
 */
#ifndef TORPOR_GRAMMAR_SHIM_H
#define TORPOR_GRAMMAR_SHIM_H

#include "torpor_text_shim.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct torpor_grammar_vocabulary torpor_grammar_vocabulary;
typedef struct torpor_grammar torpor_grammar;

/* `size`: of a row of logits. `ends`: ids of the tokens that end an answer, at least one. The tokenizer may go before it. */
torpor_text_status torpor_grammar_vocabulary_new(const torpor_text_tokenizer* tokenizer, size_t size, const uint32_t* ends,
                                                 size_t ends_size, torpor_grammar_vocabulary** out,
                                                 torpor_text_bytes* error);
void torpor_grammar_vocabulary_free(torpor_grammar_vocabulary* vocabulary);

/* For one answer, of llguidance's dialect of Lark: JSON of a schema is `%json {...}` in it, where a keyword that can't be held to is
 * TORPOR_TEXT_INVALID, and named. It may outlive the vocabulary. */
torpor_text_status torpor_grammar_new(const torpor_grammar_vocabulary* vocabulary, const char* lark, size_t lark_size,
                                      torpor_grammar** out, torpor_text_bytes* error);
void torpor_grammar_free(torpor_grammar* grammar);
/* Sets bit `id % 32` of word `id / 32` for each token that may come next; `words_size` is the vocabulary's size / 32, rounded up.
 * Once the grammar is over these are the tokens that end an answer. */
torpor_text_status torpor_grammar_mask(torpor_grammar* grammar, uint32_t* words, size_t words_size,
                                       torpor_text_bytes* error);
/* Moves on by a token of the mask; another one is TORPOR_TEXT_INVALID. */
torpor_text_status torpor_grammar_accept(torpor_grammar* grammar, uint32_t token, torpor_text_bytes* error);

#ifdef __cplusplus
}
#endif

#endif
