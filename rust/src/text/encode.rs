//! Text to ids.
//!
//! A prompt is encoded piece by piece: what follows the tokens that are held already, with text in it that must stay text. The
//! ids are those of the whole all the same.

use tokenizers::tokenizer::{Model, OffsetReferential, OffsetType, PreTokenizer};
use tokenizers::{NormalizerWrapper, PreTokenizedString, PreTokenizerWrapper};

use serde_json::Value as Json;

use super::tokenizer::Tokenizer;
use crate::abi::{invalid, Result};

/// Where a text stands.
pub enum Place {
    /// By itself, as it is.
    Alone,
    /// At the beginning: with what the post-processor adds, unless the text begins with that.
    Beginning,
    /// After the token of this id.
    After(u32),
}

/// The character that stands between the halves of what must not be taken for a token.
pub type Joint = char;

fn failed<T>(error: tokenizers::Error) -> Result<T> {
    invalid(format!("can't tokenize: {error}"))
}

fn to_ids(ids: &[u32]) -> Vec<i32> {
    ids.iter().map(|&id| id as i32).collect()
}

impl Tokenizer {
    pub fn encode(&self, text: &str, place: Place, joint: Option<Joint>) -> Result<Vec<i32>> {
        match place {
            Place::Alone => plain(self.inner(), text, joint).map(|ids| to_ids(&ids)),
            Place::Beginning => self.encode_beginning(text),
            Place::After(last) => self.encode_after(last, text, joint),
        }
    }

    fn encode_beginning(&self, text: &str) -> Result<Vec<i32>> {
        let whole = self.inner().encode_fast(text, true).or_else(failed)?;
        let ids = whole.get_ids();
        if ids.len() > 1 && ids[0] == ids[1] {
            // One of the two is the text's own, if it is not the text that has it twice.
            let own = plain(self.inner(), text, None)?;
            if ids[1..].starts_with(&own) {
                return Ok(to_ids(&ids[1..]));
            }
        }
        Ok(to_ids(ids))
    }

    fn encode_after(&self, last: u32, text: &str, joint: Option<Joint>) -> Result<Vec<i32>> {
        if let Some(token) = self.inner().get_added_vocabulary().get_added_tokens_decoder().get(&last) {
            // As it would be split in the whole: an added token ends what is before it.
            let ids = plain(self.inner(), &format!("{}{text}", token.content), joint)?;
            if ids.first() == Some(&last) {
                return Ok(to_ids(&ids[1..]));
            }
        }
        let Some(going_on) = self.without_prefix_space() else {
            return plain(self.inner(), text, joint).map(|ids| to_ids(&ids));
        };
        // What is before the first added token goes on from what is held. What follows it is as in any text.
        let cut = self.first_added_token(text);
        let mut ids = in_steps(self.inner(), going_on, &text[..cut], joint)?;
        ids.extend(plain(self.inner(), &text[cut..], joint)?);
        Ok(to_ids(&ids))
    }

    /// Offset of the first added token in a text; its end where there is none.
    fn first_added_token(&self, text: &str) -> usize {
        let split = self.inner().get_added_vocabulary().extract_and_normalize(self.inner().get_normalizer(), text);
        let splits = split.get_splits(OffsetReferential::Original, OffsetType::Byte);
        let token = splits.iter().find(|(_, _, tokens)| tokens.is_some());
        token.map_or(text.len(), |(_, (begin, _), _)| *begin)
    }
}

/// The steps of a tokenizer before its model.
pub struct Steps {
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
}

/// Nothing is added, no token recognised across a joint, and no joint left.
fn plain(tokenizer: &tokenizers::Tokenizer, text: &str, joint: Option<Joint>) -> Result<Vec<u32>> {
    if joint.is_some_and(|joint| text.contains(joint)) {
        let steps = Steps {
            normalizer: tokenizer.get_normalizer().cloned(),
            pre_tokenizer: tokenizer.get_pre_tokenizer().cloned(),
        };
        return in_steps(tokenizer, &steps, text, joint);
    }
    Ok(tokenizer.encode_fast(text, false).or_else(failed)?.get_ids().to_vec())
}

/// The crate's own steps, but for the joints' removal once added tokens are found.
fn in_steps(
    tokenizer: &tokenizers::Tokenizer,
    steps: &Steps,
    text: &str,
    joint: Option<Joint>,
) -> Result<Vec<u32>> {
    let mut split: PreTokenizedString =
        tokenizer.get_added_vocabulary().extract_and_normalize(steps.normalizer.as_ref(), text);
    if let Some(joint) = joint {
        split.normalize(|piece| piece.replace(joint, "")).or_else(failed)?;
    }
    if let Some(pre_tokenizer) = &steps.pre_tokenizer {
        pre_tokenizer.pre_tokenize(&mut split).or_else(failed)?;
    }
    let model = tokenizer.get_model();
    split.tokenize(|piece| model.tokenize(piece.get())).or_else(failed)?;
    Ok(split.into_encoding(None, 0, OffsetType::None).or_else(failed)?.get_ids().to_vec())
}

/// A tokenizer's steps without the space that they put before a text: SentencePiece's dummy prefix and its like. None where they
/// put none. The vocabulary, megabytes of it, is not copied: a wake's first token waits for this.
pub fn without_prefix_space(tokenizer: &tokenizers::Tokenizer) -> Option<Steps> {
    let mut parts = serde_json::json!([tokenizer.get_normalizer(), tokenizer.get_pre_tokenizer()]);
    let mut found = false;
    for part in parts.as_array_mut()? {
        strip_prefix_space(part, &mut found);
    }
    if !found {
        return None;
    }
    let (normalizer, pre_tokenizer) = serde_json::from_value(parts).ok()?;
    Some(Steps { normalizer, pre_tokenizer })
}

fn strip_prefix_space(part: &mut Json, found: &mut bool) {
    for list in ["normalizers", "pretokenizers"] {
        if let Some(steps) = part.get_mut(list).and_then(Json::as_array_mut) {
            steps.iter_mut().for_each(|step| strip_prefix_space(step, found));
            steps.retain(|step| !step.is_null());
        }
    }
    match part["type"].as_str() {
        Some("Prepend") => {
            *found = true;
            *part = Json::Null;
        }
        Some("Metaspace") if part["prepend_scheme"] != "never" => {
            *found = true;
            part["prepend_scheme"] = "never".into();
        }
        Some("ByteLevel") if part["add_prefix_space"] == true => {
            *found = true;
            part["add_prefix_space"] = false.into();
        }
        _ => {}
    }
}
