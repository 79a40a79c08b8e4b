//! What becomes of slots whose frame is late, whose node hangs, or whose result
//! nobody can give: they are asked of another owner as well, or become gaps.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh::placement::{NodeIndex, Placement};
use proto::v1::{DispatchReply, ErrorCode};
use proto::{Attempt, ExpertId, LayerId, Ticket};

use super::{Exchange, Location, Open, Taken};

/// After which an unpaid second sending is thought of again.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// The least that an engine listens before it calls an answer late, as it does
/// not hear while it computes.
const LISTEN: Duration = Duration::from_millis(20);

/// Why a result cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lack {
    #[error("layer {layer} expert {expert} has no live owner")]
    NoOwner { layer: LayerId, expert: ExpertId },
    #[error("layer {layer} expert {expert}: its only live owner, node {node}, hangs")]
    Hung { layer: LayerId, expert: ExpertId, node: u16 },
    #[error("layer {layer} expert {expert}: no answer from node {node} within {waited:?}")]
    NoReply { layer: LayerId, expert: ExpertId, node: u16, waited: Duration },
    #[error("layer {layer} expert {expert}: nobody took its rows within {waited:?}")]
    NotTaken { layer: LayerId, expert: ExpertId, waited: Duration },
    #[error("layer {layer}: node {node} refused the frame: {message}")]
    Refused { layer: LayerId, node: u16, code: ErrorCode, message: String },
}

impl Lack {
    /// The expert that may be there again later, if that is what is lacking.
    pub fn expert(&self) -> Option<(LayerId, ExpertId)> {
        match *self {
            Self::NoOwner { layer, expert } | Self::Hung { layer, expert, .. } => {
                Some((layer, expert))
            }
            Self::NoReply { .. } | Self::NotTaken { .. } | Self::Refused { .. } => None,
        }
    }

    /// Nobody says that the row itself is wrong: it can do without the result.
    pub fn is_absence(&self) -> bool {
        !matches!(self, Self::Refused { .. })
    }
}

/// A slot (row × top_k + slot) whose result cannot be had.
#[derive(Clone, Debug)]
pub struct Gap {
    pub slot: u32,
    pub lack: Arc<Lack>,
}

impl Exchange {
    /// The engine hears its nodes from now on. While it computed it did not, so
    /// nobody is late for that.
    pub fn on_listen(&mut self, now: Instant) {
        for open in &mut self.open {
            open.due = open.due.map(|due| due.max(now + LISTEN));
        }
    }

    /// The node answers no sign of life: others are asked without further waiting.
    pub fn on_hung(&mut self, node: NodeIndex, placement: &Placement, now: Instant) {
        for open in self.open.iter_mut().filter(|open| open.node == node) {
            open.due = Some(now);
        }
        if !self.is_done() {
            self.ask_others(placement, now);
        }
    }

    /// Asks other owners for the slots of frames that are late, and those of
    /// which it is time to be asked elsewhere as well.
    pub(super) fn ask_others(&mut self, placement: &Placement, now: Instant) {
        let passed = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        let slow = |open: &&Open| passed(open.due) || passed(open.hedge);
        let slow: Vec<Ticket> = self.open.iter().filter(slow).map(|open| open.ticket).collect();
        for ticket in slow {
            let Some(at) = self.find(ticket) else { continue };
            let open = &mut self.open[at];
            open.hedge = None;
            if passed(open.due) {
                open.due = None;
                let node = open.node;
                // Its slots may have come from elsewhere meanwhile; then nobody waits for it.
                if self.wants_any(at) {
                    self.health.lock().overdue(node, now);
                    self.ask_another(at, true, placement, now);
                }
            } else if self.wants_any(at) {
                self.ask_another(at, false, placement, now);
            }
        }
    }

    fn wants_any(&self, at: usize) -> bool {
        self.open[at].slots.iter().any(|&slot| self.lacks(slot))
    }

    /// Sends the slots of an open frame to another owner too. The frame stays open.
    fn ask_another(&mut self, at: usize, late: bool, placement: &Placement, now: Instant) {
        let Open { node, attempt, .. } = self.open[at];
        let (mut elsewhere, mut here) = (self.work.slots(), self.work.slots());
        for &slot in self.open[at].slots.iter().filter(|&&slot| self.is_uncovered(slot, at)) {
            let also = self.owned_by_another(slot, node, placement);
            if also { &mut elsewhere } else { &mut here }.push(slot);
        }
        if !here.is_empty() && self.health.lock().is_hung(node) {
            // Nobody else has them, and it will be a while.
            let lack = |layer, expert| Lack::Hung { layer, expert, node: node.0 };
            self.give_up_each(here, lack, now);
        } else {
            if late && !here.is_empty() {
                // Nobody else can compute them, so go on waiting for this node.
                let count = self.open[at].slots.len();
                let time = self.health.lock().deadline(node, count, attempt.0 + 1);
                self.open[at].due = Some(now + time);
            }
            self.work.recycle(here);
        }
        if !elsewhere.is_empty() && self.health.lock().may_send_again(now) {
            self.retries += 1;
            self.route(elsewhere, Attempt(attempt.0 + 1), Some(node), placement, now);
            return;
        }
        if late
            && !elsewhere.is_empty()
            && let Some(open) = self.open.get_mut(at)
        {
            open.due = Some(now + LOOK_AGAIN);
        }
        self.work.recycle(elsewhere);
    }

    /// Takes back what has come while it waited to be sent, for its time or in the outbox: an answer that
    /// was late may be there before its slots are sent again, or before it is the turn of a micro-batch's frames.
    pub(super) fn withdraw(&mut self, placement: &Placement, now: Instant) {
        for parked in &mut self.parked {
            parked.slots.retain(|&slot| self.located[slot as usize].is_awaited());
        }
        for came in self.parked.extract_if(.., |parked| parked.slots.is_empty()) {
            self.work.recycle(came.slots);
        }
        for at in (0..self.outbox.len()).rev() {
            let Some(index) = self.find(self.outbox[at].ticket) else { continue };
            if self.open[index].slots.iter().all(|&slot| self.lacks(slot)) {
                continue;
            }
            self.outbox.swap_remove(at);
            let Open { node, mut slots, attempt, .. } = self.open.swap_remove(index);
            self.health.lock().lost(node, slots.len(), now);
            slots.retain(|&slot| self.lacks(slot));
            self.post(node, slots, attempt, placement, now);
        }
    }

    /// Nobody but the frame at `but` is to bring the slot's result in time.
    pub(super) fn is_uncovered(&self, slot: u32, but: usize) -> bool {
        let carries = |open: &Open| open.slots.binary_search(&slot).is_ok();
        let parked = |slots: &[u32]| slots.binary_search(&slot).is_ok();
        self.lacks(slot)
            && !self
                .open
                .iter()
                .enumerate()
                .any(|(at, open)| at != but && open.due.is_some() && carries(open))
            && !self.parked.iter().any(|waiting| parked(&waiting.slots))
    }

    /// What of a frame that was taken out still needs a result that no other
    /// frame is about to bring.
    pub(super) fn still_wanted(&mut self, mut open: Open) -> Option<Open> {
        open.slots.retain(|&slot| self.is_uncovered(slot, usize::MAX));
        if open.slots.is_empty() {
            self.work.recycle(open.slots);
            return None;
        }
        Some(open)
    }

    /// A reply that matches no open frame.
    pub(super) fn unasked(
        &mut self,
        node: NodeIndex,
        reply: &DispatchReply,
        now: Instant,
    ) -> Taken {
        let mut health = self.health.lock();
        if health.late_reply(node, Ticket(reply.ticket), reply.error.is_none(), now) {
            return Taken::Late;
        }
        health.unasked(node, now);
        Taken::Stale
    }

    /// Some row of the frame makes values that are not finite. Halves go out
    /// again until it is found; the others get their results.
    pub(super) fn narrow_down(
        &mut self,
        open: Open,
        message: &str,
        placement: &Placement,
        now: Instant,
    ) {
        let Open { node, mut slots, attempt, .. } = open;
        let top_k = self.shape.top_k;
        let row = |slot: u32| slot / top_k;
        if row(slots[0]) == row(slots[slots.len() - 1]) {
            let (layer, code) = (self.layer, ErrorCode::NonFinite);
            let lack = Lack::Refused { layer, node: node.0, code, message: message.to_owned() };
            return self.give_up(slots, &lack, now);
        }
        let middle = row(slots[slots.len() / 2]);
        let mut cut = slots.partition_point(|&slot| row(slot) < middle);
        if cut == 0 {
            cut = slots.partition_point(|&slot| row(slot) <= middle);
        }
        let second = slots.split_off(cut);
        for half in [slots, second] {
            self.route(half, Attempt(attempt.0 + 1), None, placement, now);
        }
    }

    /// Slots that nobody owns.
    pub(super) fn lack_owners(&mut self, slots: Vec<u32>, now: Instant) {
        self.give_up_each(slots, |layer, expert| Lack::NoOwner { layer, expert }, now);
    }

    /// Patience ran out for all that is missing.
    pub(super) fn give_up_all(&mut self, waited: Duration, now: Instant) {
        let open: Vec<(NodeIndex, Vec<u32>)> =
            self.open.iter().map(|open| (open.node, open.slots.clone())).collect();
        for (node, slots) in open {
            let node = node.0;
            let lack = |layer, expert| Lack::NoReply { layer, expert, node, waited };
            self.give_up_each(slots, lack, now);
        }
        for parked in std::mem::take(&mut self.parked) {
            let lack = |layer, expert| Lack::NotTaken { layer, expert, waited };
            self.give_up_each(parked.slots, lack, now);
        }
    }

    /// Makes gaps of `slots`, each for the lack of its expert.
    fn give_up_each(
        &mut self,
        slots: Vec<u32>,
        lack: impl Fn(LayerId, ExpertId) -> Lack,
        now: Instant,
    ) {
        let mut last = None::<Arc<Lack>>;
        let mut expert = None;
        for &slot in &slots {
            let own = self.experts[slot as usize];
            if expert != Some(own) {
                expert = Some(own);
                last = Some(Arc::new(lack(self.layer, ExpertId(own))));
            }
            if let Some(lack) = &last {
                self.gap(slot, lack.clone());
            }
        }
        self.gave_up(slots, now);
    }

    /// Makes gaps of `slots`, all for one reason.
    pub(super) fn give_up(&mut self, slots: Vec<u32>, lack: &Lack, now: Instant) {
        let lack = Arc::new(lack.clone());
        for &slot in &slots {
            self.gap(slot, lack.clone());
        }
        self.gave_up(slots, now);
    }

    fn gap(&mut self, slot: u32, lack: Arc<Lack>) {
        let location = &mut self.located[slot as usize];
        if location.is_awaited() {
            location.reply = Location::GAP;
            self.missing -= 1;
            self.gaps.push(Gap { slot, lack });
        }
    }

    fn gave_up(&mut self, slots: Vec<u32>, now: Instant) {
        let any = !slots.is_empty();
        self.work.recycle(slots);
        if any && self.missing == 0 {
            self.settle(now);
        }
    }

    /// Forgets what is open or waits: nobody wants it any more.
    pub(crate) fn settle(&mut self, now: Instant) {
        let mut health = self.health.lock();
        for open in self.open.drain(..) {
            let count = open.slots.len();
            if self.outbox.iter().any(|out| out.ticket == open.ticket) {
                health.lost(open.node, count, now);
            } else {
                health.leave(open.ticket, open.node, count, open.sent);
            }
            self.work.recycle(open.slots);
        }
        drop(health);
        for parked in self.parked.drain(..) {
            self.work.recycle(parked.slots);
        }
        self.outbox.clear();
        self.missing = 0;
    }
}
