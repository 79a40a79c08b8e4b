//! How a batch is cut.

use super::Piece;

/// Rows below which a batch is not cut.
const WHOLE: usize = 512;

/// Cuts pieces into chunks of at most `capacity` rows: whole pieces where they fit, about a quarter of the batch each if it
/// is large.
pub fn chunks(pieces: &[Piece], capacity: usize) -> Vec<Vec<Piece>> {
    let all: usize = pieces.iter().map(|piece| piece.rows.len()).sum();
    let wanted = if all <= WHOLE.min(capacity) { all } else { all.div_ceil(4).max(WHOLE / 2) };
    let wanted = wanted.min(capacity);
    let mut chunks: Vec<Vec<Piece>> = Vec::new();
    let mut filled = 0;
    for piece in pieces {
        let mut rows = piece.rows.clone();
        while !rows.is_empty() {
            // A piece is cut only where it is larger than a chunk can be.
            let left = rows.len().min(capacity);
            if chunks.is_empty() || filled >= wanted || filled + left > capacity {
                chunks.push(Vec::new());
                filled = 0;
            }
            if let Some(chunk) = chunks.last_mut() {
                chunk.push(Piece { slot: piece.slot, rows: rows.start..rows.start + left });
            }
            filled += left;
            rows.start += left;
        }
    }
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Every row is in one chunk, in order, with its expert, and no chunk is too large.
        #[test]
        fn chunks_hold_all_rows(
            rows in prop::collection::vec(0usize..300, 0..60),
            capacity in 16usize..2000,
        ) {
            let mut end = 0;
            let cut = |(slot, count): (usize, &usize)| {
                end += count;
                Piece { slot: slot as u32, rows: end - count..end }
            };
            let pieces: Vec<Piece> = rows.iter().enumerate().map(cut).collect();
            let chunks = chunks(&pieces, capacity);
            let mut next = 0;
            for chunk in &chunks {
                let total: usize = chunk.iter().map(|piece| piece.rows.len()).sum();
                prop_assert!(total > 0 && total <= capacity);
                for Piece { slot, rows } in chunk {
                    prop_assert_eq!(rows.start, next);
                    let own = &pieces[*slot as usize].rows;
                    prop_assert!(own.start <= rows.start && rows.end <= own.end);
                    next = rows.end;
                }
            }
            prop_assert_eq!(next, end);
            if end <= WHOLE.min(capacity) {
                prop_assert!(chunks.len() <= 1);
            }
        }
    }
}
