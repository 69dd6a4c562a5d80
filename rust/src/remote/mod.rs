//! C ABI over object_store; include/torpor_remote_shim.h is its contract.

mod failure;
mod names;
mod profile;
mod seal;
mod settings;
mod store;

use std::mem;

use crate::abi::{call, give_text, guard, handle, leak, slice, utf8, Bytes};
use failure::{Failure, Result};
use store::{Condition, Store};

/// Text of the caller's.
#[repr(C)]
pub struct View {
    data: *const u8,
    size: usize,
}

impl View {
    unsafe fn text<'a>(&self, what: &str) -> Result<&'a str> {
        Ok(utf8(what, self.data, self.size)?)
    }
}

#[repr(C)]
pub struct Pair {
    name: View,
    value: View,
}

#[no_mangle]
pub unsafe extern "C" fn torpor_remote_key_id(key: View, id: *mut Bytes, error: *mut Bytes) -> i32 {
    call(error, || {
        give_text(id, seal::key_id(key.text("the key")?)?);
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn torpor_remote_open(url: View, options: View, out: *mut *mut Store, error: *mut Bytes) -> i32 {
    call(error, || {
        let store = Store::open(url.text("the URL")?, options.text("the options")?)?;
        *out = Box::into_raw(Box::new(store));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn torpor_remote_close(store: *mut Store) {
    guard(std::ptr::null_mut(), || {
        if !store.is_null() {
            let store = Box::from_raw(store);
            if !store.is_ours() {
                mem::forget(store); // its connections are the parent's
            }
        }
        Ok(())
    });
}

#[no_mangle]
pub unsafe extern "C" fn torpor_remote_cancel(store: *const Store) {
    guard(std::ptr::null_mut(), || {
        handle(store)?.cancel();
        Ok(())
    });
}

unsafe fn condition<'a>(kind: i32, tag: &View) -> Result<Condition<'a>> {
    match kind {
        0 => Ok(Condition::Always),
        1 => Ok(Condition::IfAbsent),
        2 => Ok(Condition::IfTag(tag.text("the tag")?)),
        other => Err(Failure::invalid(format!("{other} is no condition"))),
    }
}

#[no_mangle]
pub unsafe extern "C" fn torpor_remote_put(
    store: *const Store,
    key: View,
    data: *const u8,
    size: usize,
    kind: i32,
    if_tag: View,
    metadata: *const Pair,
    metadata_size: usize,
    tag: *mut Bytes,
    error: *mut Bytes,
) -> i32 {
    call(error, || {
        let mut pairs = Vec::new();
        for pair in slice(metadata, metadata_size) {
            pairs.push((pair.name.text("the metadata")?, pair.value.text("the metadata")?));
        }
        let condition = condition(kind, &if_tag)?;
        let put = handle(store)?.put(key.text("the key")?, slice(data, size), condition, &pairs)?;
        give_text(tag, put);
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn torpor_remote_get(
    store: *const Store,
    key: View,
    most: u64,
    data: *mut Bytes,
    description: *mut Bytes,
    error: *mut Bytes,
) -> i32 {
    call(error, || {
        let (bytes, about) = handle(store)?.get(key.text("the key")?, most)?;
        give_text(description, about);
        let (bytes, size) = leak(bytes);
        *data = Bytes { data: bytes, size };
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn torpor_remote_head(
    store: *const Store,
    key: View,
    description: *mut Bytes,
    error: *mut Bytes,
) -> i32 {
    call(error, || {
        give_text(description, handle(store)?.head(key.text("the key")?)?);
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn torpor_remote_read(
    store: *const Store,
    key: View,
    offset: u64,
    data: *mut u8,
    size: usize,
    error: *mut Bytes,
) -> i32 {
    call(error, || {
        if size == 0 {
            return Ok(());
        }
        let out = std::slice::from_raw_parts_mut(data, size);
        handle(store)?.read(key.text("the key")?, offset, out)
    })
}

#[no_mangle]
pub unsafe extern "C" fn torpor_remote_list(
    store: *const Store,
    directory: View,
    descriptions: *mut Bytes,
    error: *mut Bytes,
) -> i32 {
    call(error, || {
        give_text(descriptions, handle(store)?.list(directory.text("the directory")?)?);
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn torpor_remote_remove(store: *const Store, key: View, error: *mut Bytes) -> i32 {
    call(error, || handle(store)?.remove(key.text("the key")?))
}
