//! A tokio runtime on a thread of its own: the HTTP edge's, and those of the clients of object stores and of the hub.

use std::future::Future;
use std::thread::{self, JoinHandle};
use std::{io, mem, process, ptr};

use tokio::runtime::{Builder, EnterGuard, Handle};
use tokio::sync::oneshot;

/// Dropped, it drops its tasks and ends its thread; blocking work that has begun goes on alone. In a forked child its
/// thread is missing: nothing runs there, and dropping it does nothing.
pub struct Runtime {
    handle: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    pid: u32,
}

impl Runtime {
    /// `name` is the thread's.
    pub fn start(name: &str) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().on_thread_start(block_signals).build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel();
        let run = move || {
            drop(runtime.block_on(stopped));
            // Its tasks are dropped here, but blocking work is not waited for: looking up a host's name has no limit.
            runtime.shutdown_background();
        };
        let thread = with_signals_blocked(|| thread::Builder::new().name(name.into()).spawn(run))?;
        Ok(Self { handle, stop: Some(stop), thread: Some(thread), pid: process::id() })
    }

    /// Whether this process started it.
    pub fn is_ours(&self) -> bool {
        process::id() == self.pid
    }

    /// For what registers sockets or timers while the guard lives.
    pub fn enter(&self) -> EnterGuard<'_> {
        self.handle.enter()
    }

    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.handle.spawn(task);
    }

    /// Waits for `task`, which runs on the calling thread, its sockets and timers on the runtime's.
    #[cfg(any(feature = "hub", feature = "remote"))]
    pub fn block_on<T>(&self, task: impl Future<Output = T>) -> T {
        self.handle.block_on(task)
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        let (stop, thread) = (self.stop.take(), self.thread.take());
        if !self.is_ours() {
            mem::forget((stop, thread)); // they are the parent's
            return;
        }
        let _ = stop.map(|stop| stop.send(()));
        let _ = thread.map(JoinHandle::join);
    }
}

/// Signals are for the threads of the program.
fn with_signals_blocked<T>(body: impl FnOnce() -> T) -> T {
    unsafe {
        let mut all: libc::sigset_t = mem::zeroed();
        let mut before: libc::sigset_t = mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        let value = body();
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, ptr::null_mut());
        value
    }
}

/// On threads that tokio starts for blocking work, wherever it is asked for.
fn block_signals() {
    unsafe {
        let mut all: libc::sigset_t = mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, ptr::null_mut());
    }
}
