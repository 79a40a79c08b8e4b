//! Which tiles a product's launches compute: rows of many experts, ragged, cut into row tiles and those into column
//! tiles. Plain arithmetic; the device walks over what is laid out here (`Walk` in experts.cu).

use std::ops::Range;

/// Output columns of a block's tile: gate and up of 64, or 128 of down (experts.cu).
pub const GATED_COLUMNS: usize = 64;
pub const DOWN_COLUMNS: usize = 128;

/// Rows of a tile, of which there are three kernels each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RowTile {
    R16,
    R64,
    R128,
}

impl RowTile {
    pub const ALL: [RowTile; 3] = [RowTile::R16, RowTile::R64, RowTile::R128];

    pub const fn rows(self) -> usize {
        match self {
            RowTile::R16 => 16,
            RowTile::R64 => 64,
            RowTile::R128 => 128,
        }
    }

    /// The smallest that holds `rows`, or the largest.
    pub fn of(rows: usize) -> RowTile {
        match rows {
            0..=16 => RowTile::R16,
            17..=64 => RowTile::R64,
            _ => RowTile::R128,
        }
    }
}

/// Rows of one expert, as the device reads them (`Group` in experts.cu).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Group {
    pub slot: u32,
    /// First row among all.
    pub row: u32,
    pub rows: u32,
    /// Row tiles of the groups before it in its launch.
    pub first: u32,
}

impl Group {
    pub const BYTES: usize = 16;

    /// As the device reads it.
    pub fn to_bytes(self) -> [u8; Group::BYTES] {
        let mut bytes = [0; Group::BYTES];
        let words = [self.slot, self.row, self.rows, self.first];
        for (to, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(words) {
            *to = word.to_le_bytes();
        }
        bytes
    }
}

/// Groups that are computed by one launch per product.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    pub tile: RowTile,
    /// Among [`Schedule::groups`].
    pub groups: Range<usize>,
    pub row_tiles: usize,
}

impl Launch {
    /// Tiles of a product with so many output columns, `width` of them to a tile.
    pub fn tiles(&self, columns: usize, width: usize) -> usize {
        self.row_tiles * columns.div_ceil(width)
    }
}

/// The work of one batch.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Schedule {
    pub groups: Vec<Group>,
    pub launches: Vec<Launch>,
}

/// Lays out `work`, slots and how many of the rows are theirs, in the rows' order. Small groups and large ones are
/// computed by kernels of their own, so that few rows are padded; groups without rows are left out.
pub fn schedule(work: &[(u32, usize)]) -> Schedule {
    let mut schedule = Schedule::default();
    for tile in RowTile::ALL {
        let start = schedule.groups.len();
        let (mut row, mut first) = (0, 0);
        for &(slot, rows) in work {
            if rows > 0 && RowTile::of(rows) == tile {
                let group = Group { slot, row: row as u32, rows: rows as u32, first };
                first += rows.div_ceil(tile.rows()) as u32;
                schedule.groups.push(group);
            }
            row += rows;
        }
        if first > 0 {
            let groups = start..schedule.groups.len();
            schedule.launches.push(Launch { tile, groups, row_tiles: first as usize });
        }
    }
    schedule
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What `Walk::find` of experts.cu makes of tile `tile`: slot, first column, and rows.
    fn find(
        groups: &[Group],
        tile: usize,
        rows: usize,
        column_tiles: usize,
        width: usize,
    ) -> (u32, usize, Range<usize>) {
        let mut group = 0;
        while group + 1 < groups.len() && tile >= groups[group + 1].first as usize * column_tiles {
            group += 1;
        }
        let at = groups[group];
        let local = tile - at.first as usize * column_tiles;
        let row_tiles = (at.rows as usize).div_ceil(rows);
        let within = local % row_tiles * rows;
        let count = rows.min(at.rows as usize - within);
        let row = at.row as usize + within;
        (at.slot, local / row_tiles * width, row..row + count)
    }

    proptest! {
        /// Every row of every group gets every column once, with its own expert.
        #[test]
        fn tiles_cover_all_rows_once(
            work in prop::collection::vec((0u32..1000, prop_oneof![0usize..20, 0usize..400]), 0..40),
            columns in 1usize..400,
        ) {
            let schedule = schedule(&work);
            let all: usize = work.iter().map(|(_, rows)| rows).sum();
            let tiles = columns.div_ceil(GATED_COLUMNS);
            let mut seen = vec![None; all * tiles];
            for launch in &schedule.launches {
                let groups = &schedule.groups[launch.groups.clone()];
                for tile in 0..launch.tiles(columns, GATED_COLUMNS) {
                    let (slot, column, rows) =
                        find(groups, tile, launch.tile.rows(), tiles, GATED_COLUMNS);
                    prop_assert!(!rows.is_empty() && column < columns);
                    for row in rows {
                        let place = &mut seen[row * tiles + column / GATED_COLUMNS];
                        prop_assert_eq!(*place, None);
                        *place = Some(slot);
                    }
                }
            }
            let owners = work.iter().flat_map(|&(slot, rows)| std::iter::repeat_n(slot, rows));
            for (row, slot) in owners.enumerate() {
                let of_row = &seen[row * tiles..][..tiles];
                prop_assert!(of_row.iter().all(|seen| *seen == Some(slot)));
            }
        }

        /// No launch pads more than it has to.
        #[test]
        fn groups_are_computed_by_the_kernel_of_their_size(
            work in prop::collection::vec((0u32..9, 0usize..300), 0..20),
        ) {
            let schedule = schedule(&work);
            for launch in &schedule.launches {
                let groups = &schedule.groups[launch.groups.clone()];
                for group in groups {
                    prop_assert_eq!(RowTile::of(group.rows as usize), launch.tile);
                }
                let tiles = groups.iter().map(|group| (group.rows as usize).div_ceil(launch.tile.rows()));
                prop_assert_eq!(tiles.sum::<usize>(), launch.row_tiles);
            }
            prop_assert!(schedule.launches.len() <= 3);
        }
    }
}
