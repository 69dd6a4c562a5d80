//! What the AWS tools keep in `~/.aws`: one profile of the files `credentials` and `config`.

use std::env;
use std::fs;
use std::path::PathBuf;

use super::failure::{Failure, Result};

#[derive(Default)]
pub struct Profile {
    pub access_key_id: Option<String>,
    pub secret_access_key: Option<String>,
    pub session_token: Option<String>,
    pub region: Option<String>,
    pub endpoint_url: Option<String>,
}

/// A variable that is set and not empty.
pub fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

impl Profile {
    /// The profile that `AWS_PROFILE` names, else `default`; empty where there is none. INVALID when the named one is
    /// missing, or gets its credentials in a way that only the AWS tools know.
    pub fn read() -> Result<Self> {
        let named = variable("AWS_PROFILE");
        let name = named.clone().unwrap_or_else(|| "default".into());
        let mut profile = Self::default();
        let mut found = false;
        let mut elsewhere = None;
        for (text, section) in [
            (
                file("AWS_CONFIG_FILE", "config")?,
                if name == "default" { name.clone() } else { format!("profile {name}") },
            ),
            (file("AWS_SHARED_CREDENTIALS_FILE", "credentials")?, name.clone()),
        ] {
            let Some(entries) = entries_of(&text, &section) else { continue };
            found = true;
            for (key, value) in entries {
                let value = Some(value.to_string());
                match key {
                    "aws_access_key_id" => profile.access_key_id = value,
                    "aws_secret_access_key" => profile.secret_access_key = value,
                    "aws_session_token" => profile.session_token = value,
                    "region" => profile.region = value,
                    "endpoint_url" => profile.endpoint_url = value,
                    "role_arn" | "sso_session" | "sso_account_id" | "credential_process" => {
                        elsewhere = Some(key.to_string())
                    }
                    _ => {}
                }
            }
        }
        if !found && named.is_some() {
            return Err(Failure::invalid(format!(
                "the AWS profile '{name}' is in neither of the AWS files; see AWS_PROFILE"
            )));
        }
        match elsewhere {
            Some(key) if profile.access_key_id.is_none() => Err(Failure::invalid(format!(
                "the AWS profile '{name}' has its credentials by {key}, which is not supported; put them into the \
                 environment (aws configure export-credentials --format env)"
            ))),
            _ => Ok(profile),
        }
    }
}

/// The file that `variable` names, else `~/.aws/NAME`; empty where there is none.
fn file(name: &str, usual: &str) -> Result<String> {
    let named = variable(name).map(PathBuf::from);
    let usual = variable("HOME").map(|home| PathBuf::from(home).join(".aws").join(usual));
    let Some(path) = named.or(usual) else { return Ok(String::new()) };
    match fs::read_to_string(&path) {
        Ok(text) => Ok(text),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        Err(e) => Err(Failure::invalid(format!("can't read '{}': {e}", path.display()))),
    }
}

/// `KEY = VALUE` of one section; None where the file has no such section. Lines that begin with a space belong to a
/// setting of several lines, of which none is of use here.
fn entries_of<'a>(text: &'a str, section: &str) -> Option<Vec<(&'a str, &'a str)>> {
    let mut within = false;
    let mut entries = None;
    for line in text.lines() {
        if line.starts_with([' ', '\t', '#', ';']) {
            continue;
        }
        if let Some(name) = line.trim().strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            within = name.split_whitespace().eq(section.split_whitespace());
            if within {
                entries.get_or_insert_with(Vec::new);
            }
        } else if let (true, Some((key, value))) = (within, line.split_once('=')) {
            entries.get_or_insert_with(Vec::new).push((key.trim(), value.trim()));
        }
    }
    entries
}
