//! A step's plan on the device: one copy at its beginning, and where everything is in it.

use std::ops::Range;
use std::sync::Arc;

use super::super::error::GpuError;
use super::super::schedule::{Group, Launch, schedule};
use super::driver::Driver;
use super::memory::{Buffer, Host, Slice};
use super::op::SPAN;
use super::plan::{Bounds, Plan, Wave};

/// What tables begin at multiples of.
const ALIGN: usize = 16;

/// Rows that are multiplied at once with one weight, or each stretch of them with a head's own.
#[derive(Clone, Debug, Default)]
pub struct Scheduled {
    /// First byte of the groups.
    pub(super) at: usize,
    pub(super) launches: Vec<Launch>,
    pub(super) slots: usize,
    pub(super) rows: usize,
}

/// Where the tables of a step begin.
#[derive(Clone, Copy, Debug, Default)]
struct Begins {
    tokens: usize,
    rotations: usize,
    places: usize,
    rows: usize,
    pages: usize,
    spans: usize,
    wanted: usize,
}

/// See the module's text.
pub struct Tables {
    buffer: Buffer,
    host: Host,
    bounds: Bounds,
    heads: usize,
    /// Rows that a step may have, and those that it may want logits of at once.
    most: (usize, usize),
    begins: Begins,
    rows: usize,
    wanted: usize,
    waves: Vec<Wave>,
    /// All rows.
    all: Scheduled,
    /// All rows of each head.
    by_head: Scheduled,
    /// The first rows of a buffer of their own, by how many.
    first: Vec<Scheduled>,
}

impl Tables {
    /// For steps of up to `rows` rows at positions below `positions`, and logits of up to `logits` rows at once.
    pub fn new(
        driver: &Arc<dyn Driver>,
        bounds: Bounds,
        heads: usize,
        positions: usize,
        (rows, logits): (usize, usize),
    ) -> Result<Tables, GpuError> {
        let row = 4 + bounds.rope * 4 + 8 + 12 + 4;
        let spans = positions.div_ceil(SPAN) * 8;
        let pages = positions.div_ceil(bounds.page_tokens) * 4;
        let groups = (logits + 1 + heads) * Group::BYTES;
        let len = rows.saturating_mul(row + spans + pages).saturating_add(groups + 16 * ALIGN);
        Ok(Tables {
            buffer: Buffer::new::<u8>(driver, "tables of a step", len)?,
            host: Host::new(driver, "tables of a step", len)?,
            bounds,
            heads,
            most: (rows, logits),
            begins: Begins::default(),
            rows: 0,
            wanted: 0,
            waves: Vec::new(),
            all: Scheduled::default(),
            by_head: Scheduled::default(),
            first: Vec::new(),
        })
    }

    pub fn bounds(&self) -> &Bounds {
        &self.bounds
    }

    /// Rows of the step.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Rows that a step may have.
    pub fn most_rows(&self) -> usize {
        self.most.0
    }

    /// Takes a step's rows to the device. Panics if they are more than it was made for.
    pub fn send(&mut self, plan: &Plan) -> Result<(), GpuError> {
        let (rows, logits) = self.most;
        assert!(plan.len() <= rows, "{} rows of a step of {rows}", plan.len());
        let mut writer = Writer { bytes: self.host.bytes_mut()?, end: 0 };
        let scheduled = |writer: &mut Writer<'_>, work: &[(u32, usize)]| {
            let plan = schedule(work);
            let at = writer.put(plan.groups.iter().map(|group| group.to_bytes()));
            let rows = work.iter().map(|(_, rows)| rows).sum();
            Scheduled { at, launches: plan.launches, slots: work.len(), rows }
        };
        let begins = Begins {
            tokens: writer.words(plan.tokens.iter().copied()),
            rotations: writer.words(plan.rotations.iter().map(|x| x.to_bits())),
            places: writer.words(plan.places.iter().flat_map(|place| place.words())),
            rows: writer.words(plan.rows.iter().flat_map(|row| row.words())),
            pages: writer.words(plan.pages.iter().copied()),
            spans: writer.words(plan.spans.iter().flat_map(|span| span.words())),
            wanted: writer.words(plan.wanted.iter().copied()),
        };
        let each: Vec<_> = (0..self.heads as u32).map(|head| (head, plan.len())).collect();
        self.all = scheduled(&mut writer, &[(0, plan.len())]);
        self.by_head = scheduled(&mut writer, &each);
        self.first.clear();
        for count in 1..=logits.min(plan.wanted.len()) {
            self.first.push(scheduled(&mut writer, &[(0, count)]));
        }
        let len = writer.end;
        self.begins = begins;
        (self.rows, self.wanted) = (plan.len(), plan.wanted.len());
        self.waves.clone_from(&plan.waves);
        self.host.send(&self.buffer, len)
    }

    pub(super) fn waves(&self) -> &[Wave] {
        &self.waves
    }

    pub fn all(&self) -> &Scheduled {
        &self.all
    }

    pub fn by_head(&self) -> &Scheduled {
        &self.by_head
    }

    /// The first `count` rows of what wanted rows were gathered in, if that many are wanted.
    pub fn first(&self, count: usize) -> Option<&Scheduled> {
        self.first.get(count.checked_sub(1)?)
    }

    pub(super) fn groups(&self, scheduled: &Scheduled) -> Slice<'_> {
        self.at(scheduled.at)
    }

    fn at(&self, begin: usize) -> Slice<'_> {
        self.buffer.after(begin)
    }

    pub(super) fn tokens(&self) -> Slice<'_> {
        self.at(self.begins.tokens)
    }

    pub(super) fn rotations(&self) -> Slice<'_> {
        self.at(self.begins.rotations)
    }

    pub(super) fn places(&self) -> Slice<'_> {
        self.at(self.begins.places)
    }

    pub(super) fn row_table(&self) -> Slice<'_> {
        self.at(self.begins.rows)
    }

    pub(super) fn pages(&self) -> Slice<'_> {
        self.at(self.begins.pages)
    }

    pub(super) fn spans(&self) -> Slice<'_> {
        self.at(self.begins.spans)
    }

    /// Some of the rows that logits are wanted of. Panics if there are not so many.
    pub(super) fn wanted(&self, range: &Range<usize>) -> Slice<'_> {
        assert!(range.start <= range.end && range.end <= self.wanted, "wanted rows {range:?}");
        self.at(self.begins.wanted + range.start * 4)
    }
}

struct Writer<'a> {
    bytes: &'a mut [u8],
    end: usize,
}

impl Writer<'_> {
    fn words(&mut self, words: impl Iterator<Item = u32>) -> usize {
        self.put(words.map(u32::to_le_bytes))
    }

    /// Writes pieces one after the other; gives where they begin.
    fn put<const N: usize>(&mut self, pieces: impl Iterator<Item = [u8; N]>) -> usize {
        let at = self.end.next_multiple_of(ALIGN);
        self.end = at;
        for piece in pieces {
            self.bytes[self.end..self.end + N].copy_from_slice(&piece);
            self.end += N;
        }
        at
    }
}
