//! From slots to frames: which owner is asked for which slots, and how a frame
//! lies in the buffer that goes to its stream.

use std::time::Instant;

use bytes::{BufMut as _, BytesMut};
use mesh::placement::{NodeIndex, Placement};
use mesh::shared::{Place, Room};
use proto::frame;
use proto::wire;
use proto::{Attempt, ExpertId, Ticket};

use super::{Combine, Encoded, Exchange, LANES, Open, Outgoing, Shape, Wire};

/// Vectors that routing uses again.
#[derive(Default)]
pub(super) struct Work {
    /// Per expert, in one call of `route`: nothing yet, or whom it was given to.
    chosen: Vec<Option<Option<NodeIndex>>>,
    per_node: Vec<(NodeIndex, Vec<u32>)>,
    spare: Vec<Vec<u32>>,
}

impl Work {
    /// An empty list of slots.
    pub fn slots(&mut self) -> Vec<u32> {
        self.spare.pop().unwrap_or_default()
    }

    pub fn recycle(&mut self, mut slots: Vec<u32>) {
        slots.clear();
        self.spare.push(slots);
    }
}

impl Exchange {
    /// Groups slots by an owner of their expert and puts one frame per node in
    /// the outbox. An expert's slots stay together. Those without an owner are gaps.
    pub(super) fn route(
        &mut self,
        slots: Vec<u32>,
        attempt: Attempt,
        avoid: Option<NodeIndex>,
        placement: &Placement,
        now: Instant,
    ) {
        let mut work = std::mem::take(&mut self.work);
        let (mut ownerless, mut avoided) = (work.slots(), work.slots());
        let shared = self.health.clone();
        let mut health = shared.lock();
        let most = slots.iter().map(|&slot| self.experts[slot as usize]).max();
        work.chosen.clear();
        work.chosen.resize(most.map_or(0, |most| most as usize + 1), None);
        for &slot in &slots {
            let expert = self.experts[slot as usize];
            let node = *work.chosen[expert as usize].get_or_insert_with(|| {
                let given = |node: NodeIndex| {
                    let mine = work.per_node.iter().find(|(n, _)| *n == node);
                    mine.map_or(0, |(_, slots)| slots.len())
                };
                let owners = placement.owners(self.layer, ExpertId(expert));
                health.choose(owners, avoid, given, now)
            });
            match node {
                None if placement.owners(self.layer, ExpertId(expert)).is_empty() => {
                    ownerless.push(slot);
                }
                None => avoided.push(slot),
                Some(node) => match work.per_node.iter_mut().find(|(n, _)| *n == node) {
                    Some((_, slots)) => slots.push(slot),
                    None => {
                        let mut first = work.spare.pop().unwrap_or_default();
                        first.push(slot);
                        work.per_node.push((node, first));
                    }
                },
            }
        }
        drop(health);
        work.recycle(slots);
        let mut per_node = std::mem::take(&mut work.per_node);
        self.work = work;
        for (node, slots) in per_node.drain(..) {
            self.post(node, slots, attempt, placement, now);
        }
        self.work.per_node = per_node;
        if avoided.is_empty() {
            self.work.recycle(avoided);
        } else {
            // Only the avoided node owns them: it gets another chance, after a
            // pause in which the placement may learn that it is gone.
            self.park(avoided, attempt, now);
        }
        self.lack_owners(ownerless, now);
    }

    /// Frames for `slots` (ascending), each small enough for one message.
    pub(super) fn post(
        &mut self,
        node: NodeIndex,
        mut slots: Vec<u32>,
        attempt: Attempt,
        placement: &Placement,
        now: Instant,
    ) {
        let Shape { hidden, dtype, top_k, .. } = self.shape;
        let most = frame::max_rows(hidden, dtype, top_k);
        while !slots.is_empty() {
            let mut rows = 0;
            let mut last = u32::MAX;
            let end = slots.iter().position(|slot| {
                let row = slot / top_k;
                rows += usize::from(row != last);
                last = row;
                rows > most
            });
            let later = match end {
                Some(end) => slots.split_off(end),
                None => self.work.slots(),
            };
            let ticket = Ticket(self.next_ticket);
            self.next_ticket += LANES as u64;
            let epoch = placement.epoch();
            let mut health = self.health.lock();
            health.sent(node, slots.len(), attempt.0 == 0, now);
            let due = Some(now + health.deadline(node, slots.len(), attempt.0));
            let first = attempt.0 == 0;
            let hedge = health.hedge_after(node, slots.len()).filter(|_| first).map(|t| now + t);
            drop(health);
            self.open.push(Open { ticket, node, slots, attempt, epoch, sent: now, due, hedge });
            self.outbox.push(Outgoing { node, ticket });
            slots = later;
        }
        self.work.recycle(slots);
    }

    /// Appends the frame of an open ticket to `buffer`, as it goes to the
    /// stream. `rows` are the layer's as they are sent ([`Shape::sent`]), `weights` its
    /// slots', which only a node that sums needs. They are put into the stream's shared memory
    /// in place of the frame if there is `room` for them. None if it is not open.
    pub fn encode(
        &mut self,
        ticket: Ticket,
        rows: &[u8],
        weights: &[f32],
        room: Option<&Room>,
        buffer: &mut BytesMut,
    ) -> Option<Encoded> {
        let open = self.open.iter().find(|open| open.ticket == ticket)?;
        let Shape { hidden, top_k, wire, combine, .. } = self.shape;
        let dtype = self.shape.sent();
        let end = self.started + self.patience.expert_wait;
        let timeout = end.saturating_duration_since(open.sent).as_micros().max(1);
        let head = &mut self.head;
        head.ticket = ticket.0;
        head.attempt = open.attempt.0;
        head.layer = self.layer.0;
        head.epoch = open.epoch.0;
        head.dtype = dtype as i32;
        head.hidden = hidden;
        head.timeout_us = u32::try_from(timeout).unwrap_or(u32::MAX);
        head.experts.clear();
        head.experts.extend(open.slots.iter().map(|&slot| self.experts[slot as usize]));
        head.slot_counts.clear();
        let each_row = open.slots.chunk_by(|a, b| a / top_k == b / top_k);
        head.slot_counts.extend(each_row.clone().map(|slots| slots.len() as u32));
        head.reply_dtype = match wire {
            Wire::Exact => 0,
            Wire::Fp8 => self.shape.replied() as i32,
        };
        head.weights.clear();
        if combine == Combine::Node {
            head.weights.extend(open.slots.iter().map(|&slot| weights[slot as usize]));
        }
        let width = dtype.row_bytes(hidden as usize);
        let each_row = each_row.map(|slots| {
            let from = (slots[0] / top_k) as usize * width;
            &rows[from..from + width]
        });
        let results = match combine {
            Combine::Router => open.slots.len(),
            Combine::Node => head.slot_counts.len(),
        };
        let results = results * self.shape.replied().row_bytes(hidden as usize);
        let bytes = head.slot_counts.len() * width;
        let place = room.and_then(|room| room.place(ticket.0, bytes, results));
        let shared = place.is_some();
        head.shared = place.as_ref().map(Place::said);
        match place {
            Some(mut place) => {
                each_row.for_each(|row| place.put(row));
                wire::put(buffer, head, 0, |_| {});
            }
            None => wire::put(buffer, head, bytes, |buffer| {
                each_row.for_each(|row| buffer.put_slice(row));
            }),
        }
        Some(Encoded { bytes, shared })
    }
}
