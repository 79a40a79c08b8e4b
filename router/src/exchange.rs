//! One layer's exchange with the expert nodes, from routed rows to gathered
//! results: which slot went to which node, what came back, what to send again.
//! Sans-IO: time, placement and replies come in as arguments, frames to send
//! come out of [`Exchange::outbox`]. It simulates as it runs.
//!
//! Retry is per slot, not per frame: after a failure the slots of the lost
//! frame are grouped anew over whichever nodes own their experts now. Every
//! sending has its own ticket, so a late reply to a replaced ticket matches
//! nothing and is dropped; a slot's result is taken once.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use mesh::placement::{NodeIndex, Placement};
use proto::frame::{self, FrameError};
use proto::v1::{DispatchFrame, DispatchReply, Dtype, ErrorCode};
use proto::{Attempt, ExpertId, LayerId, Ticket};

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

/// What does not change from layer to layer.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub hidden: u32,
    pub dtype: Dtype,
    pub top_k: u32,
}

impl Shape {
    pub fn row_bytes(self) -> usize {
        self.hidden as usize * self.dtype.size()
    }
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

/// A frame for a node's stream.
#[derive(Debug)]
pub struct Outgoing {
    pub node: NodeIndex,
    pub frame: DispatchFrame,
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

/// Slots (row × top_k + slot, ascending) sent together to one node.
struct Open {
    node: NodeIndex,
    slots: Vec<u32>,
    attempt: Attempt,
    sent: Instant,
}

/// Slots that wait for an owner or for a busy node.
struct Parked {
    slots: Vec<u32>,
    attempt: Attempt,
    /// When to try again; `None` waits for the placement to change.
    retry_at: Option<Instant>,
}

/// Where a slot's result lies.
#[derive(Clone, Copy, Default)]
struct Location {
    reply: u32,
    row: u32,
}

/// See the module's text. Reused from layer to layer.
pub struct Exchange {
    shape: Shape,
    patience: Patience,
    next_ticket: u64,
    layer: LayerId,
    rows: Bytes,
    experts: Vec<u32>,
    traceparent: String,
    started: Instant,
    open: HashMap<Ticket, Open>,
    parked: Vec<Parked>,
    replies: Vec<Bytes>,
    located: Vec<Location>,
    missing: usize,
    retries: u64,
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
            rows: Bytes::new(),
            experts: Vec::new(),
            traceparent: String::new(),
            started: now,
            open: HashMap::new(),
            parked: Vec::new(),
            replies: Vec::new(),
            located: Vec::new(),
            missing: 0,
            retries: 0,
            outbox: Vec::new(),
        }
    }

    /// Opens a layer's exchange: `rows` in wire form, `experts[row * top_k + slot]`.
    pub fn begin(
        &mut self,
        layer: LayerId,
        rows: &[u8],
        experts: &[u32],
        traceparent: String,
        placement: &Placement,
        now: Instant,
    ) {
        self.layer = layer;
        self.rows = Bytes::copy_from_slice(rows);
        self.experts.clear();
        self.experts.extend_from_slice(experts);
        self.traceparent = traceparent;
        self.started = now;
        self.open.clear();
        self.parked.clear();
        self.replies.clear();
        self.located.clear();
        self.located.resize(experts.len(), Location::default());
        self.missing = experts.len();
        self.outbox.clear();
        let slots = (0..experts.len() as u32).collect();
        self.route(slots, Attempt(0), None, placement, now);
    }

    /// Every slot has its result.
    pub fn is_done(&self) -> bool {
        self.missing == 0
    }

    /// The result row of a slot, in wire form. Only after [`Self::is_done`].
    pub fn row(&self, slot: usize) -> &[u8] {
        let Location { reply, row } = self.located[slot];
        let width = self.shape.row_bytes();
        let from = row as usize * width;
        &self.replies[reply as usize][from..from + width]
    }

    pub fn retries(&self) -> u64 {
        self.retries
    }

    pub fn in_flight(&self) -> usize {
        self.open.len()
    }

    /// When [`Self::on_time`] next has something to do.
    pub fn next_timeout(&self) -> Instant {
        let attempts = self.open.values().map(|open| open.sent + self.patience.attempt);
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
        let open = match self.open.remove(&ticket) {
            Some(open) if open.node == node => open,
            Some(open) => {
                // Another node's ticket: whoever says so is confused or lies.
                self.open.insert(ticket, open);
                return Ok(Taken::Stale);
            }
            None => return Ok(Taken::Stale),
        };
        if let Some(error) = &reply.error {
            let code = ErrorCode::try_from(error.code).unwrap_or(ErrorCode::Unspecified);
            return self.refused(open, code, &error.message, placement, now);
        }
        match frame::check_reply(&reply, self.shape.hidden, self.shape.dtype, open.slots.len()) {
            Ok(()) if frame::all_finite(&reply.rows, self.shape.dtype) => {
                let at = self.replies.len() as u32;
                for (row, &slot) in open.slots.iter().enumerate() {
                    self.located[slot as usize] = Location { reply: at, row: row as u32 };
                }
                self.missing -= open.slots.len();
                self.replies.push(reply.rows);
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
            self.open.iter().filter(|(_, open)| open.node == node).map(|(&t, _)| t).collect();
        for ticket in lost {
            self.on_unsent(ticket, placement, now);
        }
    }

    /// A frame could not be written: its slots go elsewhere.
    pub fn on_unsent(&mut self, ticket: Ticket, placement: &Placement, now: Instant) {
        if let Some(open) = self.open.remove(&ticket) {
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
            .filter(|(_, open)| now - open.sent >= self.patience.attempt)
            .map(|(&ticket, _)| ticket)
            .collect();
        for ticket in slow {
            let open = &self.open[&ticket];
            if self.has_other_owner(open, placement) {
                self.on_unsent(ticket, placement, now);
            } else if let Some(open) = self.open.get_mut(&ticket) {
                // Nobody else can compute it, so go on waiting for this node.
                open.sent = now;
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

    fn gave_up(&self, waited: Duration) -> ExchangeError {
        let layer = self.layer;
        match (self.parked.first(), self.open.values().next()) {
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

    /// Groups slots by an owner of their expert and puts one frame per node in
    /// the outbox. An expert's slots stay together, on its least loaded owner.
    fn route(
        &mut self,
        slots: Vec<u32>,
        attempt: Attempt,
        avoid: Option<NodeIndex>,
        placement: &Placement,
        now: Instant,
    ) {
        let mut chosen: HashMap<u32, Option<NodeIndex>> = HashMap::new();
        let mut per_node: Vec<(NodeIndex, Vec<u32>)> = Vec::new();
        let mut ownerless = Vec::new();
        for slot in slots {
            let expert = self.experts[slot as usize];
            let node = *chosen.entry(expert).or_insert_with(|| {
                let load = |node: &NodeIndex| {
                    per_node.iter().find(|(n, _)| n == node).map_or(0, |(_, slots)| slots.len())
                };
                let owners = placement.owners(self.layer, ExpertId(expert)).iter();
                owners.copied().filter(|&owner| Some(owner) != avoid).min_by_key(load)
            });
            match node {
                None => ownerless.push(slot),
                Some(node) => match per_node.iter_mut().find(|(n, _)| *n == node) {
                    Some((_, slots)) => slots.push(slot),
                    None => per_node.push((node, vec![slot])),
                },
            }
        }
        if !ownerless.is_empty() {
            // If only the avoided node owns them it gets another chance, after a
            // pause in which the placement may learn that it is gone.
            let retry_at = avoid.map(|_| now + self.patience.busy);
            self.parked.push(Parked { slots: ownerless, attempt, retry_at });
        }
        for (node, slots) in per_node {
            self.post(node, slots, attempt, placement, now);
        }
    }

    /// Frames for `slots` (ascending), each small enough for one message.
    fn post(
        &mut self,
        node: NodeIndex,
        slots: Vec<u32>,
        attempt: Attempt,
        placement: &Placement,
        now: Instant,
    ) {
        let Shape { hidden, dtype, top_k } = self.shape;
        let most = frame::max_rows(hidden, dtype, top_k);
        let mut rest = slots.as_slice();
        while !rest.is_empty() {
            let mut rows = 0;
            let mut last = u32::MAX;
            let end = rest
                .iter()
                .position(|slot| {
                    let row = slot / top_k;
                    rows += usize::from(row != last);
                    last = row;
                    rows > most
                })
                .unwrap_or(rest.len());
            let (now_sent, later) = rest.split_at(end);
            rest = later;
            let ticket = Ticket(self.next_ticket);
            self.next_ticket += LANES as u64;
            let frame = self.frame(ticket, attempt, now_sent, placement);
            self.open.insert(ticket, Open { node, slots: now_sent.to_vec(), attempt, sent: now });
            self.outbox.push(Outgoing { node, frame });
        }
    }

    fn frame(
        &self,
        ticket: Ticket,
        attempt: Attempt,
        slots: &[u32],
        placement: &Placement,
    ) -> DispatchFrame {
        let width = self.shape.row_bytes();
        let mut counts: Vec<u32> = Vec::new();
        let mut rows = BytesMut::new();
        let mut last = u32::MAX;
        for &slot in slots {
            let row = slot / self.shape.top_k;
            if row != last {
                last = row;
                counts.push(0);
                let from = row as usize * width;
                rows.extend_from_slice(&self.rows[from..from + width]);
            }
            *counts.last_mut().expect("a row was just begun") += 1;
        }
        let timeout = self.patience.expert_wait.as_micros();
        DispatchFrame {
            ticket: ticket.0,
            attempt: attempt.0,
            layer: self.layer.0,
            epoch: placement.epoch().0,
            dtype: self.shape.dtype as i32,
            hidden: self.shape.hidden,
            timeout_us: u32::try_from(timeout).unwrap_or(u32::MAX),
            slot_counts: counts,
            experts: slots.iter().map(|&slot| self.experts[slot as usize]).collect(),
            versions: Vec::new(),
            traceparent: self.traceparent.clone(),
            rows: rows.freeze(),
        }
    }
}

fn bad_reply(error: &FrameError) -> String {
    format!("its reply does not fit the frame: {error}")
}

#[cfg(test)]
mod tests;
