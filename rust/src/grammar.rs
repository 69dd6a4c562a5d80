//! Which tokens may come next, so that an answer is one of a grammar's: JSON of a schema, or a Lark grammar. By llguidance.
//!
//! A vocabulary is made once of a tokenizer. A grammar belongs to one answer, and moves on with each of its tokens.

use std::sync::Arc;

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::{Matcher, ParserFactory};
use toktrie::{TokRxInfo, TokTrie, TokenId, TokenizerEnv};

use crate::abi::{guard, handle, handle_mut, invalid, slice, utf8, Bytes, Result};
use crate::text::{token_bytes, Tokenizer};

struct Tokens(TokTrie);

impl TokenizerEnv for Tokens {
    fn tok_trie(&self) -> &TokTrie {
        &self.0
    }

    fn tokenize_bytes(&self, text: &[u8]) -> Vec<TokenId> {
        self.0.greedy_tokenize(text)
    }
}

pub struct Vocabulary {
    parsers: ParserFactory,
    size: usize,
}

pub struct Grammar {
    matcher: Matcher,
    words: usize,
}

/// The first sentence; the crate adds its own state to some errors.
fn failed<T>(error: impl std::fmt::Display) -> Result<T> {
    let text = error.to_string();
    invalid(text.lines().next().unwrap_or_default().trim_end_matches('.').to_owned())
}

impl Vocabulary {
    /// `size`: of a row of logits, which may be longer than the tokenizer's vocabulary.
    fn new(tokenizer: &Tokenizer, size: usize, ends: &[u32]) -> Result<Self> {
        let Some(&end) = ends.first() else {
            return invalid("the model has no token that ends an answer");
        };
        if let Some(id) = ends.iter().find(|&&id| id as usize >= size) {
            return invalid(format!("the token {id} that ends an answer is not among the model's {size}"));
        }
        let mut tokens: Vec<Vec<u8>> = Vec::with_capacity(size);
        for id in 0..size as i32 {
            let token = tokenizer.shown_token(id, false)?;
            let special = token.is_some() && tokenizer.shown_token(id, true)?.is_none();
            tokens.push(match token {
                None => Vec::new(),
                // No text leads to a special token: only a grammar that names it does.
                Some(token) if special => [&[TokTrie::SPECIAL_TOKEN_MARKER], token.as_bytes()].concat(),
                Some(token) => token_bytes(tokenizer, &token)?,
            });
        }
        let trie = TokTrie::from(&TokRxInfo::new(size as u32, end), &tokens).with_eos_tokens(ends);
        let mut parsers = ParserFactory::new_simple(&(Arc::new(Tokens(trie)) as _)).or_else(failed)?;
        parsers.quiet();
        *parsers.limits_mut() = ParserLimits { verbose_errors: false, ..ParserLimits::default() };
        Ok(Self { parsers, size })
    }
}

impl Grammar {
    fn new(vocabulary: &Vocabulary, lark: &str) -> Result<Self> {
        let grammar = TopLevelGrammar::from_lark(lark.to_owned());
        let parser = vocabulary.parsers.create_parser(grammar).or_else(failed)?;
        Ok(Self { matcher: Matcher::new(Ok(parser)), words: vocabulary.size.div_ceil(32) })
    }

    fn mask(&mut self, words: &mut [u32]) -> Result<()> {
        if words.len() != self.words {
            return invalid(format!("a mask of {} words for {}", words.len(), self.words));
        }
        let mask = self.matcher.compute_mask_or_eos().or_else(failed)?;
        let allowed = mask.as_slice();
        let known = allowed.len().min(words.len());
        words[..known].copy_from_slice(&allowed[..known]);
        words[known..].fill(0);
        Ok(())
    }
}

#[no_mangle]
pub unsafe extern "C" fn torpor_grammar_vocabulary_new(
    tokenizer: *const Arc<Tokenizer>,
    size: usize,
    ends: *const u32,
    ends_size: usize,
    out: *mut *mut Vocabulary,
    error: *mut Bytes,
) -> i32 {
    guard(error, || {
        let vocabulary = Vocabulary::new(handle(tokenizer)?, size, slice(ends, ends_size))?;
        *out = Box::into_raw(Box::new(vocabulary));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn torpor_grammar_vocabulary_free(vocabulary: *mut Vocabulary) {
    if !vocabulary.is_null() {
        drop(Box::from_raw(vocabulary));
    }
}

#[no_mangle]
pub unsafe extern "C" fn torpor_grammar_new(
    vocabulary: *const Vocabulary,
    lark: *const u8,
    lark_size: usize,
    out: *mut *mut Grammar,
    error: *mut Bytes,
) -> i32 {
    guard(error, || {
        let grammar = Grammar::new(handle(vocabulary)?, utf8("the grammar", lark, lark_size)?)?;
        *out = Box::into_raw(Box::new(grammar));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn torpor_grammar_free(grammar: *mut Grammar) {
    if !grammar.is_null() {
        drop(Box::from_raw(grammar));
    }
}

#[no_mangle]
pub unsafe extern "C" fn torpor_grammar_mask(
    grammar: *mut Grammar,
    words: *mut u32,
    words_size: usize,
    error: *mut Bytes,
) -> i32 {
    guard(error, || {
        if words.is_null() {
            return invalid("the mask is null");
        }
        handle_mut(grammar)?.mask(std::slice::from_raw_parts_mut(words, words_size))
    })
}

#[no_mangle]
pub unsafe extern "C" fn torpor_grammar_accept(
    grammar: *mut Grammar,
    token: u32,
    error: *mut Bytes,
) -> i32 {
    guard(error, || {
        let grammar = handle_mut(grammar)?;
        if !grammar.matcher.is_stopped() {
            grammar.matcher.consume_token(token).or_else(failed)?;
        }
        Ok(())
    })
}
