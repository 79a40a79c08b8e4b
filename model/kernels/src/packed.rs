//! Activations laid out for a product, and where a product's results go.
//!
//! A row's elements are cut where the weight's k-blocks end and each piece is padded with zeros to whole steps, so
//! that a block always starts in lane 0; `Segment` says where each piece lies. [`Packed`] is made once and read by
//! every thread and every weight of the same shape; [`Out`] is a strided output that threads can share by columns, and
//! [`Inner`] one that is the next product's activations. Nothing here knows an instruction set.

use crate::dot::Dot;
use crate::lanes::{LANES, STEP};
use crate::mat::{Acts, DType, Mat};
use crate::pool::Pool;
use bytemuck::{Pod, Zeroable};
use std::any::TypeId;
use std::marker::PhantomData;
use std::ops::Range;

/// A stretch of k with one scale.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    /// Its first element in a row of the weight.
    pub(crate) from: usize,
    /// Its first element in a packed row.
    pub(crate) at: usize,
    /// Whole steps.
    pub(crate) full: usize,
    /// Elements after them.
    pub(crate) tail: usize,
}

impl Segment {
    /// Steps, with a padded last one.
    pub(crate) fn steps(&self) -> usize {
        self.full + usize::from(self.tail > 0)
    }
}

/// A cache line, so that packed rows are aligned.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line([u8; 64]);

// SAFETY: an array of bytes that fills its 64-byte alignment: no padding, and any bytes are valid.
unsafe impl Zeroable for Line {}
// SAFETY: as above.
unsafe impl Pod for Line {}

/// At least `len` zeroed or stale elements at a cache line's edge, in `buf`.
pub(crate) fn aligned<T: Pod>(buf: &mut Vec<Line>, len: usize) -> &mut [T] {
    let lines = (len * size_of::<T>()).div_ceil(size_of::<Line>());
    if buf.len() < lines {
        buf.resize(lines, Line::zeroed());
    }
    &mut bytemuck::cast_slice_mut(buf)[..len]
}

/// Activations packed for one device, numerics class and weight layout: see [`crate::Device::pack`].
#[derive(Clone, Default)]
pub struct Packed {
    buf: Vec<Line>,
    rows: usize,
    k: usize,
    /// Elements of a packed row.
    width: usize,
    segments: Vec<Segment>,
    class: Option<TypeId>,
    /// The type of weight that it was packed for.
    dtype: Option<DType>,
    /// Whether the rows are for an FP8 weight, and so multiplied by [`Dot::FP8_FACTOR`].
    fp8: bool,
    /// Whether they had to be left as they are.
    huge: bool,
}

/// Rows that a thread packs at a time.
const PIECE_ROWS: usize = 16;

/// Activations from here on are not multiplied by [`Dot::FP8_FACTOR`].
const HUGE: f32 = f32::from_bits((127 + 112) << 23);

impl Packed {
    /// An empty buffer; [`crate::Device::pack`] fills it and keeps its memory between uses.
    pub fn new() -> Packed {
        Packed::default()
    }

    /// Packed rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn fill<D: Dot>(
        &mut self,
        x: Acts<'_>,
        rows: usize,
        w: &Mat<'_>,
        pool: Option<&Pool>,
    ) {
        self.lay::<D>(x.len(), rows, w);
        let (k, width) = (self.k, self.width);
        self.fp8 = Packed::factored::<D>(w);
        self.huge = self.fp8 && x.any_from(HUGE);
        let enlarge = self.fp8 && !self.huge;
        let out = aligned::<D::Elem>(&mut self.buf, rows * width);
        let segments = &self.segments;
        Pool::pieces(pool, out, PIECE_ROWS * width, |piece, out| {
            for (r, out) in out.chunks_exact_mut(width).enumerate() {
                let row = piece * PIECE_ROWS + r;
                for s in segments {
                    for i in 0..s.steps() {
                        let len = if i < s.full { STEP } else { s.tail };
                        let at = s.at + i * STEP;
                        D::pack(x, row * k + s.from + i * STEP, len, &mut out[at..at + STEP]);
                    }
                }
                if enlarge {
                    D::enlarge(out);
                }
            }
        });
    }

    /// Sets shape, segments and class for `len` activations; the caller writes the elements.
    pub(crate) fn lay<C: 'static>(&mut self, len: usize, rows: usize, w: &Mat<'_>) {
        let k = w.k();
        assert_eq!(Some(len), rows.checked_mul(k), "activations of [{rows}, {k}]");
        self.segments.clear();
        self.width = 0;
        for (from, to) in w.segments() {
            let (full, tail) = ((to - from) / STEP, (to - from) % STEP);
            let segment = Segment { from, at: self.width, full, tail };
            self.width += segment.steps() * STEP;
            self.segments.push(segment);
        }
        (self.rows, self.k, self.class) = (rows, k, Some(TypeId::of::<C>()));
        self.dtype = Some(w.dtype());
        (self.fp8, self.huge) = (false, false);
    }

    /// Whether what was packed for one weight can be multiplied by `w` as well.
    pub fn suits(&self, w: Mat<'_>) -> bool {
        self.dtype.is_some_and(|dtype| (dtype == DType::Fp8) == (w.dtype() == DType::Fp8))
            && self.laid_out_for(&w)
    }

    fn laid_out_for(&self, w: &Mat<'_>) -> bool {
        self.k == w.k() && self.segments.iter().map(|s| s.from).eq(w.segments().map(|s| s.0))
    }

    /// Whether these rows were packed for class `C` and a weight laid out like `w`.
    pub(crate) fn fits<C: 'static>(&self, w: &Mat<'_>) -> bool {
        self.is::<C>() && self.laid_out_for(w)
    }

    /// As [`Packed::fits`], for a class whose activations may carry the factor of FP8 codes.
    pub(crate) fn fits_dot<D: Dot>(&self, w: &Mat<'_>) -> bool {
        self.fits::<D>(w) && self.fp8 == Packed::factored::<D>(w)
    }

    fn factored<D: Dot>(w: &Mat<'_>) -> bool {
        w.dtype() == DType::Fp8 && D::FP8_FACTOR != 1.0
    }

    /// Whether these rows were packed for class `C`.
    pub(crate) fn is<C: 'static>(&self) -> bool {
        self.class == Some(TypeId::of::<C>())
    }

    /// At least `len` elements of a layout of the class's own, zeroed or stale, and the segments.
    pub(crate) fn cells_mut<T: Pod>(&mut self, len: usize) -> (&mut [T], &[Segment]) {
        (aligned(&mut self.buf, len), &self.segments)
    }

    /// These rows, laid out for whole steps of k and more rows than a tile, to be written in tiles.
    pub(crate) fn inner(&mut self) -> Inner<'_> {
        let steps = self.width / STEP;
        let (cells, _) = self.cells_mut::<u32>(self.rows.div_ceil(LANES) * steps * CELLS);
        Inner { cells: cells.as_mut_ptr(), steps, at: 0, n: self.k, lifetime: PhantomData }
    }

    /// The first `len` elements that [`Packed::cells_mut`] gave to be written.
    pub(crate) fn cells<T: Pod>(&self, len: usize) -> &[T] {
        &bytemuck::cast_slice(&self.buf)[..len]
    }

    /// Whether these rows, for an FP8 weight, were too large to be multiplied by [`Dot::FP8_FACTOR`].
    pub(crate) fn is_huge(&self) -> bool {
        self.huge
    }

    pub(crate) fn data<D: Dot>(&self) -> &[D::Elem] {
        &bytemuck::cast_slice(&self.buf)[..self.rows * self.width]
    }

    pub(crate) fn width(&self) -> usize {
        self.width
    }

    pub(crate) fn segments(&self) -> &[Segment] {
        &self.segments
    }
}

/// Where a product `[rows, n]` goes: row `r`, column `j` at `r * ld + j`.
pub struct Out<'a, T = f32> {
    ptr: *mut T,
    rows: usize,
    n: usize,
    ld: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: an `Out` stands for the exclusive borrow it was made from, and threads get disjoint columns of it.
unsafe impl<T: Send> Send for Out<'_, T> {}
// SAFETY: as above; a shared reference hands out columns only through an unsafe function.
unsafe impl<T: Send> Sync for Out<'_, T> {}

impl<'a, T> Out<'a, T> {
    /// `y` as `[rows, n]` with `ld` elements from row to row. Panics if it is too short, or rows would overlap.
    pub fn new(y: &'a mut [T], rows: usize, n: usize, ld: usize) -> Out<'a, T> {
        let need = match rows {
            0 => Some(0),
            _ => (rows - 1).checked_mul(ld).and_then(|e| e.checked_add(n)),
        };
        assert!(rows < 2 || n <= ld, "rows of {n} every {ld} overlap");
        assert!(
            need.is_some_and(|need| need <= y.len()),
            "[{rows}, {n}] every {ld} in {}",
            y.len()
        );
        Out { ptr: y.as_mut_ptr(), rows, n, ld, lifetime: PhantomData }
    }

    /// Columns `range` of the same rows.
    ///
    /// # Safety
    /// While the result lives, nothing else may touch those columns.
    pub(crate) unsafe fn cols(&self, range: Range<usize>) -> Out<'a, T> {
        assert!(range.start <= range.end && range.end <= self.n, "columns {range:?} of {}", self.n);
        // SAFETY: inside the borrow, as the assertion says.
        let ptr = unsafe { self.ptr.add(range.start) };
        Out { ptr, n: range.len(), ..*self }
    }

    pub(crate) fn shape(&self) -> (usize, usize) {
        (self.rows, self.n)
    }

    pub(crate) fn ld(&self) -> usize {
        self.ld
    }

    /// The place of row `r`, column `j`, which must be inside.
    #[inline(always)]
    pub(crate) fn at(&mut self, r: usize, j: usize) -> *mut T {
        self.place(r, j).cast_mut()
    }

    /// As [`Out::at`], not to be written.
    #[inline(always)]
    pub(crate) fn place(&self, r: usize, j: usize) -> *const T {
        debug_assert!(r < self.rows && j < self.n, "({r}, {j}) of {:?}", self.shape());
        self.ptr.wrapping_add(r * self.ld + j)
    }
}

/// 32-bit cells, of a pair of bf16 each, in a step of a tile of rows.
const CELLS: usize = LANES * STEP / 2;

/// Activations that a product writes for the next one, column by column of it: tiles `[tile of rows][step][pair][row]`.
pub struct Inner<'a> {
    cells: *mut u32,
    /// Steps of a tile of rows.
    steps: usize,
    /// The first of `n` columns.
    at: usize,
    n: usize,
    lifetime: PhantomData<&'a mut [u32]>,
}

// SAFETY: stands for the exclusive borrow it was made from, and threads get disjoint columns of it.
unsafe impl Send for Inner<'_> {}
// SAFETY: as above; a shared reference hands out columns only through an unsafe function.
unsafe impl Sync for Inner<'_> {}

impl<'a> Inner<'a> {
    /// Columns `range`, whole steps of them.
    ///
    /// # Safety
    /// While the result lives, nothing else may touch those columns.
    pub(crate) unsafe fn cols(&self, range: Range<usize>) -> Inner<'a> {
        assert!(range.start <= range.end && range.end <= self.n, "columns {range:?} of {}", self.n);
        assert!(range.start.is_multiple_of(STEP), "columns from a step's first, not {range:?}");
        Inner { at: self.at + range.start, n: range.len(), ..*self }
    }

    pub(crate) fn n(&self) -> usize {
        self.n
    }

    /// Where sixteen columns from `column` on lie in tile of rows `tile`: eight pairs, sixteen rows each.
    #[inline(always)]
    pub(crate) fn cells(&mut self, tile: usize, column: usize) -> *mut u32 {
        debug_assert!(
            column < self.n && column.is_multiple_of(LANES),
            "column {column} of {}",
            self.n
        );
        let column = self.at + column;
        let step = tile * self.steps + column / STEP;
        self.cells.wrapping_add(step * CELLS + column % STEP / 2 * LANES)
    }
}
