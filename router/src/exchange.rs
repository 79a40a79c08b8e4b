//! One layer's exchange with the expert nodes, from routed rows to gathered
//! results: which slot went to which node, what came back, what to send again.
//! Sans-IO: time, placement and replies come in as arguments; what to send comes
//! out of [`Exchange::outbox`], to be written by [`Exchange::encode`]. It
//! simulates as it runs. Its vectors are used again from layer to layer.
//!
//! Retry is per slot, not per frame: after a failure the slots of the lost
//! frame are grouped anew over whichever nodes own their experts now. Every
//! sending has its own ticket, so a late reply to a replaced ticket matches
//! nothing and is dropped; a slot's result is taken once.

mod form;
mod route;

use std::time::{Duration, Instant};

use bytes::Bytes;
use mesh::placement::{NodeIndex, Placement};
use model::rows::convert;
use model::{Numerics, Share};
use proto::frame::{self, FrameError};
use proto::v1::{DispatchFrame, DispatchReply, ErrorCode};
use proto::{Attempt, Epoch, ExpertId, LayerId, Ticket};

pub use form::{Combine, Shape, Wire, class};

/// Failures of the same slots after which sending them again is paced.
const PROMPT_RESENDS: u32 = 2;

/// Exchanges that may be open at once over the same streams: one per micro-batch.
pub const LANES: usize = 2;

/// The lane whose exchange gave out `ticket`.
pub fn lane(ticket: Ticket) -> usize {
    (ticket.0 % LANES as u64) as usize
}

/// How long an exchange waits for what.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For a reply, before the frame goes to another owner, if there is one.
    pub attempt: Duration,
    /// For an expert without a live owner, and for the exchange as a whole.
    pub expert_wait: Duration,
    /// Before a frame is offered again to a node that was busy.
    pub busy: Duration,
}

/// Why the results of a layer cannot be had. The step fails, nothing else.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExchangeError {
    #[error("layer {layer} expert {expert} has no live owner, waited {waited:?}")]
    NoOwner { layer: LayerId, expert: ExpertId, waited: Duration },
    #[error("layer {layer}: no reply from node {node} within {waited:?}")]
    NoReply { layer: LayerId, node: u16, waited: Duration },
    #[error("layer {layer}: node {node} refused the frame: {message}")]
    Refused { layer: LayerId, node: u16, code: ErrorCode, message: String },
}

/// A frame to be encoded for a node's stream.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing {
    pub node: NodeIndex,
    pub ticket: Ticket,
}

/// What a reply meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// It was awaited; how long it took.
    Result(Duration),
    /// It was awaited and said no; its slots go elsewhere.
    Retried,
    /// It answers nothing that is open: late, doubled or made up.
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
}

/// Slots that wait for an owner or for a busy node.
struct Parked {
    slots: Vec<u32>,
    attempt: Attempt,
    /// When to try again; `None` waits for the placement to change.
    retry_at: Option<Instant>,
}

/// Where a slot's result lies, or the sum that it is the first of.
#[derive(Clone, Copy, Default)]
struct Location {
    reply: u32,
    row: u32,
}

/// The row of a slot that is in an earlier slot's sum.
const ELSEWHERE: u32 = u32::MAX;

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
    retries: u64,
    /// Everything of a frame but its rows, for encoding; holds the layer's trace context.
    head: DispatchFrame,
    work: route::Work,
    pub outbox: Vec<Outgoing>,
}

impl Exchange {
    /// `lane` is below [`LANES`] and tells the tickets of exchanges apart that
    /// share their nodes' streams.
    pub fn new(shape: Shape, patience: Patience, now: Instant, lane: usize) -> Self {
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
        self.started = now;
        for open in self.open.drain(..) {
            self.work.recycle(open.slots);
        }
        self.parked.clear();
        self.replies.clear();
        self.located.clear();
        self.located.resize(experts.len(), Location::default());
        self.missing = experts.len();
        self.outbox.clear();
        let mut slots = self.work.slots();
        slots.extend(0..experts.len() as u32);
        self.route(slots, Attempt(0), None, placement, now);
    }

    /// Every slot has its result.
    pub fn is_done(&self) -> bool {
        self.missing == 0
    }

    /// What a slot brings to its row's sum. Only after [`Self::is_done`].
    pub fn share(&self, slot: usize) -> Share<'_> {
        match (self.located[slot].row, self.shape.combine) {
            (ELSEWHERE, _) => Share::Elsewhere,
            (_, Combine::Router) => Share::Result(self.row(slot)),
            (_, Combine::Node) => Share::Sum(self.row(slot)),
        }
    }

    /// The result row of a slot, as the class has it. Only after [`Self::is_done`],
    /// and of a slot that is not in another's sum.
    pub fn row(&self, slot: usize) -> &[u8] {
        let Location { reply, row } = self.located[slot];
        let width = self.shape.row_bytes();
        let from = row as usize * width;
        &self.replies[reply as usize][from..from + width]
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
        let attempts = self.open.iter().map(|open| open.sent + self.patience.attempt);
        let retries = self.parked.iter().filter_map(|parked| parked.retry_at);
        let end = self.started + self.patience.expert_wait;
        attempts.chain(retries).min().map_or(end, |first| first.min(end))
    }

    /// Takes a reply from `node`.
    ///
    /// # Errors
    /// A refusal that sending again cannot mend.
    pub fn on_reply(
        &mut self,
        node: NodeIndex,
        reply: DispatchReply,
        placement: &Placement,
        now: Instant,
    ) -> Result<Taken, ExchangeError> {
        let ticket = Ticket(reply.ticket);
        // Another node's ticket is as good as none: whoever says so is confused or lies.
        let mine = |open: &Open| open.ticket == ticket && open.node == node;
        let Some(at) = self.open.iter().position(mine) else { return Ok(Taken::Stale) };
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
            Ok(()) if frame::all_finite(&reply.rows, dtype) => {
                self.locate(&open.slots);
                self.missing -= open.slots.len();
                self.replies.push(self.in_class(reply.rows));
                self.work.recycle(open.slots);
                Ok(Taken::Result(now - open.sent))
            }
            Ok(()) => {
                let message = "its results are not finite".to_owned();
                self.refused(open, ErrorCode::NonFinite, &message, placement, now)
            }
            Err(error) => {
                // A wrong reply is the node's fault, not the frame's: ask another.
                let message = bad_reply(&error);
                self.refused(open, ErrorCode::Unspecified, &message, placement, now)
            }
        }
    }

    /// Notes where the results of a reply's slots lie, which is to be the next.
    fn locate(&mut self, slots: &[u32]) {
        let reply = self.replies.len() as u32;
        let (mut row, mut token) = (0, None);
        for &slot in slots {
            let summed = self.shape.combine == Combine::Node
                && token.replace(slot / self.shape.top_k) == Some(slot / self.shape.top_k);
            self.located[slot as usize] = match summed {
                true => Location { reply, row: ELSEWHERE },
                false => Location { reply, row },
            };
            row += u32::from(!summed);
        }
    }

    /// Results as the class has them.
    fn in_class(&self, rows: Bytes) -> Bytes {
        if self.shape.replied() == self.shape.dtype {
            return rows;
        }
        let mut wide = Vec::with_capacity(rows.len() * 2);
        convert(Numerics::Bf16, self.shape.numerics(), &rows, &mut wide);
        wide.into()
    }

    fn refused(
        &mut self,
        open: Open,
        code: ErrorCode,
        message: &str,
        placement: &Placement,
        now: Instant,
    ) -> Result<Taken, ExchangeError> {
        let elsewhere = self.has_other_owner(&open, placement);
        match code {
            ErrorCode::Busy if !elsewhere => {
                self.parked.push(Parked {
                    slots: open.slots,
                    attempt: open.attempt,
                    retry_at: Some(now + self.patience.busy),
                });
            }
            // The node is leaving or never had it; the placement will say so.
            ErrorCode::Busy
            | ErrorCode::Draining
            | ErrorCode::StalePlacement
            | ErrorCode::NotResident
            | ErrorCode::VersionMismatch
            | ErrorCode::Expired => self.resend(open, placement, now),
            ErrorCode::Unspecified | ErrorCode::NonFinite if elsewhere => {
                self.resend(open, placement, now);
            }
            ErrorCode::Unspecified | ErrorCode::NonFinite | ErrorCode::Invalid => {
                return Err(ExchangeError::Refused {
                    layer: self.layer,
                    node: open.node.0,
                    code,
                    message: message.to_owned(),
                });
            }
        }
        self.retries += 1;
        Ok(Taken::Retried)
    }

    fn has_other_owner(&self, open: &Open, placement: &Placement) -> bool {
        open.slots.iter().all(|&slot| {
            let expert = ExpertId(self.experts[slot as usize]);
            placement.owners(self.layer, expert).iter().any(|&owner| owner != open.node)
        })
    }

    /// The node's stream ended: what it had not answered goes elsewhere.
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
            self.resend(open, placement, now);
        }
    }

    /// The first resends go out at once; a frame that nobody takes is paced.
    fn resend(&mut self, open: Open, placement: &Placement, now: Instant) {
        let Open { node, slots, attempt: Attempt(failed), .. } = open;
        let attempt = Attempt(failed + 1);
        if failed < PROMPT_RESENDS {
            self.route(slots, attempt, Some(node), placement, now);
        } else {
            let retry_at = Some(now + self.patience.busy);
            self.parked.push(Parked { slots, attempt, retry_at });
        }
    }

    /// The placement changed: what waits for an owner may have one now.
    pub fn on_placement(&mut self, placement: &Placement, now: Instant) {
        for parked in std::mem::take(&mut self.parked) {
            self.route(parked.slots, parked.attempt, None, placement, now);
        }
    }

    /// Lets time pass.
    ///
    /// # Errors
    /// Patience ran out for the exchange.
    pub fn on_time(&mut self, placement: &Placement, now: Instant) -> Result<(), ExchangeError> {
        let waited = now - self.started;
        if waited >= self.patience.expert_wait {
            return Err(self.gave_up(waited));
        }
        let slow: Vec<Ticket> = self
            .open
            .iter()
            .filter(|open| now - open.sent >= self.patience.attempt)
            .map(|open| open.ticket)
            .collect();
        for ticket in slow {
            let Some(at) = self.find(ticket) else { continue };
            if self.has_other_owner(&self.open[at], placement) {
                self.on_unsent(ticket, placement, now);
            } else {
                // Nobody else can compute it, so go on waiting for this node.
                self.open[at].sent = now;
            }
        }
        for parked in std::mem::take(&mut self.parked) {
            match parked.retry_at {
                Some(at) if at <= now => {
                    self.route(parked.slots, parked.attempt, None, placement, now);
                }
                _ => self.parked.push(parked),
            }
        }
        Ok(())
    }

    fn find(&self, ticket: Ticket) -> Option<usize> {
        self.open.iter().position(|open| open.ticket == ticket)
    }

    fn gave_up(&self, waited: Duration) -> ExchangeError {
        let layer = self.layer;
        match (self.parked.first(), self.open.first()) {
            (Some(parked), _) => ExchangeError::NoOwner {
                layer,
                expert: ExpertId(self.experts[parked.slots[0] as usize]),
                waited,
            },
            (None, open) => ExchangeError::NoReply {
                layer,
                node: open.map_or(u16::MAX, |open| open.node.0),
                waited,
            },
        }
    }
}

fn bad_reply(error: &FrameError) -> String {
    format!("its reply does not fit the frame: {error}")
}

#[cfg(test)]
mod tests;
