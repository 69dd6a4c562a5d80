//! One connection: hyper's HTTP/1 on a socket, with a timer and a look-out of our own.

use std::future::{poll_fn, Future};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::{pin, Pin};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{ready, Context, Poll};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{interval, sleep_until, Instant, MissedTickBehavior};

use super::request::answer;
use super::server::Shared;

/// How often a connection is looked at whose reader hyper has stopped, since more of the client's bytes lie in its buffer.
const LOOK_OUT: Duration = Duration::from_millis(250);

pub enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

macro_rules! on_socket {
    ($socket:expr, $name:ident => $call:expr) => {
        match $socket {
            Socket::Tcp($name) => $call,
            Socket::Unix($name) => $call,
        }
    };
}

struct State {
    last: Instant,
    /// Requests whose answers are not complete.
    busy: usize,
    /// When the first byte of a head came that is not complete.
    head: Option<Instant>,
    /// hyper waits for bytes, so it notices the end of them.
    reading: bool,
    served: bool,
}

/// What a connection does, for its timer.
pub struct Activity(Mutex<State>);

impl Activity {
    fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(State { last: Instant::now(), busy: 0, head: None, reading: false, served: false })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// A request from its head to the end of its answer.
pub struct Busy(Arc<Activity>);

impl Busy {
    pub fn new(activity: Arc<Activity>) -> Self {
        let mut state = activity.lock();
        state.busy += 1;
        state.head = None;
        state.served = true;
        drop(state);
        Self(activity)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.busy -= 1;
        state.last = Instant::now();
    }
}

struct Tracked {
    socket: Socket,
    activity: Arc<Activity>,
}

impl AsyncRead for Tracked {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = on_socket!(&mut self.socket, s => Pin::new(s).poll_read(cx, buf));
        let mut state = self.activity.lock();
        state.reading = read.is_pending();
        ready!(read)?;
        if buf.filled().len() > before {
            state.last = Instant::now();
            if state.busy == 0 {
                state.head.get_or_insert_with(Instant::now);
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Tracked {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(on_socket!(&mut self.socket, s => Pin::new(s).poll_write(cx, buf)))?;
        self.activity.lock().last = Instant::now();
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_socket!(&mut self.socket, s => Pin::new(s).poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_socket!(&mut self.socket, s => Pin::new(s).poll_shutdown(cx))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(on_socket!(&mut self.socket, s => Pin::new(s).poll_write_vectored(cx, bufs)))?;
        self.activity.lock().last = Instant::now();
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }
}

/// The client has closed its side, or the connection is broken. Bytes that nobody has read may lie before the end.
fn hung_up(fd: RawFd) -> bool {
    #[cfg(target_os = "linux")]
    const CLOSED: i16 = libc::POLLRDHUP;
    #[cfg(not(target_os = "linux"))]
    const CLOSED: i16 = 0;
    let mut poll = libc::pollfd { fd, events: CLOSED, revents: 0 };
    let ready = unsafe { libc::poll(&mut poll, 1, 0) };
    ready > 0 && poll.revents & (CLOSED | libc::POLLHUP | libc::POLLERR) != 0
}

/// Serves until the connection is closed, by whichever side.
pub async fn serve(shared: Arc<Shared>, socket: Socket, peer: String) {
    let config = &shared.config;
    let fd = on_socket!(&socket, s => s.as_raw_fd());
    let activity = Activity::new();
    let peer: Arc<str> = peer.into();
    let service = service_fn(|request| answer(shared.clone(), Busy::new(activity.clone()), peer.clone(), request));
    let io = TokioIo::new(Tracked { socket, activity: activity.clone() });
    let mut connection = pin!(http1::Builder::new()
        .half_close(false)
        .header_read_timeout(None)
        .max_header_size(config.max_head) // the buffer may get longer than it is told to: it grows by doubling
        .max_buf_size(config.max_head)
        .serve_connection(io, service));

    let mut draining = shared.draining.subscribe();
    let mut drain = pin!(draining.wait_for(|&yes| yes));
    let mut drained = false;
    let mut timer = pin!(sleep_until(Instant::now()));
    let mut look_out = interval(LOOK_OUT);
    look_out.set_missed_tick_behavior(MissedTickBehavior::Delay);
    poll_fn(|cx| {
        if !drained && drain.as_mut().poll(cx).is_ready() {
            drained = true;
            let state = activity.lock();
            if state.busy == 0 && !state.served {
                return Poll::Ready(()); // hyper would wait for its first request
            }
            drop(state);
            connection.as_mut().graceful_shutdown();
        }
        if connection.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        loop {
            let state = activity.lock();
            let deadline = match state.head {
                Some(head) => head + config.head_timeout,
                None => state.last + config.idle_timeout,
            };
            let (busy, reading) = (state.busy > 0, state.reading);
            drop(state);
            if busy && reading {
                return Poll::Pending;
            }
            if busy {
                ready!(look_out.poll_tick(cx));
                if hung_up(fd) {
                    return Poll::Ready(());
                }
            } else {
                if timer.deadline() != deadline {
                    timer.as_mut().reset(deadline);
                }
                return timer.as_mut().poll(cx);
            }
        }
    })
    .await;
}
