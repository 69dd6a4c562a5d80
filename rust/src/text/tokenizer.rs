//! A tokenizer.json with what stands beside it, used as Hugging Face's fast tokenizers use it.

use super::settings::Settings;
use crate::abi::{invalid, Result};
use tokenizers::{Decoder, DecoderWrapper};

pub struct Tokenizer(tokenizers::Tokenizer);

impl Tokenizer {
    /// Also gives what `settings` changed, for the digest; empty where tokenizer.json had it all.
    pub fn new(json: &str, settings: &Settings) -> Result<(Self, String)> {
        let mut inner: tokenizers::Tokenizer =
            json.parse().or_else(|e| invalid(format!("not a usable tokenizer: {e}")))?;
        // Files saved after a training run keep its limits; a prompt is never cut or padded.
        inner.with_padding(None);
        inner.with_truncation(None).or_else(|e| invalid(e.to_string()))?;
        let there: Vec<_> = inner.get_added_tokens_decoder().into_values().collect();
        let missing = settings.missing(&there);
        let mut changes = String::new();
        for token in &missing {
            let before = inner.token_to_id(&token.content);
            inner.add_tokens(std::slice::from_ref(token));
            // A flag that is said otherwise is a change too.
            changes += &format!("{token:?} {before:?}\n");
        }
        if settings.config.get("split_special_tokens").is_some_and(|value| value == true) {
            inner.set_encode_special_tokens(true);
            changes += "split_special_tokens\n";
        }
        Ok((Self(inner), changes))
    }

    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<i32>> {
        let encoding = self.0.encode_fast(text, add_special).or_else(|e| invalid(format!("can't tokenize: {e}")))?;
        Ok(encoding.get_ids().iter().map(|&id| id as i32).collect())
    }

    pub fn decode(&self, ids: &[i32], skip_special: bool) -> Result<String> {
        let tokens = ids.iter().filter_map(|&id| self.shown_token(id, skip_special).transpose());
        self.decode_tokens(tokens.collect::<Result<_>>()?)
    }

    /// The token of `id`, unless it is hidden or the vocabulary has a hole there.
    pub fn shown_token(&self, id: i32, skip_special: bool) -> Result<Option<String>> {
        let id = u32::try_from(id).or_else(|_| invalid(format!("{id} is not a token id")))?;
        let token = self.0.id_to_token(id);
        Ok(token.filter(|token| !skip_special || !self.0.get_added_vocabulary().is_special_token(token)))
    }

    pub fn decode_tokens(&self, tokens: Vec<String>) -> Result<String> {
        match self.0.get_decoder() {
            Some(decoder) => decoder.decode(tokens).or_else(|e| invalid(format!("can't decode: {e}"))),
            None => Ok(tokens.join(" ")),
        }
    }

    pub fn decoder(&self) -> Option<&DecoderWrapper> {
        self.0.get_decoder()
    }

    pub fn token_to_id(&self, token: &str) -> Option<i32> {
        self.0.token_to_id(token).map(|id| id as i32)
    }

    pub fn vocab_size(&self) -> usize {
        self.0.get_vocab_size(true)
    }
}
