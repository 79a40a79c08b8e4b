//! TDPBF16PS on this CPU against the definition, with operands that show order, rounding, flushing and overflow.

use super::tiles::{self, EDGE, LEFT, RIGHT, ROW, SUMS, Tiles};
use crate::lanes::STEP;
use crate::tile::step;

/// Sums `[output][row]`.
pub(super) type Sums = [[f32; EDGE]; EDGE];
/// bf16 bits, `[output or row][k]`.
pub(super) type Rows = [[u16; STEP]; EDGE];

/// One operation of the instruction.
///
/// # Safety
/// The CPU has AMX-BF16 and the process the system's permission.
pub(super) unsafe fn once(acc: &Sums, w: &Rows, x: &Rows) -> Sums {
    let mut out = *acc;
    let mut pairs = [[[0u16; 2]; EDGE]; EDGE];
    for (r, x) in x.iter().enumerate() {
        for (pair, x) in pairs.iter_mut().zip(x.as_chunks::<2>().0) {
            pair[r] = *x;
        }
    }
    // SAFETY: the caller's; each array is sixteen rows of 64 bytes.
    unsafe {
        let _tiles = Tiles::configure(EDGE);
        tiles::load::<SUMS>(out.as_ptr().cast(), ROW);
        tiles::load::<LEFT>(w.as_ptr().cast(), ROW);
        tiles::load::<RIGHT>(pairs.as_ptr().cast(), ROW);
        tiles::multiply::<SUMS, LEFT, RIGHT>();
        tiles::store::<SUMS>(out.as_mut_ptr().cast(), ROW);
    }
    out
}

/// Whether `multiply` gives the bits of [`step`] in `rounds` trials of each kind.
pub(super) fn pass(rounds: usize, multiply: impl Fn(&Sums, &Rows, &Rows) -> Sums) -> bool {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: u32| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (((state >> 32) * u64::from(below)) >> 32) as u32
    };
    // (Exponents of the factors, of the sum; how many each spreads over.)
    let kinds = [(127, 127, 6), (120, 118, 16), (64, 1, 3), (63, 1, 30), (51, 1, 3), (1, 1, 3)];
    let kinds = kinds.into_iter().chain([(190, 253, 3), (0, 100, 255)]);
    kinds.into_iter().all(|(factor, sum, spread)| {
        (0..rounds).all(|_| {
            let mut number = |base: u32, mantissa_bits: u32| {
                let exponent = (base + random(spread)).min(254);
                let mantissa = random(1 << mantissa_bits) * random(4).min(1);
                (random(2) << (mantissa_bits + 8)) | (exponent << mantissa_bits) | mantissa
            };
            let mut rows = || -> Rows {
                std::array::from_fn(|_| std::array::from_fn(|_| number(factor, 7) as u16))
            };
            let (w, x) = (rows(), rows());
            let acc: Sums =
                std::array::from_fn(|_| std::array::from_fn(|_| f32::from_bits(number(sum, 23))));
            agree(&multiply(&acc, &w, &x), &defined(&acc, &w, &x))
        })
    })
}

fn agree(got: &Sums, want: &Sums) -> bool {
    let same = |(g, w): (&f32, &f32)| g.to_bits() == w.to_bits() || g.is_nan() && w.is_nan();
    got.as_flattened().iter().zip(want.as_flattened()).all(same)
}

/// The definition, element by element.
pub(super) fn defined(acc: &Sums, w: &Rows, x: &Rows) -> Sums {
    let wide = |row: &[u16; STEP]| row.map(|bits| f32::from_bits(u32::from(bits) << 16));
    let (w, x) = (w.each_ref().map(wide), x.each_ref().map(wide));
    std::array::from_fn(|n| std::array::from_fn(|r| step(acc[n][r], &w[n], &x[r])))
}
