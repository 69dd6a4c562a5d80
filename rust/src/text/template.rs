//! Chat templates, rendered as Hugging Face's `apply_chat_template` renders them.

use std::fmt;
use std::sync::OnceLock;

use minijinja::{Environment, Error, ErrorKind, Value};
use serde_json::{Map, Value as Json};

use super::encode::Joint;
use super::guard::{Guard, THINKING};
use super::python;
use super::settings::Settings;
use super::tokenizer::Tokenizer;
use crate::abi::{invalid, Invalid, Result};

const NAME: &str = "chat template";
const TOOL_USE: &str = "chat template for tools";

pub struct ChatTemplate {
    source: String,
    environment: Environment<'static>,
    /// bos_token and its like, which templates use by name.
    special_tokens: Map<String, Json>,
    /// What stands around the messages of a conversation.
    frame: OnceLock<String>,
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
    /// From the texts of chat_template.jinja, of additional_chat_templates/tool_use.jinja and of chat_template.json, each of which
    /// may be absent, and from tokenizer_config.json.
    pub fn from_files(
        jinja: Option<&str>,
        tool_use: Option<&str>,
        processor: Option<&str>,
        settings: &Settings,
    ) -> Result<Option<Self>> {
        let mut sources = Sources { default: jinja.map(str::to_owned), tool_use: tool_use.map(str::to_owned) };
        if sources.is_empty() {
            sources = sources_of("tokenizer_config.json", settings.config.get("chat_template"))?;
        }
        if let (true, Some(text)) = (sources.is_empty(), processor) {
            // Of the processor of a model with vision, whose tokenizer has no other.
            let fields: Map<String, Json> = serde_json::from_str(text)
                .or_else(|e| invalid(format!("chat_template.json is not a JSON object: {e}")))?;
            sources = sources_of("chat_template.json", fields.get("chat_template"))?;
        }
        if sources.is_empty() {
            return Ok(None);
        }
        let mut environment = environment();
        for (name, source) in [(NAME, &sources.default), (TOOL_USE, &sources.tool_use)] {
            let Some(source) = source else { continue };
            environment
                .add_template_owned(name, without_generation_tags(&source.replace("\r\n", "\n").replace('\r', "\n")))
                .map_err(|e| describe(&e, "does not parse"))?;
        }
        Ok(Some(Self {
            source: sources.text(),
            environment,
            special_tokens: settings.variables(),
            frame: OnceLock::new(),
        }))
    }

    pub fn source(&self) -> &str {
        &self.source
    }

    /// With a tokenizer what looks like its special tokens, or like the template's own markers, stays text: see guard.rs. The
    /// joint is to be given to the encoder.
    pub fn render(
        &self,
        messages: &str,
        add_generation_prompt: bool,
        extra: &str,
        guarded_by: Option<&Tokenizer>,
    ) -> Result<(String, Option<Joint>)> {
        let messages: Vec<Json> =
            serde_json::from_str(messages).or_else(|e| invalid(format!("the messages are not a JSON array: {e}")))?;
        let extra: Map<String, Json> = match extra {
            "" => Map::new(),
            _ => serde_json::from_str(extra)
                .or_else(|e| invalid(format!("the extra variables are not a JSON object: {e}")))?,
        };
        let guard = guarded_by.map(|tokenizer| {
            let special = tokenizer.added_tokens().filter(|token| token.special).map(|token| token.content.clone());
            Guard::new(
                special,
                self.markers(tokenizer),
                &[&Json::from(messages.clone()).to_string(), &Json::from(extra.clone()).to_string(), &self.source],
            )
        });
        let extra = extra.into_iter().map(|(name, mut value)| {
            guard.iter().for_each(|guard| guard.value(&mut value, false));
            (name, value)
        });
        let messages = messages.into_iter().enumerate().map(|(i, message)| match message {
            Json::Object(mut message) => {
                guard.iter().for_each(|guard| guard.message(&mut message));
                // As Hugging Face does: a template knows a key that is missing better than one that is null.
                message.retain(|_, value| !value.is_null());
                Ok(Json::Object(with_reasoning_aliases(message)))
            }
            _ => invalid(format!("message {i} is not a JSON object")),
        });
        let messages = messages.collect::<Result<Vec<_>>>()?;

        let mut variables = self.special_tokens.clone();
        variables.insert("messages".into(), Json::Array(messages));
        // Defined even when not given: templates ask `tools is not none`.
        variables.insert("tools".into(), Json::Null);
        variables.insert("documents".into(), Json::Null);
        variables.insert("add_generation_prompt".into(), Json::Bool(add_generation_prompt));
        variables.extend(extra);

        let tools = variables.get("tools").is_some_and(|tools| !tools.is_null());
        let template = match self.environment.get_template(TOOL_USE) {
            Ok(template) if tools => template,
            _ => match self.environment.get_template(NAME) {
                Ok(template) => template,
                Err(_) => return invalid("the chat template is for turns with tools alone"),
            },
        };
        let text = template.render(python::value(&Json::Object(variables))).map_err(|e| describe(&e, "failed"))?;
        Ok((text, guard.map(|guard| guard.joint())))
    }

    /// Tokens that are not special but that the template frames messages with.
    fn markers<'a>(&'a self, tokenizer: &'a Tokenizer) -> impl Iterator<Item = String> + 'a {
        let frame = self.frame.get_or_init(|| {
            let probe =
                r#"[{"role":"user","content":"x"},{"role":"assistant","content":"x"},{"role":"user","content":"x"}]"#;
            self.render(probe, false, "", None).map_or(String::new(), |(text, _)| text)
        });
        let marks =
            |text: &str| frame.contains(text) && text.contains(char::is_alphabetic) && !THINKING.contains(&text);
        tokenizer
            .added_tokens()
            .filter(move |token| !token.special && marks(&token.content))
            .map(|token| token.content.clone())
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

/// The templates that a model has: one for all, and maybe one for turns with tools.
struct Sources {
    default: Option<String>,
    tool_use: Option<String>,
}

impl Sources {
    fn is_empty(&self) -> bool {
        self.default.is_none() && self.tool_use.is_none()
    }

    /// For the digest.
    fn text(&self) -> String {
        let default = self.default.clone().unwrap_or_default();
        self.tool_use.as_ref().map_or(default.clone(), |tool_use| default + "\0" + tool_use)
    }
}

/// `chat_template` of a file: a string, an object of named ones, or a list of {"name", "template"}.
fn sources_of(file: &str, field: Option<&Json>) -> Result<Sources> {
    let named = |name: &str| match field? {
        Json::String(text) => Some(text.clone()).filter(|_| name == "default"),
        Json::Object(entries) => Some(entries.get(name)?.as_str()?.to_owned()),
        Json::Array(entries) => {
            let entry = entries.iter().find(|entry| entry["name"] == name)?;
            Some(entry["template"].as_str()?.to_owned())
        }
        _ => None,
    };
    let sources = Sources { default: named("default"), tool_use: named("tool_use") };
    match field {
        None | Some(Json::Null) => Ok(sources),
        Some(Json::String(_) | Json::Object(_) | Json::Array(_)) if !sources.is_empty() => Ok(sources),
        Some(Json::Object(_) | Json::Array(_)) => {
            invalid(format!("chat_template in {file} has no entry named \"default\""))
        }
        Some(_) => invalid(format!("chat_template in {file} is neither a string nor a list or object of them")),
    }
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
        let end = tag[2..].find("%}").map_or(2, |at| at + 2); // not the '%' of the tag's own beginning
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
