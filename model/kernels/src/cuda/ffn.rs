//! Experts' feed-forward networks on the device, over the rows of many experts at once: rows go in and come out as bf16,
//! gate and up are one product and down is another, with FP8 weights each behind a quantiser (experts.cu).
//!
//! A batch is cut into chunks of whole experts where it is worth it, which take turns on two streams: one's rows travel
//! while the other's are computed. How it is cut changes no bit.

use std::ffi::c_void;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::arena::Arena;
use super::call::{self, Call, Product, QUANTIZE_ROWS, QUANTIZE_THREADS, THREADS};
use super::error::GpuError;
use super::gpu::{Gpu, Grid, Kernel, Lane, SHARED_BYTES};
use super::layout::{BLOCK, Coding, stride};
use super::memory::{Memory, Pinned};
use super::schedule::{Group, Launch, RowTile, Schedule, schedule};
use super::tensor_map::TensorMap;

/// Rows below which a batch is not cut.
const WHOLE: usize = 512;
/// The streams that chunks take turns on.
const LANES: [Lane; 2] = [Lane::Compute, Lane::Beside];

/// Rows of one expert, and where their results go: `[rows, hidden]` little-endian bf16, both.
pub struct Piece<'a> {
    pub slot: u32,
    pub x: &'a [u8],
    pub out: &'a mut [u8],
}

/// Activations as a product reads them: bf16 rows, and their codes and scales if weights are FP8.
struct Operand {
    k: usize,
    rows: Memory,
    codes: Option<(Memory, Memory)>,
    /// By row tile: values (or codes) and scales.
    maps: [(TensorMap, TensorMap); 3],
}

impl Operand {
    fn new(gpu: &Gpu, k: usize, capacity: usize, coding: Coding) -> Result<Operand, GpuError> {
        let allocate = |bytes| gpu.allocate("rows of activations", bytes);
        let pitch = stride(k, Coding::Bf16);
        let rows = allocate(capacity * pitch)?;
        let blocks = k.div_ceil(BLOCK);
        let codes = match coding {
            Coding::Bf16 => None,
            Coding::Fp8 => Some((
                allocate(capacity * stride(k, Coding::Fp8))?,
                allocate(blocks * capacity * size_of::<f32>())?,
            )),
        };
        let map = |tile: RowTile| {
            let memory = codes.as_ref().map_or(&rows, |(codes, _)| codes);
            let values = call::values(k, capacity, coding, tile, memory.address());
            let values = gpu.tensor_map(&values)?;
            let Some((_, scales)) = &codes else { return Ok((values, values)) };
            let scales = gpu.tensor_map(&call::scales(k, capacity, tile, scales.address()))?;
            Ok((values, scales))
        };
        let [small, middle, large] = RowTile::ALL.map(map);
        let maps = [small?, middle?, large?];
        Ok(Operand { k, rows, codes, maps })
    }
}

/// What one chunk is computed in.
struct Turn {
    lane: Lane,
    x: Operand,
    h: Operand,
    out: Memory,
    groups: Memory,
    from: Pinned,
    to: Pinned,
    table: Pinned,
    /// Which stretch of which piece is in it, until its results have been taken out.
    pending: Vec<(usize, Range<usize>)>,
}

impl Turn {
    fn new(arena: &Arena, lane: Lane, capacity: usize) -> Result<Turn, GpuError> {
        let (gpu, shape) = (arena.gpu(), arena.layout().shape);
        let bytes = capacity * stride(shape.hidden, Coding::Bf16);
        Ok(Turn {
            lane,
            x: Operand::new(gpu, shape.hidden, capacity, shape.coding)?,
            h: Operand::new(gpu, shape.inner, capacity, shape.coding)?,
            out: gpu.allocate("results", bytes)?,
            groups: gpu.allocate("the schedule", capacity * Group::BYTES)?,
            from: gpu.pin("rows on their way to the device", bytes)?,
            to: gpu.pin("results on their way back", bytes)?,
            table: gpu.pin("the schedule", capacity * Group::BYTES)?,
            pending: Vec::new(),
        })
    }
}

/// See the module's text.
pub struct GroupedFfn {
    arena: Arc<Arena>,
    capacity: usize,
    turns: [Turn; 2],
    /// By row tile.
    gate_up: [Kernel; 3],
    down: [Kernel; 3],
    quantize: Kernel,
}

impl GroupedFfn {
    /// Takes working memory for chunks of up to `capacity` rows, at least 16.
    pub fn new(arena: Arc<Arena>, capacity: usize) -> Result<GroupedFfn, GpuError> {
        let capacity = capacity.max(16).next_multiple_of(16);
        let gpu = arena.gpu();
        let coding = arena.layout().shape.coding;
        let kernels = |product: Product| {
            let kernel = |tile| gpu.kernel("experts", &product.kernel(coding, tile), SHARED_BYTES);
            let [small, middle, large] = RowTile::ALL.map(kernel);
            Ok::<_, GpuError>([small?, middle?, large?])
        };
        let turn = |lane| Turn::new(&arena, lane, capacity);
        let turns = [turn(LANES[0])?, turn(LANES[1])?];
        let (gate_up, down) = (kernels(Product::GateUp)?, kernels(Product::Down)?);
        let quantize = gpu.kernel("experts", "quantize", 0)?;
        Ok(GroupedFfn { capacity, turns, gate_up, down, quantize, arena })
    }

    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// Computes all pieces; returns when their results are there. Panics if a piece's rows and results differ in length or
    /// are not whole rows, or if it names no slot.
    pub fn forward(&mut self, pieces: &mut [Piece<'_>]) -> Result<(), GpuError> {
        let width = self.width();
        for piece in pieces.iter() {
            assert!(piece.x.len() == piece.out.len() && piece.x.len().is_multiple_of(width));
            assert!((piece.slot as usize) < self.arena.slots(), "a slot of the arena");
        }
        let computed = self.compute(pieces);
        if computed.is_err() {
            // What was begun is not in the way of what comes next, if anything does.
            for turn in &mut self.turns {
                let _ = self.arena.gpu().wait(turn.lane);
                turn.pending.clear();
            }
        }
        computed
    }

    fn compute(&mut self, pieces: &mut [Piece<'_>]) -> Result<(), GpuError> {
        let rows = self.rows(pieces);
        for (number, chunk) in chunks(&rows, self.capacity).into_iter().enumerate() {
            let turn = number % 2;
            self.collect(turn, pieces)?;
            self.start(turn, chunk, pieces)?;
        }
        self.collect(0, pieces)?;
        self.collect(1, pieces)
    }

    /// Bytes of a row on the host.
    fn width(&self) -> usize {
        self.arena.layout().shape.hidden * Coding::Bf16.size()
    }

    /// How many rows each of `pieces` has.
    fn rows(&self, pieces: &[Piece<'_>]) -> Vec<usize> {
        pieces.iter().map(|piece| piece.x.len() / self.width()).collect()
    }

    /// Seconds that the products of `pieces` take, which fit into one chunk, without the rows' way there and back: the
    /// mean of `repeats` times.
    pub fn time(&mut self, pieces: &mut [Piece<'_>], repeats: u32) -> Result<f64, GpuError> {
        let repeats = repeats.max(1);
        let rows = self.rows(pieces);
        let all: usize = rows.iter().sum();
        assert!(all <= self.capacity, "{all} rows in a chunk of {}", self.capacity);
        let chunk: Vec<_> = rows.iter().map(|rows| 0..*rows).enumerate().collect();
        let work: Vec<(u32, usize)> =
            pieces.iter().zip(&rows).map(|(piece, rows)| (piece.slot, *rows)).collect();
        let plan = schedule(&work);
        self.start(0, chunk, pieces)?;
        self.collect(0, pieces)?;
        let start = Instant::now();
        for _ in 0..repeats {
            self.launch(0, &plan, all)?;
        }
        self.arena.gpu().wait(LANES[0])?;
        Ok(start.elapsed().as_secs_f64() / f64::from(repeats))
    }

    /// Overwrites all working memory with codes of NaN, so that a check sees what reads more than it was given.
    pub fn poison(&mut self) -> Result<(), GpuError> {
        for turn in &self.turns {
            let mut all = vec![&turn.out];
            for operand in [&turn.x, &turn.h] {
                all.push(&operand.rows);
                all.extend(operand.codes.iter().flat_map(|(codes, scales)| [codes, scales]));
            }
            all.into_iter().try_for_each(|memory| memory.fill(turn.lane, 0xff))?;
            self.arena.gpu().wait(turn.lane)?;
        }
        Ok(())
    }

    /// Waits for a turn's chunk, if it has one, and copies its results out.
    fn collect(&mut self, turn: usize, pieces: &mut [Piece<'_>]) -> Result<(), GpuError> {
        let width = self.width();
        let pitch = stride(self.arena.layout().shape.hidden, Coding::Bf16);
        let Turn { lane, to, pending, .. } = &mut self.turns[turn];
        if pending.is_empty() {
            return Ok(());
        }
        self.arena.gpu().wait(*lane)?;
        let mut results = to.chunks_exact(pitch);
        for (piece, rows) in pending.drain(..) {
            let out = &mut pieces[piece].out[rows.start * width..rows.end * width];
            for (to, from) in out.chunks_exact_mut(width).zip(&mut results) {
                to.copy_from_slice(&from[..width]);
            }
        }
        Ok(())
    }

    /// Hands a chunk to a turn that is free.
    fn start(
        &mut self,
        turn: usize,
        chunk: Vec<(usize, Range<usize>)>,
        pieces: &[Piece<'_>],
    ) -> Result<(), GpuError> {
        let hidden = self.arena.layout().shape.hidden;
        let (width, pitch) = (hidden * 2, stride(hidden, Coding::Bf16));
        let work: Vec<(u32, usize)> =
            chunk.iter().map(|(piece, rows)| (pieces[*piece].slot, rows.len())).collect();
        let plan = schedule(&work);
        let all: usize = work.iter().map(|(_, rows)| rows).sum();

        let Turn { from, table, .. } = &mut self.turns[turn];
        let rows = chunk.iter().flat_map(|(piece, rows)| {
            pieces[*piece].x[rows.start * width..rows.end * width].chunks_exact(width)
        });
        for (to, row) in from.chunks_exact_mut(pitch).zip(rows) {
            to[..width].copy_from_slice(row);
        }
        for (to, group) in table.chunks_exact_mut(Group::BYTES).zip(&plan.groups) {
            to.copy_from_slice(&group.to_bytes());
        }

        let Turn { lane, x, groups, from, table, .. } = &self.turns[turn];
        let lane = *lane;
        // SAFETY: pinned memory is not touched until `collect` has waited for the lane, and the device's is this turn's.
        unsafe {
            x.rows.copy_in(lane, 0, &from[..all * pitch])?;
            groups.copy_in(lane, 0, &table[..plan.groups.len() * Group::BYTES])?;
        }
        self.launch(turn, &plan, all)?;
        let Turn { out, to, .. } = &mut self.turns[turn];
        // SAFETY: as above.
        unsafe { out.copy_out(lane, 0, &mut to[..all * pitch])? };
        self.turns[turn].pending = chunk;
        Ok(())
    }

    /// Has a turn's lane compute `plan`, of so many rows in all.
    fn launch(&self, turn: usize, plan: &Schedule, rows: usize) -> Result<(), GpuError> {
        let turn = &self.turns[turn];
        self.quantize(turn.lane, &turn.x, rows)?;
        for launch in &plan.launches {
            self.product(turn, launch, Product::GateUp)?;
        }
        self.quantize(turn.lane, &turn.h, rows)?;
        plan.launches.iter().try_for_each(|launch| self.product(turn, launch, Product::Down))
    }

    /// Codes and scales of `rows` bf16 rows, if weights are FP8.
    fn quantize(&self, lane: Lane, operand: &Operand, rows: usize) -> Result<(), GpuError> {
        let Some((codes, scales)) = &operand.codes else { return Ok(()) };
        let k = operand.k;
        let blocks = (rows.div_ceil(QUANTIZE_ROWS) as u32, k.div_ceil(BLOCK) as u32, 1);
        let mut from = operand.rows.address();
        let mut from_stride = (stride(k, Coding::Bf16) / 2) as u32;
        let (mut rows, mut columns) = (rows as u32, k as u32);
        let mut codes = codes.address();
        let mut code_stride = stride(k, Coding::Fp8) as u32;
        let mut table = scales.address();
        let mut table_stride = (scales.len() / k.div_ceil(BLOCK) / size_of::<f32>()) as u32;
        let mut args = [
            pointer(&mut from),
            pointer(&mut from_stride),
            pointer(&mut rows),
            pointer(&mut columns),
            pointer(&mut codes),
            pointer(&mut code_stride),
            pointer(&mut table),
            pointer(&mut table_stride),
        ];
        let grid = Grid { blocks, threads: QUANTIZE_THREADS, shared: 0 };
        // SAFETY: the parameters of `quantize` in its order; memory holds `capacity` rows, of which these are the first.
        unsafe { self.arena.gpu().launch(lane, &self.quantize, grid, &mut args) }
    }

    /// One product of one launch.
    fn product(&self, turn: &Turn, launch: &Launch, product: Product) -> Result<(), GpuError> {
        let arena = &*self.arena;
        let (input, output, kernels) = match product {
            Product::GateUp => (&turn.x, &turn.h.rows, &self.gate_up),
            Product::Down | Product::Linear => (&turn.h, &turn.out, &self.down),
        };
        let (slots, groups) = (arena.address(), turn.groups.address());
        let mut call = Call::new(arena.layout(), product, launch, slots, groups, output.address());
        let at = launch.tile as usize;
        let [mut first, mut second] = product.parts().map(|part| arena.map(part));
        let (mut values, mut scales) = input.maps[at];
        let mut args = [
            pointer(&mut first),
            pointer(&mut second),
            pointer(&mut values),
            pointer(&mut scales),
            pointer(&mut call),
        ];
        let blocks = arena.gpu().processors().min(call.tiles).max(1);
        let grid = Grid { blocks: (blocks, 1, 1), threads: THREADS, shared: SHARED_BYTES };
        // SAFETY: the parameters of a product in their order; slots, rows and outputs that the schedule names are inside.
        unsafe { arena.gpu().launch(turn.lane, &kernels[at], grid, &mut args) }
    }
}

fn pointer<T>(value: &mut T) -> *mut c_void {
    std::ptr::from_mut(value).cast()
}

/// Cuts pieces of so many rows into chunks of at most `capacity` rows: whole pieces where they fit, about a quarter of the
/// batch each if it is large. Each stretch is a piece and a range of its rows.
fn chunks(rows: &[usize], capacity: usize) -> Vec<Vec<(usize, Range<usize>)>> {
    let all: usize = rows.iter().sum();
    let wanted = if all <= WHOLE.min(capacity) { all } else { all.div_ceil(4).max(WHOLE / 2) };
    let wanted = wanted.min(capacity);
    let mut chunks: Vec<Vec<(usize, Range<usize>)>> = Vec::new();
    let mut filled = 0;
    for (piece, &count) in rows.iter().enumerate() {
        let mut start = 0;
        while start < count {
            // A piece is cut only where it is larger than a chunk can be.
            let left = (count - start).min(capacity);
            if chunks.is_empty() || filled >= wanted || filled + left > capacity {
                chunks.push(Vec::new());
                filled = 0;
            }
            if let Some(chunk) = chunks.last_mut() {
                chunk.push((piece, start..start + left));
            }
            filled += left;
            start += left;
        }
    }
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Every row is in one chunk, in order, and no chunk is too large.
        #[test]
        fn chunks_hold_all_rows(
            rows in prop::collection::vec(0usize..300, 0..60),
            capacity in 16usize..2000,
        ) {
            let chunks = chunks(&rows, capacity);
            let mut seen: Vec<usize> = vec![0; rows.len()];
            for chunk in &chunks {
                let total: usize = chunk.iter().map(|(_, rows)| rows.len()).sum();
                prop_assert!(total > 0 && total <= capacity);
                for (piece, range) in chunk {
                    prop_assert_eq!(range.start, seen[*piece]);
                    seen[*piece] = range.end;
                }
            }
            prop_assert_eq!(&seen, &rows);
            if rows.iter().sum::<usize>() <= WHOLE.min(capacity) {
                prop_assert!(chunks.len() <= 1);
            }
        }
    }
}
