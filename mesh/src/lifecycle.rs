//! How a process starts to stop, and whether it may be sent work.
//!
//! [`Shutdown`] is triggered once, by a signal or a fatal error, and heard by
//! everyone who holds a clone. [`Readiness`] answers `/readyz` and says why not.

use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::watch;

/// A one-way switch that any clone can throw and all clones hear.
#[derive(Clone, Debug)]
pub struct Shutdown(Arc<watch::Sender<bool>>);

impl Default for Shutdown {
    fn default() -> Self {
        Self::new()
    }
}

impl Shutdown {
    pub fn new() -> Self {
        Self(Arc::new(watch::channel(false).0))
    }

    pub fn trigger(&self) {
        self.0.send_replace(true);
    }

    pub fn is_triggered(&self) -> bool {
        *self.0.borrow()
    }

    /// Resolves once triggered, at once if it already was.
    pub async fn wait(&self) {
        let mut heard = self.0.subscribe();
        // The sender lives as long as `self`, so this cannot end early.
        let _ = heard.wait_for(|&on| on).await;
    }

    /// Triggers on SIGINT or SIGTERM. A second signal exits at once with code 130.
    pub fn on_signals(&self) -> std::io::Result<()> {
        use tokio::signal::unix::{SignalKind, signal};
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let shutdown = self.clone();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                if shutdown.is_triggered() {
                    std::process::exit(130);
                }
                shutdown.trigger();
            }
        });
        Ok(())
    }
}

/// Whether work is accepted, and if not, why.
#[derive(Clone, Debug)]
pub struct Readiness(Arc<ArcSwap<Result<(), String>>>);

impl Readiness {
    /// Not ready, because of `reason`.
    pub fn starting(reason: &str) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(Err(reason.to_owned()))))
    }

    pub fn set(&self, state: Result<(), String>) {
        self.0.store(Arc::new(state));
    }

    pub fn get(&self) -> Result<(), String> {
        (**self.0.load()).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_clone_hears_a_shutdown() {
        let shutdown = Shutdown::new();
        let clone = shutdown.clone();
        let waiting = tokio::spawn(async move { clone.wait().await });
        shutdown.trigger();
        waiting.await.unwrap();
        shutdown.wait().await;
    }
}
