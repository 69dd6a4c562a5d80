//! What both halves share of speaking C: statuses, owned text, and a wall that no panic crosses.
//!
//! Every function that can fail returns a status, and hands error text out through its last parameter. Panics of the crates
//! below become `STATUS_INTERNAL`.

use std::any::Any;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Once;

pub const STATUS_OK: i32 = 0;
pub const STATUS_INVALID: i32 = 1;
pub const STATUS_INTERNAL: i32 = 2;

/// What the caller's input or the model's files got wrong, as one sentence.
pub struct Invalid(pub String);
pub type Result<T> = std::result::Result<T, Invalid>;

pub fn invalid<T>(message: impl Into<String>) -> Result<T> {
    Err(Invalid(message.into()))
}

/// Owned text handed to C; freed by `torpor_text_bytes_free`.
#[repr(C)]
pub struct Bytes {
    pub data: *mut u8,
    pub size: usize,
}

pub fn leak<T>(values: Vec<T>) -> (*mut T, usize) {
    let values = values.into_boxed_slice();
    let size = values.len();
    (Box::into_raw(values) as *mut T, size)
}

pub unsafe fn reclaim<T>(data: *mut T, size: usize) {
    if !data.is_null() {
        drop(Box::from_raw(std::ptr::slice_from_raw_parts_mut(data, size)));
    }
}

/// Writes owned text to `out`, which may be null.
pub unsafe fn give_text(out: *mut Bytes, text: String) {
    if !out.is_null() {
        let (data, size) = leak(text.into_bytes());
        *out = Bytes { data, size };
    }
}

/// A caller's array; null stands for an empty one.
pub unsafe fn slice<'a, T>(data: *const T, size: usize) -> &'a [T] {
    if data.is_null() {
        &[]
    } else {
        std::slice::from_raw_parts(data, size)
    }
}

pub unsafe fn utf8<'a>(what: &str, data: *const u8, size: usize) -> Result<&'a str> {
    std::str::from_utf8(slice(data, size))
        .or_else(|e| invalid(format!("{what} is not valid UTF-8 at byte {}", e.valid_up_to())))
}

pub unsafe fn handle<'a, T>(pointer: *const T) -> Result<&'a T> {
    pointer.as_ref().ok_or_else(|| Invalid("the handle is null".into()))
}

fn panic_text(payload: Box<dyn Any + Send>) -> String {
    let text = payload.downcast_ref::<&str>().map(|s| s.to_string());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "unknown panic".into())
}

/// Runs `body` and turns what it returns, or how it panics, into a status.
pub unsafe fn guard(error: *mut Bytes, body: impl FnOnce() -> Result<()>) -> i32 {
    // A library doesn't print; this runtime is the shim's own, so the hook is too.
    static QUIET: Once = Once::new();
    QUIET.call_once(|| std::panic::set_hook(Box::new(|_| {})));
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => STATUS_OK,
        Ok(Err(Invalid(message))) => {
            give_text(error, message);
            STATUS_INVALID
        }
        Err(payload) => {
            give_text(error, panic_text(payload));
            STATUS_INTERNAL
        }
    }
}

/// What went wrong, by a status of one header's own.
#[cfg(any(feature = "hub", feature = "remote"))]
pub struct Failure {
    pub status: i32,
    pub sentence: String,
}

#[cfg(any(feature = "hub", feature = "remote"))]
impl Failure {
    pub fn invalid(sentence: impl Into<String>) -> Self {
        Self { status: STATUS_INVALID, sentence: sentence.into() }
    }
}

#[cfg(any(feature = "hub", feature = "remote"))]
impl From<Invalid> for Failure {
    fn from(Invalid(sentence): Invalid) -> Self {
        Self::invalid(sentence)
    }
}

/// As `guard`, where a header has statuses of its own.
#[cfg(any(feature = "hub", feature = "remote"))]
pub unsafe fn call(error: *mut Bytes, body: impl FnOnce() -> std::result::Result<(), Failure>) -> i32 {
    let mut failed = STATUS_INVALID;
    let status = guard(error, || {
        body().or_else(|failure| {
            failed = failure.status;
            invalid(failure.sentence)
        })
    });
    if status == STATUS_INVALID {
        failed
    } else {
        status
    }
}

pub unsafe fn handle_mut<'a, T>(pointer: *mut T) -> Result<&'a mut T> {
    pointer.as_mut().ok_or_else(|| Invalid("the handle is null".into()))
}
