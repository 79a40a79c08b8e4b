//! What replacing a resident expert costs the batches that are computed meanwhile.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kernels::cuda::{Gpu, GpuError, Row};

use super::{Experts, pieces, rows};
use crate::bench::stats::{Random, Times};

/// Replacements in a row.
const TIMES: usize = 100;
/// Batches that are timed without one.
const BATCHES: usize = 200;
/// Rows of each expert in a batch.
const ROWS: usize = 4;

/// The last slot is filled anew, again and again, while all others compute.
pub fn measure(gpu: &Gpu, experts: &mut Experts, random: &mut Random) -> anyhow::Result<String> {
    let arena = experts.ffn.arena().clone();
    let last = arena.slots() as u32 - 1;
    let packed = gpu.pin("an expert", experts.layout.bytes)?;
    let fill = || {
        let took = (0..TIMES).map(|_| {
            let start = Instant::now();
            arena.fill(last, &packed).map(|()| start.elapsed())
        });
        took.collect::<Result<Vec<_>, GpuError>>()
    };
    let hidden = experts.layout.shape.hidden;
    let work: Vec<(u32, usize)> = (0..last.max(1)).map(|slot| (slot, ROWS)).collect();
    let count = work.len() * ROWS;
    let x = rows(count, hidden, random);
    let pieces = pieces(&work);
    let mut batch = || {
        let start = Instant::now();
        experts.ffn.begin(count)?;
        let row = |id: usize| Row { id, fp8: false, bytes: &x[id * 2 * hidden..][..2 * hidden] };
        experts.ffn.compute(&pieces, &row)?;
        experts.ffn.results()?;
        Ok::<Duration, GpuError>(start.elapsed())
    };

    (0..BATCHES / 10).try_for_each(|_| batch().map(drop))?;
    let calm = (0..BATCHES).map(|_| batch()).collect::<Result<Vec<_>, _>>()?;
    let alone = fill()?;
    let done = AtomicBool::new(false);
    let (beside, disturbed) = std::thread::scope(|scope| {
        let filling = scope.spawn(|| {
            let filled = fill();
            done.store(true, Ordering::Release);
            filled
        });
        let mut disturbed = Vec::new();
        let computed = loop {
            match batch() {
                Ok(took) => disturbed.push(took),
                Err(error) => break Err(error),
            }
            if done.load(Ordering::Acquire) {
                break Ok(());
            }
        };
        match filling.join() {
            Ok(filled) => computed.and(filled).map(|filled| (filled, disturbed)),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })?;

    let mut text = format!(
        "\n| {count} rows of {} experts, and one of {:.1} MiB replaced again and again | ms, p50 / p95 / p99 |\n\
         |---|---|\n",
        work.len(),
        experts.layout.bytes as f64 / f64::from(1 << 20)
    );
    for (what, times) in [
        ("batch, nothing replaced", calm),
        ("batch, while one is", disturbed),
        ("replacing one, nothing computed", alone),
        ("replacing one, while batches are", beside),
    ] {
        writeln!(text, "| {what} | {} |", Times::new(times).fine())?;
    }
    Ok(text)
}
