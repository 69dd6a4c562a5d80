//! What templates written for Python's Jinja expect of Python: str(), repr(), json.dumps(), string methods, strftime.

use std::fmt::{self, Write};
use std::sync::Arc;

use minijinja::value::{from_args, DynObject, Enumerator, Kwargs, Object, ObjectRepr, Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;
use serde_json::Value as Json;

type Result<T> = std::result::Result<T, Error>;

pub fn install(environment: &mut Environment<'static>) {
    environment.set_formatter(|out, _, value| Ok(out.write_str(&str(value))?));
    environment.set_unknown_method_callback(method);
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", tojson);
    environment.add_filter("string", |value: &Value| str(value));
    environment.add_filter("trim", |text: &Value, chars: Option<String>| {
        strip(&str(text), chars.as_deref(), true, true).to_owned()
    });
    for name in ["length", "count"] {
        environment.add_filter(name, |value: &Value| match value.len() {
            Some(length) => Ok(length),
            None if value.is_undefined() => Ok(0),
            None => Err(Error::new(ErrorKind::InvalidOperation, format!("a {} has no length", value.kind()))),
        });
    }
    // Python's strings and dicts have a length and can be indexed, which is all Jinja asks; its undefined value is empty.
    environment.add_test("number", |value: &Value| matches!(value.kind(), ValueKind::Number | ValueKind::Bool));
    environment.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map | ValueKind::Undefined)
    });
    environment.add_test("iterable", |value: &Value| {
        use ValueKind::{Iterable, Map, Seq, String, Undefined};
        matches!(value.kind(), Seq | String | Map | Iterable | Undefined)
    });
}

/// A list or dict that prints as Python's do wherever the engine makes text of it itself, as for `~`.
#[derive(Debug)]
struct Printed(DynObject);

impl Object for Printed {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        self.0.repr()
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.0.get_value(key)
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        self.0.enumerate()
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&repr(&Value::from_dyn_object(self.0.clone())))
    }
}

/// A variable for templates.
pub fn value(json: &Json) -> Value {
    let plain = match json {
        Json::Array(items) => items.iter().map(value).collect(),
        Json::Object(items) => items.iter().map(|(key, item)| (key.as_str(), value(item))).collect(),
        scalar => Value::from_serialize(scalar),
    };
    match plain.as_object() {
        Some(object) => Value::from_object(Printed(object.clone())),
        None => plain,
    }
}

/// Python's str(); nothing for an undefined value, as Jinja prints it.
pub fn str(value: &Value) -> String {
    match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::String => value.as_str().unwrap_or_default().to_owned(),
        _ => repr(value),
    }
}

fn repr(value: &Value) -> String {
    match value.kind() {
        ValueKind::Undefined => "Undefined".into(),
        ValueKind::None => "None".into(),
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.into(),
        ValueKind::Number => number(value),
        ValueKind::String => repr_str(value.as_str().unwrap_or_default()),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<_> =
                value.try_iter().map(|items| items.map(|item| repr(&item)).collect()).unwrap_or_default();
            format!("[{}]", items.join(", "))
        }
        // A namespace and its like are maps that Python doesn't print as dicts; nobody prints those.
        ValueKind::Map => {
            let items: Vec<_> = pairs(value).iter().map(|(k, v)| format!("{}: {}", repr(k), repr(v))).collect();
            format!("{{{}}}", items.join(", "))
        }
        _ => value.to_string(),
    }
}

fn pairs(map: &Value) -> Vec<(Value, Value)> {
    let pairs = map.as_object().and_then(|object| object.try_iter_pairs().map(Iterator::collect));
    pairs.unwrap_or_default()
}

fn repr_str(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            c if c < ' ' || ('\u{7f}'..='\u{a0}').contains(&c) || c == '\u{ad}' => {
                let _ = write!(out, "\\x{:02x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    f64::try_from(value.clone()).map_or_else(|_| value.to_string(), float)
}

/// Python's repr() of a float: the shortest digits that read back, an exponent below 1e-4 and from 1e16.
fn float(x: f64) -> String {
    if !x.is_finite() {
        return if x.is_nan() {
            "nan"
        } else if x > 0.0 {
            "inf"
        } else {
            "-inf"
        }
        .into();
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if x == 0.0 || (-4..16).contains(&exponent) {
        format!("{x:?}")
    } else {
        format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
    }
}

struct JsonStyle {
    ascii: bool,
    sort_keys: bool,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
}

/// `tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`, Hugging Face's, which is json.dumps.
fn tojson(value: &Value, positional: Rest<Value>, named: Kwargs) -> Result<String> {
    let option = |place: usize, name: &str| -> Result<Option<Value>> {
        let given = match positional.get(place) {
            Some(value) => Some(value.clone()),
            None => named.get::<Option<Value>>(name)?,
        };
        Ok(given.filter(|value| !value.is_none() && !value.is_undefined()))
    };
    let ascii = option(0, "ensure_ascii")?;
    let indent = option(1, "indent")?;
    let separators = option(2, "separators")?;
    let sort_keys = option(3, "sort_keys")?;
    named.assert_all_used()?;

    let indent = match indent {
        Some(text) if text.as_str().is_some() => Some(str(&text)),
        Some(width) => Some(" ".repeat(i64::try_from(width)?.clamp(0, 64) as usize)),
        None => None,
    };
    let mut style = JsonStyle {
        ascii: ascii.is_some_and(|value| value.is_true()),
        sort_keys: sort_keys.is_some_and(|value| value.is_true()),
        item_separator: if indent.is_some() { "," } else { ", " }.into(),
        key_separator: ": ".into(),
        indent,
    };
    if let Some(separators) = separators {
        style.item_separator = str(&separators.get_item_by_index(0)?);
        style.key_separator = str(&separators.get_item_by_index(1)?);
    }
    let mut out = String::new();
    dump(&mut out, value, &style, 0)?;
    Ok(out)
}

fn dump(out: &mut String, value: &Value, style: &JsonStyle, depth: usize) -> Result<()> {
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&match number(value).as_str() {
            "nan" => "NaN".to_owned(),
            "inf" => "Infinity".to_owned(),
            "-inf" => "-Infinity".to_owned(),
            text => text.to_owned(),
        }),
        ValueKind::String => dump_str(out, value.as_str().unwrap_or_default(), style),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter()?.collect();
            dump_items(out, ('[', ']'), &items, style, depth, |out, item| dump(out, item, style, depth + 1))?;
        }
        ValueKind::Map => {
            let mut items = pairs(value);
            if style.sort_keys {
                items.sort_by(|a, b| a.0.cmp(&b.0));
            }
            dump_items(out, ('{', '}'), &items, style, depth, |out, (key, item)| {
                match key.kind() {
                    ValueKind::String => dump_str(out, key.as_str().unwrap_or_default(), style),
                    _ => {
                        out.push('"');
                        dump(out, key, style, depth)?;
                        out.push('"');
                    }
                }
                out.push_str(&style.key_separator);
                dump(out, item, style, depth + 1)
            })?;
        }
        kind => return Err(Error::new(ErrorKind::InvalidOperation, format!("{kind} is not JSON serializable"))),
    }
    Ok(())
}

fn dump_items<T>(
    out: &mut String,
    brackets: (char, char),
    items: &[T],
    style: &JsonStyle,
    depth: usize,
    mut dump_item: impl FnMut(&mut String, &T) -> Result<()>,
) -> Result<()> {
    let new_line = |out: &mut String, depth: usize| {
        if let Some(indent) = &style.indent {
            out.push('\n');
            out.push_str(&indent.repeat(depth));
        }
    };
    out.push(brackets.0);
    for (i, item) in items.iter().enumerate() {
        if i > 0 {
            out.push_str(&style.item_separator);
        }
        new_line(out, depth + 1);
        dump_item(out, item)?;
    }
    if !items.is_empty() {
        new_line(out, depth);
    }
    out.push(brackets.1);
    Ok(())
}

fn dump_str(out: &mut String, text: &str, style: &JsonStyle) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' || (style.ascii && c > '~') => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// Methods that minijinja's own imitation lacks or gets wrong; it answers for the rest.
fn method(state: &State, value: &Value, name: &str, args: &[Value]) -> Result<Value> {
    let Some(text) = value.as_str() else {
        return pycompat::unknown_method_callback(state, value, name, args);
    };
    match name {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            Ok(strip(text, chars, name != "rstrip", name != "lstrip").into())
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(text.strip_prefix(prefix).unwrap_or(text).into())
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(text.strip_suffix(suffix).unwrap_or(text).into())
        }
        // Python counts characters, minijinja bytes.
        "find" | "index" | "rfind" | "rindex" => {
            let (part,): (&str,) = from_args(args)?;
            let found = if name.starts_with('r') { text.rfind(part) } else { text.find(part) };
            match found {
                Some(at) => Ok(text[..at].chars().count().into()),
                None if name.ends_with("find") => Ok(Value::from(-1)),
                None => Err(Error::new(ErrorKind::InvalidOperation, "substring not found")),
            }
        }
        "rsplit" => {
            let (separator, limit): (Option<&str>, Option<i64>) = from_args(args)?;
            if separator == Some("") {
                return Err(Error::new(ErrorKind::InvalidOperation, "empty separator"));
            }
            let limit = limit.and_then(|limit| usize::try_from(limit).ok());
            Ok(rsplit(text, separator, limit).into_iter().map(Value::from).collect())
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let (found, missing) = match name {
                "partition" => (text.split_once(separator), [text, "", ""]),
                _ => (text.rsplit_once(separator), ["", "", text]),
            };
            let parts = match found {
                Some((head, tail)) => [head, separator, tail],
                None => missing,
            };
            Ok(parts.into_iter().map(Value::from).collect())
        }
        "splitlines" => {
            let (keep_ends,): (Option<bool>,) = from_args(args)?;
            Ok(split_lines(text, keep_ends.unwrap_or(false)).into_iter().map(Value::from).collect())
        }
        "title" => {
            let () = from_args(args)?;
            Ok(title(text).into())
        }
        "islower" | "isupper" => {
            let () = from_args(args)?;
            let (wanted, other) = if name == "islower" {
                (text.chars().any(char::is_lowercase), text.chars().any(char::is_uppercase))
            } else {
                (text.chars().any(char::is_uppercase), text.chars().any(char::is_lowercase))
            };
            Ok((wanted && !other).into())
        }
        "isspace" | "isdigit" | "isnumeric" | "isalnum" | "isalpha" if text.is_empty() => Ok(false.into()),
        _ => pycompat::unknown_method_callback(state, value, name, args),
    }
}

fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

fn strip<'a>(text: &'a str, chars: Option<&str>, left: bool, right: bool) -> &'a str {
    let stripped = |c: char| chars.map_or(is_space(c), |chars| chars.contains(c));
    let text = if left { text.trim_start_matches(stripped) } else { text };
    if right {
        text.trim_end_matches(stripped)
    } else {
        text
    }
}

fn rsplit<'a>(text: &'a str, separator: Option<&str>, limit: Option<usize>) -> Vec<&'a str> {
    let mut parts = Vec::new();
    let mut rest = if separator.is_none() { text.trim_end_matches(is_space) } else { text };
    while limit.is_none_or(|limit| parts.len() < limit) {
        let cut = match separator {
            Some(separator) => rest.rfind(separator).map(|at| (at, at + separator.len())),
            None => rest.char_indices().rev().find(|&(_, c)| is_space(c)).map(|(at, c)| (at, at + c.len_utf8())),
        };
        let Some((head, tail)) = cut else { break };
        parts.push(&rest[tail..]);
        rest = if separator.is_none() { rest[..head].trim_end_matches(is_space) } else { &rest[..head] };
    }
    if separator.is_some() || !rest.is_empty() {
        parts.push(rest);
    }
    parts.reverse();
    parts
}

fn split_lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let ends = |c: char| matches!(c, '\n'..='\r' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some((at, end)) = rest.char_indices().find(|&(_, c)| ends(c)) {
        let next = at + if rest[at..].starts_with("\r\n") { 2 } else { end.len_utf8() };
        lines.push(&rest[..if keep_ends { next } else { at }]);
        rest = &rest[next..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

/// Upper case wherever the character before has no case.
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut inside = false;
    for c in text.chars() {
        if inside {
            out.extend(c.to_lowercase());
        } else {
            out.extend(c.to_uppercase());
        }
        inside = c.is_lowercase() || c.is_uppercase();
    }
    out
}

/// datetime.now().strftime(format), which is the C library's.
fn strftime_now(format: String) -> Result<String> {
    let failed = || Error::new(ErrorKind::InvalidOperation, "strftime_now can't use this format");
    // A leading space tells an empty result from a buffer too small.
    let format = std::ffi::CString::new(format!(" {format}")).map_err(|_| failed())?;
    let mut buffer = vec![0u8; 256 + 64 * format.as_bytes().len()];
    // SAFETY: the pointers are to live objects, and strftime writes at most the size it is told.
    let written = unsafe {
        let now = libc::time(std::ptr::null_mut());
        let mut local: libc::tm = std::mem::zeroed();
        if libc::localtime_r(&now, &mut local).is_null() {
            return Err(failed());
        }
        libc::strftime(buffer.as_mut_ptr().cast(), buffer.len(), format.as_ptr(), &local)
    };
    let text = buffer.get(1..written).ok_or_else(failed)?;
    Ok(String::from_utf8_lossy(text).into_owned())
}
