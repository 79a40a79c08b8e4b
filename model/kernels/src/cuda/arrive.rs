//! How a chunk's rows travel to the device: in one copy, with what says whose they are. Plain arithmetic; `arrive_fp8` and
//! `arrive_bf16` of coding.cu read it.
//!
//! First where each row of the batch lies, then the groups, then the rows as they came. A row that several experts share
//! travels once.

use super::layout::{BLOCK, Coding, stride};
use super::schedule::Group;

/// What rows and groups lie at multiples of.
const ALIGN: usize = 16;

/// A batch's rows as they came, by place. Several threads may ask for some each.
pub trait Rows: Sync {
    /// A number that places have in common if they have the same row, and whether the row is in FP8: e4m3 codes, then f32
    /// scales of 128 values each; bf16 if not. Little-endian.
    fn kind(&self, place: usize) -> (usize, bool);

    /// Writes a place's row, which is as long as `to`.
    fn copy(&self, place: usize, to: &mut [u8]);
}

/// A row that lies somewhere; what finds it by place are rows.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    pub id: usize,
    pub fp8: bool,
    pub bytes: &'a [u8],
}

impl<'a, F: Fn(usize) -> Row<'a> + Sync> Rows for F {
    fn kind(&self, place: usize) -> (usize, bool) {
        let Row { id, fp8, .. } = self(place);
        (id, fp8)
    }

    fn copy(&self, place: usize, to: &mut [u8]) {
        to.copy_from_slice(self(place).bytes);
    }
}

/// Bytes of a row of `k` values.
pub fn row_bytes(k: usize, fp8: bool) -> usize {
    if fp8 { k + k.div_ceil(BLOCK) * size_of::<f32>() } else { k * Coding::Bf16.size() }
}

/// Most bytes of `rows` rows of `k` values with all that goes with them.
pub fn capacity(rows: usize, k: usize) -> usize {
    let longest = row_bytes(k, true).next_multiple_of(ALIGN).max(stride(k, Coding::Bf16));
    rows * (size_of::<u32>() + Group::BYTES + longest) + ALIGN
}

/// What was packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packed {
    pub rows: usize,
    /// First byte of the groups; where rows lie is at the beginning.
    pub groups: usize,
    pub bytes: usize,
}

/// Packs chunks; remembers of a chunk which rows it has.
#[derive(Debug, Default)]
pub struct Packer {
    /// By a row's id: the chunk it was last packed for, and what is said of where it lies there.
    placed: Vec<(u64, u32)>,
    chunk: u64,
}

impl Packer {
    /// Writes a chunk, whose rows are these places of the batch. Panics if `to` is shorter than [`capacity`] says.
    pub fn pack(
        &mut self,
        groups: &[Group],
        places: impl Iterator<Item = usize> + Clone,
        rows: &dyn Rows,
        k: usize,
        to: &mut [u8],
    ) -> Packed {
        self.chunk += 1;
        let count = places.clone().count();
        let at = (count * size_of::<u32>()).next_multiple_of(ALIGN);
        for (to, group) in to[at..].chunks_exact_mut(Group::BYTES).zip(groups) {
            to.copy_from_slice(&group.to_bytes());
        }
        let mut end = at + groups.len() * Group::BYTES;
        for (nth, place) in places.enumerate() {
            let (id, fp8) = rows.kind(place);
            if id >= self.placed.len() {
                self.placed.resize(id + 1, (0, 0));
            }
            let (chunk, source) = &mut self.placed[id];
            if *chunk != self.chunk {
                let bytes = row_bytes(k, fp8);
                rows.copy(place, &mut to[end..end + bytes]);
                (*chunk, *source) = (self.chunk, (end / ALIGN) as u32 * 2 + u32::from(fp8));
                end = (end + bytes).next_multiple_of(ALIGN);
            }
            to[nth * 4..][..4].copy_from_slice(&source.to_le_bytes());
        }
        Packed { rows: count, groups: at, bytes: end }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Every place finds its row, in the form it came in; rows that are shared are there once.
        #[test]
        fn every_place_finds_its_row(
            k in 1usize..300,
            distinct in prop::collection::vec((any::<u8>(), any::<bool>()), 1..20),
            chosen in prop::collection::vec(any::<prop::sample::Index>(), 1..60),
        ) {
            let rows: Vec<Vec<u8>> =
                distinct.iter().map(|&(seed, fp8)| vec![seed; row_bytes(k, fp8)]).collect();
            let ids: Vec<usize> = chosen.iter().map(|index| index.index(rows.len())).collect();
            let row = |place: usize| {
                let id = ids[place];
                Row { id, fp8: distinct[id].1, bytes: &rows[id] }
            };
            let groups = [Group { slot: 3, row: 0, rows: ids.len() as u32, first: 0 }];
            let mut packer = Packer::default();
            let half = ids.len() / 2;
            // The second chunk knows nothing of the first.
            for places in [0..half, half..ids.len()] {
                let mut to = vec![0xff; capacity(places.len(), k) + Group::BYTES];
                let packed =
                    packer.pack(&groups, places.clone(), &row, k, &mut to);
                prop_assert!(packed.bytes <= to.len() && packed.groups % ALIGN == 0);
                prop_assert_eq!(&to[packed.groups..][..Group::BYTES], &groups[0].to_bytes());
                let mut seen = Vec::new();
                for (nth, place) in places.enumerate() {
                    let source = u32::from_le_bytes(to[nth * 4..][..4].try_into().unwrap());
                    let at = (source / 2) as usize * ALIGN;
                    let id = ids[place];
                    prop_assert_eq!(source % 2 == 1, distinct[id].1);
                    prop_assert_eq!(&to[at..][..rows[id].len()], &rows[id][..]);
                    prop_assert!(at >= packed.groups + Group::BYTES);
                    seen.push((id, at));
                }
                seen.sort_unstable();
                seen.dedup();
                prop_assert!(seen.windows(2).all(|pair| pair[0].0 != pair[1].0), "copied once");
            }
        }
    }

    #[test]
    fn a_row_in_fp8_never_takes_more_room_than_in_bf16() {
        for k in 1..1000 {
            let fp8 = row_bytes(k, true).next_multiple_of(ALIGN);
            assert!(fp8 <= stride(k, Coding::Bf16), "{k}");
        }
    }
}
