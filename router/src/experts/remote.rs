//! Experts behind links: runs one [`Exchange`] per layer and micro-batch against
//! the real clock, the current placement and the nodes' streams.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use bytes::Bytes;
use mesh::link::{LinkEvent, LinkHandle, Writer};
use mesh::membership::Links;
use mesh::placement::{NodeIndex, Placement};
use mesh::pump::{AWAKE, Pump, TURN, Turn};
use mesh::shared::rings::{KNOCK, Put};
use mesh::telemetry::propagate;
use model::rows::encode_fp8;
use model::{Routed, Share};
use proto::v1::DispatchReply;
use proto::wire::{self, Leaving};
use proto::{Epoch, ExpertId, LayerId, Ticket};
use tokio::sync::mpsc::Receiver;
use tracing::Span;

use crate::exchange::{Encoded, Exchange, LANES, Outgoing, Taken, Wire, lane};
use crate::experts::spin::Spin;
use crate::health::{Counts, SharedHealth};
use crate::history::{History, list};
use crate::metrics::RouterMetrics;

/// How often a waiting engine looks whether the placement has changed.
const LOOK_AROUND: Duration = Duration::from_millis(20);

/// See the module's text.
pub struct Remote {
    /// Each with the time its rows were sent.
    pub lanes: [(Exchange, Instant); LANES],
    pub links: Links,
    pub events: Receiver<LinkEvent>,
    pub looking: Looking,
    /// Where the streams live; driven here and nowhere else.
    pub pump: Pump,
    /// Each lane's rows in the form that frames carry, where it is not the class's.
    pub coded: [Vec<u8>; LANES],
    /// What frames are written into; its memory comes back when they have left.
    pub wire: Leaving,
    pub placement: Arc<ArcSwap<Placement>>,
    pub metrics: RouterMetrics,
    pub epoch: Epoch,
    pub spin: Spin,
    pub health: SharedHealth,
    /// As of the last look.
    pub any_hung: bool,
    /// What of its counts the metrics know.
    pub counted: Counts,
    pub history: History,
}

/// How the rings of nodes on this host are looked into.
pub struct Looking {
    /// Whose turn it is.
    next: usize,
    /// When the streams had theirs.
    turned: Instant,
    /// Frames that go by their streams, used again.
    leaving: Vec<Leaves>,
}

impl Looking {
    pub fn new(now: Instant) -> Self {
        Self { next: 0, turned: now, leaving: Vec::new() }
    }
}

/// A message that leaves by a stream: a frame, or a knock.
struct Leaves {
    link: Arc<LinkHandle>,
    stream: Arc<Writer>,
    message: Bytes,
    /// The frame, and what the metrics count of it.
    frame: Option<(Ticket, Encoded)>,
}

impl Remote {
    pub fn send(&mut self, lane: usize, layer: LayerId, routed: &Routed<'_>, span: &Span) {
        let now = Instant::now();
        let placement = self.placement.load_full();
        self.look(&placement, now);
        let parent = propagate::traceparent(span);
        let (exchange, sent) = &mut self.lanes[lane];
        *sent = now;
        let shape = exchange.shape();
        self.coded[lane].clear();
        if shape.wire == Wire::Fp8 {
            let hidden = shape.hidden as usize;
            encode_fp8(shape.numerics(), routed.rows, hidden, &mut self.coded[lane]);
        }
        exchange.begin(layer, routed.experts, parent, &placement, now);
        let (slots, epoch) = (routed.experts.len(), self.epoch.0);
        self.history.record(
            "layer",
            format_args!("\"lane\":{lane},\"layer\":{layer},\"slots\":{slots},\"epoch\":{epoch}"),
        );
        self.flush(lane, routed, &placement, now);
    }

    /// Returns when the lane's rows are all there. What comes for another lane is
    /// taken meanwhile; what it has to send again waits for its own call, which has its rows.
    pub fn wait(&mut self, waited: usize, routed: &Routed<'_>) {
        let start = Instant::now();
        let placement = self.placement.load_full();
        self.lanes.iter_mut().for_each(|(exchange, _)| exchange.on_listen(start));
        self.flush(waited, routed, &placement, start);
        let idle = !self.lanes[waited].0.is_done();
        let awake = idle && self.spin.choose(routed.count);
        while !self.lanes[waited].0.is_done() {
            let event = match self.next() {
                Some(event) => Some(event),
                None => {
                    let now = Instant::now();
                    let next = self.next_timeout();
                    if awake && now < next.min(start + AWAKE) {
                        std::thread::yield_now();
                        self.turn(now);
                        continue;
                    }
                    self.listen(now, next)
                }
            };
            let now = Instant::now();
            let placement = self.placement.load_full();
            self.look(&placement, now);
            match event {
                Some(LinkEvent::Reply(node, reply)) => self.take(node, reply, &placement, now),
                Some(LinkEvent::Down { node, damaged }) => {
                    self.lose(node, damaged, &placement, now);
                }
                None => {
                    for (exchange, _) in self.lanes.iter_mut().filter(|(e, _)| !e.is_done()) {
                        exchange.on_time(&placement, now);
                    }
                }
            }
            self.flush(waited, routed, &placement, now);
        }
        if self.history.is_on() {
            let gaps = list(self.lanes[waited].0.gaps().iter().map(|gap| gap.slot));
            self.history.record("done", format_args!("\"lane\":{waited},\"gaps\":{gaps}"));
        }
        let waited_for = start.elapsed();
        if idle {
            self.spin.observe(routed.count, awake, waited_for);
        }
        self.metrics.exchange_wait.observe(waited_for.as_secs_f64());
        self.metrics.exchange.observe(self.lanes[waited].1.elapsed().as_secs_f64());
        self.count();
    }

    /// What has come, if anything has.
    fn next(&mut self) -> Option<LinkEvent> {
        let links = self.links.load();
        let (before, from) = links.split_at(self.looking.next.min(links.len()));
        for link in from.iter().chain(before) {
            if let Some(reply) = link.look() {
                // Who has replied is last to be looked at again.
                self.looking.next = usize::from(link.node.0) + 1;
                return Some(LinkEvent::Reply(link.node, reply));
            }
        }
        self.events.try_recv().ok()
    }

    /// Gives the streams their turn, if it is time: at once, if anything can come by them alone.
    fn turn(&mut self, now: Instant) {
        let due = now.duration_since(self.looking.turned) >= TURN;
        if due || self.links.load().iter().any(|link| link.needs_socket()) {
            self.pump.turn();
            self.looking.turned = now;
        }
    }

    /// When an exchange has something to do again, whatever comes. One is open.
    fn next_timeout(&self) -> Instant {
        let open = self.lanes.iter().filter(|(exchange, _)| !exchange.is_done());
        open.map(|(exchange, _)| exchange.next_timeout()).min().unwrap_or_else(Instant::now)
    }

    /// What comes before `next`, if anything does.
    fn listen(&mut self, now: Instant, next: Instant) -> Option<LinkEvent> {
        let pause = next.saturating_duration_since(now).min(LOOK_AROUND);
        if !self.links.load().iter().all(|link| link.sleep()) {
            return self.next();
        }
        match self.pump.run_for(pause, self.events.recv()) {
            Some(Some(event)) => Some(event),
            // The links hold the senders for as long as the process serves.
            Some(None) => {
                std::thread::sleep(LOOK_AROUND);
                None
            }
            // Nobody is late whose answer only has to be read.
            None => {
                self.pump.turn();
                self.events.try_recv().ok()
            }
        }
    }

    fn take(&mut self, node: NodeIndex, reply: DispatchReply, placement: &Placement, now: Instant) {
        let ticket = reply.ticket;
        self.metrics.count_rows(reply.rows.len(), reply.shared_bytes > 0);
        let exchange = &mut self.lanes[lane(Ticket(ticket))].0;
        let before = exchange.missing();
        let taken = exchange.on_reply(node, reply, placement, now);
        if self.history.is_on() {
            let what = match taken {
                Taken::Result(_) => "taken",
                Taken::Retried => "refused",
                Taken::Late => "late",
                Taken::Stale => "stale",
            };
            let (from, applied) = (node.0, before - exchange.missing());
            let but = list(exchange.doubled().iter());
            let said = format_args!(
                "\"ticket\":{ticket},\"node\":{from},\"applied\":{applied},\"but\":{but}"
            );
            self.history.record(what, said);
        }
        match taken {
            Taken::Result(took) => {
                if let Some(link) = self.links.get(node) {
                    link.observe(took);
                }
                self.metrics.round_trip.observe(took.as_secs_f64());
            }
            Taken::Retried => self.count_retry(node),
            Taken::Late => _ = self.metrics.late_replies.inc(),
            Taken::Stale => _ = self.metrics.stale_replies.inc(),
        }
    }

    /// The node's stream has ended.
    fn lose(&mut self, node: NodeIndex, damaged: bool, placement: &Placement, now: Instant) {
        self.metrics.damaged.inc_by(u64::from(damaged));
        let before = self.retries();
        for (exchange, _) in &mut self.lanes {
            exchange.on_down(node, placement, now);
        }
        self.health.lock().down(node, now);
        if self.retries() > before {
            self.count_retry(node);
        }
    }

    /// Somebody who gives signs of life owns the expert.
    pub fn has(&self, layer: LayerId, expert: ExpertId) -> bool {
        let placement = self.placement.load();
        let links = self.links.load();
        let lives =
            |node: &NodeIndex| links.get(usize::from(node.0)).is_some_and(|link| !link.is_hung());
        placement.owners(layer, expert).iter().any(lives)
    }

    pub fn abandon(&mut self) {
        let now = Instant::now();
        self.lanes.iter_mut().for_each(|(exchange, _)| exchange.settle(now));
    }

    /// Brings the metrics up to what the policy has counted.
    fn count(&mut self) {
        let now = self.health.lock().counts;
        if now == self.counted {
            return;
        }
        let before = std::mem::replace(&mut self.counted, now);
        let metrics = &self.metrics;
        metrics.frames.inc_by(now.first - before.first);
        metrics.late.inc_by(now.late - before.late);
        metrics.again.inc_by(now.again - before.again);
        metrics.spared.inc_by(now.spared - before.spared);
        metrics.ejections.inc_by(now.ejections - before.ejections);
    }

    pub fn share(&self, lane: usize, slot: usize) -> Share<'_> {
        self.lanes[lane].0.share(slot)
    }

    pub fn row(&self, lane: usize, slot: usize) -> &[u8] {
        self.lanes[lane].0.row(slot)
    }

    pub fn in_flight(&self) -> usize {
        self.lanes.iter().map(|(exchange, _)| exchange.in_flight()).sum()
    }

    fn retries(&self) -> u64 {
        self.lanes.iter().map(|(exchange, _)| exchange.retries()).sum()
    }

    /// Tells the open exchanges of a placement that they do not know yet, and
    /// of nodes that hang.
    fn look(&mut self, placement: &Placement, now: Instant) {
        let links = self.links.load();
        let any_hung = links.iter().any(|link| link.is_hung());
        if any_hung || self.any_hung {
            self.any_hung = any_hung;
            for link in links.iter() {
                let hung = link.is_hung();
                if self.health.lock().set_hung(link.node, hung, now) && hung {
                    for (exchange, _) in &mut self.lanes {
                        exchange.on_hung(link.node, placement, now);
                    }
                }
            }
        }
        if placement.epoch() != self.epoch {
            self.epoch = placement.epoch();
            for (exchange, _) in &mut self.lanes {
                exchange.on_placement(placement, now);
            }
        }
    }

    fn count_retry(&self, node: NodeIndex) {
        self.metrics.retries.inc();
        if let Some(link) = self.links.get(node) {
            link.retries.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
    }

    /// Writes what the exchange wants sent. What cannot be written is routed
    /// anew, which may put more into the outbox or park it.
    fn flush(&mut self, lane: usize, routed: &Routed<'_>, placement: &Placement, now: Instant) {
        if self.lanes[lane].0.outbox.is_empty() {
            return;
        }
        let mut leaving = std::mem::take(&mut self.looking.leaving);
        self.wire.begin();
        while !self.lanes[lane].0.outbox.is_empty() {
            self.put(lane, routed, &mut leaving, placement, now);
            match leaving.is_empty() {
                true => self.turn(now),
                false => self.leave(lane, &mut leaving, placement, now),
            }
        }
        self.looking.leaving = leaving;
    }

    /// Puts frames where their nodes see them at once, the others into `leaving`.
    fn put(
        &mut self,
        lane: usize,
        routed: &Routed<'_>,
        leaving: &mut Vec<Leaves>,
        placement: &Placement,
        now: Instant,
    ) {
        let Self { lanes, coded, links, wire, metrics, history, .. } = self;
        let exchange = &mut lanes[lane].0;
        let rows = match exchange.shape().wire {
            Wire::Exact => routed.rows,
            Wire::Fp8 => &coded[lane],
        };
        while let Some(Outgoing { node, ticket }) = exchange.outbox.pop() {
            let link = links.get(node);
            let stream = link.as_ref().and_then(|link| link.stream());
            let room = stream.as_ref().and_then(|stream| stream.room());
            let buffer = wire.buffer();
            let Some(encoded) = exchange.encode(ticket, rows, routed.weights, room, buffer) else {
                // Its slots have been given up since.
                continue;
            };
            if stream.as_ref().is_some_and(|stream| stream.is_sealed()) {
                wire::seal(buffer);
            }
            let message = wire.take();
            let Some((link, stream)) = link.zip(stream) else {
                exchange.on_unsent(ticket, placement, now);
                continue;
            };
            match link.put(&stream, &message) {
                Put::Not => {
                    let frame = Some((ticket, encoded));
                    leaving.push(Leaves { link, stream, message, frame });
                    continue;
                }
                Put::Knock => leaving.push(Leaves { link, stream, message: KNOCK, frame: None }),
                Put::There => {}
            }
            metrics.count_rows(encoded.bytes, encoded.shared);
            if history.is_on() {
                record_sent(history, exchange, lane, ticket);
            }
        }
    }

    /// Hands messages to their streams.
    fn leave(
        &mut self,
        lane: usize,
        leaving: &mut Vec<Leaves>,
        placement: &Placement,
        now: Instant,
    ) {
        let Self { lanes, metrics, history, .. } = self;
        let exchange = &mut lanes[lane].0;
        // On the pump, where waking the connections costs no system call.
        self.pump.run(async {
            for Leaves { link, stream, message, frame } in leaving.drain(..) {
                let Some((ticket, encoded)) = frame else {
                    stream.knock();
                    continue;
                };
                if !link.send(&stream, message) {
                    if let Some(room) = stream.room() {
                        room.release(ticket.0);
                    }
                    exchange.on_unsent(ticket, placement, now);
                    continue;
                }
                metrics.count_rows(encoded.bytes, encoded.shared);
                if history.is_on() {
                    record_sent(history, exchange, lane, ticket);
                }
            }
            // The bytes leave now, before this thread computes on.
            Turn::default().await;
        });
        self.looking.turned = now;
    }
}

fn record_sent(history: &History, exchange: &Exchange, lane: usize, ticket: Ticket) {
    let Some(sent) = exchange.sending(ticket) else { return };
    history.record(
        "sent",
        format_args!(
            "\"ticket\":{},\"lane\":{lane},\"node\":{},\"layer\":{},\"epoch\":{},\
             \"attempt\":{},\"slots\":{},\"experts\":{}",
            ticket.0,
            sent.node.0,
            sent.layer,
            sent.epoch.0,
            sent.attempt.0,
            list(sent.slots.iter()),
            list(sent.experts.iter()),
        ),
    );
}
