//! Experts behind links: runs one [`Exchange`] per layer against the real
//! clock, the current placement and the nodes' streams.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use mesh::link::{LinkEvent, LinkHandle};
use mesh::placement::Placement;
use mesh::pump::Pump;
use mesh::telemetry::propagate;
use model::Routed;
use proto::{Epoch, LayerId, Ticket};
use tokio::sync::mpsc::Receiver;
use tracing::Span;

use crate::exchange::{Exchange, ExchangeError, Taken};
use crate::metrics::RouterMetrics;

/// How often a waiting engine looks whether the placement has changed.
const LOOK_AROUND: Duration = Duration::from_millis(20);

/// See the module's text.
pub struct Remote {
    pub exchange: Exchange,
    pub links: Arc<[Arc<LinkHandle>]>,
    pub events: Receiver<LinkEvent>,
    /// Where the streams live; driven here and nowhere else.
    pub pump: Pump,
    pub placement: Arc<ArcSwap<Placement>>,
    pub metrics: RouterMetrics,
    pub epoch: Epoch,
    pub sent: Instant,
}

impl Remote {
    pub fn send(&mut self, layer: LayerId, routed: &Routed<'_>, span: &Span) {
        let now = Instant::now();
        let placement = self.placement.load_full();
        self.epoch = placement.epoch();
        self.sent = now;
        let parent = propagate::traceparent(span);
        self.exchange.begin(layer, routed.rows, routed.experts, parent, &placement, now);
        self.flush(&placement, now);
    }

    pub fn wait(&mut self) -> Result<(), ExchangeError> {
        let start = Instant::now();
        while !self.exchange.is_done() {
            let now = Instant::now();
            let pause = self.exchange.next_timeout().saturating_duration_since(now);
            let event = match self.events.try_recv() {
                Ok(event) => Some(Some(event)),
                Err(_) => self.pump.run_for(pause.min(LOOK_AROUND), self.events.recv()),
            };
            let now = Instant::now();
            let placement = self.placement.load_full();
            if placement.epoch() != self.epoch {
                self.epoch = placement.epoch();
                self.exchange.on_placement(&placement, now);
            }
            match event {
                Some(Some(LinkEvent::Reply(node, reply))) => {
                    match self.exchange.on_reply(node, reply, &placement, now)? {
                        Taken::Result(took) => {
                            self.links[node.0 as usize].observe(took);
                            self.metrics.round_trip.observe(took.as_secs_f64());
                        }
                        Taken::Retried => self.count_retry(node.0),
                        Taken::Stale => _ = self.metrics.stale_replies.inc(),
                    }
                }
                Some(Some(LinkEvent::Down(node))) => {
                    let before = self.exchange.retries();
                    self.exchange.on_down(node, &placement, now);
                    if self.exchange.retries() > before {
                        self.count_retry(node.0);
                    }
                }
                None => self.exchange.on_time(&placement, now)?,
                // The links hold the senders for as long as the process serves.
                Some(None) => std::thread::sleep(LOOK_AROUND),
            }
            self.flush(&placement, now);
        }
        self.metrics.exchange_wait.observe(start.elapsed().as_secs_f64());
        self.metrics.exchange.observe(self.sent.elapsed().as_secs_f64());
        Ok(())
    }

    pub fn row(&self, slot: usize) -> &[u8] {
        self.exchange.row(slot)
    }

    pub fn in_flight(&self) -> usize {
        self.exchange.in_flight()
    }

    fn count_retry(&self, node: u16) {
        self.metrics.retries.inc();
        let retries = &self.links[node as usize].retries;
        retries.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }

    /// Writes what the exchange wants sent. What cannot be written is routed
    /// anew, which may put more into the outbox or park it.
    fn flush(&mut self, placement: &Placement, now: Instant) {
        while let Some(out) = self.exchange.outbox.pop() {
            let link = &self.links[out.node.0 as usize];
            if let Err(frame) = link.send(out.frame) {
                self.exchange.on_unsent(Ticket(frame.ticket), placement, now);
            }
        }
        // The bytes leave now, before this thread computes on.
        self.pump.turn();
    }
}
