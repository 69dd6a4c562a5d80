//! What a repository holds, and which of its files a model needs.

use serde_json::Value;

use super::{fail, Result, FAILED, NOT_FOUND};
use crate::abi::STATUS_INVALID;

/// How a file's digest is made: git's of a blob (SHA-1), or that of large files (SHA-256). In hex it names the blob.
#[derive(Clone, Copy, PartialEq)]
pub enum Digest {
    Git,
    Sha256,
}

#[derive(Clone)]
pub struct RemoteFile {
    pub name: String, // parts with `/` between them, none of them hidden
    pub size: u64,
    pub digest: Digest,
    pub hex: String,
}

pub struct Listing {
    pub commit: String,
    pub files: Vec<RemoteFile>,
}

fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c))
}

/// A path that stays below the directory that it is joined to. Hidden files are of no model.
fn is_plain(name: &str) -> bool {
    name.split('/').all(|part| !part.is_empty() && !part.starts_with('.'))
        && name.len() <= 1024
        && !name.contains(|c: char| c.is_control() || c == '\\')
}

impl Listing {
    /// Of the hub's answer. Files that no model can need, by name or description, are left out.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let bad = || fail(FAILED, "the hub's answer is of no use; check HF_ENDPOINT");
        let Ok(value) = serde_json::from_slice::<Value>(text) else { return bad() };
        let commit = value["sha"].as_str().unwrap_or_default();
        let Some(siblings) = value["siblings"].as_array().filter(|_| is_hex(commit, 40)) else { return bad() };
        let mut files = Vec::new();
        for sibling in siblings {
            let large = &sibling["lfs"];
            let (digest, hex, digits, size) = if large.is_object() {
                (Digest::Sha256, &large["sha256"], 64, &large["size"])
            } else {
                (Digest::Git, &sibling["blobId"], 40, &sibling["size"])
            };
            let (name, hex) = (sibling["rfilename"].as_str().unwrap_or_default(), hex.as_str().unwrap_or_default());
            if let (true, true, Some(size)) = (is_plain(name), is_hex(hex, digits), size.as_u64()) {
                files.push(RemoteFile { name: name.into(), size, digest, hex: hex.into() });
            }
        }
        Ok(Self { commit: commit.into(), files })
    }
}

/// "m-00001-of-00003.gguf" as ("m-", "-of-00003.gguf"); None for a file that is no piece.
fn piece(name: &str) -> Option<(&str, &str)> {
    let at = name.rfind("-of-")?;
    let head = name.get(..at.checked_sub(5)?)?;
    let (number, tail) = (name.get(at - 5..at)?, &name[at..]);
    let digits = |text: &str| text.len() == 5 && text.bytes().all(|c| c.is_ascii_digit());
    (digits(number) && digits(tail.get(4..9)?) && head.ends_with('-')).then_some((head, tail))
}

/// What `file` needs; without one what a model of safetensors does.
pub fn choose(files: &[RemoteFile], repo: &str, file: &str) -> Result<Vec<RemoteFile>> {
    if !file.is_empty() {
        let of_it = |name: &str| name == file || (piece(file).is_some() && piece(name) == piece(file));
        let chosen: Vec<_> = files.iter().filter(|file| of_it(&file.name)).cloned().collect();
        if chosen.iter().any(|chosen| chosen.name == file) {
            return Ok(chosen);
        }
        return fail(NOT_FOUND, format!("{repo} has no file '{file}'"));
    }
    let weights = |file: &&RemoteFile| file.name.ends_with(".safetensors") && !file.name.contains('/');
    // Others of these names beside them are adapters, or the same weights in their maker's form.
    let usual = |file: &&RemoteFile| weights(file) && file.name.starts_with("model");
    let any_usual = files.iter().any(|file| usual(&file));
    if !files.iter().any(|file| weights(&file)) {
        let gguf: Vec<&str> = files.iter().map(|file| file.name.as_str()).filter(|n| n.ends_with(".gguf")).collect();
        return match gguf.first() {
            None => fail(NOT_FOUND, format!("{repo} has no weights in safetensors or GGUF at its top")),
            Some(first) => fail(
                STATUS_INVALID,
                format!(
                    "{repo} has GGUF files ({}); name one, as {repo}:{first}",
                    gguf[..gguf.len().min(12)].join(", ")
                ),
            ),
        };
    }
    let beside = |name: &str| {
        !name.contains('/') && [".json", ".jinja", ".model", ".txt"].iter().any(|ending| name.ends_with(ending))
    };
    let wanted = |file: &&RemoteFile| if weights(file) { !any_usual || usual(file) } else { beside(&file.name) };
    Ok(files.iter().filter(wanted).cloned().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(names: &[&str]) -> Vec<RemoteFile> {
        let file =
            |name: &&str| RemoteFile { name: name.to_string(), size: 1, digest: Digest::Git, hex: "0".repeat(40) };
        names.iter().map(file).collect()
    }

    fn chosen(names: &[&str], file: &str) -> Option<Vec<String>> {
        choose(&named(names), "org/name", file).ok().map(|files| files.into_iter().map(|file| file.name).collect())
    }

    #[test]
    fn a_model_needs_its_weights_once_and_the_small_files_beside_them() {
        let all = [
            "config.json",
            "model-1.safetensors",
            "consolidated.safetensors",
            "original/params.json",
            "original/model.safetensors",
            "README.md",
            "pytorch_model.bin",
            "chat_template.jinja",
            "merges.txt",
        ];
        let needed = ["config.json", "model-1.safetensors", "chat_template.jinja", "merges.txt"].map(String::from);
        assert_eq!(chosen(&all, "").unwrap(), needed);
        assert_eq!(chosen(&["weights.safetensors"], "").unwrap(), ["weights.safetensors"]);
        assert!(chosen(&["a.gguf"], "").is_none() && chosen(&["README.md"], "").is_none());
    }

    #[test]
    fn all_pieces_of_a_gguf_file_come() {
        let all = ["q/m-00001-of-00002.gguf", "q/m-00002-of-00002.gguf", "q/n-00001-of-00002.gguf", "m.gguf"];
        assert_eq!(chosen(&all, all[0]).unwrap(), all[..2]);
        assert_eq!(chosen(&all, "m.gguf").unwrap(), ["m.gguf"]);
        assert!(chosen(&all, "x.gguf").is_none());
        for odd in ["", "-of-", "é-of-00001.gguf", "1-of-", "00001-of-00002", "-éé-of-é"] {
            assert!(piece(odd).is_none());
        }
    }

    #[test]
    fn names_that_lead_elsewhere_are_left_out() {
        let commit = "a".repeat(40);
        let answer = |name: &str| {
            serde_json::json!({"sha": commit, "siblings": [{"rfilename": name, "size": 1, "blobId": commit}]})
                .to_string()
        };
        for name in ["../x", "/x", "a/../x", "a//x", "a\\x", "a\nx", ".git/config", "", "./x"] {
            assert!(Listing::parse(answer(name).as_bytes()).ok().unwrap().files.is_empty(), "{name}");
        }
        assert_eq!(Listing::parse(answer("a/x").as_bytes()).ok().unwrap().files.len(), 1);
        for odd in ["", "[]", "{}", "{\"sha\": 1}", "{\"sha\": \"../../x\", \"siblings\": []}"] {
            assert!(Listing::parse(odd.as_bytes()).is_err());
        }
    }
}
