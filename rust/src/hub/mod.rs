//! C ABI of the client of the Hugging Face Hub; include/torpor_hub_shim.h is its contract.

mod cache;
mod client;
mod listing;

use std::ffi::c_void;

use serde_json::{json, Value};

use crate::abi::{call, give_text, utf8, Bytes, Failure, Invalid, STATUS_INVALID};
use crate::runtime::Runtime;
use cache::Repository;
use client::Client;

pub const NOT_FOUND: i32 = 3;
pub const FAILED: i32 = 4;
pub const CORRUPT: i32 = 5;

pub type Result<T> = std::result::Result<T, Failure>;

pub fn fail<T>(status: i32, sentence: impl Into<String>) -> Result<T> {
    Err(Failure { status, sentence: sentence.into() })
}

type Progress = extern "C" fn(user: *mut c_void, file: *const u8, file_size: usize, done: u64, total: u64);

struct Options {
    endpoint: String,
    token: String,
    cache: String,
    repo: String,
    file: String,
    revision: String,
}

impl Options {
    fn parse(text: &str) -> Result<Self> {
        let value: Value = serde_json::from_str(text).map_err(|e| Invalid(format!("the options: {e}")))?;
        let text = |name: &str| value[name].as_str().unwrap_or_default().to_string();
        let options = Self {
            endpoint: text("endpoint"),
            token: text("token"),
            cache: text("cache"),
            repo: text("repo"),
            file: text("file"),
            revision: text("revision"),
        };
        let part = |part: &str| {
            !part.is_empty()
                && !part.starts_with(['.', '-'])
                && part.bytes().all(|c| c.is_ascii_alphanumeric() || b"-._".contains(&c))
                && !part.contains("..")
                && !part.contains("--")
        };
        if options.repo.split('/').count() != 2 || !options.repo.split('/').all(part) {
            return fail(STATUS_INVALID, format!("'{}' is no ORG/NAME of the Hugging Face Hub", options.repo));
        }
        if !options.revision.split('/').all(|name| !name.is_empty() && !name.starts_with('.') && !name.contains('\\')) {
            return fail(STATUS_INVALID, format!("'{}' is no branch, tag or commit", options.revision));
        }
        Ok(options)
    }
}

fn pull(options: &Options, mut progress: impl FnMut(&str, u64, u64)) -> Result<String> {
    let runtime = Runtime::start("torpor-hub");
    let runtime = runtime.or_else(|e| fail(FAILED, format!("can't start the thread of the hub's client: {e}")))?;
    let client = Client::new(&options.endpoint, &options.token, &options.repo)?;
    let listing = runtime.block_on(client.list(&options.revision))?;
    let files = listing::choose(&listing.files, &options.repo, &options.file)?;
    let repository = Repository::open(&options.cache, &options.repo)?;
    let total = files.iter().fold(0, |sum: u64, file| sum.saturating_add(file.size));
    let present: u64 = files.iter().map(|file| repository.held(file)).sum();
    repository.require_room(total.saturating_sub(present))?;
    let (mut done, mut downloaded) = (0, 0);
    for file in &files {
        let came = runtime.block_on(repository.fetch(&client, &listing.commit, file, |bytes| {
            progress(&file.name, done + bytes, total);
        }))?;
        done += file.size;
        downloaded += came;
        repository.link(&listing.commit, file)?;
        progress(&file.name, done, total);
    }
    repository.set_ref(&options.revision, &listing.commit)?;
    let snapshot = repository.snapshot(&listing.commit);
    Ok(json!({"snapshot": snapshot.to_string_lossy(), "revision": listing.commit, "files": files.len(),
              "bytes": total, "downloaded": downloaded})
    .to_string())
}

#[no_mangle]
pub unsafe extern "C" fn torpor_hub_pull(
    options: *const u8,
    options_size: usize,
    progress: Progress,
    user: *mut c_void,
    report: *mut Bytes,
    error: *mut Bytes,
) -> i32 {
    call(error, || {
        let options = Options::parse(utf8("the options", options, options_size)?)?;
        let pulled = pull(&options, |file, done, total| progress(user, file.as_ptr(), file.len(), done, total))?;
        give_text(report, pulled);
        Ok(())
    })
}
