//! Regroups the rows of queued frames by expert, so that an expert's weights
//! are read once for all routers and requests that want it. Pure: no queue, no
//! clock, no weights.

use std::ops::Range;

use proto::v1::DispatchFrame;

/// Where one result row belongs: slot `slot` of frame `frame` in the batch,
/// computed from that frame's row `row`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub frame: u32,
    pub row: u32,
    pub slot: u32,
    /// Whether it is its row's first slot.
    pub first: bool,
}

/// The rows of one expert in one version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    pub layer: u32,
    pub expert: u32,
    pub version: u32,
    /// Which of the batch's places are its rows.
    pub places: Range<usize>,
}

/// A batch by expert; used again for the next.
#[derive(Default)]
pub struct Batch {
    pub groups: Vec<Group>,
    keyed: Vec<((u32, u32, u32), Place)>,
}

impl Batch {
    /// Groups every slot of `frames`, ordered by layer and expert, and within a
    /// group by frame and row. The frames must have passed `proto::frame::check`.
    pub fn group<'a>(&mut self, frames: impl IntoIterator<Item = &'a DispatchFrame>) {
        let Self { groups, keyed } = self;
        keyed.clear();
        for (frame, content) in frames.into_iter().enumerate() {
            let mut slot = 0;
            for (row, &count) in content.slot_counts.iter().enumerate() {
                for place in 0..count {
                    let expert = content.experts[slot];
                    let version = content.versions.get(slot).copied().unwrap_or(0);
                    let place = Place {
                        frame: frame as u32,
                        row: row as u32,
                        slot: slot as u32,
                        first: place == 0,
                    };
                    keyed.push(((content.layer, expert, version), place));
                    slot += 1;
                }
            }
        }
        // Places are ascending as they were pushed, so that the order is total.
        keyed.sort_unstable_by_key(|&(key, place)| (key, place.frame, place.slot));

        groups.clear();
        for (at, &((layer, expert, version), _)) in keyed.iter().enumerate() {
            match groups.last_mut() {
                Some(last)
                    if (last.layer, last.expert, last.version) == (layer, expert, version) =>
                {
                    last.places.end = at + 1;
                }
                _ => groups.push(Group { layer, expert, version, places: at..at + 1 }),
            }
        }
    }

    /// One of [`Batch::places`]. Panics if there are not so many.
    pub fn place(&self, at: usize) -> Place {
        self.keyed[at].1
    }

    /// The places of all groups, one after another.
    pub fn places(&self) -> impl Iterator<Item = Place> {
        self.keyed.iter().map(|&(_, place)| place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(layer: u32, rows: &[&[u32]]) -> DispatchFrame {
        DispatchFrame {
            layer,
            slot_counts: rows.iter().map(|row| row.len() as u32).collect(),
            experts: rows.concat(),
            ..Default::default()
        }
    }

    #[test]
    fn rows_of_many_frames_meet_at_their_expert() {
        let frames = [frame(2, &[&[1, 4], &[4]]), frame(2, &[&[0, 4]]), frame(1, &[&[4]])];
        let mut batch = Batch::default();
        batch.group(&frames);
        let keys: Vec<_> =
            batch.groups.iter().map(|g| (g.layer, g.expert, g.places.len())).collect();
        assert_eq!(keys, [(1, 4, 1), (2, 0, 1), (2, 1, 1), (2, 4, 3)]);
        assert_eq!(
            batch.places().collect::<Vec<_>>()[batch.groups[3].places.clone()],
            [
                Place { frame: 0, row: 0, slot: 1, first: false },
                Place { frame: 0, row: 1, slot: 2, first: true },
                Place { frame: 1, row: 0, slot: 1, first: false },
            ]
        );
    }

    #[test]
    fn versions_are_never_mixed() {
        let mut versioned = frame(1, &[&[3], &[3]]);
        versioned.versions = vec![0, 7];
        let mut batch = Batch::default();
        batch.group([&versioned]);
        let versions: Vec<_> = batch.groups.iter().map(|group| group.version).collect();
        assert_eq!(versions, [0, 7]);
    }
}
