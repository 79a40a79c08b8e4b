//! Experts' feed-forward networks on the device, over the rows of many experts at once: rows go in as they came, in bf16 or
//! FP8, and come out as bf16; gate and up are one product and down is another, with FP8 weights each behind rows coded in
//! FP8 (experts.cu, coding.cu).
//!
//! A batch is cut into chunks of whole experts where it is worth it, which take turns on two streams: one's rows travel
//! while the other's are computed. So do the chunks of successive batches: another may begin before the results of the last
//! are taken. How it is cut changes no bit.

mod chunks;
mod operand;

use std::collections::VecDeque;
use std::ffi::c_void;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use self::chunks::chunks;
use self::operand::Operand;
use super::arena::Arena;
use super::arrive::{self, Packed, Packer, Rows};
use super::call::{CODING_ROWS, CODING_THREADS, Call, Product, THREADS};
use super::error::GpuError;
use super::gpu::{Grid, Kernel, Lane, Mark, SHARED_BYTES};
use super::layout::{BLOCK, Coding, stride};
use super::memory::{Memory, Pinned};
use super::schedule::{Launch, RowTile, Schedule, schedule};

/// The streams that chunks take turns on.
const LANES: [Lane; 2] = [Lane::Compute, Lane::Beside];
/// Batches that may have begun before the first one's results are taken.
const BATCHES: usize = 2;

/// Rows of one expert, by their places in the batch.
#[derive(Clone, Debug)]
pub struct Piece {
    pub slot: u32,
    pub rows: Range<usize>,
}

/// A batch's results: bf16 rows, by place.
#[derive(Clone, Copy)]
pub struct Results<'a> {
    pub bytes: &'a [u8],
    /// Bytes of a row, and from one to the next.
    pub width: usize,
    pub pitch: usize,
}

impl<'a> Results<'a> {
    pub fn row(&self, place: usize) -> &'a [u8] {
        &self.bytes[place * self.pitch..][..self.width]
    }
}

/// What one chunk is computed in.
struct Turn {
    lane: Lane,
    /// Rows as they arrive, with where each lies and the schedule.
    arrived: Memory,
    x: Operand,
    h: Operand,
    out: Memory,
    /// What is copied to `arrived`; free again when `copied` is reached.
    from: Pinned,
    copied: Mark,
}

impl Turn {
    fn new(arena: &Arena, lane: Lane, rows: usize) -> Result<Turn, GpuError> {
        let (gpu, shape) = (arena.gpu(), arena.layout().shape);
        let bytes = arrive::capacity(rows, shape.hidden);
        Ok(Turn {
            lane,
            arrived: gpu.allocate("rows as they arrive", bytes)?,
            x: Operand::new(gpu, (shape.hidden, rows), shape.coding, false)?,
            h: Operand::new(gpu, (shape.inner, rows), shape.coding, true)?,
            out: gpu.allocate("results", rows * stride(shape.hidden, Coding::Bf16))?,
            from: gpu.pin("rows on their way to the device", bytes)?,
            copied: gpu.mark()?,
        })
    }
}

/// Where a batch's results are left.
struct Home {
    results: Pinned,
    /// Reached by both lanes when they are there.
    done: [Mark; 2],
}

/// Where the time of a batch goes that fits into one chunk, in seconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stages {
    /// Into pinned memory.
    pub pack: f64,
    pub copy_in: f64,
    pub compute: f64,
    pub copy_out: f64,
}

/// See the module's text.
pub struct GroupedFfn {
    arena: Arc<Arena>,
    capacity: usize,
    turns: [Turn; 2],
    /// Whose turn it is.
    turn: usize,
    packer: Packer,
    homes: [Home; BATCHES],
    /// Which homes have batches whose results were not taken, the oldest first.
    begun: VecDeque<usize>,
    /// By row tile.
    gate_up: [Kernel; 3],
    down: [Kernel; 3],
    arrive: Kernel,
    quantize: Kernel,
}

impl GroupedFfn {
    /// Takes working memory for chunks of up to `capacity` rows, at least 16.
    pub fn new(arena: Arc<Arena>, capacity: usize) -> Result<GroupedFfn, GpuError> {
        let capacity = capacity.max(16).next_multiple_of(16);
        let gpu = arena.gpu();
        let shape = arena.layout().shape;
        let kernels = |product: Product| {
            let kernel =
                |tile| gpu.kernel("experts", &product.kernel(shape.coding, tile), SHARED_BYTES);
            let [small, middle, large] = RowTile::ALL.map(kernel);
            Ok::<_, GpuError>([small?, middle?, large?])
        };
        let turn = |lane| Turn::new(&arena, lane, capacity);
        let home = || {
            let bytes = capacity * stride(shape.hidden, Coding::Bf16);
            let results = gpu.pin("results", bytes)?;
            Ok::<_, GpuError>(Home { results, done: [gpu.mark()?, gpu.mark()?] })
        };
        let arrive = match shape.coding {
            Coding::Fp8 => "arrive_fp8",
            Coding::Bf16 => "arrive_bf16",
        };
        Ok(GroupedFfn {
            capacity,
            turns: [turn(LANES[0])?, turn(LANES[1])?],
            turn: 0,
            packer: Packer::default(),
            homes: [home()?, home()?],
            begun: VecDeque::with_capacity(BATCHES),
            gate_up: kernels(Product::GateUp)?,
            down: kernels(Product::Down)?,
            arrive: gpu.kernel("coding", arrive, 0)?,
            quantize: gpu.kernel("coding", "quantize", 0)?,
            arena,
        })
    }

    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// Begins a batch of so many rows. Panics if two have begun whose results were not taken.
    pub fn begin(&mut self, rows: usize) -> Result<(), GpuError> {
        assert!(self.begun.len() < BATCHES, "batches whose results were not taken");
        let home = (0..BATCHES).find(|home| !self.begun.contains(home)).unwrap_or(0);
        let bytes = rows * self.pitch();
        if bytes > self.homes[home].results.len() {
            self.homes[home].results = self.arena.gpu().pin("results", bytes)?;
        }
        self.begun.push_back(home);
        Ok(())
    }

    /// Has `pieces` of the batch that began last computed, whose rows are in `rows`. Panics if a piece names no slot, or its
    /// places are beyond the batch.
    pub fn compute(&mut self, pieces: &[Piece], rows: &dyn Rows) -> Result<(), GpuError> {
        let Some(&home) = self.begun.back() else { return Ok(()) };
        assert!(pieces.iter().all(|piece| (piece.slot as usize) < self.arena.slots()));
        let given = self.give(pieces, rows, home);
        if given.is_err() {
            // What was begun is not in the way of what comes next, if anything does.
            let _ = self.settle();
        }
        given
    }

    fn give(&mut self, pieces: &[Piece], rows: &dyn Rows, home: usize) -> Result<(), GpuError> {
        for chunk in chunks(pieces, self.capacity) {
            let turn = self.turn;
            self.turn = (turn + 1) % self.turns.len();
            let (plan, packed) = self.pack(turn, &chunk, rows)?;
            self.copy_in(turn, packed)?;
            self.launch(turn, &plan, packed)?;
            self.copy_out(turn, home, &chunk)?;
        }
        let (gpu, done) = (self.arena.gpu(), &self.homes[home].done);
        done.iter().zip(LANES).try_for_each(|(mark, lane)| gpu.set(mark, lane))
    }

    /// Whether the results of the oldest batch are there.
    pub fn is_done(&self) -> Result<bool, GpuError> {
        let Some(&home) = self.begun.front() else { return Ok(true) };
        let [one, other] = &self.homes[home].done;
        let gpu = self.arena.gpu();
        Ok(gpu.is_reached(one)? && gpu.is_reached(other)?)
    }

    /// Waits for all that was given to the device.
    pub fn settle(&self) -> Result<(), GpuError> {
        LANES.into_iter().try_for_each(|lane| self.arena.gpu().wait(lane))
    }

    /// Waits for the results of the oldest batch; there are none without a batch.
    pub fn results(&mut self) -> Result<Results<'_>, GpuError> {
        let (width, pitch) = (self.width(), self.pitch());
        let Some(home) = self.begun.pop_front() else {
            return Ok(Results { bytes: &[], width, pitch });
        };
        let home = &self.homes[home];
        home.done.iter().try_for_each(|mark| self.arena.gpu().reach(mark))?;
        Ok(Results { bytes: &home.results, width, pitch })
    }

    /// Bytes of a row on the host.
    fn width(&self) -> usize {
        self.arena.layout().shape.hidden * Coding::Bf16.size()
    }

    /// Bytes from one row of results to the next.
    fn pitch(&self) -> usize {
        stride(self.arena.layout().shape.hidden, Coding::Bf16)
    }

    /// Seconds that `pieces` take, which fit into one chunk: each stage by itself, and of the products the mean of `repeats`
    /// times without a pause between them. Panics if a batch has begun.
    pub fn time(
        &mut self,
        pieces: &[Piece],
        rows: &dyn Rows,
        repeats: u32,
    ) -> Result<Stages, GpuError> {
        let all: usize = pieces.iter().map(|piece| piece.rows.len()).sum();
        assert!(all <= self.capacity, "{all} rows in a chunk of {}", self.capacity);
        assert!(self.begun.is_empty(), "a batch that has begun");
        self.begin(pieces.iter().map(|piece| piece.rows.end).max().unwrap_or(0))?;
        let (repeats, lane) = (repeats.max(1), self.turns[0].lane);
        let timed = |work: &mut dyn FnMut() -> Result<(), GpuError>| {
            let start = Instant::now();
            work()?;
            Ok::<_, GpuError>(start.elapsed().as_secs_f64())
        };
        let mut packed = None;
        let pack = timed(&mut || {
            packed = Some(self.pack(0, pieces, rows)?);
            Ok(())
        })?;
        let Some((plan, packed)) = packed else { return Ok(Stages::default()) };
        let copy_in = timed(&mut || {
            self.copy_in(0, packed)?;
            self.arena.gpu().wait(lane)
        })?;
        self.launch(0, &plan, packed)?;
        self.arena.gpu().wait(lane)?;
        let compute = timed(&mut || {
            (0..repeats).try_for_each(|_| self.launch(0, &plan, packed))?;
            self.arena.gpu().wait(lane)
        })?;
        let copy_out = timed(&mut || {
            self.copy_out(0, 0, pieces)?;
            self.arena.gpu().wait(lane)
        })?;
        self.begun.clear();
        Ok(Stages { pack, copy_in, compute: compute / f64::from(repeats), copy_out })
    }

    /// Overwrites all working memory with codes of NaN, so that a check sees what reads more than it was given.
    pub fn poison(&mut self) -> Result<(), GpuError> {
        for turn in &self.turns {
            let own = [&turn.arrived, &turn.out].into_iter();
            let mut all = own.chain(turn.x.memories()).chain(turn.h.memories());
            all.try_for_each(|memory| memory.fill(turn.lane, 0xff))?;
            self.arena.gpu().wait(turn.lane)?;
        }
        Ok(())
    }

    /// Lays a chunk out in a turn's pinned memory, once what was there has left.
    fn pack(
        &mut self,
        turn: usize,
        chunk: &[Piece],
        rows: &dyn Rows,
    ) -> Result<(Schedule, Packed), GpuError> {
        let work: Vec<(u32, usize)> =
            chunk.iter().map(|piece| (piece.slot, piece.rows.len())).collect();
        let plan = schedule(&work);
        let places = chunk.iter().flat_map(|piece| piece.rows.clone());
        let turn = &mut self.turns[turn];
        self.arena.gpu().reach(&turn.copied)?;
        let hidden = self.arena.layout().shape.hidden;
        let packed = self.packer.pack(&plan.groups, places, rows, hidden, &mut turn.from);
        Ok((plan, packed))
    }

    /// What was packed, to the device.
    fn copy_in(&self, turn: usize, packed: Packed) -> Result<(), GpuError> {
        let turn = &self.turns[turn];
        // SAFETY: `pack` writes to the pinned memory only when `copied` is reached, and the device's is this turn's.
        unsafe { turn.arrived.copy_in(turn.lane, 0, &turn.from[..packed.bytes])? };
        self.arena.gpu().set(&turn.copied, turn.lane)
    }

    /// A chunk's results, to their places: one copy where pieces follow each other.
    fn copy_out(&mut self, turn: usize, home: usize, chunk: &[Piece]) -> Result<(), GpuError> {
        let (pitch, turn) = (self.pitch(), &self.turns[turn]);
        let mut row = 0;
        for run in chunk.chunk_by(|piece, next| piece.rows.end == next.rows.start) {
            let places = run[0].rows.start..run[run.len() - 1].rows.end;
            let to = &mut self.homes[home].results[places.start * pitch..places.end * pitch];
            // SAFETY: handed out only when `done` is reached, which follows on this lane.
            unsafe { turn.out.copy_out(turn.lane, row * pitch, to)? };
            row += places.len();
        }
        Ok(())
    }

    /// Has a turn's lane compute `plan`, whose rows are in `packed`.
    fn launch(&self, turn: usize, plan: &Schedule, packed: Packed) -> Result<(), GpuError> {
        let turn = &self.turns[turn];
        self.arrive(turn, packed)?;
        for launch in &plan.launches {
            self.product(turn, launch, packed, Product::GateUp)?;
        }
        self.quantize(turn, packed)?;
        let mut launches = plan.launches.iter();
        launches.try_for_each(|launch| self.product(turn, launch, packed, Product::Down))
    }

    /// Rows that have arrived, as the first product reads them.
    fn arrive(&self, turn: &Turn, packed: Packed) -> Result<(), GpuError> {
        let mut arrived = turn.arrived.address();
        let mut sources = arrived;
        let (mut rows, mut k) = (packed.rows as u32, turn.x.k as u32);
        let first =
            [pointer(&mut arrived), pointer(&mut sources), pointer(&mut rows), pointer(&mut k)];
        self.code(turn, &self.arrive, &turn.x, packed.rows, &first)
    }

    /// What is between the products as the second reads it: codes and scales if weights are FP8.
    fn quantize(&self, turn: &Turn, packed: Packed) -> Result<(), GpuError> {
        if turn.h.codes.is_none() {
            return Ok(());
        }
        let mut from = turn.h.address();
        let mut from_stride = (stride(turn.h.k, Coding::Bf16) / 2) as u32;
        let (mut rows, mut k) = (packed.rows as u32, turn.h.k as u32);
        let first =
            [pointer(&mut from), pointer(&mut from_stride), pointer(&mut rows), pointer(&mut k)];
        self.code(turn, &self.quantize, &turn.h, packed.rows, &first)
    }

    /// A kernel of coding.cu that writes `to`; `first` are its parameters before those that say where.
    fn code(
        &self,
        turn: &Turn,
        kernel: &Kernel,
        to: &Operand,
        rows: usize,
        first: &[*mut c_void; 4],
    ) -> Result<(), GpuError> {
        let blocks = to.k.div_ceil(BLOCK);
        let (mut at, mut width) = (to.address(), (stride(to.k, Coding::Bf16) / 2) as u32);
        let (mut table, mut table_width) = (0, 0);
        let mut args = first.to_vec();
        if let Some((codes, scales)) = &to.codes {
            (at, width) = (codes.address(), stride(to.k, Coding::Fp8) as u32);
            table = scales.address();
            table_width = (scales.len() / blocks / size_of::<f32>()) as u32;
        }
        args.extend([pointer(&mut at), pointer(&mut width)]);
        if to.codes.is_some() {
            args.extend([pointer(&mut table), pointer(&mut table_width)]);
        }
        let grid = Grid {
            blocks: (rows.div_ceil(CODING_ROWS) as u32, blocks as u32, 1),
            threads: CODING_THREADS,
            shared: 0,
        };
        // SAFETY: the parameters of the kernels of coding.cu in their order; memory holds `capacity` rows, of which these
        // are the first, and `sources` name rows that were packed with them.
        unsafe { self.arena.gpu().launch(turn.lane, kernel, grid, &mut args) }
    }

    /// One product of one launch.
    fn product(
        &self,
        turn: &Turn,
        launch: &Launch,
        packed: Packed,
        product: Product,
    ) -> Result<(), GpuError> {
        let arena = &*self.arena;
        let (input, output, kernels) = match product {
            Product::GateUp => (&turn.x, turn.h.address(), &self.gate_up),
            Product::Down | Product::Linear => (&turn.h, turn.out.address(), &self.down),
        };
        let (slots, groups) = (arena.address(), turn.arrived.address() + packed.groups as u64);
        let mut call = Call::new(arena.layout(), product, launch, slots, groups, output);
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

impl Drop for GroupedFfn {
    /// Memory is given back only when no copy uses it.
    fn drop(&mut self) {
        // A device that is gone uses nothing.
        let _ = self.settle();
    }
}

fn pointer<T>(value: &mut T) -> *mut c_void {
    std::ptr::from_mut(value).cast()
}
