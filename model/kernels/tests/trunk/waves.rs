//! Attention in waves: how much room there is for parts does not show.

use std::sync::Arc;

use half::bf16;
use kernels::cuda::trunk::{
    Attention, Bounds, Buffer, Cache, Driver, Host, Plan, Rows, Tables, fetch,
};

use crate::device::Random;
use crate::driver::StandIn;

const PAGES: usize = 80;
const PAGE_TOKENS: usize = 16;
const HEADS: usize = 3;
const RANK: usize = 24;
const ROPE: usize = 8;

/// A buffer with `values` in it.
fn filled(driver: &Arc<dyn Driver>, buffer: &Buffer, values: &[bf16]) {
    let mut host = Host::new(driver, "values", values.len() * 2).unwrap();
    host.bytes_mut().unwrap().copy_from_slice(bytemuck::cast_slice(values));
    host.send(buffer, values.len() * 2).unwrap();
}

/// What rows of some positions get, with room for so many parts.
fn run(driver: &Arc<dyn Driver>, parts: usize) -> Vec<u8> {
    let bounds = Bounds { vocab: 1, pages: PAGES, page_tokens: PAGE_TOKENS, rope: ROPE, parts };
    let mut plan = Plan::default();
    for (start, count) in [(1030, 3), (5, 2), (600, 4), (1100, 1)] {
        plan.chunk(&bounds, &vec![0; count], start, (0..80).rev(), |_| &[0.0; ROPE]);
    }
    let rows = plan.len();
    let mut tables = Tables::new(driver, bounds, HEADS, 2048, (rows, 1)).unwrap();
    tables.send(&plan).unwrap();

    let mut random = Random(5);
    let width = RANK + ROPE;
    let cache = Buffer::new::<bf16>(driver, "cache", PAGES * PAGE_TOKENS * width).unwrap();
    filled(driver, &cache, &random.halves(PAGES * PAGE_TOKENS * width));
    let rotated = Buffer::new::<bf16>(driver, "queries", rows * HEADS * ROPE).unwrap();
    filled(driver, &rotated, &random.halves(rows * HEADS * ROPE));
    let absorbed = Rows::new(driver, "queries", RANK, HEADS * rows).unwrap();
    filled(driver, absorbed.buffer(), &random.halves(rows * HEADS * RANK));
    let out = Rows::new(driver, "results", RANK, HEADS * rows).unwrap();
    let attention = Attention {
        heads: HEADS,
        rank: RANK,
        scale: 0.3,
        absorbed: &absorbed,
        rotated: &rotated,
        out: &out,
        parts: &Buffer::new::<f32>(driver, "parts", parts * HEADS * RANK).unwrap(),
        tops: &Buffer::new::<f32>(driver, "tops", parts * HEADS * 2).unwrap(),
    };
    let cache = Cache {
        buffer: &cache,
        pages: PAGES,
        layers: 1,
        layer: 0,
        page_tokens: PAGE_TOKENS,
        width,
    };
    driver.attention(&tables, cache, &attention).unwrap();
    let len = rows * HEADS * RANK * 2;
    let mut host = Host::new(driver, "results", len).unwrap();
    fetch(driver, [(out.buffer(), &mut host, len)]).unwrap();
    host.bytes().to_vec()
}

#[test]
fn room_for_few_parts_gives_the_same_bits_as_room_for_all() {
    let Some(driver) = StandIn::open(1) else { return };
    let whole = run(&driver, 64);
    assert!(whole.as_chunks::<2>().0.iter().all(|x| bf16::from_le_bytes(*x).is_finite()));
    for parts in [3, 7] {
        assert!(run(&driver, parts) == whole, "{parts} parts");
    }
}
