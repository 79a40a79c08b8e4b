//! Regroups the rows of queued frames by expert, so that an expert's weights
//! are read once for all routers and requests that want it. Pure: no queue, no
//! clock, no weights.

use proto::v1::DispatchFrame;

/// Where one result row belongs: slot `slot` of frame `frame` in the batch,
/// computed from that frame's row `row`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub frame: u32,
    pub row: u32,
    pub slot: u32,
}

/// The rows of one expert in one version.
#[derive(Debug, PartialEq, Eq)]
pub struct Group {
    pub layer: u32,
    pub expert: u32,
    pub version: u32,
    pub places: Vec<Place>,
}

/// Groups every slot of `frames`, ordered by layer and expert, and within a
/// group by frame and row. The frames must have passed `proto::frame::check`.
pub fn group<'a>(frames: impl IntoIterator<Item = &'a DispatchFrame>) -> Vec<Group> {
    let mut keyed = Vec::new();
    for (frame, content) in frames.into_iter().enumerate() {
        let mut slot = 0;
        for (row, &count) in content.slot_counts.iter().enumerate() {
            for _ in 0..count {
                let expert = content.experts[slot];
                let version = content.versions.get(slot).copied().unwrap_or(0);
                let place = Place { frame: frame as u32, row: row as u32, slot: slot as u32 };
                keyed.push(((content.layer, expert, version), place));
                slot += 1;
            }
        }
    }
    // Stable, so that frames and rows stay in order within a group.
    keyed.sort_by_key(|&(key, _)| key);

    let mut groups: Vec<Group> = Vec::new();
    for ((layer, expert, version), place) in keyed {
        match groups.last_mut() {
            Some(last) if (last.layer, last.expert, last.version) == (layer, expert, version) => {
                last.places.push(place);
            }
            _ => groups.push(Group { layer, expert, version, places: vec![place] }),
        }
    }
    groups
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
        let groups = group(&frames);
        let keys: Vec<_> = groups.iter().map(|g| (g.layer, g.expert, g.places.len())).collect();
        assert_eq!(keys, [(1, 4, 1), (2, 0, 1), (2, 1, 1), (2, 4, 3)]);
        assert_eq!(
            groups[3].places,
            [
                Place { frame: 0, row: 0, slot: 1 },
                Place { frame: 0, row: 1, slot: 2 },
                Place { frame: 1, row: 0, slot: 1 },
            ]
        );
    }

    #[test]
    fn versions_are_never_mixed() {
        let mut versioned = frame(1, &[&[3], &[3]]);
        versioned.versions = vec![0, 7];
        let groups = group([&versioned]);
        assert_eq!(groups.len(), 2);
        assert_eq!((groups[0].version, groups[1].version), (0, 7));
    }
}
