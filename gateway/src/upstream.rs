//! Routers: which of them are ready, which one gets a sequence, and the stream
//! of its tokens. Rooms:
//!
//! - [`router`]: one router's channel and what it last said of itself
//! - [`pick`]: the choice among them, a pure function
//! - [`generation`]: one sequence, carried over from router to router
//!
//! No router's failure is a client's failure while another one can go on.

pub mod generation;
pub mod pick;
pub mod router;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use mesh::lifecycle::Shutdown;
use mesh::registry::Etcd;
use mesh::tls::{Role, Tls};
use mesh::transport::Endpoint;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::error::Error;
use crate::metrics::Metrics;
use pick::Candidate;
use router::{Class, Router};

const POLL_EVERY: Duration = Duration::from_millis(250);
/// The same for a router that is not ready: somebody may wait for it.
const POLL_ABSENT: Duration = Duration::from_millis(50);

/// A router that was learned of is forgotten when it has neither answered nor been
/// named for so long.
const FORGET_AFTER: Duration = Duration::from_secs(60);
/// Most routers of a mesh.
const MOST_ROUTERS: usize = 1024;

/// Every router the gateway may use.
pub struct Upstream {
    routers: ArcSwap<Vec<Arc<Router>>>,
    /// Held while the list is changed.
    turn: Mutex<()>,
    tls: Option<Tls>,
    vocab_size: u32,
    metrics: Metrics,
}

/// The routers, for `/v1/models` and `/readyz`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    pub routers: usize,
    pub ready: usize,
    pub numerics: String,
    pub device: String,
}

impl Upstream {
    /// Prepares a channel to each of `endpoints`; none is connected yet.
    /// Routers whose vocabulary is not `vocab_size` are never ready.
    pub fn new(
        endpoints: &[Endpoint],
        tls: Option<Tls>,
        vocab_size: u32,
        metrics: Metrics,
    ) -> Result<Arc<Self>, Error> {
        let routers = endpoints
            .iter()
            .map(|endpoint| Ok(Arc::new(Router::new(endpoint, tls.as_ref(), vocab_size)?)))
            .collect::<Result<Vec<_>, Error>>()?;
        let routers = ArcSwap::from_pointee(routers);
        Ok(Arc::new(Self { routers, turn: Mutex::default(), tls, vocab_size, metrics }))
    }

    /// Asks every router for its status until `shutdown`; so those that etcd names.
    pub fn watch(self: &Arc<Self>, shutdown: &Shutdown, etcd: Option<Etcd>) {
        for router in self.routers.load().iter() {
            tokio::spawn(Arc::clone(self).poll(Arc::clone(router), shutdown.clone()));
        }
        let Some(etcd) = etcd else { return };
        let (upstream, shutdown) = (Arc::clone(self), shutdown.clone());
        tokio::spawn(async move {
            let hear = |router: &Endpoint| upstream.join(router, &shutdown);
            tokio::select! {
                () = etcd.follow(Role::Router, hear) => {}
                () = shutdown.wait() => {}
            }
        });
    }

    /// The router at `endpoint` is one of the mesh.
    fn join(self: &Arc<Self>, endpoint: &Endpoint, shutdown: &Shutdown) {
        let _turn = self.turn.lock();
        let routers = self.routers.load();
        if let Some(known) = routers.iter().find(|router| router.endpoint == *endpoint) {
            known.hear();
            return;
        }
        let router = match Router::new(endpoint, self.tls.as_ref(), self.vocab_size) {
            Ok(router) if routers.len() < MOST_ROUTERS => Arc::new(router),
            Ok(_) => return tracing::warn!(router = %endpoint, "there are too many routers"),
            Err(error) => return tracing::warn!(router = %endpoint, %error, "cannot be used"),
        };
        tracing::info!(router = %endpoint, "a router joins");
        router.learned();
        self.routers.store(Arc::new(routers.iter().chain([&router]).cloned().collect()));
        tokio::spawn(Arc::clone(self).poll(router, shutdown.clone()));
    }

    /// Asks the router for its status, until it is forgotten.
    async fn poll(self: Arc<Self>, router: Arc<Router>, shutdown: Shutdown) {
        let mut pause = Duration::ZERO;
        loop {
            tokio::select! {
                () = shutdown.wait() => return,
                () = tokio::time::sleep(pause) => {}
            }
            router.refresh().await;
            pause = if router.status().is_ok() { POLL_EVERY } else { POLL_ABSENT };
            let forgotten = self.forget(&router, Instant::now());
            let ready = self.routers.load().iter().filter(|r| r.status().is_ok()).count();
            self.metrics.routers_ready.set(ready as i64);
            if forgotten {
                return;
            }
        }
    }

    /// Takes a router out that was only learned of, if it has been away for long.
    fn forget(&self, router: &Arc<Router>, now: Instant) -> bool {
        let silent = router.heard().is_some_and(|heard| now.duration_since(heard) > FORGET_AFTER);
        if silent {
            let _turn = self.turn.lock();
            let stay =
                self.routers.load().iter().filter(|r| !Arc::ptr_eq(r, router)).cloned().collect();
            self.routers.store(Arc::new(stay));
            let router = &router.endpoint;
            tracing::warn!(%router, "forgotten, as it has been away for {FORGET_AFTER:?}");
        }
        silent
    }

    /// Ok when at least one router takes work; else why each does not.
    pub fn readiness(&self) -> Result<(), String> {
        let mut reasons = Vec::new();
        for router in self.routers.load().iter() {
            match router.status() {
                Ok(_) => return Ok(()),
                Err(reason) => reasons.push(format!("router {}: {reason}", router.endpoint)),
            }
        }
        if reasons.is_empty() {
            return Err("waiting for routers: etcd has named none yet".to_owned());
        }
        Err(reasons.join("; "))
    }

    /// Whether some router was ready not longer ago than `time`.
    fn was_ready_within(&self, time: Duration) -> bool {
        self.routers.load().iter().any(|router| router.was_ready_within(time))
    }

    pub fn summary(&self) -> Summary {
        let routers = self.routers.load();
        let mut summary = Summary { routers: routers.len(), ..Summary::default() };
        for status in routers.iter().filter_map(|router| router.status().ok()) {
            summary.ready += 1;
            if summary.ready == 1 {
                summary.numerics.clone_from(&status.numerics);
                summary.device.clone_from(&status.device);
            }
        }
        summary
    }

    /// The shortest context among ready routers, in tokens.
    pub fn context(&self) -> Option<u32> {
        let routers = self.routers.load();
        let statuses = routers.iter().filter_map(|router| router.status().ok());
        statuses.map(|status| status.max_context).filter(|&context| context > 0).min()
    }

    /// A ready router for a sequence with prefix `key`, none of `tried`; of
    /// `class` alone where one is given. If the sequence `drops` missing experts,
    /// one that lacks only those will do.
    fn choose(
        &self,
        key: u64,
        class: Option<&Class>,
        tried: &[u64],
        drops: bool,
    ) -> Option<(Arc<Router>, Class)> {
        let mut able = Vec::new();
        let mut candidates = Vec::new();
        for router in self.routers.load().iter().filter(|router| !tried.contains(&router.id)) {
            let degraded = || router.degraded().filter(|_| drops);
            let Some(status) = router.status().ok().or_else(degraded) else { continue };
            let own = Class::of(&status);
            if class.is_some_and(|class| *class != own) {
                continue;
            }
            candidates.push(Candidate {
                id: router.id,
                load: u64::from(status.running)
                    .saturating_add(u64::from(status.waiting))
                    .max(router.in_flight()),
                full: status.max_waiting > 0 && status.waiting >= status.max_waiting,
            });
            able.push((Arc::clone(router), own));
        }
        pick::pick(key, &candidates).map(|at| able.swap_remove(at))
    }
}
