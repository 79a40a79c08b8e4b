//! The latent KV cache: pages of compressed keys and values (DeepSeek-V2 paper, section 2.1).
//!
//! A page holds `page_tokens` consecutive positions of one sequence in all layers; a position is
//! `kv_lora` latent values and `qk_rope` rotated key values, in the class's type. Who owns which
//! page is the caller's business: the pool only hands pages out and takes them back, and never more
//! than it was made with. Memory is reserved at once: the host's, backed by the system when first written, or a device's,
//! where a trunk computes there.

use std::ops::Range;
use std::sync::Arc;

use kernels::cuda::GpuError;
use kernels::cuda::trunk::{Buffer, Cache, Driver};
use memmap2::MmapMut;

use crate::config::Config;
use crate::numerics::Numerics;

/// A page of a [`KvPool`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageId(pub u32);

/// A pool that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum KvError {
    /// No pages, no tokens in a page, or more bytes than can be addressed.
    #[error("kv pool of {pages} pages of {page_tokens} tokens cannot be addressed")]
    Shape {
        /// Pages asked for.
        pages: usize,
        /// Tokens of a page asked for.
        page_tokens: usize,
    },
    /// The system refused the memory.
    #[error("kv pool of {bytes} bytes: {source}")]
    Memory {
        /// Bytes asked for.
        bytes: usize,
        /// What the system said.
        source: std::io::Error,
    },
    /// The device did.
    #[error(transparent)]
    Gpu(#[from] GpuError),
}

/// Where pages are.
enum Memory {
    Host(MmapMut),
    Gpu(Buffer),
}

/// All KV pages of one trunk.
pub struct KvPool {
    /// `[pages][layers][page_tokens][width]` values.
    memory: Memory,
    layers: usize,
    page_tokens: usize,
    /// Bytes of one position in one layer.
    row_bytes: usize,
    /// Pages to hand out; the last one first.
    free: Vec<PageId>,
    /// Whether each page is handed out.
    taken: Vec<bool>,
    numerics: Numerics,
}

impl KvPool {
    /// Bytes of one page of `page_tokens` positions.
    pub fn page_bytes(config: &Config, numerics: Numerics, page_tokens: usize) -> usize {
        config.layers * page_tokens * config.kv_width() * numerics.bytes()
    }

    /// A pool of `pages` pages of `page_tokens` positions each.
    pub fn new(
        config: &Config,
        numerics: Numerics,
        pages: usize,
        page_tokens: usize,
    ) -> Result<KvPool, KvError> {
        KvPool::with(config, numerics, pages, page_tokens, |bytes| {
            let memory = MmapMut::map_anon(bytes);
            Ok(Memory::Host(memory.map_err(|source| KvError::Memory { bytes, source })?))
        })
    }

    /// The same on a device, in bf16.
    pub(crate) fn on(
        driver: &Arc<dyn Driver>,
        config: &Config,
        pages: usize,
        page_tokens: usize,
    ) -> Result<KvPool, KvError> {
        KvPool::with(config, Numerics::Bf16, pages, page_tokens, |bytes| {
            Ok(Memory::Gpu(Buffer::new::<u8>(driver, "the KV cache", bytes)?))
        })
    }

    fn with(
        config: &Config,
        numerics: Numerics,
        pages: usize,
        page_tokens: usize,
        memory: impl FnOnce(usize) -> Result<Memory, KvError>,
    ) -> Result<KvPool, KvError> {
        let refuse = || KvError::Shape { pages, page_tokens };
        let row_bytes = config.kv_width() * numerics.bytes();
        let bytes = (config.layers * row_bytes)
            .checked_mul(page_tokens)
            .and_then(|b| b.checked_mul(pages))
            .filter(|b| *b > 0 && *b <= isize::MAX as usize)
            .ok_or_else(refuse)?;
        let count = u32::try_from(pages).map_err(|_| refuse())?;
        Ok(KvPool {
            memory: memory(bytes)?,
            layers: config.layers,
            page_tokens,
            row_bytes,
            free: (0..count).rev().map(PageId).collect(),
            taken: vec![false; pages],
            numerics,
        })
    }

    /// Takes a page, if one is left. What it held before is still in it.
    pub fn alloc(&mut self) -> Option<PageId> {
        let page = self.free.pop()?;
        self.taken[page.0 as usize] = true;
        Some(page)
    }

    /// Gives a page back. Panics if it is not handed out: two owners of a page would corrupt a
    /// sequence.
    pub fn free(&mut self, page: PageId) {
        let taken = self.taken.get_mut(page.0 as usize);
        assert!(taken.as_deref() == Some(&true), "page {} is not handed out", page.0);
        self.taken[page.0 as usize] = false;
        self.free.push(page);
    }

    /// Pages handed out.
    pub fn used(&self) -> usize {
        self.taken.len() - self.free.len()
    }

    /// All pages.
    pub fn total(&self) -> usize {
        self.taken.len()
    }

    /// Positions that a page holds.
    pub fn page_tokens(&self) -> usize {
        self.page_tokens
    }

    /// The class whose values it holds.
    pub fn numerics(&self) -> Numerics {
        self.numerics
    }

    /// Fills the cache with values spread in -1 to 1, for measuring without a prompt. Panics if it is a device's.
    #[doc(hidden)]
    pub fn fill(&mut self) {
        let mut noise = 1u32;
        let mut next = || {
            noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (noise >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        let numerics = self.numerics;
        let memory = self.host_mut();
        match numerics {
            Numerics::F32 => {
                memory.as_chunks_mut().0.iter_mut().for_each(|v| *v = next().to_le_bytes())
            }
            Numerics::Bf16 => memory
                .as_chunks_mut()
                .0
                .iter_mut()
                .for_each(|v| *v = half::bf16::from_f32(next()).to_le_bytes()),
        }
    }

    fn host(&self) -> &[u8] {
        match &self.memory {
            Memory::Host(memory) => memory,
            Memory::Gpu(_) => panic!("a device's cache in a step of the host's"),
        }
    }

    fn host_mut(&mut self) -> &mut [u8] {
        match &mut self.memory {
            Memory::Host(memory) => memory,
            Memory::Gpu(_) => panic!("a device's cache in a step of the host's"),
        }
    }

    /// One layer on the device. Panics if the pool is the host's.
    pub(crate) fn layer(&self, layer: usize) -> Cache<'_> {
        let Memory::Gpu(buffer) = &self.memory else {
            panic!("the host's cache in a step of a device's")
        };
        Cache {
            buffer,
            pages: self.taken.len(),
            layers: self.layers,
            layer,
            page_tokens: self.page_tokens,
            width: self.row_bytes / self.numerics.bytes(),
        }
    }

    fn start(&self, page: PageId, layer: usize) -> usize {
        debug_assert!(layer < self.layers);
        (page.0 as usize * self.layers + layer) * self.page_tokens * self.row_bytes
    }

    /// Positions `slots` of a page in one layer, `[slots, width]` values.
    pub(crate) fn rows(&self, page: PageId, layer: usize, slots: Range<usize>) -> &[u8] {
        debug_assert!(slots.end <= self.page_tokens);
        let start = self.start(page, layer);
        &self.host()[start + slots.start * self.row_bytes..start + slots.end * self.row_bytes]
    }

    /// Position `slot` of a page in one layer, `[width]` values.
    pub(crate) fn row_mut(&mut self, page: PageId, layer: usize, slot: usize) -> &mut [u8] {
        debug_assert!(slot < self.page_tokens);
        let start = self.start(page, layer) + slot * self.row_bytes;
        let end = start + self.row_bytes;
        &mut self.host_mut()[start..end]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/plain/config.json");
        Config::from_json(&std::fs::read_to_string(dir).unwrap(), dir).unwrap()
    }

    #[test]
    fn hands_out_each_page_once_and_takes_it_back() {
        let mut pool = KvPool::new(&config(), Numerics::Bf16, 3, 16).unwrap();
        let pages: Vec<_> = std::iter::from_fn(|| pool.alloc()).collect();
        assert_eq!(pages, [PageId(0), PageId(1), PageId(2)]);
        assert_eq!((pool.used(), pool.total()), (3, 3));
        pool.free(pages[1]);
        assert_eq!(pool.used(), 2);
        assert_eq!(pool.alloc(), Some(PageId(1)));
        assert_eq!(pool.alloc(), None);
    }

    #[test]
    #[should_panic(expected = "page 0 is not handed out")]
    fn a_page_is_not_freed_twice() {
        let mut pool = KvPool::new(&config(), Numerics::Bf16, 1, 16).unwrap();
        let page = pool.alloc().unwrap();
        pool.free(page);
        pool.free(page);
    }

    #[test]
    fn rows_of_pages_and_layers_do_not_overlap() {
        let config = config();
        let mut pool = KvPool::new(&config, Numerics::F32, 2, 4).unwrap();
        let mut stamp = 0u8;
        for page in [PageId(0), PageId(1)] {
            for layer in 0..config.layers {
                for slot in 0..4 {
                    stamp += 1;
                    pool.row_mut(page, layer, slot).fill(stamp);
                }
            }
        }
        let width = config.kv_width() * 4;
        let mut stamp = 0u8;
        for page in [PageId(0), PageId(1)] {
            for layer in 0..config.layers {
                for row in pool.rows(page, layer, 0..4).chunks(width) {
                    stamp += 1;
                    assert!(row.iter().all(|b| *b == stamp));
                }
            }
        }
        assert_eq!(KvPool::page_bytes(&config, Numerics::F32, 4), width * 4 * config.layers);
    }

    #[test]
    fn absurd_pools_are_refused() {
        assert!(KvPool::new(&config(), Numerics::F32, 0, 16).is_err());
        assert!(KvPool::new(&config(), Numerics::F32, 16, 0).is_err());
        assert!(KvPool::new(&config(), Numerics::F32, usize::MAX, 16).is_err());
    }
}
