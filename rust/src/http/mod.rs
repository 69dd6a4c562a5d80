//! C ABI over hyper and tokio; include/torpor_http_shim.h is its contract.

mod connection;
mod exchange;
mod request;
mod server;

use std::ffi::{c_void, OsStr};
use std::marker::PhantomData;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hyper::header::{HeaderName, HeaderValue};
use hyper::{Response, StatusCode};
use sha2::{Digest, Sha256};

use crate::abi::{guard, handle, invalid, slice, utf8, Bytes, Result, STATUS_OK};
use exchange::Exchange;
use server::Server;

/// Text of somebody else's.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct View<'a> {
    data: *const u8,
    size: usize,
    text: PhantomData<&'a [u8]>,
}

impl<'a> From<&'a [u8]> for View<'a> {
    fn from(text: &'a [u8]) -> Self {
        Self { data: text.as_ptr(), size: text.len(), text: PhantomData }
    }
}

impl<'a> From<&'a str> for View<'a> {
    fn from(text: &'a str) -> Self {
        text.as_bytes().into()
    }
}

impl<'a> View<'a> {
    unsafe fn bytes(&self) -> &'a [u8] {
        slice(self.data, self.size)
    }
}

#[repr(C)]
pub struct Header<'a> {
    name: View<'a>,
    value: View<'a>,
}

#[repr(C)]
pub struct RequestView<'a> {
    id: u64,
    method: View<'a>,
    path: View<'a>,
    query: View<'a>,
    peer: View<'a>,
    headers: *const Header<'a>,
    headers_size: usize,
    body: View<'a>,
    refused: u16,
}

#[repr(C)]
pub struct Config<'a> {
    host: View<'a>,
    port: u16,
    socket: View<'a>,
    max_body_bytes: usize,
    max_bodies_bytes: usize,
    max_head_bytes: usize,
    max_connections: usize,
    head_timeout_ms: u64,
    body_timeout_ms: u64,
    idle_timeout_ms: u64,
    stream_buffer_bytes: usize,
    stall_timeout_ms: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Callbacks {
    context: *mut c_void,
    request: unsafe extern "C" fn(*mut c_void, *const RequestView<'_>, *mut Arc<Exchange>),
    gone: unsafe extern "C" fn(*mut c_void, u64),
}

// The caller's functions may be called on any thread (the header says so).
unsafe impl Send for Callbacks {}
unsafe impl Sync for Callbacks {}

impl Callbacks {
    fn request(&self, request: &RequestView<'_>, exchange: Arc<Exchange>) {
        unsafe { (self.request)(self.context, request, Box::into_raw(Box::new(exchange))) }
    }

    fn gone(&self, id: u64) {
        unsafe { (self.gone)(self.context, id) }
    }
}

unsafe fn owned_config(config: &Config<'_>) -> Result<server::Config> {
    let named = |view: &View<'_>| !view.data.is_null() && view.size > 0;
    let host = if named(&config.host) { Some(utf8("the host", config.host.data, config.host.size)?.into()) } else { None };
    let socket = named(&config.socket).then(|| PathBuf::from(OsStr::from_bytes(config.socket.bytes())));
    if host.is_none() && socket.is_none() {
        return invalid("no address to listen on");
    }
    Ok(server::Config {
        host,
        port: config.port,
        socket,
        max_body: config.max_body_bytes,
        max_bodies: config.max_bodies_bytes,
        max_head: config.max_head_bytes.max(8192),
        max_connections: config.max_connections,
        head_timeout: Duration::from_millis(config.head_timeout_ms),
        body_timeout: Duration::from_millis(config.body_timeout_ms),
        idle_timeout: Duration::from_millis(config.idle_timeout_ms),
        stream_buffer: config.stream_buffer_bytes,
        stall_timeout: Duration::from_millis(config.stall_timeout_ms),
    })
}

unsafe fn head(status: u16, headers: *const Header<'_>, size: usize) -> Result<Response<()>> {
    let mut head = Response::new(());
    let known = StatusCode::from_u16(status).ok().filter(|status| !status.is_informational());
    *head.status_mut() = known.map_or_else(|| invalid(format!("{status} is no status of an answer")), Ok)?;
    let headers = if headers.is_null() { &[] } else { std::slice::from_raw_parts(headers, size) };
    for header in headers {
        let told = || String::from_utf8_lossy(header.name.bytes()).into_owned();
        let name = HeaderName::from_bytes(header.name.bytes());
        let name = name.or_else(|_| invalid(format!("'{}' is no name of a header", told())))?;
        let value = HeaderValue::from_bytes(header.value.bytes());
        let value = value.or_else(|_| invalid(format!("the header '{}' holds a control character", told())))?;
        head.headers_mut().append(name, value);
    }
    Ok(head)
}

#[no_mangle]
pub unsafe extern "C" fn torpor_http_start(
    config: *const Config<'_>,
    callbacks: *const Callbacks,
    out: *mut *mut Server,
    error: *mut Bytes,
) -> i32 {
    guard(error, || {
        let server = Server::start(owned_config(handle(config)?)?, *handle(callbacks)?)?;
        *out = Box::into_raw(Box::new(server));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn torpor_http_port(server: *const Server) -> u16 {
    server.as_ref().map_or(0, |server| server.port)
}

#[no_mangle]
pub unsafe extern "C" fn torpor_http_connections(server: *const Server) -> usize {
    server.as_ref().map_or(0, Server::connections)
}

#[no_mangle]
pub unsafe extern "C" fn torpor_http_drain(server: *const Server) {
    guard(std::ptr::null_mut(), || {
        handle(server)?.drain();
        Ok(())
    });
}

#[no_mangle]
pub unsafe extern "C" fn torpor_http_wait(server: *const Server, timeout_ms: u64) -> bool {
    let mut closed = false;
    guard(std::ptr::null_mut(), || {
        closed = handle(server)?.wait(Duration::from_millis(timeout_ms));
        Ok(())
    });
    closed
}

#[no_mangle]
pub unsafe extern "C" fn torpor_http_stop(server: *mut Server) {
    guard(std::ptr::null_mut(), || {
        if !server.is_null() {
            Box::from_raw(server).stop();
        }
        Ok(())
    });
}

unsafe fn begin(exchange: *const Arc<Exchange>, head: Response<()>, whole: Option<bytes::Bytes>) -> Result<()> {
    if handle(exchange)?.begin(head, whole) {
        Ok(())
    } else {
        invalid("an answer has begun already")
    }
}

#[no_mangle]
pub unsafe extern "C" fn torpor_http_respond(
    exchange: *const Arc<Exchange>,
    status: u16,
    headers: *const Header<'_>,
    headers_size: usize,
    body: *const u8,
    body_size: usize,
    error: *mut Bytes,
) -> i32 {
    guard(error, || {
        let body = bytes::Bytes::copy_from_slice(slice(body, body_size));
        begin(exchange, head(status, headers, headers_size)?, Some(body))
    })
}

#[no_mangle]
pub unsafe extern "C" fn torpor_http_begin(
    exchange: *const Arc<Exchange>,
    status: u16,
    headers: *const Header<'_>,
    headers_size: usize,
    error: *mut Bytes,
) -> i32 {
    guard(error, || begin(exchange, head(status, headers, headers_size)?, None))
}

#[no_mangle]
pub unsafe extern "C" fn torpor_http_write(exchange: *const Arc<Exchange>, data: *const u8, size: usize) -> bool {
    let mut sent = false;
    let status = guard(std::ptr::null_mut(), || {
        sent = handle(exchange)?.write(slice(data, size));
        Ok(())
    });
    status == STATUS_OK && sent
}

#[no_mangle]
pub unsafe extern "C" fn torpor_http_keep_alive(
    exchange: *const Arc<Exchange>,
    data: *const u8,
    size: usize,
    idle_ms: u64,
) {
    guard(std::ptr::null_mut(), || {
        handle(exchange)?.keep_alive(slice(data, size), Duration::from_millis(idle_ms));
        Ok(())
    });
}

#[no_mangle]
pub unsafe extern "C" fn torpor_http_end(exchange: *const Arc<Exchange>) {
    guard(std::ptr::null_mut(), || {
        handle(exchange)?.end();
        Ok(())
    });
}

#[no_mangle]
pub unsafe extern "C" fn torpor_http_exchange_free(exchange: *mut Arc<Exchange>) {
    guard(std::ptr::null_mut(), || {
        if !exchange.is_null() {
            Box::from_raw(exchange).abandon();
        }
        Ok(())
    });
}

#[no_mangle]
pub unsafe extern "C" fn torpor_http_sha256(data: *const u8, size: usize, out: *mut u8) {
    let hash = Sha256::digest(slice(data, size));
    std::ptr::copy_nonoverlapping(hash.as_ptr(), out, hash.len());
}
