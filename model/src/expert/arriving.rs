//! An expert whose weights come from somebody who has them, as stored, and lie in memory in place of
//! a file: the same bytes in the same layout, so the same kernels give the same bits.

use std::sync::Arc;

use memmap2::MmapMut;
use sha2::{Digest as _, Sha256};

use super::Expert;
use crate::checkpoint::Checkpoint;
use crate::error::LoadError;
use crate::ffn::Ffn;

/// See the module's text.
pub struct Arriving {
    checkpoint: Arc<Checkpoint>,
    layer: usize,
    index: usize,
    weights: Ffn,
    map: MmapMut,
    filled: usize,
    hash: Sha256,
}

impl Expert {
    /// Has `take` take its weights as stored, in pieces of at most `piece` bytes, until it says false;
    /// the SHA-256 over all of them. Blocks where they have to be read.
    pub fn pass_on(&self, piece: usize, mut take: impl FnMut(&[u8]) -> bool) -> Option<[u8; 32]> {
        let mut hash = Sha256::new();
        for span in self.weights.spans() {
            for bytes in self.checkpoint.span(span).chunks(piece) {
                hash.update(bytes);
                if !take(bytes) {
                    return None;
                }
            }
        }
        Some(hash.finalize().into())
    }
}

impl Arriving {
    /// Makes room for expert `index` of MoE layer `layer`, as long as its checkpoint says.
    ///
    /// # Errors
    /// There is no such expert, or no room.
    pub fn new(
        checkpoint: &Arc<Checkpoint>,
        layer: usize,
        index: usize,
    ) -> Result<Self, LoadError> {
        let weights = checkpoint.expert(layer, index)?;
        let map = MmapMut::map_anon(weights.bytes())
            .map_err(|error| LoadError::io(checkpoint.dir(), error))?;
        // As with files: a hint.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Self {
            checkpoint: checkpoint.clone(),
            layer,
            index,
            weights,
            map,
            filled: 0,
            hash: Sha256::new(),
        })
    }

    /// Bytes that it takes in all.
    pub fn bytes(&self) -> usize {
        self.map.len()
    }

    /// Bytes that have not come yet.
    pub fn missing(&self) -> usize {
        self.map.len() - self.filled
    }

    /// Takes the next bytes; false, and nothing is taken, if they are more than are missing.
    pub fn put(&mut self, next: &[u8]) -> bool {
        let fits = next.len() <= self.missing();
        if fits {
            self.map[self.filled..][..next.len()].copy_from_slice(next);
            self.filled += next.len();
            self.hash.update(next);
        }
        fits
    }

    /// The expert, once all bytes have come, which have to have this SHA-256.
    ///
    /// # Errors
    /// Some have not, or others, or the system refuses.
    pub fn finish(self, digest: &[u8]) -> Result<Expert, LoadError> {
        let Self { checkpoint, layer, index, weights, map, filled, hash } = self;
        let name = format!("layer {layer} expert {index}, fetched");
        if filled < map.len() {
            let problem = format!("{filled} of {} bytes came", map.len());
            return Err(LoadError::file(name.as_ref(), problem));
        }
        if hash.finalize().as_slice() != digest {
            return Err(LoadError::file(name.as_ref(), "other bytes came than were sent"));
        }
        let map = map.make_read_only().map_err(|error| LoadError::io(name.as_ref(), error))?;
        Ok(Expert {
            checkpoint: checkpoint.part(name, map),
            layer,
            index,
            weights: weights.packed(),
        })
    }
}
