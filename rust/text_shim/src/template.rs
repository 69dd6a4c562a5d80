//! Chat templates, rendered as Hugging Face's `apply_chat_template` renders them.

use std::fmt;

use minijinja::{Environment, Error, ErrorKind, Value};
use serde_json::{Map, Value as Json};

use crate::python;
use crate::{invalid, Invalid, Result};

const NAME: &str = "chat template";

pub struct ChatTemplate {
    source: String,
    environment: Environment<'static>,
    /// bos_token and its like, which templates use by name.
    special_tokens: Map<String, Json>,
}

/// Carries the text of `raise_exception` through whatever the engine wraps around it.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

impl ChatTemplate {
    /// From the text of chat_template.jinja and of tokenizer_config.json, either of which may be absent.
    pub fn from_files(jinja: Option<&str>, config: Option<&str>) -> Result<Option<Self>> {
        let config: Map<String, Json> = match config {
            Some(text) => serde_json::from_str(text)
                .or_else(|e| invalid(format!("tokenizer_config.json is not a JSON object: {e}")))?,
            None => Map::new(),
        };
        let source = match jinja {
            Some(text) => Some(text.to_owned()),
            None => template_of(config.get("chat_template"))?,
        };
        let Some(source) = source else { return Ok(None) };

        let mut environment = environment();
        environment
            .add_template_owned(NAME, without_generation_tags(&source.replace("\r\n", "\n").replace('\r', "\n")))
            .map_err(|e| describe(&e, "does not parse"))?;
        Ok(Some(Self { source, environment, special_tokens: special_tokens(&config) }))
    }

    pub fn source(&self) -> &str {
        &self.source
    }

    pub fn render(&self, messages: &str, add_generation_prompt: bool, extra: &str) -> Result<String> {
        let messages: Vec<Json> =
            serde_json::from_str(messages).or_else(|e| invalid(format!("the messages are not a JSON array: {e}")))?;
        let messages = messages.into_iter().enumerate().map(|(i, message)| match message {
            Json::Object(mut message) => {
                // As Hugging Face does: a template knows a key that is missing better than one that is null.
                message.retain(|_, value| !value.is_null());
                Ok(Json::Object(with_reasoning_aliases(message)))
            }
            _ => invalid(format!("message {i} is not a JSON object")),
        });
        let messages = messages.collect::<Result<Vec<_>>>()?;
        let extra: Map<String, Json> = match extra {
            "" => Map::new(),
            _ => serde_json::from_str(extra)
                .or_else(|e| invalid(format!("the extra variables are not a JSON object: {e}")))?,
        };

        let mut variables = self.special_tokens.clone();
        variables.insert("messages".into(), Json::Array(messages));
        // Defined even when not given: templates ask `tools is not none`.
        variables.insert("tools".into(), Json::Null);
        variables.insert("documents".into(), Json::Null);
        variables.insert("add_generation_prompt".into(), Json::Bool(add_generation_prompt));
        variables.extend(extra);

        let template = self.environment.get_template(NAME).map_err(|e| describe(&e, "failed"))?;
        template.render(python::value(&Json::Object(variables))).map_err(|e| describe(&e, "failed"))
    }
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.add_function("raise_exception", |message: Value| -> std::result::Result<Value, Error> {
        let message = python::str(&message);
        Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
    });
    python::install(&mut environment);
    environment
}

/// `chat_template` of tokenizer_config.json: a string, or a list of {"name", "template"}.
fn template_of(field: Option<&Json>) -> Result<Option<String>> {
    match field {
        None | Some(Json::Null) => Ok(None),
        Some(Json::String(text)) => Ok(Some(text.clone())),
        Some(Json::Array(entries)) => {
            let default = entries.iter().find(|entry| entry["name"] == "default");
            match default.and_then(|entry| entry["template"].as_str()) {
                Some(text) => Ok(Some(text.to_owned())),
                None => invalid("chat_template in tokenizer_config.json has no entry named \"default\""),
            }
        }
        Some(_) => invalid("chat_template in tokenizer_config.json is neither a string nor a list"),
    }
}

/// The named special tokens, each a string or an AddedToken object.
fn special_tokens(config: &Map<String, Json>) -> Map<String, Json> {
    const NAMES: [&str; 7] =
        ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
    let text = |name: &str| match config.get(name)? {
        Json::String(text) => Some(text.clone()),
        Json::Object(token) => token.get("content")?.as_str().map(str::to_owned),
        _ => None,
    };
    NAMES.iter().filter_map(|&name| Some((name.to_owned(), Json::String(text(name)?)))).collect()
}

/// Hugging Face gives a message's reasoning under the newer names too.
fn with_reasoning_aliases(mut message: Map<String, Json>) -> Map<String, Json> {
    let reasoning = ["reasoning_content", "thinking", "reasoning"].iter().find_map(|&name| message.get(name)).cloned();
    let Some(reasoning) = reasoning else { return message };
    message.insert("reasoning_content".into(), reasoning.clone());
    if message.contains_key("thinking") {
        return message;
    }
    let mut aliased = Map::new();
    aliased.insert("thinking".into(), reasoning);
    aliased.extend(message);
    aliased
}

/// `{% generation %}` marks what the assistant said, for training masks. It renders its body, in a scope of its own, as
/// `{% with %}` does.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let end = tag.find("%}").unwrap_or(2);
        let inside = &tag[2..end];
        let word = inside.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        out.push_str("{%");
        match word {
            "generation" => out.push_str(&inside.replace(word, "with")),
            "endgeneration" => out.push_str(&inside.replace(word, "endwith")),
            _ => out.push_str(inside),
        }
        rest = &tag[end..];
    }
    out + rest
}

/// One sentence: the template's own message when it raised, else what went wrong on which line.
fn describe(error: &Error, verb: &str) -> Invalid {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = cause {
        if let Some(Raised(message)) = current.downcast_ref::<Raised>() {
            return Invalid(message.clone());
        }
        cause = current.source();
    }
    let line = error.line().map_or(String::new(), |line| format!(" on line {line}"));
    match error.detail() {
        Some(detail) => Invalid(format!("the chat template {verb}{line}: {}: {detail}", error.kind())),
        None => Invalid(format!("the chat template {verb}{line}: {}", error.kind())),
    }
}
