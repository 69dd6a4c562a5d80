//! A tokenizer.json with what stands beside it, used as Hugging Face's fast tokenizers use it.

use std::sync::OnceLock;

use super::encode::{without_prefix_space, Steps};
use super::settings::Settings;
use crate::abi::{invalid, Result};
use tokenizers::models::bpe::BPE;
use tokenizers::{
    AddedToken, Decoder, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, TokenizerImpl,
};

/// A tokenizer.json as the crate reads it, but sooner where its model is a BPE, which is read from the text itself. The
/// crate makes a tree of values of a model first, to see of which kind it is. It has the last word on what is no BPE.
fn parse(json: &str) -> tokenizers::Result<tokenizers::Tokenizer> {
    type Bpe = TokenizerImpl<BPE, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;
    match serde_json::from_str::<Bpe>(json) {
        Ok(tokenizer) => Ok(tokenizer.into()),
        Err(_) => json.parse(),
    }
}

pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    going_on: OnceLock<Option<Steps>>,
}

impl Tokenizer {
    /// Also gives what `settings` changed, for the digest; empty where tokenizer.json had it all.
    pub fn new(json: &str, settings: &Settings) -> Result<(Self, String)> {
        let mut inner: tokenizers::Tokenizer =
            parse(json).or_else(|e| invalid(format!("not a usable tokenizer: {e}")))?;
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
        Ok((Self { inner, going_on: OnceLock::new() }, changes))
    }

    pub fn inner(&self) -> &tokenizers::Tokenizer {
        &self.inner
    }

    /// The steps that put no space before a text; None where this tokenizer's put none. Made when they are first needed.
    pub fn without_prefix_space(&self) -> Option<&Steps> {
        self.going_on.get_or_init(|| without_prefix_space(&self.inner)).as_ref()
    }

    pub fn added_tokens(&self) -> impl Iterator<Item = &AddedToken> {
        self.inner.get_added_vocabulary().get_added_tokens_decoder().values()
    }

    pub fn decode(&self, ids: &[i32], skip_special: bool) -> Result<String> {
        let tokens = ids.iter().filter_map(|&id| self.shown_token(id, skip_special).transpose());
        self.decode_tokens(tokens.collect::<Result<_>>()?)
    }

    /// The token of `id`, unless it is hidden or the vocabulary has a hole there.
    pub fn shown_token(&self, id: i32, skip_special: bool) -> Result<Option<String>> {
        let id = u32::try_from(id).or_else(|_| invalid(format!("{id} is not a token id")))?;
        let token = self.inner.id_to_token(id);
        Ok(token.filter(|token| !skip_special || !self.inner.get_added_vocabulary().is_special_token(token)))
    }

    pub fn decode_tokens(&self, tokens: Vec<String>) -> Result<String> {
        match self.inner.get_decoder() {
            Some(decoder) => decoder.decode(tokens).or_else(|e| invalid(format!("can't decode: {e}"))),
            None => Ok(tokens.join(" ")),
        }
    }

    pub fn decoder(&self) -> Option<&DecoderWrapper> {
        self.inner.get_decoder()
    }

    pub fn token_to_id(&self, token: &str) -> Option<i32> {
        self.inner.token_to_id(token).map(|id| id as i32)
    }

    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }
}
