//! Which rows a step has: what kernels index memory by, so it is checked here, on the host, before it is theirs.

use std::ops::Range;

use super::op::{Place, Row, SPAN, Span};

/// What a step's rows have to keep to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Tokens are below it.
    pub vocab: usize,
    /// Pages are below it, and hold so many positions.
    pub pages: usize,
    pub page_tokens: usize,
    /// Values of a row's table of rotations.
    pub rope: usize,
    /// Parts of attention that there is room for at once.
    pub parts: usize,
}

/// Rows whose attention is computed at once, since their parts fit into the room for them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wave {
    pub rows: Range<usize>,
    pub spans: Range<usize>,
}

/// See the module's text. Its memory is used again.
#[derive(Debug, Default)]
pub struct Plan {
    pub(super) tokens: Vec<u32>,
    pub(super) rotations: Vec<f32>,
    pub(super) places: Vec<Place>,
    pub(super) rows: Vec<Row>,
    pub(super) pages: Vec<u32>,
    pub(super) spans: Vec<Span>,
    pub(super) wanted: Vec<u32>,
    pub(super) waves: Vec<Wave>,
    /// Parts of the wave that is being filled.
    parts: usize,
}

impl Plan {
    /// Forgets all rows.
    pub fn clear(&mut self) {
        let Plan { tokens, rotations, places, rows, pages, spans, wanted, waves, parts } = self;
        for words in [tokens, pages, wanted] {
            words.clear();
        }
        rotations.clear();
        places.clear();
        rows.clear();
        spans.clear();
        waves.clear();
        *parts = 0;
    }

    /// Rows so far.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Consecutive tokens of a sequence, the first at position `start`, whose pages are `pages`; `rotation` is a position's
    /// cosines and sines. Panics if something is out of bounds.
    pub fn chunk<'a>(
        &mut self,
        bounds: &Bounds,
        tokens: &[u32],
        start: usize,
        pages: impl Iterator<Item = u32>,
        rotation: impl Fn(usize) -> &'a [f32],
    ) {
        let first = self.pages.len();
        let needed = (start + tokens.len()).div_ceil(bounds.page_tokens);
        self.pages.extend(pages.take(needed));
        assert_eq!(self.pages.len() - first, needed, "pages of a sequence");
        assert!(
            self.pages[first..].iter().all(|page| (*page as usize) < bounds.pages),
            "a page of the cache"
        );
        assert!(tokens.iter().all(|token| (*token as usize) < bounds.vocab), "a token");
        for (at, &token) in tokens.iter().enumerate() {
            let position = start + at;
            let page = self.pages[first + position / bounds.page_tokens];
            let slot = (position % bounds.page_tokens) as u32;
            let table = rotation(at);
            assert_eq!(table.len(), bounds.rope, "a row's rotations");
            self.tokens.push(token);
            self.rotations.extend_from_slice(table);
            self.places.push(Place { page, slot });
            self.attend(bounds.parts, first as u32, position);
        }
    }

    /// A row's spans, in the last wave or in a new one.
    fn attend(&mut self, room: usize, pages: u32, position: usize) {
        let (row, span) = (self.rows.len(), self.spans.len());
        let count = position / SPAN + 1;
        // A row with one span leaves no part.
        let parts = if count > 1 { count } else { 0 };
        assert!(parts <= room, "{parts} parts of a row");
        if self.parts + parts > room || self.waves.is_empty() {
            self.waves.push(Wave { rows: row..row, spans: span..span });
            self.parts = 0;
        }
        self.rows.push(Row { pages, position: position as u32, part: self.parts as u32 });
        let spans = (0..count as u32).map(|index| Span { row: row as u32, index });
        self.spans.extend(spans);
        self.parts += parts;
        if let Some(wave) = self.waves.last_mut() {
            (wave.rows.end, wave.spans.end) = (row + 1, self.spans.len());
        }
    }

    /// Has the row's logits computed. Panics if there is no such row.
    pub fn want(&mut self, row: u32) {
        assert!((row as usize) < self.len(), "row {row}");
        self.wanted.push(row);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BOUNDS: Bounds = Bounds { vocab: 10, pages: 500, page_tokens: 16, rope: 2, parts: 5 };

    fn filled(chunks: &[(usize, usize)]) -> Plan {
        let mut plan = Plan::default();
        for &(start, count) in chunks {
            let pages = (0u32..).map(|page| 499 - page);
            plan.chunk(&BOUNDS, &vec![3; count], start, pages, |_| &[1.0, 0.0]);
        }
        plan
    }

    proptest! {
        /// Every row has its spans and its parts once, no wave has more parts than there is room for, and each row's entry
        /// goes to the page and slot of its position.
        #[test]
        fn rows_have_their_spans_parts_and_places(
            chunks in prop::collection::vec((0usize..2000, 1usize..40), 1..6),
        ) {
            let plan = filled(&chunks);
            let positions = chunks.iter().flat_map(|(start, count)| *start..start + count);
            let (mut row, mut span) = (0, 0);
            let rows: Vec<usize> = positions.collect();
            prop_assert_eq!((rows.len(), plan.places.len()), (plan.len(), plan.len()));
            for wave in &plan.waves {
                prop_assert_eq!((wave.rows.start, wave.spans.start), (row, span));
                let mut parts = 0;
                for at in wave.rows.clone() {
                    let Row { pages, position, part } = plan.rows[at];
                    prop_assert_eq!(position as usize, rows[at]);
                    let place = plan.places[at];
                    let page = plan.pages[pages as usize + rows[at] / 16];
                    prop_assert_eq!((place.page, place.slot), (page, position % 16));
                    let count = rows[at] / SPAN + 1;
                    for index in 0..count as u32 {
                        prop_assert_eq!(plan.spans[span], Span { row: at as u32, index });
                        span += 1;
                    }
                    if count > 1 {
                        prop_assert_eq!(part as usize, parts);
                        parts += count;
                    }
                    row += 1;
                }
                prop_assert!(parts <= BOUNDS.parts);
                prop_assert_eq!(wave.spans.end, span);
            }
            prop_assert_eq!((row, span), (plan.len(), plan.spans.len()));
        }
    }

    #[test]
    fn a_plan_is_used_again_and_what_is_out_of_bounds_is_not_taken() {
        let mut plan = filled(&[(5, 3)]);
        plan.want(2);
        plan.clear();
        assert!(plan.is_empty() && plan.wanted.is_empty() && plan.waves.is_empty());
        for bad in [
            |plan: &mut Plan| plan.chunk(&BOUNDS, &[10], 0, [1].into_iter(), |_| &[1.0, 0.0]),
            |plan: &mut Plan| plan.chunk(&BOUNDS, &[1], 0, [500].into_iter(), |_| &[1.0, 0.0]),
            |plan: &mut Plan| plan.chunk(&BOUNDS, &[1], 16, [1].into_iter(), |_| &[1.0, 0.0]),
            |plan: &mut Plan| plan.chunk(&BOUNDS, &[1], 0, [1].into_iter(), |_| &[1.0]),
            |plan: &mut Plan| plan.want(0),
        ] {
            let refused = std::panic::catch_unwind(|| bad(&mut Plan::default()));
            assert!(refused.is_err());
        }
    }
}
