//! What goes into tiles and comes out of them: weights decoded into left operands, sums into the output.
//!
//! Decoded operands are whole tiles one after another, with zeros after the last output and the last k, so that neither
//! the weight is read outside its rows nor a stray NaN meets a padded zero. FP8 codes become bf16 by a table, NaN
//! included.

use super::super::avx512::round;
use super::lanes;
use super::tiles::{self, EDGE, LEFT, RIGHT, ROW, SUMS, TILE};
use crate::lanes::STEP;
use crate::mat::{DType, Mat};
use crate::packed::Out;
use bytemuck::{Pod, Zeroable};
use std::arch::asm;
use std::arch::x86_64::*;

/// A stretch of a weight's k.
#[derive(Clone, Copy)]
pub(super) struct Part {
    /// First element in a row of the weight, and how many.
    pub(super) from: usize,
    pub(super) len: usize,
    /// First step in a packed row.
    pub(super) step: usize,
}

impl Part {
    pub(super) fn steps(&self) -> usize {
        self.len.div_ceil(STEP)
    }
}

/// An operand's tiles: the first of each row or column of tiles, bytes between a tile's rows, and from one step's tile
/// to the next step's.
#[derive(Clone, Copy)]
pub(super) struct Operand {
    pub(super) first: [*const u8; 2],
    pub(super) stride: usize,
    pub(super) step: usize,
}

impl Operand {
    #[inline(always)]
    fn at(&self, which: usize, step: usize) -> *const u8 {
        self.first[which].wrapping_add(step * self.step)
    }
}

/// Zeroes the sums of `P` panels and `R` tiles of rows.
///
/// # Safety
/// Tiles are configured.
#[inline(always)]
pub(super) unsafe fn zero<const P: usize, const R: usize>() {
    // SAFETY: the caller's.
    unsafe {
        tiles::zero::<SUMS>();
        if R > 1 {
            tiles::zero::<{ SUMS + 1 }>();
        }
        if P > 1 {
            tiles::zero::<{ SUMS + 2 }>();
        }
        if P > 1 && R > 1 {
            tiles::zero::<{ SUMS + 3 }>();
        }
    }
}

/// Adds `steps` steps of `P` panels and `R` tiles of rows to the sums; `each` is called with every step.
///
/// # Safety
/// Tiles are configured, and the operands' tiles are there.
#[inline(always)]
pub(super) unsafe fn run<const P: usize, const R: usize>(
    left: Operand,
    right: Operand,
    steps: usize,
    each: impl FnMut(usize),
) {
    // SAFETY: the caller's.
    unsafe { add::<P, R, false>(left, right, steps, each) }
}

/// As [`run`], with activations that pass by: they leave the first-level cache to the weights.
///
/// # Safety
/// As for [`run`].
#[inline(always)]
pub(super) unsafe fn run_past<const P: usize, const R: usize>(
    left: Operand,
    right: Operand,
    steps: usize,
    each: impl FnMut(usize),
) {
    // SAFETY: the caller's.
    unsafe { add::<P, R, true>(left, right, steps, each) }
}

#[inline(always)]
unsafe fn add<const P: usize, const R: usize, const PAST: bool>(
    left: Operand,
    right: Operand,
    steps: usize,
    mut each: impl FnMut(usize),
) {
    for step in 0..steps {
        each(step);
        // SAFETY: the caller's.
        unsafe {
            match PAST {
                true => tiles::load_past::<RIGHT>(right.at(0, step), right.stride),
                false => tiles::load::<RIGHT>(right.at(0, step), right.stride),
            }
            tiles::load::<LEFT>(left.at(0, step), left.stride);
            tiles::multiply::<SUMS, LEFT, RIGHT>();
            if P > 1 {
                tiles::load::<{ LEFT + 1 }>(left.at(1, step), left.stride);
                tiles::multiply::<{ SUMS + 2 }, { LEFT + 1 }, RIGHT>();
            }
            if R > 1 {
                match PAST {
                    true => tiles::load_past::<{ RIGHT + 1 }>(right.at(1, step), right.stride),
                    false => tiles::load::<{ RIGHT + 1 }>(right.at(1, step), right.stride),
                }
                tiles::multiply::<{ SUMS + 1 }, LEFT, { RIGHT + 1 }>();
            }
            if P > 1 && R > 1 {
                tiles::multiply::<{ SUMS + 3 }, { LEFT + 1 }, { RIGHT + 1 }>();
            }
        }
    }
}

/// `EDGE` outputs of a tile of rows.
pub(super) type Tile = [[f32; EDGE]; EDGE];

/// The sums of two panels and two tiles of rows.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Sums(pub(super) [[Tile; 2]; 2]);

// SAFETY: numbers alone, 4 KiB without padding.
unsafe impl Zeroable for Sums {}
// SAFETY: as above.
unsafe impl Pod for Sums {}

/// Loads the sums of `P` panels and `R` tiles of rows.
///
/// # Safety
/// Tiles are configured.
#[inline(always)]
pub(super) unsafe fn load<const P: usize, const R: usize>(Sums(from): &Sums) {
    // SAFETY: the caller's; a tile is sixteen rows.
    unsafe {
        tiles::load::<SUMS>(from[0][0].as_ptr().cast(), ROW);
        if R > 1 {
            tiles::load::<{ SUMS + 1 }>(from[0][1].as_ptr().cast(), ROW);
        }
        if P > 1 {
            tiles::load::<{ SUMS + 2 }>(from[1][0].as_ptr().cast(), ROW);
        }
        if P > 1 && R > 1 {
            tiles::load::<{ SUMS + 3 }>(from[1][1].as_ptr().cast(), ROW);
        }
    }
}

/// Stores the sums of `P` panels and `R` tiles of rows. Columns that are not configured keep what they hold.
///
/// # Safety
/// Tiles are configured.
#[inline(always)]
pub(super) unsafe fn store<const P: usize, const R: usize>(Sums(to): &mut Sums) {
    // SAFETY: the caller's; a tile is sixteen rows.
    unsafe {
        tiles::store::<SUMS>(to[0][0].as_mut_ptr().cast(), ROW);
        if R > 1 {
            tiles::store::<{ SUMS + 1 }>(to[0][1].as_mut_ptr().cast(), ROW);
        }
        if P > 1 {
            tiles::store::<{ SUMS + 2 }>(to[1][0].as_mut_ptr().cast(), ROW);
        }
        if P > 1 && R > 1 {
            tiles::store::<{ SUMS + 3 }>(to[1][1].as_mut_ptr().cast(), ROW);
        }
    }
}

/// Adds a k-block's sums, times each output's scale, to `sums`: k-block `index` of the outputs that `scales` is for.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn fold<const P: usize, const R: usize>(
    scales: &[Scales<'_>],
    index: usize,
    block: &Sums,
    sums: &mut Sums,
) {
    for p in 0..P {
        let mut factors = [0.0; EDGE];
        for (factor, scales) in factors.iter_mut().zip(&scales[p * EDGE..]) {
            *factor = f32::from_le_bytes(scales[index]);
        }
        for r in 0..R {
            let rows = block.0[p][r].iter().zip(&mut sums.0[p][r]);
            for ((block, sums), factor) in rows.zip(&factors) {
                // SAFETY: sixteen elements each.
                unsafe {
                    let (block, sum) =
                        (_mm512_loadu_ps(block.as_ptr()), _mm512_loadu_ps(sums.as_ptr()));
                    let sum = _mm512_fmadd_ps(block, _mm512_set1_ps(*factor), sum);
                    _mm512_storeu_ps(sums.as_mut_ptr(), sum);
                }
            }
        }
    }
}

/// An output's scales, one for each k-block.
pub(super) type Scales<'a> = &'a [[u8; 4]];

/// The scales of output `n`; beyond the last, of the last. None where the weight has none.
pub(super) fn scales<'a>(w: &Mat<'a>, n: usize) -> Scales<'a> {
    w.scales().map(|table| table.row(n.min(w.n() - 1))).unwrap_or_default()
}

/// Puts `sums`, outputs from `n`, into rows `row..row + rows` of the output.
#[target_feature(enable = "avx512f")]
pub(super) fn collect(sums: &Tile, y: &mut Out<'_>, row: usize, rows: usize, n: usize) {
    let outputs = EDGE.min(y.shape().1 - n);
    let mask = lanes(outputs);
    for (r, values) in columns(sums)[..rows].iter().enumerate() {
        // SAFETY: this row has `outputs` columns from n.
        unsafe { _mm512_mask_storeu_epi32(y.at(row + r, n).cast(), mask, *values) };
    }
}

/// A tile's columns.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn columns(tile: &Tile) -> [__m512i; EDGE] {
    let mut rows = [_mm512_setzero_si512(); EDGE];
    for (row, values) in rows.iter_mut().zip(tile) {
        // SAFETY: sixteen elements.
        *row = unsafe { _mm512_loadu_si512(values.as_ptr().cast()) };
    }
    transposed(rows)
}

/// Sixteen rows of sixteen 32-bit elements as sixteen columns.
#[target_feature(enable = "avx512f")]
pub(super) fn transposed(mut r: [__m512i; EDGE]) -> [__m512i; EDGE] {
    let mut t = r;
    for i in (0..EDGE).step_by(2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for i in (0..EDGE).step_by(4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // Lane l of r[i + j] holds column 4 l + j of rows i to i + 3.
    for j in 0..4 {
        let even = _mm512_shuffle_i32x4::<0x88>(r[j], r[j + 4]);
        let odd = _mm512_shuffle_i32x4::<0xdd>(r[j], r[j + 4]);
        let even_below = _mm512_shuffle_i32x4::<0x88>(r[j + 8], r[j + 12]);
        let odd_below = _mm512_shuffle_i32x4::<0xdd>(r[j + 8], r[j + 12]);
        t[j] = _mm512_shuffle_i32x4::<0x88>(even, even_below);
        t[j + 4] = _mm512_shuffle_i32x4::<0x88>(odd, odd_below);
        t[j + 8] = _mm512_shuffle_i32x4::<0xdd>(even, even_below);
        t[j + 12] = _mm512_shuffle_i32x4::<0xdd>(odd, odd_below);
    }
    t
}

/// Decodes `part` of the `EDGE` outputs from `n` into `part.steps()` tiles. `ahead` says for an output's bytes which
/// address to ask for early.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,gfni")]
pub(super) fn decode(
    w: &Mat<'_>,
    n: usize,
    part: Part,
    out: &mut [u8],
    ahead: impl Fn(*const u8) -> *const u8,
) {
    let out = &mut out[..part.steps() * TILE];
    let size = w.dtype().size();
    if w.dtype() == DType::Fp8 && n + EDGE <= w.n() && part.len.is_multiple_of(2 * STEP) {
        let first = &w.row_bytes(n)[part.from..part.from + part.len];
        // SAFETY: the panel's rows are there, `part.len` codes of each, and as many tiles as hold them.
        return unsafe { decode_codes(first, w.stride(), EDGE, out.as_mut_ptr(), &ahead) };
    }
    for row in 0..EDGE {
        let to = out[row * ROW..].as_mut_ptr();
        if n + row >= w.n() {
            for step in 0..part.steps() {
                // SAFETY: row `row` of a tile of `out`.
                unsafe { _mm512_storeu_si512(to.add(step * TILE).cast(), _mm512_setzero_si512()) };
            }
            continue;
        }
        let from = &w.row_bytes(n + row)[part.from * size..(part.from + part.len) * size];
        // SAFETY: `part.len` elements, and as many tiles as hold them.
        unsafe {
            match w.dtype() {
                DType::F32 => decode_f32(from, to, &ahead),
                DType::Bf16 => decode_bf16(from, to, &ahead),
                DType::Fp8 => decode_codes(from, 0, 1, to, &ahead),
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn decode_f32(from: &[u8], to: *mut u8, ahead: &impl Fn(*const u8) -> *const u8) {
    for (step, bytes) in from.chunks(STEP * 4).enumerate() {
        let p = bytes.as_ptr();
        let mask = u32::MAX >> (STEP - bytes.len() / 4);
        // SAFETY: masked loads read the chunk alone; the store is a row of tile `step`.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(ahead(p).cast());
            _mm_prefetch::<_MM_HINT_T0>(ahead(p).wrapping_add(64).cast());
            let a = _mm512_maskz_loadu_ps(mask as __mmask16, p.cast());
            let b = _mm512_maskz_loadu_ps((mask >> 16) as __mmask16, p.wrapping_add(64).cast());
            let [a, b] = [a, b].map(|v| _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(round(v))));
            let pairs = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(a), b);
            _mm512_storeu_si512(to.add(step * TILE).cast(), pairs);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn decode_bf16(from: &[u8], to: *mut u8, ahead: &impl Fn(*const u8) -> *const u8) {
    for (step, bytes) in from.chunks(STEP * 2).enumerate() {
        let p = bytes.as_ptr();
        let mask = u32::MAX >> (STEP - bytes.len() / 2);
        // SAFETY: as for f32.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(ahead(p).cast());
            let pairs = _mm512_maskz_loadu_epi16(mask, p.cast());
            _mm512_storeu_si512(to.add(step * TILE).cast(), pairs);
        }
    }
}

/// Codes of `rows` rows, of which `first` is the first and `stride` bytes lie from one to the next.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,gfni")]
unsafe fn decode_codes(
    first: &[u8],
    stride: usize,
    rows: usize,
    to: *mut u8,
    ahead: &impl Fn(*const u8) -> *const u8,
) {
    let codes = Codes::new();
    let (whole, rest) = (first.len() / (2 * STEP), first.len() % (2 * STEP));
    for row in 0..rows {
        let from = first.as_ptr().wrapping_add(row * stride);
        let to = to.wrapping_add(row * ROW);
        for i in 0..whole {
            let (p, to) = (from.wrapping_add(i * 2 * STEP), to.wrapping_add(2 * i * TILE));
            // SAFETY: by the caller's word.
            unsafe {
                _mm_prefetch::<_MM_HINT_T0>(ahead(p).cast());
                let [a, b] = codes.pairs(_mm512_loadu_si512(p.cast()));
                _mm512_storeu_si512(to.cast(), a);
                _mm512_storeu_si512(to.wrapping_add(TILE).cast(), b);
            }
        }
        if rest > 0 {
            let mask = u64::MAX >> (2 * STEP - rest);
            let (p, to) = (from.wrapping_add(whole * 2 * STEP), to.wrapping_add(2 * whole * TILE));
            // SAFETY: masked loads read the row alone; the second step has a tile if it has a code.
            unsafe {
                let [a, b] = codes.pairs(_mm512_maskz_loadu_epi8(mask, p.cast()));
                _mm512_storeu_si512(to.cast(), a);
                if rest > STEP {
                    _mm512_storeu_si512(to.wrapping_add(TILE).cast(), b);
                }
            }
        }
    }
}

/// What decodes e4m3 codes, in registers.
pub(super) struct Codes {
    high: __m512i,
    low: __m512i,
    /// Halves of 128-bit lanes: eight codes of the first step below eight of the second.
    order: __m512i,
    /// What tells codes of normal numbers from others.
    one: __m512i,
    exponent: __m512i,
}

impl Codes {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,gfni")]
    pub(super) fn new() -> Codes {
        Codes {
            high: kept(_mm512_set1_epi64(HIGH_BYTE)),
            low: kept(_mm512_set1_epi64(LOW_BYTE)),
            order: kept(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7)),
            one: kept(_mm512_set1_epi8(1)),
            exponent: kept(_mm512_set1_epi8(0x70)),
        }
    }

    /// 64 codes as bf16, 32 and 32.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,gfni")]
    pub(super) fn pairs(&self, codes: __m512i) -> [__m512i; 2] {
        // One more than a code has none of the exponent's upper bits where the exponent is zero or the code is no number, and
        // for the least normal numbers: few, and right in the table too, so that one test tells them all.
        let odd = _mm512_testn_epi8_mask(_mm512_add_epi8(codes, self.one), self.exponent);
        let codes = _mm512_permutexvar_epi64(self.order, codes);
        let [low, high] = match odd {
            0 => [
                _mm512_gf2p8affine_epi64_epi8::<0>(codes, self.low),
                _mm512_gf2p8affine_epi64_epi8::<BIAS>(codes, self.high),
            ],
            _ => looked_up(codes),
        };
        [_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)]
    }
}

/// A constant that the compiler does not know, so that it does not load it from memory again and again.
#[inline]
#[target_feature(enable = "avx512f")]
fn kept(mut constant: __m512i) -> __m512i {
    // SAFETY: no instructions.
    unsafe {
        asm!("/* {} */", inout(zmm_reg) constant,
            options(pure, nomem, nostack, preserves_flags));
    }
    constant
}

/// For each bit of a byte of a normal number's bf16, the highest first, which bit of its code seeeemmm it is, or the inverse
/// of where [`BIAS`] says so. An exponent e becomes e + 120: its first bit, four times the inverse of that, its others.
const HIGH_BYTE: i64 = i64::from_le_bytes([0x80, 0x40, 0x40, 0x40, 0x40, 0x40, 0x20, 0x10]);
const LOW_BYTE: i64 = i64::from_le_bytes([0x08, 0x04, 0x02, 0x01, 0, 0, 0, 0]);
const BIAS: i32 = 0b0011_1100;

/// The low and the high bytes of any codes' bf16.
#[cold]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,gfni")]
fn looked_up(codes: __m512i) -> [__m512i; 2] {
    let bytes = |table: &[u8; 128]| {
        let [first, last] = [0, 64].map(|at| {
            // SAFETY: half of the table is a register.
            unsafe { _mm512_loadu_si512(table[at..at + 64].as_ptr().cast()) }
        });
        _mm512_permutex2var_epi8(first, codes, last)
    };
    // The code's own sign bit over the table's clear one: a | (b & c).
    let sign = _mm512_set1_epi8(i8::MIN);
    [bytes(&LOW), _mm512_ternarylogic_epi64::<0xf8>(bytes(&HIGH), codes, sign)]
}

/// The bytes of the bf16 that e4m3 codes 0 to 127 stand for.
static LOW: [u8; 128] = table(0);
static HIGH: [u8; 128] = table(8);

const fn table(shift: u32) -> [u8; 128] {
    let mut out = [0; 128];
    let mut code = 0;
    while code < 128 {
        out[code] = (widened(code as u16) >> shift) as u8;
        code += 1;
    }
    out
}

/// The bf16 of a code without a sign.
pub(super) const fn widened(code: u16) -> u16 {
    match code {
        0 => 0,
        // m / 512, whose leading bit moves to the exponent.
        1..8 => {
            let shift = code.leading_zeros() - 12;
            (((127 - 6 - shift as u16) << 7) | ((code << (4 + shift)) & 0x7f)) & 0x7fff
        }
        0x7f => 0x7fc0,
        _ => (code << 4) + (120 << 7),
    }
}
