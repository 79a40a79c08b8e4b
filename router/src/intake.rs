//! The engine's actor: the one door through which sequences reach the engine's
//! thread. It bounds how many may wait, refuses when draining, and stops the
//! process when the engine's thread has died, since nothing else can mend that.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use actix::{Actor, AsyncContext as _, Context, Handler, Message, WrapFuture as _};
use mesh::failpoint;
use mesh::lifecycle::Shutdown;
use mesh::supervise::Pulse;
use tokio::sync::mpsc::Sender;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::watch;

use crate::engine::{Gauges, Job};

/// Asks the engine to run a job.
#[derive(Message)]
#[rtype(result = "Result<(), Refused>")]
pub struct Submit(pub Box<Job>);

/// Why a job was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("{0} requests are waiting already")]
    Full(usize),
    #[error("the router is draining")]
    Draining,
}

/// What the actor needs; cloned by its factory.
#[derive(Clone)]
pub struct IntakeParts {
    pub jobs: Sender<Job>,
    pub gauges: Arc<Gauges>,
    pub max_waiting: usize,
    pub shutdown: Shutdown,
    /// Turns true when the engine's thread has ended.
    pub engine_ended: watch::Receiver<bool>,
}

/// See the module's text.
pub struct Intake {
    parts: IntakeParts,
    _pulse: Pulse,
}

impl Intake {
    pub fn new(parts: IntakeParts, pulse: Pulse) -> Self {
        Self { parts, _pulse: pulse }
    }
}

impl Actor for Intake {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(self.parts.max_waiting.max(16));
        let mut ended = self.parts.engine_ended.clone();
        let shutdown = self.parts.shutdown.clone();
        ctx.spawn(
            async move {
                if ended.wait_for(|&ended| ended).await.is_ok() && !shutdown.is_triggered() {
                    tracing::error!("the engine's thread died, stopping the router");
                    shutdown.trigger();
                }
            }
            .into_actor(self),
        );
    }
}

impl Handler<Submit> for Intake {
    type Result = Result<(), Refused>;

    fn handle(&mut self, Submit(job): Submit, _: &mut Self::Context) -> Self::Result {
        failpoint::pass("intake");
        let IntakeParts { jobs, gauges, max_waiting, shutdown, .. } = &self.parts;
        if shutdown.is_triggered() {
            return Err(Refused::Draining);
        }
        let waiting =
            gauges.waiting.load(Ordering::Relaxed) as usize + jobs.max_capacity() - jobs.capacity();
        if waiting >= *max_waiting {
            return Err(Refused::Full(waiting));
        }
        jobs.try_send(*job).map_err(|error| match error {
            TrySendError::Full(_) => Refused::Full(*max_waiting),
            TrySendError::Closed(_) => Refused::Draining,
        })
    }
}
