//! The bf16 class of AMX tiles (`tile.rs` defines it), on TDPBF16PS.
//!
//! A weight's rows are the left operand as they are stored, sixteen outputs by 32 elements of k; activations are the right
//! one, packed once as pairs of k by rows; sums are [outputs][rows]. Up to two tiles of rows stream the weight
//! (`strip.rs`; `coded.rs` where it is FP8), more pass runs of it over tiles of rows (`block.rs`). Sums over a weight's
//! rows are `columns.rs` (`few.rs` for few). The permission that Linux wants is asked for once, with a trial of the instruction against the definition: a CPU that differs in a bit does not get to use it.

mod block;
mod coded;
mod columns;
mod few;
mod panel;
mod single;
mod sink;
mod strip;
#[cfg(test)]
mod tests;
mod tiles;
mod trials;

use self::block::Source;
use self::panel::Operand;
use self::tiles::{EDGE, Tiles};
use crate::device::Multiply;
use crate::lanes::STEP;
use crate::mat::{Acts, DType, Mat, round_bf16};
use crate::packed::{Inner, Out, Packed, Segment};
use crate::pool::Pool;
use crate::transposed::Stack;
use half::bf16;
use std::arch::asm;
use std::arch::x86_64::*;
use std::sync::OnceLock;

/// The product of bf16 activations by tiles.
pub(crate) struct Amx;

impl Multiply for Amx {
    fn pack(x: Acts<'_>, rows: usize, w: &Mat<'_>, into: &mut Packed, pool: Option<&Pool>) {
        into.lay::<Amx>(x.len(), rows, w);
        match x {
            Acts::Bf16(x) => pack(x, rows, w.k(), into, pool),
            Acts::F32(x) => {
                let x: Vec<bf16> = x.iter().map(|x| round_bf16(*x)).collect();
                pack(&x, rows, w.k(), into, pool);
            }
        }
    }

    unsafe fn product(x: &Packed, w: &Mat<'_>, y: &mut Out<'_>) {
        assert!(x.fits::<Amx>(w), "activations packed for another weight layout");
        assert_eq!(y.shape(), (x.rows(), w.n()), "the output of a product [rows, n]");
        let rows = x.rows();
        if rows == 0 || w.n() == 0 {
            return;
        }
        // SAFETY: the CPU has tiles and they are permitted, by the caller's word; the shapes agree.
        unsafe {
            let _tiles = Tiles::configure(columns(rows));
            match (rows.div_ceil(EDGE), w.dtype()) {
                (1, DType::Fp8) => coded::product::<1>(x, w, y),
                (2, DType::Fp8) => coded::product::<2>(x, w, y),
                (1, _) => strip::product::<1>(x, w, y),
                (2, _) => strip::product::<2>(x, w, y),
                _ => block::product(x, Source::One(*w), y),
            }
        }
    }

    fn inner<'h>(
        x: &Packed,
        [gate, up]: [&Mat<'_>; 2],
        down: &Mat<'_>,
        h: &'h mut Packed,
    ) -> Option<Inner<'h>> {
        let (rows, n) = (x.rows(), gate.n());
        let same = gate.dtype() == up.dtype() && n == up.n() && n == down.k();
        let whole = |(from, to): (usize, usize)| (to - from).is_multiple_of(STEP);
        if rows <= FEW || !same || !down.segments().all(whole) {
            return None;
        }
        h.lay::<Amx>(rows * n, rows, down);
        Some(h.inner())
    }

    unsafe fn gated(x: &Packed, w: [&Mat<'_>; 2], h: &mut Inner<'_>) {
        assert!(w.iter().all(|w| x.fits::<Amx>(w)), "activations packed for another weight layout");
        assert!(w.iter().all(|w| w.n() == h.n()), "columns of a gate and of its other half");
        assert!(x.rows() > FEW, "rows that go through tiles together");
        // SAFETY: the CPU has tiles and they are permitted, by the caller's word; the shapes agree.
        unsafe {
            let _tiles = Tiles::configure(EDGE);
            block::product(x, Source::Both(w.map(|w| *w)), h);
        }
    }

    unsafe fn rounded(x: &Packed, w: &Mat<'_>, y: &mut [bf16]) -> bool {
        let rows = x.rows();
        if rows <= FEW || w.n() == 0 {
            return false;
        }
        assert!(x.fits::<Amx>(w), "activations packed for another weight layout");
        let mut y = Out::new(bytemuck::cast_slice_mut::<_, u16>(y), rows, w.n(), w.n());
        // SAFETY: the CPU has tiles and they are permitted, by the caller's word; the shapes agree.
        unsafe {
            let _tiles = Tiles::configure(EDGE);
            block::product(x, Source::One(*w), &mut y);
        }
        true
    }

    unsafe fn transposed(
        x: &[bf16],
        rows: usize,
        ldx: usize,
        w: Stack<'_>,
        y: &mut [f32],
        ldy: usize,
    ) -> bool {
        if !w.is_bf16() {
            // SAFETY: the CPU has AVX-512 with VBMI, by the caller's word.
            return rows == 1 && unsafe { single::compute(x, w, y) };
        }
        // SAFETY: the CPU has tiles and they are permitted, by the caller's word, with the shapes.
        unsafe { columns::Columns { x, rows, ldx, w, y, ldy }.compute() };
        true
    }
}

/// Rows up to which a weight is streamed.
const FEW: usize = 2 * EDGE;

/// Rows of activations in one tile. Beyond one tile all are full, with rows of zeros, so that one configuration does.
fn columns(rows: usize) -> usize {
    rows.min(EDGE)
}

/// Packed activations as tiles: `[tile of rows][step of k][pair of k][row]`, each cell a pair of bf16.
#[derive(Clone, Copy)]
struct Right<'a> {
    cells: &'a [u32],
    columns: usize,
    steps: usize,
}

impl<'a> Right<'a> {
    fn of(x: &'a Packed) -> Right<'a> {
        let (columns, steps) = (columns(x.rows()), x.width() / STEP);
        let tiles = x.rows().div_ceil(EDGE);
        Right { cells: x.cells(tiles * steps * EDGE * columns), columns, steps }
    }

    /// The tile of rows `tile` at step `step`, and those of the steps after it.
    fn at(&self, tile: usize, step: usize) -> *const u8 {
        self.cells[(tile * self.steps + step) * EDGE * self.columns..].as_ptr().cast()
    }

    /// Tiles of one or two tiles of rows from step `step` on.
    fn operand<const R: usize>(&self, step: usize) -> Operand {
        let second = if R > 1 { self.at(1, step) } else { std::ptr::null() };
        Operand {
            first: [self.at(0, step), second],
            stride: self.stride(),
            step: self.tile_bytes(),
        }
    }

    /// Bytes of one tile.
    fn tile_bytes(&self) -> usize {
        EDGE * self.columns * 4
    }

    /// Bytes of one row of a tile.
    fn stride(&self) -> usize {
        self.columns * 4
    }
}

fn pack(x: &[bf16], rows: usize, k: usize, into: &mut Packed, pool: Option<&Pool>) {
    let (columns, steps) = (columns(rows), into.width() / STEP);
    let tile_cells = steps * EDGE * columns;
    let (cells, segments) = into.cells_mut::<u32>(rows.div_ceil(EDGE) * tile_cells);
    Pool::pieces(pool, cells, tile_cells, |tile, cells| {
        let first = tile * EDGE;
        let x = &x[first * k..rows.min(first + EDGE) * k];
        // SAFETY: packed only by a device of this kind, so AVX-512 is there.
        unsafe { pack_tile(x, k, segments, columns, cells) };
    });
}

/// Packs up to a tile of rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn pack_tile(x: &[bf16], k: usize, segments: &[Segment], columns: usize, cells: &mut [u32]) {
    let lanes = lanes(columns);
    for s in segments {
        for i in 0..s.steps() {
            let len = if i < s.full { STEP } else { s.tail };
            let cells = &mut cells[(s.at / STEP + i) * EDGE * columns..][..EDGE * columns];
            let mask = u32::MAX >> (STEP - len);
            let mut pairs = [_mm512_setzero_si512(); EDGE];
            for (x, pairs) in x.chunks_exact(k).zip(&mut pairs) {
                let x = &x[s.from + i * STEP..][..len];
                // SAFETY: `len` elements are there, and no others are read.
                *pairs = unsafe { _mm512_maskz_loadu_epi16(mask, x.as_ptr().cast()) };
            }
            if columns > 1 {
                pairs = panel::transposed(pairs);
                for (row, pairs) in cells.chunks_exact_mut(columns).zip(pairs) {
                    // SAFETY: as many lanes as the row has.
                    unsafe { _mm512_mask_storeu_epi32(row.as_mut_ptr().cast(), lanes, pairs) };
                }
            } else {
                // SAFETY: one row's sixteen pairs.
                unsafe { _mm512_storeu_si512(cells.as_mut_ptr().cast(), pairs[0]) };
            }
        }
    }
}

/// The first `count` of sixteen lanes.
fn lanes(count: usize) -> __mmask16 {
    u16::MAX >> (EDGE - count)
}

/// Whether this CPU has bf16 tiles, the system permits them to this process, and they add up as defined.
pub(super) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        if !present() || !permitted() {
            return false;
        }
        // SAFETY: the instruction is there and permitted.
        trials::pass(16, |acc, w, x| unsafe { trials::once(acc, w, x) })
    })
}

/// AMX-TILE and AMX-BF16, tiles of sixteen rows of 64 bytes, and a system that saves them.
fn present() -> bool {
    #[allow(unused_unsafe, reason = "safe in later compilers")]
    // SAFETY: every x86-64 CPU has CPUID.
    unsafe {
        let leaf = |leaf, sub| __cpuid_count(leaf, sub);
        if leaf(0, 0).eax < 0x1d || leaf(1, 0).ecx >> 27 & 1 == 0 {
            return false;
        }
        let (tile, bf16) = (leaf(7, 0).edx >> 24 & 1, leaf(7, 0).edx >> 22 & 1);
        if tile & bf16 == 0 || leaf(0x1d, 0).eax < 1 {
            return false;
        }
        let palette = leaf(0x1d, 1);
        // SAFETY: OSXSAVE, checked above, says that XGETBV may be used.
        let saved = {
            let (low, _high): (u32, u32);
            asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") _high, options(nomem, nostack));
            low >> 17 & 3 == 3
        };
        let (bytes_per_row, names) = (palette.ebx & 0xffff, palette.ebx >> 16);
        saved && bytes_per_row >= 64 && names >= 8 && palette.ecx & 0xffff >= 16
    }
}

/// Asks Linux for tile data, which counts for the whole process.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const TILE_DATA: i64 = 18;
    let mut answer = ARCH_PRCTL;
    // SAFETY: the system call takes two numbers and touches no memory of ours; it changes RCX and R11.
    unsafe {
        asm!("syscall", inlateout("rax") answer, in("rdi") ARCH_REQ_XCOMP_PERM, in("rsi") TILE_DATA,
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    answer == 0
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}
