//! The kernels of `src/cuda/experts.cu` and `coding.cu`, run on the CPU through a stand-in for the GPU (`standin/standin.h`): against a plain
//! reference in double, over poisoned memory, with the schedules, tensors and calls that a GPU would be told. It cannot
//! show how hardware rounds or how fast it is; `tests/gpu.sh` does, where there is one.

#[path = "standin/common.rs"]
mod common;
#[path = "standin/compiled.rs"]
mod compiled;

use std::ffi::{CString, c_char, c_int, c_void};
use std::sync::OnceLock;

use kernels::cuda::arrive::{self, Packer};
use kernels::cuda::call::{self, CODING_ROWS, CODING_THREADS, Call, Product, THREADS};
use kernels::cuda::reference::{self, distance, scale};
use kernels::cuda::schedule::{RowTile, schedule};
use kernels::cuda::{BLOCK, Coding, ExpertShape, Layout, Row, TensorMap, stride};
use kernels::{Mat, f32_to_fp8, fp8_to_f32, round_bf16};
use libloading::{Library, Symbol};

use common::{Random, widened};
use compiled::{compiled, tensor_map};

type RunProduct =
    unsafe extern "C" fn(*const c_char, u32, u32, u64, *const TensorMap, *const Call) -> c_int;
type RunQuantize = unsafe extern "C" fn(
    u32,
    u32,
    u32,
    *const c_void,
    u32,
    u32,
    u32,
    *mut c_void,
    u32,
    *mut c_void,
    u32,
);

/// The stand-in with the products in it, compiled once; nothing where there is no C++ compiler.
fn library() -> Option<&'static Library> {
    static BUILT: OnceLock<Option<Library>> = OnceLock::new();
    BUILT.get_or_init(|| compiled("experts.cpp")).as_ref()
}

/// The same with what codes rows.
fn coding() -> Option<&'static Library> {
    static BUILT: OnceLock<Option<Library>> = OnceLock::new();
    BUILT.get_or_init(|| compiled("coding.cpp")).as_ref()
}

/// The stand-in has one block's state for the whole process.
static ONE_AT_A_TIME: parking_lot::Mutex<()> = parking_lot::Mutex::new(());

/// "Device" memory: at a multiple of 256, poisoned.
struct Memory {
    words: Vec<u64>,
    start: *mut u64,
}

impl Memory {
    fn new(bytes: usize) -> Memory {
        // Some to align within.
        let mut words = vec![u64::MAX; bytes.div_ceil(8) + 64];
        let start = words.as_mut_ptr();
        Memory { words, start }
    }

    fn address(&self) -> u64 {
        (self.start as u64).next_multiple_of(256)
    }

    fn bytes(&mut self) -> &mut [u8] {
        let skip = (self.address() - self.start as u64) as usize;
        &mut bytemuck::cast_slice_mut(&mut self.words)[skip..]
    }
}

struct Expert {
    codes: [Vec<u8>; 3],
    scales: [Vec<u8>; 3],
}

/// A case: experts in slots, and rows for some of them.
struct Case {
    layout: Layout,
    experts: Vec<Expert>,
    slots: Memory,
    work: Vec<(u32, usize)>,
    /// bf16 `[rows, hidden]`
    x: Vec<half::bf16>,
}

impl Case {
    fn new(hidden: usize, inner: usize, coding: Coding, work: &[(u32, usize)], seed: u64) -> Case {
        let mut random = Random(seed);
        let count = work.iter().map(|(slot, _)| slot + 1).max().unwrap_or(1) as usize;
        let mut weight = |n: usize, k: usize| match coding {
            Coding::Fp8 => {
                let codes = (0..n * k).map(|_| f32_to_fp8(random.unit() * 400.0)).collect();
                let scales = (0..n.div_ceil(BLOCK) * k.div_ceil(BLOCK))
                    .flat_map(|_| (0.0002 + random.unit().abs() * 0.001).to_le_bytes())
                    .collect();
                (codes, scales)
            }
            Coding::Bf16 => {
                let values = (0..n * k).flat_map(|_| round_bf16(random.unit() * 0.2).to_le_bytes());
                (values.collect(), Vec::new())
            }
        };
        let experts: Vec<Expert> = (0..count)
            .map(|_| {
                let made = [weight(inner, hidden), weight(inner, hidden), weight(hidden, inner)];
                let [(gate, s0), (up, s1), (down, s2)] = made;
                Expert { codes: [gate, up, down], scales: [s0, s1, s2] }
            })
            .collect();
        let layout = Layout::new(ExpertShape { hidden, inner, coding });
        let mut slots = Memory::new(layout.bytes * count);
        for (slot, expert) in experts.iter().enumerate() {
            let to = &mut slots.bytes()[slot * layout.bytes..][..layout.bytes];
            layout.pack(&expert.mats(&layout), to).unwrap();
        }
        let rows: usize = work.iter().map(|(_, rows)| rows).sum();
        let x = (0..rows * hidden).map(|_| round_bf16(random.unit() * 2.0)).collect();
        Case { layout, experts, slots, work: work.to_vec(), x }
    }

    fn rows(&self) -> usize {
        self.work.iter().map(|(_, rows)| rows).sum()
    }

    /// Through the kernels, on `blocks` blocks.
    fn run(&self, blocks: u32, seed: u64) -> Vec<half::bf16> {
        let _turn = ONE_AT_A_TIME.lock();
        let library = library().unwrap();
        // SAFETY: that is its type (standin/experts.cpp).
        let product: Symbol<'_, RunProduct> = unsafe { library.get(b"standin_product") }.unwrap();
        let ExpertShape { hidden, inner, coding } = self.layout.shape;
        let (rows, capacity) = (self.rows(), self.rows().next_multiple_of(16) + 16);
        let plan = schedule(&self.work);
        let mut table = Memory::new(plan.groups.len() * 16);
        for (to, group) in table.bytes().chunks_exact_mut(16).zip(&plan.groups) {
            to.copy_from_slice(&group.to_bytes());
        }
        let mut x = Memory::new(capacity * stride(hidden, Coding::Bf16));
        fill(&mut x, &self.x, hidden);
        let h = Memory::new(capacity * stride(inner, Coding::Bf16));
        let out = Memory::new(capacity * stride(hidden, Coding::Bf16));
        let count = self.experts.len();
        for (which, input, k, output) in
            [(Product::GateUp, &x, hidden, &h), (Product::Down, &h, inner, &out)]
        {
            let (codes, scales) = quantized(input, rows, k, capacity);
            for launch in &plan.launches {
                let slots = self.slots.address();
                let values = match coding {
                    Coding::Fp8 => &codes,
                    Coding::Bf16 => input,
                };
                let [w0, w1] = which
                    .parts()
                    .map(|part| tensor_map(&call::weights(&self.layout, part, count, slots)));
                let values = call::values(k, capacity, coding, launch.tile, values.address());
                let scales = call::scales(k, capacity, launch.tile, scales.address());
                let maps = [w0, w1, tensor_map(&values), tensor_map(&scales)];
                let groups = table.address();
                let call = Call::new(&self.layout, which, launch, slots, groups, output.address());
                let name = CString::new(which.kernel(coding, launch.tile)).unwrap();
                let blocks = blocks.min(call.tiles);
                // SAFETY: maps, call and what they point to outlive the run.
                let found =
                    unsafe { product(name.as_ptr(), blocks, THREADS, seed, maps.as_ptr(), &call) };
                assert_eq!(found, 1, "{name:?} is not in the stand-in");
            }
        }
        taken(out, rows, hidden)
    }

    /// In double, rounded where the kernels round.
    fn reference(&self) -> Vec<f64> {
        let ExpertShape { hidden, coding, .. } = self.layout.shape;
        let x = widened(&self.x);
        let mut rows = x.chunks_exact(hidden);
        let group = |&(slot, count): &(u32, usize)| {
            let mats = self.experts[slot as usize].mats(&self.layout);
            reference::expert(mats, coding, rows.by_ref().take(count))
        };
        self.work.iter().flat_map(group).collect()
    }
}

impl Expert {
    fn mats(&self, layout: &Layout) -> [Mat<'_>; 3] {
        std::array::from_fn(|i| {
            let (n, k) = (layout.parts[i].n, layout.parts[i].k);
            match layout.shape.coding {
                Coding::Fp8 => Mat::fp8(&self.codes[i], &self.scales[i], n, k, (BLOCK, BLOCK)),
                Coding::Bf16 => Mat::bf16(&self.codes[i], n, k),
            }
            .unwrap()
        })
    }
}

/// Writes rows at the device's pitch.
fn fill(memory: &mut Memory, rows: &[half::bf16], k: usize) {
    let pitch = stride(k, Coding::Bf16);
    for (to, row) in memory.bytes().chunks_exact_mut(pitch).zip(rows.chunks_exact(k)) {
        to[..2 * k].copy_from_slice(bytemuck::cast_slice(row));
    }
}

fn taken(mut memory: Memory, rows: usize, k: usize) -> Vec<half::bf16> {
    let pitch = stride(k, Coding::Bf16);
    let rows = memory.bytes().chunks_exact(pitch).take(rows);
    rows.flat_map(|row| {
        row[..2 * k].as_chunks::<2>().0.iter().map(|x| half::bf16::from_le_bytes(*x))
    })
    .collect()
}

/// Codes and scales of `rows` rows, by the kernel.
fn quantized(input: &Memory, rows: usize, k: usize, capacity: usize) -> (Memory, Memory) {
    // SAFETY: that is its type (standin/coding.cpp).
    let quantize: Symbol<'_, RunQuantize> =
        unsafe { coding().unwrap().get(b"standin_quantize") }.unwrap();
    let blocks = k.div_ceil(BLOCK);
    let codes = Memory::new(capacity * stride(k, Coding::Fp8));
    let scales = Memory::new(blocks * capacity * 4);
    // SAFETY: memory holds `capacity` rows, of which these are the first.
    unsafe {
        quantize(
            rows.div_ceil(CODING_ROWS) as u32,
            blocks as u32,
            CODING_THREADS,
            input.address() as *const c_void,
            (stride(k, Coding::Bf16) / 2) as u32,
            rows as u32,
            k as u32,
            codes.address() as *mut c_void,
            stride(k, Coding::Fp8) as u32,
            scales.address() as *mut c_void,
            capacity as u32,
        );
    }
    (codes, scales)
}

#[test]
fn products_are_those_of_the_reference() {
    if library().is_none() {
        return;
    }
    for (hidden, inner) in [(256, 64), (200, 72), (136, 200)] {
        for coding in [Coding::Fp8, Coding::Bf16] {
            // Tiles of each size, full, with tails, and an expert without rows in between.
            let work = [(2, 3), (0, 0), (1, 17), (3, 16), (0, 70), (2, 1), (1, 130)];
            let case = Case::new(hidden, inner, coding, &work, 7 + hidden as u64);
            let off = distance(&widened(&case.run(3, 11)), &case.reference());
            assert!(off <= 4e-3, "{hidden} x {inner} {coding:?}: off by {off}");
        }
    }
}

#[test]
fn a_row_is_the_same_bits_in_every_tile_and_on_any_number_of_blocks() {
    if library().is_none() {
        return;
    }
    for coding in [Coding::Fp8, Coding::Bf16] {
        let hidden = 192;
        let whole = Case::new(hidden, 136, coding, &[(0, 66)], 3);
        let tile = |rows| RowTile::of(rows);
        assert!(tile(66) == RowTile::R128 && tile(20) == RowTile::R64 && tile(1) == RowTile::R16);
        let together = whole.run(2, 5);
        for (from, count) in [(0, 20), (17, 20), (65, 1), (0, 16)] {
            let mut part = Case::new(hidden, 136, coding, &[(0, count)], 3);
            part.x = whole.x[from * hidden..(from + count) * hidden].to_vec();
            for blocks in [1, 4] {
                let alone = part.run(blocks, 9 + u64::from(blocks));
                assert!(alone == together[from * hidden..(from + count) * hidden], "{coding:?}");
            }
        }
    }
}

#[test]
fn rows_are_quantised_as_they_travel() {
    if coding().is_none() {
        return;
    }
    let _turn = ONE_AT_A_TIME.lock();
    for k in [128, 200, 8] {
        let (rows, capacity) = (9, 16);
        let mut random = Random(k as u64);
        let mut x: Vec<_> = (0..rows * k).map(|_| round_bf16(random.unit() * 3e3)).collect();
        // A block of zeros, and one whose scale would vanish.
        x[..k].fill(half::bf16::ZERO);
        x[k..2 * k].fill(half::bf16::from_bits(1));
        let mut memory = Memory::new(capacity * stride(k, Coding::Bf16));
        fill(&mut memory, &x, k);
        let (mut codes, mut scales) = quantized(&memory, rows, k, capacity);
        for (row, values) in x.chunks_exact(k).enumerate() {
            let at = row * stride(k, Coding::Fp8);
            for (block, values) in values.chunks(BLOCK).enumerate() {
                let scale = scale(&widened(values));
                let got = &scales.bytes()[(block * capacity + row) * 4..][..4];
                assert_eq!(got, scale.to_le_bytes());
                let expected: Vec<u8> =
                    values.iter().map(|x| f32_to_fp8(x.to_f32() / scale)).collect();
                let got = &codes.bytes()[at + block * BLOCK..][..values.len()];
                assert_eq!(got, expected, "row {row} block {block} of {k}");
            }
        }
    }
}

/// Rows in both forms, some of them shared, packed as for a GPU: what arrives of each place in FP8 and in bf16.
#[test]
fn rows_arrive_in_the_form_that_weights_are_multiplied_with() {
    if coding().is_none() {
        return;
    }
    let _turn = ONE_AT_A_TIME.lock();
    for k in [256, 200, 129, 5] {
        let mut random = Random(k as u64);
        let values: Vec<Vec<_>> =
            (0..6).map(|_| (0..k).map(|_| round_bf16(random.unit() * 7.0)).collect()).collect();
        let sent: Vec<Vec<u8>> = values
            .iter()
            .enumerate()
            .map(|(id, row): (_, &Vec<half::bf16>)| match id % 2 {
                0 => row.iter().flat_map(|x| x.to_le_bytes()).collect(),
                _ => travelling(row),
            })
            .collect();
        let places = [5, 0, 1, 1, 4, 3, 0, 2, 5];
        let row = |place: usize| {
            let id = places[place];
            Row { id, fp8: id % 2 == 1, bytes: &sent[id] }
        };
        let mut arrived = Memory::new(arrive::capacity(places.len(), k));
        let packed = Packer::default().pack(&[], 0..places.len(), &row, k, arrived.bytes());
        let (codes, scales) = arrived_fp8(&arrived, packed.rows, k);
        let halves = arrived_bf16(&arrived, packed.rows, k);
        for (place, &id) in places.iter().enumerate() {
            let expected = match id % 2 {
                0 => travelling(&values[id]),
                _ => sent[id].clone(),
            };
            let (expected_codes, expected_scales) = expected.split_at(k);
            assert_eq!(codes[place * stride(k, Coding::Fp8)..][..k], *expected_codes, "{place}");
            for (block, scale) in expected_scales.chunks_exact(4).enumerate() {
                assert_eq!(scales[(block * ROOM + place) * 4..][..4], *scale, "{place} {block}");
            }
            let got = &halves[place * stride(k, Coding::Bf16)..][..2 * k];
            let expected: Vec<u8> = match id % 2 {
                0 => sent[id].clone(),
                _ => (0..k)
                    .flat_map(|i| {
                        let scale = expected_scales.as_chunks::<4>().0[i / BLOCK];
                        let value = fp8_to_f32(expected_codes[i]) * f32::from_le_bytes(scale);
                        round_bf16(value).to_le_bytes()
                    })
                    .collect(),
            };
            assert_eq!(got, expected, "{place} of {k}");
        }
    }
}

/// Rows that what arrives is written among.
const ROOM: usize = 16;

/// A row as it travels in FP8.
fn travelling(row: &[half::bf16]) -> Vec<u8> {
    let scales = || row.chunks(BLOCK).map(|block| scale(&widened(block)));
    let codes = row.chunks(BLOCK).zip(scales());
    let codes = codes.flat_map(|(block, scale)| block.iter().map(move |x| (x, scale)));
    codes
        .map(|(x, scale)| f32_to_fp8(x.to_f32() / scale))
        .chain(scales().flat_map(f32::to_le_bytes))
        .collect()
}

fn arrived_fp8(arrived: &Memory, rows: usize, k: usize) -> (Vec<u8>, Vec<u8>) {
    type Run = unsafe extern "C" fn(u32, u32, u32, u64, u64, u32, u32, u64, u32, u64, u32);
    let (blocks, pitch) = (k.div_ceil(BLOCK), stride(k, Coding::Fp8));
    let mut codes = Memory::new(ROOM * pitch);
    let mut scales = Memory::new(blocks * ROOM * 4);
    let (at, across) = (arrived.address(), rows.div_ceil(CODING_ROWS) as u32);
    // SAFETY: that is its type (standin/coding.cpp), and memory is there for `ROOM` rows.
    unsafe {
        let run: Symbol<'_, Run> = coding().unwrap().get(b"standin_arrive_fp8").unwrap();
        let (rows, k, pitch, room) = (rows as u32, k as u32, pitch as u32, ROOM as u32);
        let (codes, scales) = (codes.address(), scales.address());
        run(across, blocks as u32, CODING_THREADS, at, at, rows, k, codes, pitch, scales, room);
    }
    (codes.bytes().to_vec(), scales.bytes().to_vec())
}

fn arrived_bf16(arrived: &Memory, rows: usize, k: usize) -> Vec<u8> {
    type Run = unsafe extern "C" fn(u32, u32, u32, u64, u64, u32, u32, u64, u32);
    let (blocks, pitch) = (k.div_ceil(BLOCK), stride(k, Coding::Bf16));
    let mut out = Memory::new(ROOM * pitch);
    let (at, across) = (arrived.address(), rows.div_ceil(CODING_ROWS) as u32);
    // SAFETY: as above.
    unsafe {
        let run: Symbol<'_, Run> = coding().unwrap().get(b"standin_arrive_bf16").unwrap();
        let (rows, k, pitch) = (rows as u32, k as u32, (pitch / 2) as u32);
        run(across, blocks as u32, CODING_THREADS, at, at, rows, k, out.address(), pitch);
    }
    out.bytes().to_vec()
}
