//! C ABI over the `tokenizers` crate and `minijinja`; include/torpor_text_shim.h is its contract.

mod detokenizer;
mod encode;
mod guard;
mod python;
mod settings;
mod template;
mod tokenizer;

use std::sync::Arc;

use crate::abi::{give_text, guard, handle, handle_mut, invalid, leak, reclaim, slice, utf8, Bytes, Result};
use detokenizer::Detokenizer;
use encode::Place;
use settings::Settings;
use template::ChatTemplate;

#[cfg(feature = "grammar")]
pub use detokenizer::token_bytes;
pub use tokenizer::Tokenizer;

const PLACE_ALONE: i64 = -1;
const PLACE_BEGINNING: i64 = -2;

/// Owned token ids handed to C; freed by `torpor_text_ids_free`.
#[repr(C)]
pub struct Ids {
    data: *mut i32,
    size: usize,
}

#[no_mangle]
pub unsafe extern "C" fn torpor_text_bytes_free(bytes: Bytes) {
    reclaim(bytes.data, bytes.size);
}

#[no_mangle]
pub unsafe extern "C" fn torpor_text_ids_free(ids: Ids) {
    reclaim(ids.data, ids.size);
}

/// A file's text; null when there is no such file.
#[repr(C)]
pub struct File {
    data: *const u8,
    size: usize,
}

impl File {
    unsafe fn text<'a>(&self, name: &str) -> Result<Option<&'a str>> {
        if self.data.is_null() {
            return Ok(None);
        }
        utf8(name, self.data, self.size).map(Some)
    }
}

/// The texts of a model directory's files.
#[repr(C)]
pub struct Files {
    tokenizer: File,
    tokenizer_config: File,
    special_tokens_map: File,
    added_tokens: File,
    jinja: File,
    tool_use: File,
    chat_template: File,
}

impl Files {
    unsafe fn settings(&self) -> Result<Settings> {
        Settings::new(
            self.tokenizer_config.text("tokenizer_config.json")?,
            self.special_tokens_map.text("special_tokens_map.json")?,
            self.added_tokens.text("added_tokens.json")?,
        )
    }
}

#[no_mangle]
pub unsafe extern "C" fn torpor_text_tokenizer_new(
    files: *const Files,
    out: *mut *mut Arc<Tokenizer>,
    changes: *mut Bytes,
    error: *mut Bytes,
) -> i32 {
    guard(error, || {
        let files = handle(files)?;
        let json = files.tokenizer.text("tokenizer.json")?.unwrap_or_default();
        let (tokenizer, changed) = Tokenizer::new(json, &files.settings()?)?;
        give_text(changes, changed);
        *out = Box::into_raw(Box::new(Arc::new(tokenizer)));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn torpor_text_tokenizer_free(tokenizer: *mut Arc<Tokenizer>) {
    if !tokenizer.is_null() {
        drop(Box::from_raw(tokenizer));
    }
}

/// One character, or nothing.
unsafe fn joint<'a>(data: *const u8, size: usize) -> Result<Option<encode::Joint>> {
    Ok(utf8("the joint", data, size)?.chars().next())
}

#[no_mangle]
pub unsafe extern "C" fn torpor_text_tokenizer_encode(
    tokenizer: *const Arc<Tokenizer>,
    text: *const u8,
    text_size: usize,
    place: i64,
    joint_data: *const u8,
    joint_size: usize,
    out: *mut Ids,
    error: *mut Bytes,
) -> i32 {
    guard(error, || {
        let place = match place {
            PLACE_ALONE => Place::Alone,
            PLACE_BEGINNING => Place::Beginning,
            last => match u32::try_from(last) {
                Ok(last) => Place::After(last),
                Err(_) => return invalid(format!("{last} is not a place")),
            },
        };
        let ids =
            handle(tokenizer)?.encode(utf8("the text", text, text_size)?, place, joint(joint_data, joint_size)?)?;
        let (data, size) = leak(ids);
        *out = Ids { data, size };
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn torpor_text_tokenizer_decode(
    tokenizer: *const Arc<Tokenizer>,
    ids: *const i32,
    ids_size: usize,
    skip_special: bool,
    out: *mut Bytes,
    error: *mut Bytes,
) -> i32 {
    guard(error, || {
        give_text(out, handle(tokenizer)?.decode(slice(ids, ids_size), skip_special)?);
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn torpor_text_tokenizer_token_to_id(
    tokenizer: *const Arc<Tokenizer>,
    token: *const u8,
    token_size: usize,
    out: *mut i32,
    error: *mut Bytes,
) -> i32 {
    guard(error, || {
        // No token holds invalid UTF-8, so such a name is simply unknown.
        let token = std::str::from_utf8(slice(token, token_size)).ok();
        let tokenizer = handle(tokenizer)?;
        *out = token.and_then(|token| tokenizer.token_to_id(token)).unwrap_or(-1);
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn torpor_text_tokenizer_vocab_size(
    tokenizer: *const Arc<Tokenizer>,
    out: *mut usize,
    error: *mut Bytes,
) -> i32 {
    guard(error, || {
        *out = handle(tokenizer)?.vocab_size();
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn torpor_text_detokenizer_new(
    tokenizer: *const Arc<Tokenizer>,
    skip_special: bool,
    out: *mut *mut Detokenizer,
    error: *mut Bytes,
) -> i32 {
    guard(error, || {
        let detokenizer = Detokenizer::new(Arc::clone(handle(tokenizer)?), skip_special);
        *out = Box::into_raw(Box::new(detokenizer));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn torpor_text_detokenizer_free(detokenizer: *mut Detokenizer) {
    if !detokenizer.is_null() {
        drop(Box::from_raw(detokenizer));
    }
}

#[no_mangle]
pub unsafe extern "C" fn torpor_text_detokenizer_push(
    detokenizer: *mut Detokenizer,
    id: i32,
    out: *mut Bytes,
    error: *mut Bytes,
) -> i32 {
    guard(error, || {
        give_text(out, handle_mut(detokenizer)?.push(id)?);
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn torpor_text_detokenizer_finish(
    detokenizer: *mut Detokenizer,
    out: *mut Bytes,
    error: *mut Bytes,
) -> i32 {
    guard(error, || {
        give_text(out, handle_mut(detokenizer)?.finish()?);
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn torpor_text_template_new(
    files: *const Files,
    out: *mut *mut ChatTemplate,
    source: *mut Bytes,
    error: *mut Bytes,
) -> i32 {
    guard(error, || {
        let files = handle(files)?;
        *out = std::ptr::null_mut();
        let template = ChatTemplate::from_files(
            files.jinja.text("chat_template.jinja")?,
            files.tool_use.text("tool_use.jinja")?,
            files.chat_template.text("chat_template.json")?,
            &files.settings()?,
        )?;
        if let Some(template) = template {
            give_text(source, template.source().to_owned());
            *out = Box::into_raw(Box::new(template));
        }
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn torpor_text_template_free(template: *mut ChatTemplate) {
    if !template.is_null() {
        drop(Box::from_raw(template));
    }
}

#[no_mangle]
pub unsafe extern "C" fn torpor_text_template_render(
    template: *const ChatTemplate,
    messages: *const u8,
    messages_size: usize,
    add_generation_prompt: bool,
    extra: *const u8,
    extra_size: usize,
    guarded_by: *const Arc<Tokenizer>,
    out: *mut Bytes,
    joint: *mut Bytes,
    error: *mut Bytes,
) -> i32 {
    guard(error, || {
        let messages = utf8("the messages", messages, messages_size)?;
        let extra = utf8("the extra variables", extra, extra_size)?;
        let guarded_by = guarded_by.as_ref().map(Arc::as_ref);
        let (text, joined) = handle(template)?.render(messages, add_generation_prompt, extra, guarded_by)?;
        give_text(out, text);
        give_text(joint, joined.map_or(String::new(), String::from));
        Ok(())
    })
}
