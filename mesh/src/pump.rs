//! The runtime that a computing thread owns and drives itself. The streams it
//! works with live here, so a frame goes from the computation to the socket and
//! back without waking another thread.
//!
//! Nothing runs while its owner computes: sockets fill their buffers, timers
//! come late. Whoever puts a task here allows for that.
//!
//! An owner that has just computed and waits for more stays awake for a moment,
//! as waking a CPU that has gone to rest takes longer than many a frame's way. It
//! yields meanwhile, so whatever has work for the CPU has it.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::runtime::{Builder, Handle, Runtime};

/// How long an owner that waits for what usually follows soon stays awake.
pub const AWAKE: Duration = Duration::from_millis(2);

/// How long sockets may go without a look while what is awaited comes past them (`shared::rings`).
pub const TURN: Duration = Duration::from_micros(50);

/// Leaves the runtime to the tasks that can run and to its sockets, once. Only for the
/// future that drives the runtime ([`Pump::run`]): a task that wakes itself runs before
/// the sockets are looked at. Unlike tokio's own yield it allocates nothing.
#[derive(Default)]
pub struct Turn(bool);

impl Future for Turn {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if std::mem::replace(&mut self.0, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// Shared by what its one owner drives; clones are the same runtime.
#[derive(Clone)]
pub struct Pump(Arc<Owned>);

struct Owned(Option<Runtime>);

impl Drop for Owned {
    fn drop(&mut self) {
        // Its tasks end here. Blocking for them would be wrong where the last
        // clone goes out of scope on another runtime.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl Pump {
    /// # Errors
    /// The system gives no event queue.
    pub fn new() -> std::io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        Ok(Self(Arc::new(Owned(Some(runtime)))))
    }

    /// For those who put tasks here from other threads.
    pub fn handle(&self) -> Handle {
        self.runtime().handle().clone()
    }

    /// Runs the tasks that can run and those that they wake, then returns.
    pub fn turn(&self) {
        self.runtime().block_on(Turn::default());
    }

    /// Drives the tasks until `future` is done.
    pub fn run<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime().block_on(future)
    }

    /// As [`Self::run`], for at most `time`; `None` when it ran out.
    pub fn run_for<T>(&self, time: Duration, future: impl Future<Output = T>) -> Option<T> {
        self.runtime().block_on(async { tokio::time::timeout(time, future).await.ok() })
    }

    fn runtime(&self) -> &Runtime {
        self.0.0.as_ref().expect("taken only when dropped")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn a_turn_runs_what_another_thread_put_there() {
        let pump = Pump::new().unwrap();
        let ran = Arc::new(AtomicBool::new(false));
        let (handle, flag) = (pump.handle(), ran.clone());
        std::thread::spawn(move || {
            handle.spawn(async move { flag.store(true, Ordering::Relaxed) });
        })
        .join()
        .unwrap();
        assert!(!ran.load(Ordering::Relaxed));
        pump.turn();
        assert!(ran.load(Ordering::Relaxed));
    }

    #[test]
    fn time_runs_out() {
        let pump = Pump::new().unwrap();
        assert_eq!(pump.run_for(Duration::from_millis(1), std::future::pending::<()>()), None);
        assert_eq!(pump.run_for(Duration::from_secs(9), async { 7 }), Some(7));
    }
}
