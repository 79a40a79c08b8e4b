//! Properties of the plan: nothing starves, nothing leaks, budgets hold.

use proptest::prelude::*;

use super::*;

struct Pool {
    free: Vec<u32>,
}

impl Pool {
    fn new(pages: u32) -> Self {
        Self { free: (0..pages).collect() }
    }
}

impl Pages for Pool {
    fn alloc(&mut self) -> Option<PageId> {
        self.free.pop().map(PageId)
    }

    fn free(&mut self, page: PageId) {
        assert!(!self.free.contains(&page.0), "page {} freed twice", page.0);
        self.free.push(page.0);
    }
}

const LIMITS: Limits =
    Limits { step_tokens: 16, prefill_chunk: 8, max_running: 4, page_tokens: 4, tpot_target: None };

fn never(_: SeqId) -> bool {
    false
}

#[test]
fn decode_goes_before_a_long_prompt() {
    let (mut scheduler, mut pool) = (Scheduler::new(LIMITS), Pool::new(64));
    let short = scheduler.push(vec![1; 3]);
    let plan = scheduler.plan(&mut pool, &never);
    assert_eq!(plan, [Part { id: short, start: 0, len: 3, last: true }]);
    scheduler.computed(plan[0]);
    scheduler.append(short, 9);

    let long = scheduler.push(vec![2; 40]);
    let plan = scheduler.plan(&mut pool, &never);
    assert_eq!(
        plan,
        [
            Part { id: short, start: 3, len: 1, last: true },
            Part { id: long, start: 0, len: 8, last: false },
        ]
    );
}

#[test]
fn prompts_beside_streams_are_cut_by_measured_time() {
    let limits = Limits { step_tokens: 512, prefill_chunk: 512, page_tokens: 64, ..LIMITS };
    let limits = Limits { tpot_target: Some(Duration::from_millis(30)), ..limits };
    let (mut scheduler, mut pool) = (Scheduler::new(limits), Pool::new(64));
    let stream = scheduler.push(vec![1; 100]);
    let plan = scheduler.plan(&mut pool, &never);
    assert_eq!(plan[0].len, 100, "alone, a prompt takes all it can");
    scheduler.computed(plan[0]);
    scheduler.took(&plan, Duration::from_millis(100));
    scheduler.append(stream, 9);
    let plan = scheduler.plan(&mut pool, &never);
    scheduler.computed(plan[0]);
    scheduler.took(&plan, Duration::from_millis(10));
    scheduler.append(stream, 9);

    let long = scheduler.push(vec![2; 1000]);
    let plan = scheduler.plan(&mut pool, &never);
    assert_eq!(plan[0], Part { id: stream, start: 101, len: 1, last: true });
    assert_eq!(plan[1].id, long);
    assert!((16..=22).contains(&plan[1].len), "20 of 90 ms for 99 rows: {}", plan[1].len);
}

#[test]
fn the_youngest_gives_way_when_pages_run_out() {
    let (mut scheduler, mut pool) = (Scheduler::new(LIMITS), Pool::new(3));
    let (old, young) = (scheduler.push(vec![1; 8]), scheduler.push(vec![2; 4]));
    for part in scheduler.plan(&mut pool, &never) {
        scheduler.computed(part);
    }
    scheduler.append(old, 5);
    scheduler.append(young, 5);
    let plan = scheduler.plan(&mut pool, &never);
    assert_eq!(plan, [Part { id: old, start: 8, len: 1, last: true }]);
    assert_eq!((scheduler.running(), scheduler.waiting()), (1, 1));
    assert_eq!(scheduler.get(young).map(|s| (s.computed, s.tokens.len())), Some((0, 5)));
}

#[test]
fn a_paused_sequence_keeps_its_pages_and_computes_nothing() {
    let (mut scheduler, mut pool) = (Scheduler::new(LIMITS), Pool::new(8));
    let id = scheduler.push(vec![1; 12]);
    let part = scheduler.plan(&mut pool, &never)[0];
    scheduler.computed(part);
    assert!(scheduler.plan(&mut pool, &|_| true).is_empty());
    assert_eq!(scheduler.get(id).map(|s| s.pages.len()), Some(2));
}

proptest! {
    /// Every sequence finishes, budgets hold in every step, parts are contiguous
    /// and in one piece, and all pages come back, with cancellations in between.
    #[test]
    fn all_sequences_finish_and_pages_return(
        prompts in prop::collection::vec((1usize..60, 1usize..20, any::<bool>()), 1..12),
        pages in 20u32..60,
    ) {
        let (mut scheduler, mut pool) = (Scheduler::new(LIMITS), Pool::new(pages));
        let mut goals = BTreeMap::new();
        for &(prompt, generate, cancel) in &prompts {
            let id = scheduler.push(vec![0; prompt]);
            goals.insert(id, (prompt + generate, cancel));
        }
        let mut steps = 0;
        while !scheduler.is_empty() {
            steps += 1;
            prop_assert!(steps < 10_000, "no progress");
            let plan = scheduler.plan(&mut pool, &never);
            prop_assert!(!plan.is_empty());
            prop_assert!(plan.iter().map(|part| part.len).sum::<usize>() <= LIMITS.step_tokens);
            prop_assert!(scheduler.running() <= LIMITS.max_running);
            let mut seen = std::collections::BTreeSet::new();
            for part in plan {
                prop_assert!(seen.insert(part.id));
                let sequence = scheduler.get(part.id).unwrap();
                prop_assert_eq!(sequence.computed, part.start);
                prop_assert!(sequence.pages.len() * LIMITS.page_tokens >= part.start + part.len);
                scheduler.computed(part);
                let (goal, cancel) = goals[&part.id];
                if part.last {
                    scheduler.append(part.id, 1);
                }
                let length = scheduler.get(part.id).unwrap().tokens.len();
                if length >= goal || (cancel && steps % 7 == 0) {
                    scheduler.remove(part.id, &mut pool);
                }
            }
        }
        prop_assert_eq!(pool.free.len() as u32, pages);
    }
}
