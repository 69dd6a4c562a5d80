//! A line that someone types at a terminal: with editing, the history of the session, and a paste as one text. By rustyline.

use rustyline::error::ReadlineError;
use rustyline::history::MemHistory;
use rustyline::{Config, Editor};

use crate::abi::{give_text, guard, handle_mut, invalid, utf8, Bytes, Invalid};

type LineEditor = Editor<(), MemHistory>;

const TEXT: i32 = 0;
const END: i32 = 1;
const INTERRUPTED: i32 = 2;

#[no_mangle]
pub unsafe extern "C" fn torpor_line_editor_new(out: *mut *mut LineEditor, error: *mut Bytes) -> i32 {
    guard(error, || {
        let config = Config::builder().auto_add_history(true).bracketed_paste(true).build();
        let editor = LineEditor::with_history(config, MemHistory::new()).map_err(|e| Invalid(e.to_string()))?;
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
