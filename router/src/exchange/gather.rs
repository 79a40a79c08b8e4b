//! Where each slot's result lies among the replies, and what it brings to its
//! row's sum: a result of its own, or a node's sum of several.

use std::time::Instant;

use bytes::Bytes;
use mesh::placement::Placement;
use model::rows::convert;
use model::{Numerics, Share};
use proto::Attempt;

use super::{Combine, Exchange, Shape};

/// Where a slot's result lies, or the sum that it is the first of.
#[derive(Clone, Copy)]
pub(super) struct Location {
    /// [`Location::NOWHERE`] or [`Location::GAP`] if it is in no reply.
    pub(super) reply: u32,
    pub(super) row: u32,
}

impl Location {
    pub(super) const NOWHERE: u32 = u32::MAX;
    pub(super) const GAP: u32 = u32::MAX - 1;
    pub(super) const AWAITED: Self = Self { reply: Self::NOWHERE, row: 0 };

    pub(super) fn is_awaited(self) -> bool {
        self.reply == Self::NOWHERE
    }
}
/// The row of a slot that is in an earlier slot's sum.
const ELSEWHERE: u32 = u32::MAX;

impl Exchange {
    /// The slot has neither a result nor been given up.
    pub(super) fn lacks(&self, slot: u32) -> bool {
        self.located[slot as usize].is_awaited()
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
    /// and of a slot that is not in another's sum; zeros for a gap.
    pub fn row(&self, slot: usize) -> &[u8] {
        let Location { reply, row } = self.located[slot];
        if reply == Location::GAP {
            return &self.zeros;
        }
        let width = self.shape.row_bytes();
        let from = row as usize * width;
        &self.replies[reply as usize][from..from + width]
    }

    /// Notes where the results of a reply's slots lie, which is to be the next. Of a
    /// slot's results the first is taken; a sum is taken if all of it is lacking.
    pub(super) fn locate(&mut self, slots: &[u32]) {
        let reply = self.replies.len() as u32;
        let Shape { top_k, combine, .. } = self.shape;
        let of_one_row = |a: &u32, b: &u32| combine == Combine::Node && a / top_k == b / top_k;
        for (row, group) in (0..).zip(slots.chunk_by(of_one_row)) {
            if !group.iter().all(|&slot| self.lacks(slot)) {
                self.doubled.extend_from_slice(group);
                continue;
            }
            for (at, &slot) in group.iter().enumerate() {
                let row = if at == 0 { row } else { ELSEWHERE };
                self.located[slot as usize] = Location { reply, row };
            }
            self.missing -= group.len();
        }
    }

    /// What is still lacking of sums that could not be taken is asked for anew.
    pub(super) fn ask_for_the_rest(
        &mut self,
        attempt: Attempt,
        placement: &Placement,
        now: Instant,
    ) {
        if self.shape.combine == Combine::Router || self.doubled.is_empty() {
            return;
        }
        let mut rest = self.work.slots();
        rest.extend(self.doubled.iter().filter(|&&slot| self.is_uncovered(slot, usize::MAX)));
        if rest.is_empty() {
            return self.work.recycle(rest);
        }
        self.retries += 1;
        self.route(rest, Attempt(attempt.0 + 1), None, placement, now);
    }

    /// Results as the class has them.
    pub(super) fn in_class(&self, rows: Bytes) -> Bytes {
        if self.shape.replied() == self.shape.dtype {
            return rows;
        }
        let mut wide = Vec::with_capacity(rows.len() * 2);
        convert(Numerics::Bf16, self.shape.numerics(), &rows, &mut wide);
        wide.into()
    }
}
