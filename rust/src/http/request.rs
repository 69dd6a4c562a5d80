//! From hyper's request to the C callback, and from its answer to hyper's.

use std::future::poll_fn;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::Arc;

use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use hyper::header::{EXPECT, HOST};
use hyper::http::request::Parts;
use hyper::{Request, Response};
use tokio::time::timeout;

use super::connection::Busy;
use super::exchange::{Exchange, Held, Receiver};
use super::server::Shared;
use super::{Header, RequestView};

/// What is read and thrown away of a body that is refused, so that the client gets to read why.
const DISCARD_BYTES: usize = 256 << 20;

/// A body that is not taken: the status to answer with.
struct Refused(u16);

async fn read_body(shared: &Shared, held: &mut Held, mut body: Incoming) -> io::Result<Result<Vec<u8>, Refused>> {
    let config = &shared.config;
    let mut bytes = Vec::new();
    let mut refused = None;
    let mut seen = 0;
    if body.size_hint().lower() > config.max_body as u64 {
        refused = Some(Refused(413));
    }
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(io::Error::other)?;
        let Some(data) = frame.data_ref() else { continue };
        seen += data.len();
        if refused.is_none() {
            if bytes.len() + data.len() > config.max_body {
                refused = Some(Refused(413));
            } else if !held.grow(data.len(), config.max_bodies) {
                refused = Some(Refused(503));
            } else {
                bytes.extend_from_slice(data);
            }
        }
        if refused.is_some() {
            bytes = Vec::new();
            if seen > config.max_body.saturating_add(DISCARD_BYTES) {
                break;
            }
        }
    }
    Ok(match refused {
        Some(refused) => Err(refused),
        None => Ok(bytes),
    })
}

fn hand_over(shared: &Shared, exchange: Arc<Exchange>, id: u64, peer: &str, parts: &Parts, body: &[u8], refused: u16) {
    // The target's own authority goes before the header (RFC 9112, 3.2.2).
    let authority = parts.uri.authority().map(|authority| authority.as_str());
    let own_host = authority.map(|authority| Header { name: "host".into(), value: authority.into() });
    let others = parts.headers.iter().filter(|(name, _)| authority.is_none() || *name != HOST);
    let others = others.map(|(name, value)| Header { name: name.as_str().into(), value: value.as_bytes().into() });
    let headers: Vec<Header> = own_host.into_iter().chain(others).collect();
    let view = RequestView {
        id,
        method: parts.method.as_str().into(),
        path: parts.uri.path().into(),
        query: parts.uri.query().unwrap_or_default().into(),
        peer: peer.into(),
        headers: headers.as_ptr(),
        headers_size: headers.len(),
        body: body.into(),
        refused,
    };
    shared.callbacks.request(&view, exchange);
}

pub async fn answer(
    shared: Arc<Shared>,
    busy: Busy,
    peer: Arc<str>,
    request: Request<Incoming>,
) -> io::Result<Response<Receiver>> {
    let config = &shared.config;
    let (parts, body) = request.into_parts();
    let mut held = Held::new(shared.bodies.clone());
    let expects = parts.headers.contains_key(EXPECT);
    let body = if expects && body.size_hint().lower() > config.max_body as u64 {
        Err(Refused(413)) // the client waits for leave to send it
    } else {
        match timeout(config.body_timeout, read_body(&shared, &mut held, body)).await {
            Ok(body) => body?,
            Err(_) => Err(Refused(408)),
        }
    };
    let refused = body.as_ref().err().map_or(0, |refused| refused.0);

    let exchange = Exchange::new(config.stream_buffer, config.stall_timeout, held);
    let id = shared.next_id.fetch_add(1, Ordering::Relaxed);
    let gone = shared.clone();
    let mut receiver = Receiver::new(exchange.clone(), Box::new(move || gone.callbacks.gone(id)), busy);

    hand_over(&shared, exchange, id, &peer, &parts, &body.unwrap_or_default(), refused);
    let head = poll_fn(|cx| receiver.poll_head(cx)).await?;
    Ok(head.map(|()| receiver))
}
