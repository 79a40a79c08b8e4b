//! The instructions: configuring, loading, multiplying and storing tiles.
//!
//! Tile registers are named in the assembly text, and the compiler knows nothing of them: it makes no code that
//! touches them, so what one block leaves there the next finds. They are this thread's alone, from [`Tiles::configure`]
//! until the guard it gives is dropped.

use std::arch::asm;

/// Rows of a tile, and 32-bit elements of a full row.
pub(super) const EDGE: usize = 16;
/// Bytes of a full row.
pub(super) const ROW: usize = 64;
/// Bytes of a full tile.
pub(super) const TILE: usize = EDGE * ROW;

/// The first tile register of each operand; sums are `SUMS + 2 * panel + tile of rows`.
pub(super) const SUMS: u8 = 0;
pub(super) const LEFT: u8 = 4;
pub(super) const RIGHT: u8 = 6;

/// LDTILECFG's operand.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Tiles are configured on this thread for as long as this lives.
pub(super) struct Tiles(());

impl Tiles {
    /// Sums and right operands of `columns` rows of activations, full left operands.
    ///
    /// # Safety
    /// The CPU has AMX-TILE and the process the system's permission; `columns` is 1 to 16.
    pub(super) unsafe fn configure(columns: usize) -> Tiles {
        debug_assert!((1..=EDGE).contains(&columns), "{columns} columns");
        let narrow = 4 * columns as u16;
        let mut config = Config {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        for (tile, row_bytes) in config.row_bytes[..8].iter_mut().enumerate() {
            let left = (LEFT..RIGHT).contains(&(tile as u8));
            *row_bytes = if left { ROW as u16 } else { narrow };
        }
        config.rows[..8].fill(EDGE as u8);
        // SAFETY: the caller's.
        unsafe { Tiles::apply(&config) }
    }

    /// Full right operands, sums and left operands of `rows` rows.
    ///
    /// # Safety
    /// The CPU has AMX-TILE and the process the system's permission; `rows` is 1 to 16.
    pub(super) unsafe fn configure_rows(rows: usize) -> Tiles {
        debug_assert!((1..=EDGE).contains(&rows), "{rows} rows");
        let mut config = Config {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        config.row_bytes[..8].fill(ROW as u16);
        config.rows[..usize::from(RIGHT)].fill(rows as u8);
        config.rows[usize::from(RIGHT)..8].fill(EDGE as u8);
        // SAFETY: the caller's.
        unsafe { Tiles::apply(&config) }
    }

    /// # Safety
    /// A valid configuration of palette 1, on a CPU and in a process that may use it.
    unsafe fn apply(config: &Config) -> Tiles {
        // SAFETY: the caller's.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) std::ptr::from_ref(config), options(readonly, nostack));
        }
        Tiles(())
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: only made where tiles are there.
        unsafe { asm!("tilerelease", options(nomem, nostack)) };
    }
}

/// Zeroes tile `T`.
///
/// # Safety
/// As for all here: tiles are configured.
#[inline(always)]
pub(super) unsafe fn zero<const T: u8>() {
    // SAFETY: the caller's.
    unsafe { asm!("tilezero tmm{t}", t = const T, options(nomem, nostack, preserves_flags)) };
}

/// Loads tile `T` from rows `stride` bytes apart.
///
/// # Safety
/// Tiles are configured, and its rows are there.
#[inline(always)]
pub(super) unsafe fn load<const T: u8>(p: *const u8, stride: usize) {
    // SAFETY: the caller's.
    unsafe {
        asm!("tileloadd tmm{t}, [{p} + {s}*1]", t = const T, p = in(reg) p, s = in(reg) stride,
            options(readonly, nostack, preserves_flags));
    };
}

/// As [`load`], with a hint to leave the first-level cache to others.
///
/// # Safety
/// As for [`load`].
#[inline(always)]
pub(super) unsafe fn load_past<const T: u8>(p: *const u8, stride: usize) {
    // SAFETY: the caller's.
    unsafe {
        asm!("tileloaddt1 tmm{t}, [{p} + {s}*1]", t = const T, p = in(reg) p, s = in(reg) stride,
            options(readonly, nostack, preserves_flags));
    };
}

/// Stores tile `T` to rows `stride` bytes apart.
///
/// # Safety
/// Tiles are configured, and its rows are there to be written.
#[inline(always)]
pub(super) unsafe fn store<const T: u8>(p: *mut u8, stride: usize) {
    // SAFETY: the caller's.
    unsafe {
        asm!("tilestored [{p} + {s}*1], tmm{t}", t = const T, p = in(reg) p, s = in(reg) stride,
            options(nostack, preserves_flags));
    };
}

/// Adds the products of tiles `A` (outputs by pairs) and `B` (pairs by rows) to tile `C`.
///
/// # Safety
/// Tiles are configured, and the CPU has AMX-BF16.
#[inline(always)]
pub(super) unsafe fn multiply<const C: u8, const A: u8, const B: u8>() {
    // SAFETY: the caller's.
    unsafe {
        asm!("tdpbf16ps tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B,
            options(nomem, nostack, preserves_flags));
    };
}
