//! Listeners, the thread that serves them, and what all connections share.

use std::future::{poll_fn, Future};
use std::io::{self, Write};
use std::mem::ManuallyDrop;
use std::net::ToSocketAddrs;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net as unix;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::task::{ready, Context, Poll};
use std::time::{Duration, Instant};
use std::{fs, net};

use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;

use super::connection::{serve, Socket};
use super::Callbacks;
use crate::abi::{invalid, Invalid, Result};
use crate::runtime::Runtime;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 1024;
/// The wait after an accept that failed, for instance for want of file descriptors.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
const TOO_MANY: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\ncontent-length: 0\r\nretry-after: 1\r\n\r\n";

pub struct Config {
    pub host: Option<String>,
    pub port: u16,
    pub socket: Option<PathBuf>,
    pub max_body: usize,
    pub max_bodies: usize,
    pub max_head: usize,
    pub max_connections: usize,
    pub head_timeout: Duration,
    pub body_timeout: Duration,
    pub idle_timeout: Duration,
    pub stream_buffer: usize,
    pub stall_timeout: Duration,
}

pub struct Shared {
    pub config: Config,
    pub callbacks: Callbacks,
    pub next_id: AtomicU64,
    /// Bytes of request bodies held.
    pub bodies: Arc<AtomicUsize>,
    pub draining: watch::Sender<bool>,
    connections: Mutex<usize>,
    closed: Condvar,
}

impl Shared {
    fn connections(&self) -> MutexGuard<'_, usize> {
        self.connections.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

struct Connected(Arc<Shared>);

impl Drop for Connected {
    fn drop(&mut self) {
        *self.0.connections() -= 1;
        self.0.closed.notify_all();
    }
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<(Socket, String)>> {
        Poll::Ready(Ok(match self {
            Self::Tcp(listener) => {
                let (stream, peer) = ready!(listener.poll_accept(cx))?;
                let _ = stream.set_nodelay(true); // each event of a stream goes out at once
                (Socket::Tcp(stream), peer.to_string())
            }
            Self::Unix(listener) => (Socket::Unix(ready!(listener.poll_accept(cx))?.0), "unix".into()),
        }))
    }
}

/// A UNIX socket's file, removed when nobody listens any more.
struct SocketFile {
    path: PathBuf,
    inode: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|file| (file.dev(), file.ino()) == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn listen(fd: &impl AsRawFd) {
    // The standard library's backlog is 128; listening again changes it.
    unsafe { libc::listen(fd.as_raw_fd(), BACKLOG) };
}

fn bind_tcp(host: &str, port: u16) -> Result<net::TcpListener> {
    let at = |e: io::Error| Invalid(format!("can't listen on {host}:{port}: {e}"));
    let addresses = (host, port).to_socket_addrs().map_err(at)?;
    let listener = net::TcpListener::bind(addresses.collect::<Vec<_>>().as_slice()).map_err(at)?;
    listen(&listener);
    listener.set_nonblocking(true).map_err(at)?;
    Ok(listener)
}

fn bind_unix(path: PathBuf) -> Result<(unix::UnixListener, SocketFile)> {
    let name = path.display().to_string();
    let at = |e: io::Error| Invalid(format!("can't listen on '{name}': {e}"));
    if let Ok(file) = fs::symlink_metadata(&path) {
        if !file.file_type().is_socket() {
            return invalid(format!("can't listen on '{name}': there is a file that is no socket"));
        }
        match unix::UnixStream::connect(&path) {
            Ok(_) => return invalid(format!("can't listen on '{name}': another server does")),
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(&path).map_err(at)?,
            Err(e) => return Err(at(e)),
        }
    }
    // Nobody can connect before listen(), so the mode is right in time.
    let listener = bind_without_listening(&path).map_err(at)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(at)?;
    let file = fs::symlink_metadata(&path).map_err(at)?;
    let file = SocketFile { path, inode: (file.dev(), file.ino()) };
    listen(&listener);
    listener.set_nonblocking(true).map_err(at)?;
    Ok((listener, file))
}

fn bind_without_listening(path: &std::path::Path) -> io::Result<unix::UnixListener> {
    use std::os::unix::ffi::OsStrExt;
    let bytes = path.as_os_str().as_bytes();
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    if bytes.len() >= address.sun_path.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the path is too long for a UNIX socket"));
    }
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let listener = unsafe { unix::UnixListener::from_raw_fd(fd) };
    let size = std::mem::size_of_val(&address) as libc::socklen_t;
    let bound = unsafe {
        libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC);
        libc::bind(fd, (&raw const address).cast(), size)
    };
    if bound < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(listener)
}

/// One more connection than are served is told so, as far as that goes at once.
fn refuse(socket: Socket) {
    let fd = match &socket {
        Socket::Tcp(stream) => stream.as_raw_fd(),
        Socket::Unix(stream) => stream.as_raw_fd(),
    };
    // The file descriptor stays the socket's; it is used as a file only to write.
    let _ = ManuallyDrop::new(unsafe { fs::File::from_raw_fd(fd) }).write(TOO_MANY);
}

async fn accept(shared: Arc<Shared>, listener: Listener, _file: Option<SocketFile>) {
    let mut draining = shared.draining.subscribe();
    let mut drain = pin!(draining.wait_for(|&yes| yes));
    loop {
        let accepted = poll_fn(|cx| match drain.as_mut().poll(cx) {
            Poll::Ready(_) => Poll::Ready(None),
            Poll::Pending => listener.poll_accept(cx).map(Some),
        });
        match accepted.await {
            None => return,
            Some(Err(_)) => tokio::time::sleep(ACCEPT_AGAIN).await,
            Some(Ok((socket, peer))) => {
                let mut connections = shared.connections();
                if *connections >= shared.config.max_connections {
                    drop(connections);
                    refuse(socket);
                    continue;
                }
                *connections += 1;
                drop(connections);
                let connected = Connected(shared.clone());
                tokio::spawn(async move { serve(connected.0.clone(), socket, peer).await });
            }
        }
    }
}

pub struct Server {
    shared: Arc<Shared>,
    runtime: Runtime,
    pub port: u16,
}

impl Server {
    pub fn start(mut config: Config, callbacks: Callbacks) -> Result<Self> {
        let tcp = config.host.take().map(|host| bind_tcp(&host, config.port)).transpose()?;
        let unix = config.socket.take().map(bind_unix).transpose()?;
        let port = tcp.as_ref().and_then(|tcp| tcp.local_addr().ok()).map_or(0, |address| address.port());
        let shared = Arc::new(Shared {
            config,
            callbacks,
            next_id: AtomicU64::new(1),
            bodies: Arc::default(),
            draining: watch::Sender::new(false),
            connections: Mutex::new(0),
            closed: Condvar::new(),
        });
        let failed = |e: io::Error| Invalid(format!("can't start the HTTP thread: {e}"));
        let runtime = Runtime::start("torpor-http").map_err(failed)?;
        {
            let _entered = runtime.enter();
            if let Some(tcp) = tcp {
                let listener = Listener::Tcp(TcpListener::from_std(tcp).map_err(failed)?);
                runtime.spawn(accept(shared.clone(), listener, None));
            }
            if let Some((unix, file)) = unix {
                let listener = Listener::Unix(UnixListener::from_std(unix).map_err(failed)?);
                runtime.spawn(accept(shared.clone(), listener, Some(file)));
            }
        }
        Ok(Self { shared, runtime, port })
    }

    pub fn connections(&self) -> usize {
        *self.shared.connections()
    }

    pub fn drain(&self) {
        self.shared.draining.send_replace(true);
    }

    pub fn wait(&self, timeout: Duration) -> bool {
        let deadline = Instant::now().checked_add(timeout);
        let mut connections = self.shared.connections();
        while *connections > 0 {
            let left = deadline.map_or(timeout, |deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return false;
            }
            let waited = self.shared.closed.wait_timeout(connections, left);
            connections = waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        }
        true
    }

    pub fn stop(self) {
        if !self.runtime.is_ours() {
            std::mem::forget(self); // its thread stayed with the parent
        }
    }
}
