//! One request's answer, between the thread that gives it and the connection that sends it.
//!
//! The connection holds a `Receiver`, whose drop tells that the client has gone: hyper drops what it sends when it notices.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use hyper::Response;
use tokio::time::{sleep, Instant, Sleep};

use super::connection::Busy;

/// What one frame joins at most of small writes that wait.
const FRAME_BYTES: usize = 64 << 10;

struct State {
    head: Option<Response<()>>,
    begun: bool,
    /// The body's size, if it was given at once.
    whole: Option<u64>,
    queue: VecDeque<Bytes>,
    queued: usize,
    ended: bool,
    cut: bool,
    gone: bool,
    keep_alive: Option<(Bytes, Duration)>,
    waker: Option<Waker>,
}

pub struct Exchange {
    state: Mutex<State>,
    room: Condvar,
    buffer: usize,
    stall: Duration,
    _held: Held,
}

/// Bytes of request bodies, of which a server holds a bounded number; given back when dropped.
pub struct Held {
    all: Arc<AtomicUsize>,
    bytes: usize,
}

impl Held {
    pub fn new(all: Arc<AtomicUsize>) -> Self {
        Self { all, bytes: 0 }
    }

    /// False: all would be more than `most`.
    pub fn grow(&mut self, bytes: usize, most: usize) -> bool {
        let all = self.all.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.bytes += bytes;
        all <= most
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.all.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Exchange {
    pub fn new(buffer: usize, stall: Duration, held: Held) -> Arc<Self> {
        let state = State {
            head: None,
            begun: false,
            whole: None,
            queue: VecDeque::new(),
            queued: 0,
            ended: false,
            cut: false,
            gone: false,
            keep_alive: None,
            waker: None,
        };
        Arc::new(Self { state: Mutex::new(state), room: Condvar::new(), buffer, stall, _held: held })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing here panics with the lock held.
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The answer's head, and the whole body if it is `whole`. False: an answer has begun already.
    pub fn begin(&self, head: Response<()>, whole: Option<Bytes>) -> bool {
        let mut state = self.lock();
        if state.begun {
            return false;
        }
        state.begun = true;
        state.head = Some(head);
        if let Some(body) = whole {
            state.whole = Some(body.len() as u64);
            state.queued = body.len();
            if !body.is_empty() {
                state.queue.push_back(body);
            }
            state.ended = true;
        }
        wake(state);
        true
    }

    /// False when the client has gone, or has read nothing for so long that it counts as gone.
    pub fn write(&self, bytes: &[u8]) -> bool {
        let mut state = self.lock();
        while !state.gone && !state.cut && state.queued >= self.buffer {
            let before = state.queued;
            let (guard, waited) = self.room.wait_timeout(state, self.stall).unwrap_or_else(|poisoned| poisoned.into_inner());
            state = guard;
            if waited.timed_out() && state.queued >= before {
                state.cut = true;
            }
        }
        if state.gone || state.cut || !state.begun || state.ended {
            wake(state);
            return false;
        }
        if !bytes.is_empty() {
            state.queued += bytes.len();
            state.queue.push_back(Bytes::copy_from_slice(bytes));
            wake(state);
        }
        true
    }

    pub fn keep_alive(&self, bytes: &[u8], idle: Duration) {
        let mut state = self.lock();
        state.keep_alive = Some((Bytes::copy_from_slice(bytes), idle));
        wake(state);
    }

    pub fn end(&self) {
        let mut state = self.lock();
        state.ended = true;
        wake(state);
    }

    /// Cuts the connection unless the answer is complete.
    pub fn abandon(&self) {
        let mut state = self.lock();
        if !state.ended {
            state.cut = true;
            wake(state);
        }
    }
}

fn wake(mut state: MutexGuard<'_, State>) {
    let waker = state.waker.take();
    drop(state);
    if let Some(waker) = waker {
        waker.wake();
    }
}

/// The connection's end of an exchange: first a future of the head, then the body.
pub struct Receiver {
    exchange: Arc<Exchange>,
    on_gone: Option<Box<dyn FnOnce() + Send>>,
    timer: Option<(Duration, Pin<Box<Sleep>>)>,
    whole: Option<u64>,
    _busy: Busy,
}

impl Receiver {
    pub fn new(exchange: Arc<Exchange>, on_gone: Box<dyn FnOnce() + Send>, busy: Busy) -> Self {
        Self { exchange, on_gone: Some(on_gone), timer: None, whole: None, _busy: busy }
    }

    /// The head, once there is one. An error: the answer was given up before it began.
    pub fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Response<()>>> {
        let mut state = self.exchange.lock();
        if state.cut {
            return Poll::Ready(Err(cut()));
        }
        if let Some(head) = state.head.take() {
            self.whole = state.whole;
            return Poll::Ready(Ok(head));
        }
        state.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

fn cut() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "the answer was given up")
}

fn next_frame(state: &mut State) -> Option<Bytes> {
    let first = state.queue.pop_front()?;
    let next = state.queue.front().map_or(usize::MAX, Bytes::len);
    let frame = if first.len().saturating_add(next) > FRAME_BYTES {
        first
    } else {
        let mut joined = first.to_vec();
        while let Some(more) = state.queue.front() {
            if joined.len() + more.len() > FRAME_BYTES {
                break;
            }
            joined.extend_from_slice(more);
            state.queue.pop_front();
        }
        joined.into()
    };
    state.queued -= frame.len();
    Some(frame)
}

impl Body for Receiver {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let this = &mut *self;
        let mut state = this.exchange.lock();
        if state.cut {
            return Poll::Ready(Some(Err(cut())));
        }
        if let Some(frame) = next_frame(&mut state) {
            this.timer = None;
            this.exchange.room.notify_all();
            return Poll::Ready(Some(Ok(Frame::data(frame))));
        }
        if state.ended {
            this.on_gone = None;
            return Poll::Ready(None);
        }
        if let Some((bytes, idle)) = &state.keep_alive {
            if this.timer.as_ref().is_some_and(|(other, _)| other != idle) {
                this.timer = None;
            }
            let (_, timer) = this.timer.get_or_insert_with(|| (*idle, Box::pin(sleep(*idle))));
            if timer.as_mut().poll(cx).is_ready() {
                timer.as_mut().reset(Instant::now() + *idle);
                return Poll::Ready(Some(Ok(Frame::data(bytes.clone()))));
            }
        }
        state.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    fn size_hint(&self) -> SizeHint {
        self.whole.map_or_else(SizeHint::default, SizeHint::with_exact)
    }

    fn is_end_stream(&self) -> bool {
        self.whole == Some(0)
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let mut state = self.exchange.lock();
        state.gone = true;
        let complete = state.ended && !state.cut && state.queue.is_empty();
        state.queue.clear();
        state.queued = 0;
        drop(state);
        self.exchange.room.notify_all();
        if let (Some(on_gone), false) = (self.on_gone.take(), complete) {
            on_gone();
        }
    }
}
