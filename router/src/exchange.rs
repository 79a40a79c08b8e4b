//! One layer's exchange with the expert nodes, from routed rows to gathered
//! results: which slot went to which node, what came back, what to send again.
//! Sans-IO: time, placement and replies come in as arguments; what to send comes
//! out of [`Exchange::outbox`], to be written by [`Exchange::encode`]. It
//! simulates as it runs. Its vectors are used again from layer to layer.
//!
//! Retry is per slot, not per frame: after a failure the slots of the lost
//! frame are grouped anew over whichever nodes own their experts now. Every
//! sending has its own ticket. A frame that is late stays open while another
//! owner is asked as well ([`again`]); of a slot's results the first is taken,
//! and what comes after that is dropped. Whom to ask, and when an answer is
//! late, is decided by [`crate::health`].
//!
//! A slot whose result cannot be had is a [`Gap`]: its row is lost, or does
//! without, as its sequence wants it, and the other rows go on.

mod again;
mod form;
mod gather;
mod route;

use std::time::{Duration, Instant};

use bytes::Bytes;
use mesh::placement::{NodeIndex, Placement};
use proto::frame::{self, FrameError};
use proto::v1::{DispatchFrame, DispatchReply, ErrorCode};
use proto::{Attempt, Epoch, ExpertId, LayerId, Ticket};

use crate::health::{Failure, SharedHealth};
pub use again::{Gap, Lack};
pub use form::{Combine, Shape, Wire, class};
use gather::Location;

/// Failures of the same slots after which sending them again is paced.
const PROMPT_RESENDS: u32 = 2;
/// How often the pause before a paced sending doubles.
const MOST_PAUSE: u32 = 5;

/// Exchanges that may be open at once over the same streams: one per micro-batch.
pub const LANES: usize = 2;

/// The lane whose exchange gave out `ticket`.
pub fn lane(ticket: Ticket) -> usize {
    (ticket.0 % LANES as u64) as usize
}

/// How long an exchange waits for what.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For the exchange as a whole.
    pub expert_wait: Duration,
    /// Before a frame is offered again to a node that was busy; longer each time.
    pub busy: Duration,
}

/// A frame to be encoded for a node's stream.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing {
    pub node: NodeIndex,
    pub ticket: Ticket,
}

/// What became of a frame's rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Encoded {
    pub bytes: usize,
    /// Whether they stand in shared memory.
    pub shared: bool,
}

/// What a reply meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// It was awaited; how long it took.
    Result(Duration),
    /// It was awaited and said no; its slots go elsewhere.
    Retried,
    /// The results are there already, from another node that was asked as well.
    Late,
    /// It answers nothing that was sent: doubled or made up.
    Stale,
}

/// What a frame carries, and under which epoch.
#[derive(Clone, Debug)]
pub struct Sending<'a> {
    pub node: NodeIndex,
    pub layer: LayerId,
    pub attempt: Attempt,
    pub epoch: Epoch,
    pub slots: &'a [u32],
    /// One per slot.
    pub experts: Vec<u32>,
}

/// Slots (row × top_k + slot, ascending) sent together to one node.
struct Open {
    ticket: Ticket,
    node: NodeIndex,
    slots: Vec<u32>,
    attempt: Attempt,
    epoch: Epoch,
    sent: Instant,
    /// When it is late; `None` once that has been seen.
    due: Option<Instant>,
    /// When another owner is asked as well although it is not late.
    hedge: Option<Instant>,
}

/// Slots that wait before they are sent again. All of them lack their results.
struct Parked {
    slots: Vec<u32>,
    attempt: Attempt,
    retry_at: Instant,
}

/// See the module's text. Reused from layer to layer.
pub struct Exchange {
    shape: Shape,
    patience: Patience,
    next_ticket: u64,
    layer: LayerId,
    experts: Vec<u32>,
    started: Instant,
    /// Few: about one per node that is asked.
    open: Vec<Open>,
    parked: Vec<Parked>,
    replies: Vec<Bytes>,
    located: Vec<Location>,
    missing: usize,
    gaps: Vec<Gap>,
    /// Slots of the last reply whose results were there already.
    doubled: Vec<u32>,
    /// The row that stands for a result that is not there.
    zeros: Vec<u8>,
    health: SharedHealth,
    retries: u64,
    /// Everything of a frame but its rows, for encoding; holds the layer's trace context.
    head: DispatchFrame,
    work: route::Work,
    pub outbox: Vec<Outgoing>,
}

impl Exchange {
    /// `lane` is below [`LANES`] and tells the tickets of exchanges apart that
    /// share their nodes' streams.
    pub fn new(
        shape: Shape,
        patience: Patience,
        health: SharedHealth,
        now: Instant,
        lane: usize,
    ) -> Self {
        Self {
            shape,
            patience,
            next_ticket: LANES as u64 + lane as u64,
            layer: LayerId(0),
            experts: Vec::new(),
            started: now,
            open: Vec::new(),
            parked: Vec::new(),
            replies: Vec::new(),
            located: Vec::new(),
            missing: 0,
            gaps: Vec::new(),
            doubled: Vec::new(),
            zeros: vec![0; shape.row_bytes()],
            health,
            retries: 0,
            head: DispatchFrame::default(),
            work: route::Work::default(),
            outbox: Vec::new(),
        }
    }

    /// Opens a layer's exchange: `experts[row * top_k + slot]`.
    pub fn begin(
        &mut self,
        layer: LayerId,
        experts: &[u32],
        traceparent: String,
        placement: &Placement,
        now: Instant,
    ) {
        self.layer = layer;
        self.experts.clear();
        self.experts.extend_from_slice(experts);
        self.head.traceparent = traceparent;
        self.settle(now);
        self.started = now;
        self.replies.clear();
        self.gaps.clear();
        self.located.clear();
        self.located.resize(experts.len(), Location::AWAITED);
        self.missing = experts.len();
        let mut slots = self.work.slots();
        slots.extend(0..experts.len() as u32);
        self.route(slots, Attempt(0), None, placement, now);
    }

    /// Every slot has its result or is a gap.
    pub fn is_done(&self) -> bool {
        self.missing == 0
    }

    /// Slots of the last reply whose results were not taken, for the history.
    pub fn doubled(&self) -> &[u32] {
        &self.doubled
    }

    /// The results that cannot be had.
    pub fn gaps(&self) -> &[Gap] {
        &self.gaps
    }

    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Slots that have no result yet.
    pub fn missing(&self) -> usize {
        self.missing
    }

    /// An open ticket's frame, for the history.
    pub fn sending(&self, ticket: Ticket) -> Option<Sending<'_>> {
        let open = &self.open[self.find(ticket)?];
        let Open { node, attempt, epoch, .. } = *open;
        let experts = open.slots.iter().map(|&slot| self.experts[slot as usize]);
        Some(Sending {
            node,
            layer: self.layer,
            attempt,
            epoch,
            slots: &open.slots,
            experts: experts.collect(),
        })
    }

    pub fn retries(&self) -> u64 {
        self.retries
    }

    pub fn in_flight(&self) -> usize {
        self.open.len()
    }

    /// When [`Self::on_time`] next has something to do.
    pub fn next_timeout(&self) -> Instant {
        let attempts = self.open.iter().flat_map(|open| [open.due, open.hedge]).flatten();
        let retries = self.parked.iter().map(|parked| parked.retry_at);
        let end = self.started + self.patience.expert_wait;
        attempts.chain(retries).min().map_or(end, |first| first.min(end))
    }

    /// Takes a reply from `node`.
    pub fn on_reply(
        &mut self,
        node: NodeIndex,
        reply: DispatchReply,
        placement: &Placement,
        now: Instant,
    ) -> Taken {
        let ticket = Ticket(reply.ticket);
        self.doubled.clear();
        // Another node's ticket is as good as none: whoever says so is confused or lies.
        let mine = |open: &Open| open.ticket == ticket && open.node == node;
        let Some(at) = self.open.iter().position(mine) else {
            return self.unasked(node, &reply, now);
        };
        let open = self.open.swap_remove(at);
        if let Some(error) = &reply.error {
            let code = ErrorCode::try_from(error.code).unwrap_or(ErrorCode::Unspecified);
            return self.refused(open, code, &error.message, placement, now);
        }
        let Shape { hidden, top_k, combine, .. } = self.shape;
        let dtype = self.shape.replied();
        let rows = match combine {
            Combine::Router => open.slots.len(),
            Combine::Node => open.slots.chunk_by(|a, b| a / top_k == b / top_k).count(),
        };
        match frame::check_reply(&reply, hidden, dtype, rows) {
            // Those from shared memory were looked at as they were copied.
            Ok(()) if reply.shared_bytes > 0 || frame::all_finite(&reply.rows, dtype) => {
                let took = now.saturating_duration_since(open.sent);
                self.health.lock().answered(node, open.slots.len(), took, now);
                let before = self.missing;
                self.locate(&open.slots);
                let used = self.missing < before;
                if used {
                    let rows = self.in_class(reply.rows);
                    self.replies.push(rows);
                }
                self.ask_for_the_rest(open.attempt, placement, now);
                self.withdraw(placement, now);
                self.work.recycle(open.slots);
                if self.missing == 0 {
                    self.settle(now);
                }
                if used { Taken::Result(took) } else { Taken::Late }
            }
            // What is wrong with the reply is the node's fault, not the frame's: ask another.
            Ok(()) => self.refused(open, ErrorCode::Unspecified, frame::NOT_FINITE, placement, now),
            Err(error) => {
                let message = bad_reply(&error);
                self.refused(open, ErrorCode::Unspecified, &message, placement, now)
            }
        }
    }

    fn refused(
        &mut self,
        open: Open,
        code: ErrorCode,
        message: &str,
        placement: &Placement,
        now: Instant,
    ) -> Taken {
        let failure = match code {
            ErrorCode::Unspecified => Some(Failure::Hard),
            // The placement will say so, or the rows are to blame.
            ErrorCode::Draining | ErrorCode::NonFinite => None,
            _ => Some(Failure::Soft),
        };
        self.health.lock().refused(open.node, open.slots.len(), failure, now);
        self.retries += 1;
        let Some(open) = self.still_wanted(open) else { return Taken::Retried };
        let elsewhere = self.has_other_owner(&open, placement);
        match code {
            ErrorCode::Busy => {
                if elsewhere && self.health.lock().may_send_again(now) {
                    self.resend(open, placement, now);
                } else {
                    self.park(open.slots, Attempt(open.attempt.0 + 1), now);
                }
            }
            // The node is leaving or never had it; the placement will say so.
            ErrorCode::Draining
            | ErrorCode::StalePlacement
            | ErrorCode::NotResident
            | ErrorCode::VersionMismatch
            | ErrorCode::Expired => self.resend(open, placement, now),
            // Once more elsewhere: it may be the node that is wrong.
            ErrorCode::Unspecified if elsewhere => self.resend(open, placement, now),
            ErrorCode::NonFinite | ErrorCode::Invalid if elsewhere && open.attempt.0 == 0 => {
                self.resend(open, placement, now);
            }
            ErrorCode::NonFinite => self.narrow_down(open, message, placement, now),
            ErrorCode::Unspecified | ErrorCode::Invalid => {
                let (node, message) = (open.node.0, message.to_owned());
                let lack = Lack::Refused { layer: self.layer, node, code, message };
                self.give_up(open.slots, &lack, now);
            }
        }
        Taken::Retried
    }

    fn has_other_owner(&self, open: &Open, placement: &Placement) -> bool {
        open.slots.iter().all(|&slot| self.owned_by_another(slot, open.node, placement))
    }

    fn owned_by_another(&self, slot: u32, than: NodeIndex, placement: &Placement) -> bool {
        let expert = ExpertId(self.experts[slot as usize]);
        placement.owners(self.layer, expert).iter().any(|&owner| owner != than)
    }

    /// The node's stream ended: what it had not answered goes elsewhere. The
    /// health of nodes hears of it from the caller, once for all exchanges.
    pub fn on_down(&mut self, node: NodeIndex, placement: &Placement, now: Instant) {
        let lost: Vec<Ticket> =
            self.open.iter().filter(|open| open.node == node).map(|open| open.ticket).collect();
        for ticket in lost {
            self.on_unsent(ticket, placement, now);
        }
    }

    /// A frame could not be written: its slots go elsewhere.
    pub fn on_unsent(&mut self, ticket: Ticket, placement: &Placement, now: Instant) {
        if let Some(at) = self.find(ticket) {
            let open = self.open.swap_remove(at);
            self.retries += 1;
            let mut health = self.health.lock();
            health.lost(open.node, open.slots.len(), now);
            health.must_send_again(now);
            drop(health);
            if let Some(open) = self.still_wanted(open) {
                self.resend(open, placement, now);
            }
        }
    }

    /// The first resends go out at once; a frame that nobody takes is paced.
    fn resend(&mut self, open: Open, placement: &Placement, now: Instant) {
        let Open { node, slots, attempt: Attempt(failed), .. } = open;
        let attempt = Attempt(failed + 1);
        if failed < PROMPT_RESENDS {
            self.route(slots, attempt, Some(node), placement, now);
        } else {
            self.park(slots, attempt, now);
        }
    }

    fn park(&mut self, slots: Vec<u32>, attempt: Attempt, now: Instant) {
        let pause = self.patience.busy * (1 << attempt.0.min(MOST_PAUSE));
        self.parked.push(Parked { slots, attempt, retry_at: now + pause });
    }

    /// The placement changed: what waits for an owner may have one now.
    pub fn on_placement(&mut self, placement: &Placement, now: Instant) {
        for Parked { slots, attempt, .. } in std::mem::take(&mut self.parked) {
            self.route(slots, attempt, None, placement, now);
        }
    }

    /// Lets time pass. When patience has run out, what is missing becomes gaps.
    pub fn on_time(&mut self, placement: &Placement, now: Instant) {
        if self.is_done() {
            return;
        }
        let waited = now - self.started;
        if waited >= self.patience.expert_wait {
            return self.give_up_all(waited, now);
        }
        self.ask_others(placement, now);
        for parked in std::mem::take(&mut self.parked) {
            if parked.retry_at <= now {
                self.route(parked.slots, parked.attempt, None, placement, now);
            } else {
                self.parked.push(parked);
            }
        }
    }

    fn find(&self, ticket: Ticket) -> Option<usize> {
        self.open.iter().position(|open| open.ticket == ticket)
    }
}

fn bad_reply(error: &FrameError) -> String {
    format!("its reply does not fit the frame: {error}")
}

#[cfg(test)]
mod tests;
