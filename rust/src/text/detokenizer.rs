//! Ids in, text out, one token at a time, such that the pieces put together are the decoding of the whole.
//!
//! Hugging Face's DecodeStream waits while its text ends in U+FFFD, so one invalid byte makes it wait for ever and
//! re-decode everything each step. Here each family of decoders has its own rule, and a step costs the same at any length.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use super::tokenizer::Tokenizer;
use crate::abi::Result;
use tokenizers::DecoderWrapper;

pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_special: bool,
    state: State,
}

enum State {
    /// Byte-level BPE: tokens are bytes, only an open UTF-8 sequence is kept.
    ByteLevel { open: Vec<u8> },
    /// All others: `pending` is decoded behind `context`, the last token given out, since what a token says depends on
    /// whether it is the first.
    Tokens { context: Vec<String>, pending: Vec<String>, byte_fallback: bool, byte_level: bool },
}

impl Detokenizer {
    pub fn new(tokenizer: Arc<Tokenizer>, skip_special: bool) -> Self {
        let steps = steps(tokenizer.decoder());
        let state = match steps[..] {
            [DecoderWrapper::ByteLevel(_)] => State::ByteLevel { open: Vec::new() },
            _ => State::Tokens {
                context: Vec::new(),
                pending: Vec::new(),
                byte_fallback: steps.iter().any(|step| matches!(step, DecoderWrapper::ByteFallback(_))),
                byte_level: steps.iter().any(|step| matches!(step, DecoderWrapper::ByteLevel(_))),
            },
        };
        Self { tokenizer, skip_special, state }
    }

    pub fn push(&mut self, id: i32) -> Result<String> {
        let Some(token) = self.tokenizer.shown_token(id, self.skip_special)? else {
            return Ok(String::new());
        };
        match &mut self.state {
            State::ByteLevel { open } => {
                append_bytes(open, &token);
                Ok(take_decided(open))
            }
            State::Tokens { context, pending, byte_fallback, byte_level } => {
                // A run of byte tokens is text only if all of it is valid UTF-8, which its end alone decides.
                let undecided = *byte_fallback && is_byte_token(&token);
                pending.push(token);
                if undecided {
                    return Ok(String::new());
                }
                let text = decode_behind(&self.tokenizer, context, pending)?;
                if *byte_level && text.ends_with(char::REPLACEMENT_CHARACTER) {
                    return Ok(String::new());
                }
                // An empty token tells the decoder nothing about what follows.
                if let Some(last) = pending.drain(..).rfind(|token| !token.is_empty()) {
                    *context = vec![last];
                }
                Ok(text)
            }
        }
    }

    /// What is still open; the next push starts a new text.
    pub fn finish(&mut self) -> Result<String> {
        match &mut self.state {
            State::ByteLevel { open } => {
                let text = String::from_utf8_lossy(open).into_owned();
                open.clear();
                Ok(text)
            }
            State::Tokens { context, pending, .. } => {
                let text = decode_behind(&self.tokenizer, context, pending)?;
                context.clear();
                pending.clear();
                Ok(text)
            }
        }
    }
}

/// What a token adds to a text that something stands before.
#[cfg(feature = "grammar")]
pub fn token_bytes(tokenizer: &Tokenizer, token: &str) -> Result<Vec<u8>> {
    let steps = steps(tokenizer.decoder());
    let any = |wanted: fn(&DecoderWrapper) -> bool| steps.iter().any(|step| wanted(step));
    if any(|step| matches!(step, DecoderWrapper::ByteLevel(_))) {
        let mut bytes = Vec::new();
        append_bytes(&mut bytes, token);
        return Ok(bytes);
    }
    if any(|step| matches!(step, DecoderWrapper::ByteFallback(_))) && is_byte_token(token) {
        return Ok(u8::from_str_radix(&token[3..5], 16).into_iter().collect());
    }
    Ok(decode_behind(tokenizer, &["a".to_owned()], &[token.to_owned()])?.into_bytes())
}

/// The decoder's steps, nested sequences laid flat.
fn steps(decoder: Option<&DecoderWrapper>) -> Vec<&DecoderWrapper> {
    match decoder {
        None => Vec::new(),
        Some(DecoderWrapper::Sequence(sequence)) => {
            sequence.get_decoders().iter().flat_map(|step| steps(Some(step))).collect()
        }
        Some(step) => vec![step],
    }
}

/// As the crate's ByteFallback decides it.
fn is_byte_token(token: &str) -> bool {
    token.len() == 6
        && token.starts_with("<0x")
        && token.ends_with('>')
        && token.get(3..5).is_some_and(|hex| u8::from_str_radix(hex, 16).is_ok())
}

/// What `tokens` adds to the text of `context`.
fn decode_behind(tokenizer: &Tokenizer, context: &[String], tokens: &[String]) -> Result<String> {
    let before = tokenizer.decode_tokens(context.to_vec())?;
    let whole = tokenizer.decode_tokens([context, tokens].concat())?;
    // A decoder that rewrites text already given out can't be streamed exactly; what is new is then the closest thing.
    let same: usize = before.chars().zip(whole.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
    Ok(whole[same..].to_owned())
}

/// The bytes a byte-level token stands for; one with any other character in it (an added token) stands for its own.
fn append_bytes(bytes: &mut Vec<u8>, token: &str) {
    static BYTE_OF: OnceLock<HashMap<char, u8>> = OnceLock::new();
    let byte_of = BYTE_OF.get_or_init(|| {
        // GPT-2's alphabet: printable Latin-1 is itself, the other bytes are numbered from U+0100.
        let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let others = (0..=255u8).filter(|&byte| !printable(byte));
        let others = others.zip(0x100u32..).filter_map(|(byte, code)| Some((char::from_u32(code)?, byte)));
        (0..=255u8).filter(|&byte| printable(byte)).map(|byte| (byte as char, byte)).chain(others).collect()
    });
    match token.chars().map(|c| byte_of.get(&c).copied()).collect::<Option<Vec<u8>>>() {
        Some(decoded) => bytes.extend(decoded),
        None => bytes.extend(token.as_bytes()),
    }
}

/// Takes from `open` all that no further byte can change, invalid sequences as U+FFFD.
fn take_decided(open: &mut Vec<u8>) -> String {
    let decided = match std::str::from_utf8(open) {
        Ok(_) => open.len(),
        Err(_) => open.utf8_chunks().last().map_or(0, |chunk| {
            let tail = chunk.invalid();
            let unfinished = matches!(std::str::from_utf8(tail), Err(e) if e.error_len().is_none());
            open.len() - if unfinished { tail.len() } else { 0 }
        }),
    };
    let text = String::from_utf8_lossy(&open[..decided]).into_owned();
    open.drain(..decided);
    text
}
