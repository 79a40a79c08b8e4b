//! Products whose results stay f32, and those with a weight for each head, as the trunk launches them.

use std::sync::Arc;

use half::bf16;
use kernels::Mat;
use kernels::cuda::trunk::{
    Bounds, Buffer, Driver, Host, Plan, Rows, Tables, Uploader, Weights, fetch,
};
use kernels::cuda::{Coding, reference};

use crate::device::{Random, distance, widened};
use crate::driver::StandIn;

/// Tables of a step of so many rows, for so many heads.
fn tables(driver: &Arc<dyn Driver>, rows: usize, heads: usize) -> Tables {
    let bounds = Bounds { vocab: 1, pages: 64, page_tokens: 64, rope: 2, parts: 4 };
    let mut plan = Plan::default();
    plan.chunk(&bounds, &vec![0; rows], 0, 0..64, |_| &[1.0, 0.0]);
    let mut tables = Tables::new(driver, bounds, heads, 4096, (rows, 1)).unwrap();
    tables.send(&plan).unwrap();
    tables
}

fn weights(
    driver: &Arc<dyn Driver>,
    (n, k, slots): (usize, usize, usize),
    values: &[bf16],
) -> Weights {
    let weights = Weights::new(driver, (n, k), slots, None).unwrap();
    let mut uploader = Uploader::new(driver).unwrap();
    let write = |first: usize, to: &mut [u8]| {
        for (row, to) in (first..).zip(to.chunks_exact_mut(weights.stride())) {
            to[..2 * k].copy_from_slice(bytemuck::cast_slice(&values[row * k..][..k]));
        }
    };
    weights.fill(&mut uploader, write).unwrap();
    weights
}

/// Rows with `values` in them, and poison in their padding.
fn rows(driver: &Arc<dyn Driver>, k: usize, values: &[bf16], capacity: usize) -> Rows {
    let rows = Rows::new(driver, "rows", k, capacity).unwrap();
    let mut host = Host::new(driver, "rows", values.len() / k * rows.stride() * 2).unwrap();
    let bytes = host.bytes_mut().unwrap();
    for (to, row) in bytes.chunks_exact_mut(rows.stride() * 2).zip(values.chunks_exact(k)) {
        to[..2 * k].copy_from_slice(bytemuck::cast_slice(row));
    }
    let len = bytes.len();
    host.send(rows.buffer(), len).unwrap();
    rows
}

fn read<T: bytemuck::AnyBitPattern>(
    driver: &Arc<dyn Driver>,
    from: &Buffer,
    count: usize,
) -> Vec<T> {
    let len = count * size_of::<T>();
    let mut host = Host::new(driver, "results", len).unwrap();
    fetch(driver, [(from, &mut host, len)]).unwrap();
    host.bytes().chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
}

fn linear(driver: &Arc<dyn Driver>, w: &Weights, (n, k): (usize, usize), x: &[bf16]) -> Vec<f32> {
    let count = x.len() / k;
    // Capacities that are no multiples of four.
    let x = rows(driver, k, x, count.max(17)).with_codes(driver, "codes").unwrap();
    let tables = tables(driver, count, 1);
    driver.code(count, &x, [w]).unwrap();
    let out = Buffer::new::<f32>(driver, "results", count * n).unwrap();
    driver.linear(&tables, tables.all(), &x, w, out.all()).unwrap();
    read(driver, &out, count * n)
}

#[test]
fn f32_results_are_those_of_the_reference_and_a_row_the_same_bits_in_every_tile() {
    let Some(driver) = StandIn::open(3) else { return };
    let mut random = Random(11);
    for (n, k) in [(200, 136), (64, 40), (130, 256)] {
        let (values, x) = (random.halves(n * k), random.halves(150 * k));
        let w = weights(&driver, (n, k, 1), &values);
        let wide = widened(&values);
        for count in [3, 40, 150] {
            let out = linear(&driver, &w, (n, k), &x[..count * k]);
            let x = widened(&x[..count * k]);
            let dot = |x: &[f32], w: &[f32]| -> f64 {
                x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum()
            };
            let rows = x.chunks_exact(k);
            let reference: Vec<f64> =
                rows.flat_map(|x| wide.chunks_exact(k).map(move |w| dot(x, w))).collect();
            let off = distance(&out, &reference);
            // Nothing is rounded but sums.
            assert!(off <= 1e-6, "{count} rows of {n} x {k}: off by {off}");
        }
        let together = linear(&driver, &w, (n, k), &x);
        for (from, count) in [(0, 1), (17, 20), (149, 1), (30, 64)] {
            let alone = linear(&driver, &w, (n, k), &x[from * k..(from + count) * k]);
            assert!(alone == together[from * n..(from + count) * n], "rows {from} on");
        }
    }
}

/// An FP8 matrix with scales of its own per 128 x 128, and its weights on the device.
struct Fp8 {
    codes: Vec<u8>,
    scales: Vec<u8>,
    size: (usize, usize),
}

impl Fp8 {
    fn new(random: &mut Random, (n, k): (usize, usize)) -> Fp8 {
        let codes = (0..n * k).map(|_| kernels::f32_to_fp8(200.0 * random.unit())).collect();
        let blocks = n.div_ceil(128) * k.div_ceil(128);
        let scales = (0..blocks).flat_map(|_| (0.02 + 0.01 * random.unit()).to_le_bytes());
        Fp8 { codes, scales: scales.collect(), size: (n, k) }
    }

    fn mat(&self) -> Mat<'_> {
        let (n, k) = self.size;
        Mat::fp8(&self.codes, &self.scales, n, k, (128, 128)).unwrap()
    }

    fn weights(&self, driver: &Arc<dyn Driver>) -> Weights {
        let (mat, mut uploader) = (self.mat(), Uploader::new(driver).unwrap());
        let scales = uploader.scales(&mat).unwrap();
        let weights = Weights::new(driver, self.size, 1, scales).unwrap();
        let write = |first: usize, to: &mut [u8]| {
            for (row, to) in (first..).zip(to.chunks_exact_mut(weights.stride())) {
                to[..mat.k()].copy_from_slice(mat.row_bytes(row));
            }
        };
        weights.fill(&mut uploader, write).unwrap();
        assert_eq!(weights.coding(), Coding::Fp8);
        weights
    }
}

#[test]
fn fp8_results_are_those_of_the_reference_and_a_row_the_same_bits_in_every_tile() {
    let Some(driver) = StandIn::open(3) else { return };
    let mut random = Random(14);
    for size in [(200, 136), (64, 40), (130, 256), (300, 288)] {
        let (n, k) = size;
        let fp8 = Fp8::new(&mut random, size);
        let (w, x) = (fp8.weights(&driver), random.halves(150 * k));
        for count in [3, 40, 150] {
            let out = linear(&driver, &w, size, &x[..count * k]);
            let wide = widened(&x[..count * k]);
            let expected = reference::linear(fp8.mat(), Coding::Fp8, wide.chunks_exact(k));
            let off = distance(&out, &expected);
            // Codes and scales are the reference's: nothing else is rounded but sums.
            assert!(off <= 1e-6, "{count} rows of {n} x {k}: off by {off}");
        }
        let together = linear(&driver, &w, size, &x);
        for (from, count) in [(0, 1), (17, 20), (149, 1), (30, 64)] {
            let alone = linear(&driver, &w, size, &x[from * k..(from + count) * k]);
            assert!(alone == together[from * n..(from + count) * n], "rows {from} on");
        }
    }
}

#[test]
fn gated_layers_in_fp8_have_scales_for_each_half() {
    let Some(driver) = StandIn::open(2) else { return };
    let mut random = Random(15);
    let (hidden, inner, count) = (136, 200, 21);
    let mats = [(inner, hidden), (inner, hidden), (hidden, inner)];
    let mats = mats.map(|size| Fp8::new(&mut random, size));
    let [gate, up, down] = mats.each_ref().map(|fp8| fp8.weights(&driver));
    let values = random.halves(count * hidden);
    let x = rows(&driver, hidden, &values, count).with_codes(&driver, "codes").unwrap();
    let inner = Rows::new(&driver, "inner", inner, count).unwrap();
    let inner = inner.with_codes(&driver, "codes").unwrap();
    let (tables, out) =
        (tables(&driver, count, 1), Buffer::new::<f32>(&driver, "out", count * hidden));
    let (all, out) = (tables.all(), out.unwrap());
    driver.code(count, &x, [&gate, &up]).unwrap();
    driver.gate_up(&tables, all, &x, [&gate, &up], &inner).unwrap();
    driver.code(count, &inner, [&down]).unwrap();
    driver.linear(&tables, all, &inner, &down, out.all()).unwrap();
    let got: Vec<f32> = read(&driver, &out, count * hidden);
    let [gate, up, down] = mats.each_ref().map(Fp8::mat);
    let wide = widened(&values);
    let expected = reference::expert([gate, up, down], Coding::Fp8, wide.chunks_exact(hidden));
    let off = distance(&got, &expected);
    // An inner value at the edge between two of bf16, and then of e4m3, may fall to either.
    assert!(off <= 5e-3, "off by {off}");
}

#[test]
fn heads_have_their_own_weights() {
    let Some(driver) = StandIn::open(4) else { return };
    let mut random = Random(12);
    let (heads, n, k, count) = (3, 72, 24, 5);
    let (values, x) = (random.halves(heads * n * k), random.halves(heads * count * k));
    let (w, tables) = (weights(&driver, (n, k, heads), &values), tables(&driver, count, heads));
    let (from, out) =
        (rows(&driver, k, &x, heads * 16), Rows::new(&driver, "rows", n, 48).unwrap());
    driver.narrow(&tables, tables.by_head(), &from, &w, &out).unwrap();
    let got: Vec<bf16> = read(&driver, out.buffer(), heads * count * n);
    let (wide, x) = (widened(&values), widened(&x));
    let mut expected = Vec::new();
    for (head, x) in x.chunks_exact(count * k).enumerate() {
        for x in x.chunks_exact(k) {
            for w in wide[head * n * k..(head + 1) * n * k].chunks_exact(k) {
                expected.push(x.iter().zip(w).map(|(x, w)| f64::from(x * w)).sum::<f64>());
            }
        }
    }
    assert!(distance(&widened(&got), &expected) <= 4e-3);
}

#[test]
fn what_does_not_fit_is_refused_and_not_launched() {
    let Some(driver) = StandIn::open(1) else { return };
    let mut random = Random(13);
    let (n, k) = (24, 40);
    let w = weights(&driver, (n, k, 1), &random.halves(n * k));
    let tables = tables(&driver, 20, 1);
    let x = rows(&driver, k, &random.halves(20 * k), 20);
    let short = Buffer::new::<f32>(&driver, "results", 20 * n - 1).unwrap();
    let said = driver.linear(&tables, tables.all(), &x, &w, short.all()).map_err(|e| e.to_string());
    assert_eq!(said, Err("linear_bf16_64 needs 1920 bytes of results, which has 1916".to_owned()));
    let (few, other) = (rows(&driver, k, &[], 16), rows(&driver, k - 8, &[], 20));
    let out = Buffer::new::<f32>(&driver, "results", 20 * n).unwrap();
    assert!(driver.linear(&tables, tables.all(), &few, &w, out.all()).is_err());
    assert!(driver.linear(&tables, tables.all(), &other, &w, out.all()).is_err());
    assert!(driver.linear(&tables, tables.by_head(), &x, &w, out.all()).is_ok());

    let fp8 = Fp8::new(&mut random, (n, k)).weights(&driver);
    let said = driver.code(20, &x, [&w, &fp8]).map_err(|e| e.to_string());
    assert_eq!(said, Err("quantize needs 960 bytes of rows in FP8, which has 0".to_owned()));
    assert!(driver.linear(&tables, tables.all(), &x, &fp8, out.all()).is_err());
    assert!(driver.gate_up(&tables, tables.all(), &x, [&w, &fp8], &x).is_err());
}
