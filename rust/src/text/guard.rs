//! Text that must stay text: strings of special tokens in what users and tools say are broken up before a template renders
//! them, by a joint that the encoder takes out again.

use std::collections::HashSet;

use serde_json::{Map, Value as Json};

use super::encode::Joint;

/// Templates look for these in an answer.
pub const THINKING: [&str; 2] = ["<think>", "</think>"];

pub struct Guard {
    joint: Joint,
    /// Of everything, and of all but answers.
    special: Strings,
    markers: Strings,
}

/// Texts to be found in others.
struct Strings {
    texts: HashSet<String>,
    begin: HashSet<char>,
    lengths: Vec<usize>,
}

impl Strings {
    /// One of a single character can't be broken up.
    fn new(texts: impl Iterator<Item = String>) -> Self {
        let texts: HashSet<String> = texts.filter(|text| text.chars().nth(1).is_some()).collect();
        let begin = texts.iter().filter_map(|text| text.chars().next()).collect();
        let lengths: HashSet<usize> = texts.iter().map(String::len).collect();
        Self { texts, begin, lengths: lengths.into_iter().collect() }
    }

    /// Whether one of them begins `text`, which begins with `first`.
    fn begin(&self, first: char, text: &str, but: &[&str]) -> bool {
        self.begin.contains(&first)
            && self
                .lengths
                .iter()
                .any(|&length| text.get(..length).is_some_and(|part| self.texts.contains(part) && !but.contains(&part)))
    }
}

impl Guard {
    /// Against tokens that are special, and the others of `markers`. `all` is every text that is to be guarded.
    pub fn new(special: impl Iterator<Item = String>, markers: impl Iterator<Item = String>, all: &[&str]) -> Self {
        // A private character that nobody wrote.
        let unused = |joint: &char| !all.iter().any(|text| text.contains(*joint));
        let joint = ('\u{F0000}'..='\u{FFFFD}').find(unused).unwrap_or('\u{100000}');
        Self { joint, special: Strings::new(special), markers: Strings::new(markers) }
    }

    pub fn joint(&self) -> Joint {
        self.joint
    }

    /// All that a message says, but not its role.
    pub fn message(&self, message: &mut Map<String, Json>) {
        let answer = message.get("role").is_some_and(|role| role == "assistant");
        for (key, value) in message.iter_mut() {
            if key != "role" {
                self.value(value, answer);
            }
        }
    }

    /// All texts of a value, and the names of its members.
    pub fn value(&self, value: &mut Json, answer: bool) {
        match value {
            Json::String(text) => self.text(text, answer),
            Json::Array(items) => items.iter_mut().for_each(|item| self.value(item, answer)),
            Json::Object(items) => {
                let owned = std::mem::take(items);
                for (mut key, mut item) in owned {
                    self.text(&mut key, answer);
                    self.value(&mut item, answer);
                    items.insert(key, item);
                }
            }
            _ => {}
        }
    }

    fn text(&self, text: &mut String, answer: bool) {
        let but: &[&str] = if answer { &THINKING } else { &[] };
        let mut cuts = Vec::new();
        for (at, first) in text.char_indices() {
            let rest = &text[at..];
            if self.special.begin(first, rest, but) || (!answer && self.markers.begin(first, rest, &[])) {
                cuts.push(at + first.len_utf8());
            }
        }
        // From the end, so that what is before stays where it is.
        for at in cuts.into_iter().rev() {
            text.insert(at, self.joint);
        }
    }
}
