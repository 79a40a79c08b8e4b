//! That the way of a row allocates nothing of ours once it is warm: every allocation
//! of this process, which is router and node at once, is counted over many dispatches
//! and gathers against stub nodes. Nothing grows with rows, slots or nodes. A binary of its own, as the count is of the
//! whole process.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kernels::Isa;
use mesh::lifecycle::Shutdown;
use mesh::link::Identity;
use mesh::near::Shortcut;
use mesh::transport::Endpoint;
use model::Routed;
use proto::v1::Dtype;
use router::exchange::{Combine, Shape, Wire};
use router::measure::{Config, Dispatcher};

static COUNT: AtomicU64 = AtomicU64::new(0);

struct Counting;

// SAFETY: every call is handed on to the system's allocator as it came.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps `alloc`'s contract, which is the system's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from `alloc` or `realloc`, so from the system.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as for `dealloc`; the caller keeps `realloc`'s contract.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const EXPERTS: u32 = 16;
const TOP_K: usize = 4;
const HIDDEN: usize = 512;
const ROUNDS: u64 = 200;
/// What is ours, the encoding, routing, gathering and answering, allocates nothing.
const OURS: f64 = 0.5;
/// The HTTP/2 library reads into a buffer of 8 KiB. A DATA frame that does not fit it
/// gets a buffer of its own, that buffer's count of users, and the next one of 8 KiB.
const LONG_DATA: u64 = 3;
const READ_BUFFER: u64 = 8 << 10;

/// Allocations of the library for `bytes` that arrive: they come as one DATA frame.
fn reading(bytes: u64) -> u64 {
    if bytes <= READ_BUFFER / 2 { 0 } else { LONG_DATA }
}

/// Allocations per frame of `rows` rows spread over `nodes` nodes.
fn per_frame(nodes: u32, rows: usize, shared_rows: Shortcut) -> f64 {
    let dir =
        std::env::temp_dir().join(format!("moemesh-count-{}-{nodes}-{rows}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let endpoints: Vec<Endpoint> =
        (0..nodes).map(|node| Endpoint::Unix(dir.join(format!("{node}.sock")))).collect();
    let shutdown = Shutdown::new();
    let serving =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    for (node, endpoint) in (0..nodes).zip(endpoints.clone()) {
        let stop = shutdown.clone();
        serving.spawn(async move {
            let shape = proto::frame::Shape {
                hidden: HIDDEN as u32,
                experts: EXPERTS,
                top_k: TOP_K as u32,
            };
            let model = expert_node::stub::Model::of_one_layer(shape);
            let owned: Vec<u32> = (0..EXPERTS).filter(|expert| expert % nodes == node).collect();
            expert_node::stub::serve(&endpoint, &model, &owned, stop).await.unwrap();
        });
    }
    let mut dispatcher = Dispatcher::connect(Config {
        nodes: endpoints,
        identity: Identity {
            model_digest: expert_node::stub::DIGEST.to_vec(),
            numerics: expert_node::stub::NUMERICS.class(Isa::detect()),
            hidden: HIDDEN as u32,
        },
        shape: Shape {
            hidden: HIDDEN as u32,
            dtype: Dtype::Bf16,
            top_k: TOP_K as u32,
            wire: Wire::Exact,
            combine: Combine::Router,
        },
        layer: expert_node::stub::LAYER,
        experts: EXPERTS,
        shared_rows,
    })
    .unwrap();
    let bytes = vec![0x3c; rows * HIDDEN * 2];
    let weights = vec![0.25; rows * TOP_K];
    // Every row goes to each node alike, so that a round is as many frames as nodes.
    let chosen: Vec<u32> = (0..rows).flat_map(|_| 0..TOP_K as u32).collect();
    let routed =
        Routed { rows: &bytes, count: rows, top_k: TOP_K, experts: &chosen, weights: &weights };
    let mut go = |rounds| (0..rounds).for_each(|_| dispatcher.round_trip(&routed).unwrap());
    go(ROUNDS);
    let before = COUNT.load(Ordering::Relaxed);
    go(ROUNDS);
    let counted = COUNT.load(Ordering::Relaxed) - before;
    drop(dispatcher);
    shutdown.trigger();
    serving.shutdown_timeout(Duration::from_secs(5));
    let _ = std::fs::remove_dir_all(dir);
    counted as f64 / (ROUNDS * u64::from(nodes)) as f64
}

#[test]
fn a_warm_exchange_allocates_only_what_http_2_reads_long_frames_into() {
    let mut too_many = Vec::new();
    for shared in [Shortcut::Auto, Shortcut::Off] {
        for (nodes, rows) in [(1, 1), (4, 1), (4, 3), (1, 64), (4, 64)] {
            let out = rows as u64 * HIDDEN as u64 * 2;
            let back = out * TOP_K as u64 / u64::from(nodes);
            let allowed = match shared {
                // No message meets HTTP/2, but few in which one end was about to sleep.
                Shortcut::Auto => OURS,
                Shortcut::Off => OURS + (reading(out) + reading(back)) as f64,
            };
            let each = per_frame(nodes, rows, shared);
            println!(
                "{shared}: {nodes} nodes, {rows} rows: {each:.3} allocations a frame, {allowed} allowed"
            );
            if each > allowed {
                too_many.push((shared, nodes, rows, each, allowed));
            }
        }
    }
    assert!(too_many.is_empty(), "shared, nodes, rows, allocations a frame, allowed: {too_many:?}");
}
