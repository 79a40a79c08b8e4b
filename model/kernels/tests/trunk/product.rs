//! Products whose results stay f32, and those with a weight for each head, as the trunk launches them.

use std::sync::Arc;

use half::bf16;
use kernels::cuda::trunk::{
    Bounds, Buffer, Driver, Host, Plan, Rows, Tables, Uploader, Weights, fetch,
};

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
    let weights = Weights::new(driver, (n, k), slots).unwrap();
    let mut uploader = Uploader::new(driver).unwrap();
    let write = |first: usize, to: &mut [bf16]| {
        for (row, to) in (first..).zip(to.chunks_exact_mut(weights.stride())) {
            to[..k].copy_from_slice(&values[row * k..][..k]);
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
    let (tables, x) = (tables(driver, count, 1), rows(driver, k, x, count.max(16)));
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
}
