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

use std::sync::Arc;
use std::time::Duration;

use mesh::lifecycle::Shutdown;
use mesh::tls::Tls;
use mesh::transport::Endpoint;

use crate::error::Error;
use crate::metrics::Metrics;
use pick::Candidate;
use router::{Class, Router};

const POLL_EVERY: Duration = Duration::from_millis(250);
/// The same for a router that is not ready: somebody may wait for it.
const POLL_ABSENT: Duration = Duration::from_millis(50);

/// Every router the gateway may use.
pub struct Upstream {
    routers: Vec<Arc<Router>>,
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
        tls: Option<&Tls>,
        vocab_size: u32,
        metrics: Metrics,
    ) -> Result<Arc<Self>, Error> {
        if endpoints.is_empty() {
            return Err(Error::NoRouters);
        }
        let routers = endpoints
            .iter()
            .map(|endpoint| Ok(Arc::new(Router::new(endpoint, tls, vocab_size)?)))
            .collect::<Result<_, Error>>()?;
        Ok(Arc::new(Self { routers, metrics }))
    }

    /// Asks every router for its status until `shutdown`.
    pub fn watch(self: &Arc<Self>, shutdown: &Shutdown) {
        for router in &self.routers {
            let (router, upstream) = (Arc::clone(router), Arc::clone(self));
            let shutdown = shutdown.clone();
            tokio::spawn(async move {
                let mut pause = Duration::ZERO;
                loop {
                    tokio::select! {
                        () = shutdown.wait() => return,
                        () = tokio::time::sleep(pause) => {}
                    }
                    router.refresh().await;
                    pause = if router.status().is_ok() { POLL_EVERY } else { POLL_ABSENT };
                    let ready = upstream.routers.iter().filter(|r| r.status().is_ok()).count();
                    upstream.metrics.routers_ready.set(ready as i64);
                }
            });
        }
    }

    /// Ok when at least one router takes work; else why each does not.
    pub fn readiness(&self) -> Result<(), String> {
        let mut reasons = Vec::new();
        for router in &self.routers {
            match router.status() {
                Ok(_) => return Ok(()),
                Err(reason) => reasons.push(format!("router {}: {reason}", router.endpoint)),
            }
        }
        Err(reasons.join("; "))
    }

    /// Whether some router was ready not longer ago than `time`.
    fn was_ready_within(&self, time: Duration) -> bool {
        self.routers.iter().any(|router| router.was_ready_within(time))
    }

    pub fn summary(&self) -> Summary {
        let mut summary = Summary { routers: self.routers.len(), ..Summary::default() };
        for status in self.routers.iter().filter_map(|router| router.status().ok()) {
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
        let statuses = self.routers.iter().filter_map(|router| router.status().ok());
        statuses.map(|status| status.max_context).filter(|&context| context > 0).min()
    }

    /// A ready router for a sequence with prefix `key`, none of `tried`; of
    /// `class` alone where one is given.
    fn choose(
        &self,
        key: u64,
        class: Option<&Class>,
        tried: &[u64],
    ) -> Option<(Arc<Router>, Class)> {
        let mut able = Vec::new();
        let mut candidates = Vec::new();
        for router in self.routers.iter().filter(|router| !tried.contains(&router.id)) {
            let Ok(status) = router.status() else { continue };
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
