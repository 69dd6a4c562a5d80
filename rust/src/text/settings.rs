//! What stands beside tokenizer.json: tokenizer_config.json, and what older directories have. Put together as AutoTokenizer of
//! transformers 5 does, which reads the older files only where tokenizer_config.json has no `added_tokens_decoder`.

use serde_json::{Map, Value as Json};
use tokenizers::AddedToken;

use crate::abi::{invalid, Result};

const NAMES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

#[derive(Default)]
pub struct Settings {
    pub config: Map<String, Json>,
    /// bos_token and its like, and those that this model has beside them (image_token).
    named: Map<String, Json>,
    /// Special tokens without a name.
    extra: Vec<Json>,
    /// By id.
    added: Vec<(u64, AddedToken)>,
}

fn object(file: &str, text: Option<&str>) -> Result<Map<String, Json>> {
    match text {
        Some(text) => serde_json::from_str(text).or_else(|e| invalid(format!("{file} is not a JSON object: {e}"))),
        None => Ok(Map::new()),
    }
}

/// A token is a string, or an object with its text and flags.
fn content(token: &Json) -> Option<&str> {
    token.as_str().or_else(|| token.get("content")?.as_str())
}

fn added_token(token: &Json) -> Option<AddedToken> {
    let flag = |name: &str, otherwise: bool| token.get(name).and_then(Json::as_bool).unwrap_or(otherwise);
    let special = flag("special", !token.is_object());
    let normalized = flag("normalized", !special);
    let made = AddedToken::from(content(token)?, special).normalized(normalized);
    Some(made.single_word(flag("single_word", false)).lstrip(flag("lstrip", false)).rstrip(flag("rstrip", false)))
}

/// What a class of tokenizers takes for the names that its config leaves out.
fn defaults_of(class: &str) -> &'static [(&'static str, &'static str)] {
    match class.strip_suffix("Fast").unwrap_or(class) {
        "LlamaTokenizer" | "CodeLlamaTokenizer" => {
            &[("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")]
        }
        "GemmaTokenizer" => {
            &[("bos_token", "<bos>"), ("eos_token", "<eos>"), ("unk_token", "<unk>"), ("pad_token", "<pad>")]
        }
        _ => &[],
    }
}

impl Settings {
    pub fn new(config: Option<&str>, special_tokens_map: Option<&str>, added_tokens: Option<&str>) -> Result<Self> {
        let mut fields = object("tokenizer_config.json", config)?;
        let decoder = fields.get("added_tokens_decoder").and_then(Json::as_object).cloned();
        if decoder.is_none() {
            for (key, mut value) in object("special_tokens_map.json", special_tokens_map)? {
                if let Json::Object(token) = &mut value {
                    token.insert("special".into(), Json::Bool(true));
                }
                fields.insert(key, value);
            }
        }
        let class = fields.get("tokenizer_class").and_then(Json::as_str).unwrap_or_default().to_owned();
        for (name, token) in defaults_of(&class) {
            if !fields.contains_key(*name) {
                fields.insert((*name).into(), Json::String((*token).into()));
            }
        }

        let mut settings = Self { config: fields, ..Self::default() };
        for (key, value) in &settings.config {
            // Of its own names a model's are texts, or objects that say that they are tokens.
            let token = if NAMES.contains(&key.as_str()) {
                content(value).is_some()
            } else {
                key.ends_with("_token") && (value.is_string() || value.get("__type").is_some_and(|t| t == "AddedToken"))
            };
            if token {
                settings.named.insert(key.clone(), value.clone());
            }
        }
        let listed = |key: &str| settings.config.get(key).filter(|value| !value.is_null() && **value != Json::Array(Vec::new()));
        match listed("extra_special_tokens").or_else(|| listed("additional_special_tokens")) {
            Some(Json::Array(tokens)) => settings.extra = tokens.clone(),
            Some(Json::Object(tokens)) => settings.named.extend(tokens.clone()),
            _ => {}
        }

        match decoder {
            Some(decoder) => {
                for (id, token) in decoder {
                    let id = id.parse().or_else(|_| invalid(format!("added_tokens_decoder has the id \"{id}\"")))?;
                    settings.added.extend(added_token(&token).map(|token| (id, token)));
                }
            }
            None => {
                for (text, id) in object("added_tokens.json", added_tokens)? {
                    let special = settings.named.values().chain(&settings.extra).any(|t| content(t) == Some(&text));
                    settings.added.push((id.as_u64().unwrap_or(u64::MAX), AddedToken::from(text, special)));
                }
            }
        }
        settings.added.sort_by_key(|(id, _)| *id);
        Ok(settings)
    }

    /// The special tokens that templates use by name.
    pub fn variables(&self) -> Map<String, Json> {
        let text = |(name, token): (&String, &Json)| Some((name.clone(), Json::String(content(token)?.to_owned())));
        self.named.iter().filter_map(text).collect()
    }

    /// Tokens that a tokenizer with these added ones lacks, in the order in which they get ids.
    pub fn missing(&self, there: &[AddedToken]) -> Vec<AddedToken> {
        // Equal means equal in text alone, and flags may be set right.
        let same = |a: &AddedToken, b: &AddedToken| {
            (&a.content, a.single_word, a.lstrip, a.rstrip, a.normalized, a.special)
                == (&b.content, b.single_word, b.lstrip, b.rstrip, b.normalized, b.special)
        };
        let mut missing: Vec<AddedToken> = Vec::new();
        missing.extend(self.added.iter().map(|(_, token)| token).filter(|t| !there.iter().any(|h| same(h, t))).cloned());
        for token in self.named.values().chain(&self.extra).filter_map(added_token) {
            if !there.iter().chain(&missing).any(|known| known.content == token.content) {
                missing.push(token);
            }
        }
        for token in &mut missing {
            token.special |= self.named.values().any(|named| content(named) == Some(&token.content));
        }
        missing
    }
}
