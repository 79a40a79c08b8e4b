//! Random schedules: frames and replies that are lost, late, doubled, refused or
//! wrong, nodes that crash, hang, return and are ejected, over many layers.

use std::collections::BTreeSet;

use proptest::prelude::*;
use proptest::sample::Index;

use super::*;

const ALL: &[u32] = &[0, 1, 2, 3, 4, 5];
/// Every expert has two owners.
const OWNED: [&[u32]; 3] = [ALL, &[0, 1, 2], &[3, 4, 5]];

/// The network and what is known of its nodes.
struct World {
    case: Case,
    flying: Vec<Sent>,
    down: BTreeSet<u16>,
    hung: BTreeSet<u16>,
    table: Placement,
    start: Instant,
}

impl World {
    fn new(policy: Policy, experts: &[[u32; 2]]) -> Self {
        let table = table(&BTreeSet::new());
        let mut case = Case::with(policy, experts, &table);
        let (flying, start) = (case.sent(), case.now);
        Self { case, flying, down: BTreeSet::new(), hung: BTreeSet::new(), table, start }
    }

    fn reply(&mut self, at: usize, reply: impl Fn(&DispatchFrame) -> DispatchReply, keep: bool) {
        let out = &self.flying[at];
        let (node, reply) = (out.node, reply(&out.frame));
        if !keep {
            self.flying.swap_remove(at);
        }
        // A hung node's answers come when it goes on.
        if !self.hung.contains(&node.0) || !keep {
            self.case.exchange.on_reply(node, reply, &self.table, self.case.now);
        }
    }

    fn crash(&mut self, node: u16) {
        self.down.insert(node);
        self.hung.remove(&node);
        let (table, now) = (table(&self.down), self.case.now);
        self.case.health.lock().set_hung(NodeIndex(node), false, now);
        self.case.exchange.on_down(NodeIndex(node), &self.table, now);
        self.case.health.lock().down(NodeIndex(node), now);
        self.flying.retain(|out| out.node.0 != node);
        self.table = table;
        self.case.exchange.on_placement(&self.table, now);
    }

    fn hang(&mut self, node: u16) {
        if self.down.contains(&node) || !self.hung.insert(node) {
            return;
        }
        let now = self.case.now;
        self.case.health.lock().set_hung(NodeIndex(node), true, now);
        self.case.exchange.on_hung(NodeIndex(node), &self.table, now);
    }

    fn heal(&mut self) {
        self.down.clear();
        let now = self.case.now;
        for node in std::mem::take(&mut self.hung) {
            self.case.health.lock().set_hung(NodeIndex(node), false, now);
        }
        self.table = table(&self.down);
        self.case.exchange.on_placement(&self.table, now);
    }

    fn pass(&mut self, time: Duration) {
        self.case.now += time;
        self.case.exchange.on_time(&self.table, self.case.now);
    }

    /// Every result is its own, every gap has its reason, and what was sent
    /// twice was within the budget.
    fn check(&self) {
        let exchange = &self.case.exchange;
        let gaps: BTreeSet<u32> = exchange.gaps().iter().map(|gap| gap.slot).collect();
        assert_eq!(gaps.len(), exchange.gaps().len(), "one gap a slot");
        for (slot, &expert) in self.case.experts.iter().enumerate() {
            let want = 100.0 * (slot / 2) as f32 + expert as f32;
            let want = if gaps.contains(&(slot as u32)) { 0.0 } else { want };
            let got = f32::from_le_bytes(exchange.row(slot)[..4].try_into().unwrap());
            assert_eq!(got, want, "slot {slot}");
        }
        let counts = self.case.health.lock().counts;
        let seconds = (self.case.now - self.start).as_secs_f64();
        let most = 10.0 + 0.2 * counts.first as f64 + 10.0 * seconds;
        assert!(counts.again as f64 <= most + 1e-6, "{counts:?} in {seconds} s");
        assert_eq!(exchange.in_flight(), 0, "nobody waits for what is under way");
    }
}

fn table(down: &BTreeSet<u16>) -> Placement {
    let live: Vec<_> = (0..).zip(OWNED).filter(|(node, _)| !down.contains(node)).collect();
    placement(&live)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Whatever happens, a layer ends: with every result exact where an owner was
    /// left, and with gaps only for experts that had none that was alive.
    #[test]
    fn a_bad_network_never_changes_a_result(
        rows in prop::collection::vec((0..EXPERTS, 1..EXPERTS), 1..12),
        hedge in any::<bool>(),
        enabled in prop::sample::select(vec![true, true, true, false]),
        events in prop::collection::vec((0u8..14, any::<Index>(), 0u64..400), 0..150),
    ) {
        let experts: Vec<[u32; 2]> = rows
            .iter()
            .map(|&(a, d)| { let b = (a + d) % EXPERTS; [a.min(b), a.max(b)] })
            .collect();
        let policy = Policy { hedge, enabled, ..Policy::default() };
        let mut world = World::new(policy, &experts);
        // Nodes that were ever away since the layer began.
        let mut trouble = false;
        for (kind, index, ms) in events {
            if !world.flying.is_empty() {
                let at = index.index(world.flying.len());
                match kind {
                    0..=2 => world.reply(at, answer, false),
                    3 => world.reply(at, answer, true),
                    4 => world.reply(at, |frame| refuse(frame, ErrorCode::Busy), false),
                    5 => world.reply(at, |frame| refuse(frame, ErrorCode::Expired), false),
                    // Lost without a trace.
                    6 => _ = world.flying.swap_remove(at),
                    7 => world.reply(at, |frame| DispatchReply {
                        rows: Bytes::from_static(&[1; 5]), ..answer(frame)
                    }, false),
                    8 => { trouble = true; world.crash(world.flying[at].node.0) }
                    9 => { trouble = true; world.hang(world.flying[at].node.0) }
                    _ => {}
                }
            }
            match kind {
                10 => world.heal(),
                11..=13 => world.pass(Duration::from_millis(ms)),
                _ => {}
            }
            if world.case.exchange.is_done() {
                world.check();
                for gap in world.case.exchange.gaps() {
                    let absent = gap.lack.is_absence();
                    prop_assert!(trouble || !absent, "{:?}", gap);
                }
                trouble = !world.down.is_empty() || !world.hung.is_empty();
                let now = world.case.now;
                let flat = experts.concat();
                world.case.exchange.begin(LAYER, &flat, String::new(), &world.table, now);
            }
            let sent = world.case.sent();
            for out in &sent {
                prop_assert!(!world.down.contains(&out.node.0), "a frame for nobody");
            }
            world.flying.extend(sent);
        }
        // The network heals: every slot gets its result now, unless it is a gap already.
        world.heal();
        let gaps = world.case.exchange.gaps().len();
        for _ in 0..400 {
            let sent = world.case.sent();
            world.flying.extend(sent);
            while !world.flying.is_empty() {
                world.reply(0, answer, false);
            }
            if world.case.exchange.is_done() {
                break;
            }
            world.pass(Duration::from_millis(50));
        }
        prop_assert!(world.case.exchange.is_done());
        world.check();
        prop_assert_eq!(world.case.exchange.gaps().len(), gaps);
    }
}
