//! A line that someone types at a terminal: with editing, a history, completion, and a paste as one text. By rustyline.

use std::borrow::Cow;
use std::ffi::c_void;

use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::MemHistory;
use rustyline::validate::Validator;
use rustyline::{CompletionType, Config, Context, Editor, Helper};

use crate::abi::{give_text, guard, handle_mut, invalid, slice, utf8, Bytes, Invalid};

type LineEditor = Editor<Words, MemHistory>;

const TEXT: i32 = 0;
const END: i32 = 1;
const INTERRUPTED: i32 = 2;

type Complete = unsafe extern "C" fn(context: *mut c_void, before: *const u8, size: usize, offers: *mut Vec<String>);

/// What the caller says that the last word before the cursor may become.
pub struct Words {
    complete: Option<Complete>,
    context: *mut c_void,
    bold: bool,
}

impl Helper for Words {}
impl Validator for Words {}
impl Hinter for Words {
    type Hint = String;
}

impl Highlighter for Words {
    fn highlight_prompt<'b, 's: 'b, 'p: 'b>(&'s self, prompt: &'p str, _default: bool) -> Cow<'b, str> {
        if self.bold {
            Cow::Owned(format!("\x1b[1m{prompt}\x1b[0m"))
        } else {
            Cow::Borrowed(prompt)
        }
    }
}

impl Completer for Words {
    type Candidate = String;

    fn complete(&self, line: &str, cursor: usize, _: &Context<'_>) -> rustyline::Result<(usize, Vec<String>)> {
        let before = &line[..cursor];
        let mut offers = Vec::new();
        if let Some(complete) = self.complete {
            // SAFETY: the caller keeps both as long as the editor, and is on this thread.
            unsafe { complete(self.context, before.as_ptr(), before.len(), &mut offers) };
        }
        Ok((before.rfind([' ', '\t', '\n']).map_or(0, |blank| blank + 1), offers))
    }
}

#[no_mangle]
pub unsafe extern "C" fn torpor_line_editor_new(
    complete: Option<Complete>,
    context: *mut c_void,
    bold: bool,
    out: *mut *mut LineEditor,
    error: *mut Bytes,
) -> i32 {
    guard(error, || {
        let config = Config::builder().completion_type(CompletionType::List).bracketed_paste(true).build();
        let mut editor = LineEditor::with_history(config, MemHistory::new()).map_err(|e| Invalid(e.to_string()))?;
        editor.set_helper(Some(Words { complete, context, bold }));
        *out = Box::into_raw(Box::new(editor));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn torpor_line_editor_free(editor: *mut LineEditor) {
    if !editor.is_null() {
        drop(Box::from_raw(editor));
    }
}

#[no_mangle]
pub unsafe extern "C" fn torpor_line_offer(offers: *mut Vec<String>, word: *const u8, size: usize) {
    if let (Some(offers), Ok(word)) = (offers.as_mut(), std::str::from_utf8(slice(word, size))) {
        offers.push(word.to_owned());
    }
}

#[no_mangle]
pub unsafe extern "C" fn torpor_line_remember(
    editor: *mut LineEditor,
    text: *const u8,
    size: usize,
    error: *mut Bytes,
) -> i32 {
    guard(error, || {
        let added = handle_mut(editor)?.add_history_entry(utf8("the line", text, size)?);
        added.map(|_| ()).or_else(|e| invalid(format!("can't remember a line: {e}")))
    })
}

#[no_mangle]
pub unsafe extern "C" fn torpor_line_read(
    editor: *mut LineEditor,
    prompt: *const u8,
    prompt_size: usize,
    outcome: *mut i32,
    text: *mut Bytes,
    error: *mut Bytes,
) -> i32 {
    guard(error, || {
        *outcome = match handle_mut(editor)?.readline(utf8("the prompt", prompt, prompt_size)?) {
            Ok(line) => {
                give_text(text, line);
                TEXT
            }
            Err(ReadlineError::Eof) => END,
            Err(ReadlineError::Interrupted) => INTERRUPTED,
            Err(other) => return invalid(format!("can't read from the terminal: {other}")),
        };
        Ok(())
    })
}
