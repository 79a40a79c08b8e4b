//! The exchange against scripted and random networks: whatever is lost, late,
//! doubled or refused, every slot gets exactly its own result or an error.

use mesh::placement::ExpertGrid;
use proto::v1::{DispatchError, Dtype};
use proto::wire::{self, Messages};

use super::*;
use crate::health::{Policy, SharedHealth};

mod random;

const LAYER: LayerId = LayerId(3);
const SHAPE: Shape =
    Shape { hidden: 2, dtype: Dtype::F32, top_k: 2, wire: Wire::Exact, combine: Combine::Router };
const PATIENCE: Patience =
    Patience { expert_wait: Duration::from_secs(30), busy: Duration::from_millis(5) };
const EXPERTS: u32 = 6;

/// `owners[node]` lists what each live node owns; the epoch is its count.
fn placement(owners: &[(u16, &[u32])]) -> Placement {
    let grid = ExpertGrid { layers: vec![LAYER], experts: EXPERTS };
    Placement::empty(grid).next(owners.iter().map(|&(n, owned)| (NodeIndex(n), LAYER, owned)))
}

/// The only right answer: a row's value plus its expert, so that a mix-up shows.
fn answer(frame: &DispatchFrame) -> DispatchReply {
    let value =
        |row: usize| f32::from_le_bytes(frame.rows[row * 8..row * 8 + 4].try_into().unwrap());
    let mut experts = frame.experts.iter();
    let mut out = Vec::new();
    for (row, &count) in frame.slot_counts.iter().enumerate() {
        for &expert in experts.by_ref().take(count as usize) {
            out.extend_from_slice(&(value(row) + expert as f32).to_le_bytes());
            out.extend_from_slice(&0f32.to_le_bytes());
        }
    }
    DispatchReply {
        ticket: frame.ticket,
        attempt: frame.attempt,
        dtype: Dtype::F32 as i32,
        hidden: 2,
        rows: out.into(),
        ..Default::default()
    }
}

fn refuse(frame: &DispatchFrame, code: ErrorCode) -> DispatchReply {
    let error = DispatchError { code: code as i32, message: "no".into() };
    DispatchReply { ticket: frame.ticket, error: Some(error), ..Default::default() }
}

/// A frame as its node reads it.
struct Sent {
    node: NodeIndex,
    frame: DispatchFrame,
}

struct Case {
    exchange: Exchange,
    health: SharedHealth,
    rows: Vec<u8>,
    experts: Vec<u32>,
    now: Instant,
}

impl Case {
    fn new(experts: &[[u32; 2]], placement: &Placement) -> Self {
        Self::with(Policy::default(), experts, placement)
    }

    fn with(policy: Policy, experts: &[[u32; 2]], placement: &Placement) -> Self {
        let now = Instant::now();
        let rows: Vec<u8> = (0..experts.len())
            .flat_map(|row| [100.0 * row as f32, 0.0])
            .flat_map(f32::to_le_bytes)
            .collect();
        let experts = experts.concat();
        let health = SharedHealth::new(policy, 1, now);
        let mut exchange = Exchange::new(SHAPE, PATIENCE, health.clone(), now, 0);
        exchange.begin(LAYER, &experts, String::new(), placement, now);
        Self { exchange, health, rows, experts, now }
    }

    fn sent(&mut self) -> Vec<Sent> {
        let outbox = std::mem::take(&mut self.exchange.outbox);
        let read = |out: Outgoing| {
            let mut wire = bytes::BytesMut::new();
            self.exchange.encode(out.ticket, &self.rows, &[], None, &mut wire).unwrap();
            let mut messages = Messages::new(1 << 20);
            messages.push(wire.freeze());
            let mut frame = DispatchFrame::default();
            wire::read(messages.take().unwrap().unwrap(), &mut frame).unwrap();
            let shape = frame::Shape { hidden: 2, experts: EXPERTS, top_k: 2 };
            frame::check(&frame, shape, 0).unwrap();
            assert_eq!(frame.ticket, out.ticket.0);
            Sent { node: out.node, frame }
        };
        outbox.into_iter().map(read).collect()
    }

    fn assert_exact(&self) {
        assert!(self.exchange.is_done() && self.exchange.gaps().is_empty());
        for (slot, &expert) in self.experts.iter().enumerate() {
            let row = self.exchange.row(slot);
            let want = 100.0 * (slot / 2) as f32 + expert as f32;
            assert_eq!(f32::from_le_bytes(row[..4].try_into().unwrap()), want, "slot {slot}");
        }
    }
}

#[test]
fn one_frame_per_node_and_results_in_any_order() {
    let table = placement(&[(0, &[0, 1, 2]), (1, &[3, 4, 5])]);
    let mut case = Case::new(&[[0, 5], [1, 2], [4, 5]], &table);
    let mut sent = case.sent();
    assert_eq!(sent.len(), 2);
    let rows: Vec<_> = sent.iter().map(|out| out.frame.slot_counts.clone()).collect();
    assert_eq!(rows, [vec![1, 2], vec![1, 2]]);
    sent.reverse();
    for out in &sent {
        let (now, reply) = (case.now, answer(&out.frame));
        let taken = case.exchange.on_reply(out.node, reply, &table, now);
        assert!(matches!(taken, Taken::Result(_)));
    }
    case.assert_exact();
}

#[test]
fn a_lost_node_costs_one_resend_and_its_late_reply_is_dropped() {
    let both = placement(&[(0, &[0, 1, 2, 3, 4, 5]), (1, &[0, 1, 2, 3, 4, 5])]);
    let mut case = Case::new(&[[0, 1]], &both);
    let now = case.now;
    let sent = case.sent();
    let lost = &sent[0];
    let kept = placement(&[(1 - lost.node.0, &[0, 1, 2, 3, 4, 5])]);
    case.exchange.on_down(lost.node, &kept, now);
    let again = case.sent();
    assert!(again.iter().all(|out| out.node != lost.node && out.frame.attempt == 1));
    let late = case.exchange.on_reply(lost.node, answer(&lost.frame), &kept, now);
    assert_eq!(late, Taken::Stale);
    for out in sent[1..].iter().chain(&again) {
        case.exchange.on_reply(out.node, answer(&out.frame), &kept, now);
    }
    case.assert_exact();
    assert_eq!(case.exchange.retries(), 1);
}

#[test]
fn another_nodes_ticket_and_a_second_reply_are_not_taken() {
    let table = placement(&[(0, &[0, 1, 2]), (1, &[3, 4, 5])]);
    let mut case = Case::new(&[[0, 5]], &table);
    let now = case.now;
    let sent = case.sent();
    let forged = answer(&sent[0].frame);
    let taken = case.exchange.on_reply(sent[1].node, forged, &table, now);
    assert_eq!(taken, Taken::Stale);
    for _ in 0..2 {
        for out in &sent {
            case.exchange.on_reply(out.node, answer(&out.frame), &table, now);
        }
    }
    case.assert_exact();
}

#[test]
fn a_missing_owner_is_a_gap_at_once_and_its_neighbours_are_exact() {
    let half = placement(&[(0, &[0, 1, 2])]);
    let mut case = Case::new(&[[0, 5], [1, 2]], &half);
    let now = case.now;
    for out in case.sent() {
        case.exchange.on_reply(out.node, answer(&out.frame), &half, now);
    }
    assert!(case.exchange.is_done());
    let gaps = case.exchange.gaps();
    assert_eq!(gaps.iter().map(|gap| gap.slot).collect::<Vec<_>>(), [1]);
    assert_eq!(gaps[0].lack.expert(), Some((LAYER, ExpertId(5))));
    assert_eq!(gaps[0].lack.to_string(), "layer 3 expert 5 has no live owner");
    assert_eq!(case.exchange.row(1), [0; 8], "stands for what is not there");
    for (slot, want) in [(0, 0.0f32), (2, 101.0), (3, 102.0)] {
        assert_eq!(case.exchange.row(slot)[..4], want.to_le_bytes());
    }
}

#[test]
fn without_an_answer_patience_ends_for_the_rows_that_need_it() {
    let table = placement(&[(0, &[0, 1, 2]), (1, &[3, 4, 5])]);
    let mut case = Case::new(&[[0, 5], [1, 2]], &table);
    let now = case.now;
    for out in case.sent().iter().filter(|out| out.node.0 == 0) {
        case.exchange.on_reply(out.node, answer(&out.frame), &table, now);
    }
    case.exchange.on_time(&table, now + Duration::from_secs(29));
    assert!(!case.exchange.is_done() && case.sent().is_empty(), "nobody else to ask");
    case.exchange.on_time(&table, now + PATIENCE.expert_wait);
    assert!(case.exchange.is_done());
    let lacks: Vec<_> = case.exchange.gaps().iter().map(|gap| (gap.slot, &*gap.lack)).collect();
    assert!(matches!(lacks[..], [(1, Lack::NoReply { node: 1, .. })]), "{lacks:?}");
}

#[test]
fn a_late_frame_is_asked_of_another_and_the_first_answer_counts() {
    let both = placement(&[(0, &[0, 1]), (1, &[0, 1])]);
    for first_wins in [true, false] {
        let mut case = Case::new(&[[0, 1]], &both);
        let first = case.sent();
        let mut now = case.now + Duration::from_millis(1999);
        case.exchange.on_time(&both, now);
        assert!(case.sent().is_empty(), "nothing was measured, so there is patience");
        now += Duration::from_millis(1);
        case.exchange.on_time(&both, now);
        let again = case.sent();
        assert_eq!(again.len(), first.len());
        assert!(again.iter().all(|out| out.frame.attempt == 1));
        let (one, other) = if first_wins { (&first, &again) } else { (&again, &first) };
        for out in one {
            case.exchange.on_reply(out.node, answer(&out.frame), &both, now);
        }
        case.assert_exact();
        for out in other {
            let taken = case.exchange.on_reply(out.node, answer(&out.frame), &both, now);
            assert_eq!(taken, Taken::Late);
            let taken = case.exchange.on_reply(out.node, answer(&out.frame), &both, now);
            assert_eq!(taken, Taken::Stale);
        }
        case.assert_exact();
    }
}

#[test]
fn hedging_asks_another_early_where_it_is_wanted() {
    let both = placement(&[(0, &[0, 1]), (1, &[0, 1])]);
    for hedge in [false, true] {
        let policy = Policy { hedge, ..Policy::default() };
        let mut case = Case::with(policy, &[[0, 1]], &both);
        let ms = Duration::from_millis(1);
        // Many answers of a millisecond; the next one does not come.
        for _ in 0..200 {
            for out in case.sent() {
                let now = case.now + ms;
                case.exchange.on_reply(out.node, answer(&out.frame), &both, now);
            }
            case.assert_exact();
            case.now += ms;
            case.exchange.begin(LAYER, &[0, 1], String::new(), &both, case.now);
        }
        let first = case.sent();
        let late = case.now + 10 * ms;
        assert_eq!(case.exchange.next_timeout() < late, hedge);
        case.exchange.on_time(&both, late);
        let second = case.sent();
        assert_eq!(second.len(), if hedge { first.len() } else { 0 });
        for out in &first {
            case.exchange.on_reply(out.node, answer(&out.frame), &both, late);
        }
        case.assert_exact();
        assert_eq!(case.health.lock().counts.late, 0, "a hedge is no failure");
    }
}

#[test]
fn without_budget_the_first_sending_is_waited_for() {
    let both = placement(&[(0, &[0, 1]), (1, &[0, 1])]);
    let mut case = Case::new(&[[0, 1]], &both);
    let first = case.sent();
    let now = case.now + Duration::from_secs(2);
    while case.health.lock().may_send_again(now) {}
    case.exchange.on_time(&both, now);
    assert!(case.sent().is_empty());
    assert!(case.exchange.next_timeout() > now, "thought of again, but not at once");
    for out in first {
        case.exchange.on_reply(out.node, answer(&out.frame), &both, now);
    }
    case.assert_exact();
}

#[test]
fn a_hung_nodes_slots_go_elsewhere_or_are_gaps() {
    let some = placement(&[(0, &[0, 1, 5]), (1, &[0, 1, 2])]);
    let mut case = Case::new(&[[0, 5]], &some);
    let now = case.now;
    let first = case.sent();
    let hung = NodeIndex(0);
    case.health.lock().set_hung(hung, true, now);
    case.exchange.on_hung(hung, &some, now);
    let second = case.sent();
    assert!(second.iter().all(|out| out.node.0 == 1), "only the replica is asked");
    for out in first.iter().filter(|out| out.node.0 == 1).chain(&second) {
        case.exchange.on_reply(out.node, answer(&out.frame), &some, now);
    }
    assert!(case.exchange.is_done());
    let gaps = case.exchange.gaps();
    assert!(matches!(*gaps[0].lack, Lack::Hung { expert: ExpertId(5), node: 0, .. }), "{gaps:?}");
    assert_eq!((gaps.len(), gaps[0].slot), (1, 1));
}

#[test]
fn refusals_go_elsewhere_or_end_the_step() {
    let both = placement(&[(0, &[0, 1]), (1, &[0, 1])]);
    for code in [ErrorCode::Busy, ErrorCode::Draining, ErrorCode::NotResident] {
        let mut case = Case::new(&[[0, 1]], &both);
        let now = case.now;
        let first = case.sent();
        let reply = refuse(&first[0].frame, code);
        let taken = case.exchange.on_reply(first[0].node, reply, &both, now);
        assert_eq!(taken, Taken::Retried);
        let again = case.sent();
        assert!(!again.is_empty() && again.iter().all(|out| out.node != first[0].node));
    }
    // What two nodes call invalid is.
    let mut case = Case::new(&[[0, 1]], &both);
    let now = case.now;
    for _ in 0..2 {
        for out in case.sent() {
            let reply = refuse(&out.frame, ErrorCode::Invalid);
            case.exchange.on_reply(out.node, reply, &both, now);
        }
    }
    assert!(case.exchange.is_done());
    for gap in case.exchange.gaps() {
        assert!(matches!(*gap.lack, Lack::Refused { code: ErrorCode::Invalid, .. }), "{gap:?}");
        assert!(gap.lack.expert().is_none() && !gap.lack.is_absence());
    }
}

#[test]
fn a_busy_mesh_is_asked_less_and_less_often() {
    let one = placement(&[(0, &[0, 1])]);
    let mut case = Case::new(&[[0, 1]], &one);
    let mut sendings = 0;
    for ms in 0..1000 {
        let now = case.now + Duration::from_millis(ms);
        case.exchange.on_time(&one, now);
        for out in case.sent() {
            sendings += 1;
            let reply = refuse(&out.frame, ErrorCode::Busy);
            case.exchange.on_reply(out.node, reply, &one, now);
        }
    }
    assert!((5..20).contains(&sendings), "{sendings}");
}

#[test]
fn what_was_parked_is_not_sent_when_the_first_frame_has_brought_it() {
    let all = placement(&[(0, &[0]), (1, &[0]), (2, &[2])]);
    let mut case = Case::new(&[[0, 2]], &all);
    let first = case.sent().into_iter().find(|out| out.node.0 != 2).unwrap();
    // It is late, and whoever else is asked has no room, until its slot is parked.
    let mut now = case.now + Duration::from_millis(2000);
    case.exchange.on_time(&all, now);
    let mut refused = 0;
    loop {
        let again: Vec<_> = case.sent().into_iter().filter(|out| out.node.0 != 2).collect();
        if again.is_empty() {
            break;
        }
        for out in again {
            refused += 1;
            case.exchange.on_reply(out.node, refuse(&out.frame, ErrorCode::Busy), &all, now);
        }
    }
    assert!(refused > 0);
    let taken = case.exchange.on_reply(first.node, answer(&first.frame), &all, now);
    assert!(matches!(taken, Taken::Result(_)), "{taken:?}");
    for _ in 0..20 {
        now += Duration::from_millis(50);
        case.exchange.on_time(&all, now);
        let sent = case.sent();
        assert!(sent.iter().all(|out| out.node.0 == 2), "its result is there");
    }
}

#[test]
fn what_waits_to_be_sent_is_taken_back_when_the_first_frame_has_brought_it() {
    let all = placement(&[(0, &[0]), (1, &[0]), (2, &[2])]);
    let mut case = Case::new(&[[0, 2]], &all);
    let first = case.sent().into_iter().find(|out| out.node.0 != 2).unwrap();
    let now = case.now + Duration::from_millis(2000);
    case.exchange.on_time(&all, now);
    assert!(case.exchange.outbox.iter().any(|out| out.node.0 != 2), "another owner is to be asked");
    let taken = case.exchange.on_reply(first.node, answer(&first.frame), &all, now);
    assert!(matches!(taken, Taken::Result(_)), "{taken:?}");
    let sent = case.sent();
    assert!(sent.iter().all(|out| out.node.0 == 2), "its result is there");
}

#[test]
fn one_row_that_is_not_finite_costs_only_itself() {
    let both = placement(&[(0, &[0, 1, 2, 3]), (1, &[2, 3, 4, 5])]);
    let experts = [[0, 5], [1, 2], [2, 3], [3, 4], [0, 4], [1, 5], [2, 4]];
    for bad in 0..experts.len() {
        let mut case = Case::new(&experts, &both);
        let poisoned = (100.0 * bad as f32).to_le_bytes();
        loop {
            let sent = case.sent();
            if sent.is_empty() {
                let next = case.exchange.next_timeout();
                if case.exchange.is_done() {
                    break;
                }
                case.now = next;
                case.exchange.on_time(&both, next);
            }
            for out in sent {
                let poison = out.frame.rows.chunks(8).any(|row| row[..4] == poisoned);
                let reply = match poison {
                    true => refuse(&out.frame, ErrorCode::NonFinite),
                    false => answer(&out.frame),
                };
                case.exchange.on_reply(out.node, reply, &both, case.now);
            }
        }
        let mut gaps: Vec<_> = case.exchange.gaps().iter().map(|gap| gap.slot).collect();
        gaps.sort_unstable();
        assert_eq!(gaps, [2 * bad as u32, 2 * bad as u32 + 1]);
        for slot in (0..2 * experts.len()).filter(|slot| slot / 2 != bad) {
            let want = (100 * (slot / 2)) as f32 + experts[slot / 2][slot % 2] as f32;
            assert_eq!(case.exchange.row(slot)[..4], want.to_le_bytes(), "slot {slot}");
        }
        let health = case.health.lock();
        assert_eq!(health.counts.ejections, 0, "the rows are to blame, not the nodes");
    }
}

#[test]
fn a_reply_of_the_wrong_shape_or_with_nan_is_asked_of_another() {
    let both = placement(&[(0, &[0, 1]), (1, &[0, 1])]);
    let edits: [fn(&mut DispatchReply); 4] = [
        |reply| reply.rows = Bytes::from_static(&[0; 3]),
        |reply| reply.hidden = 9,
        |reply| reply.dtype = 2,
        |reply| {
            reply.rows =
                [f32::NAN; 8].map(f32::to_le_bytes).concat()[..reply.rows.len()].to_vec().into()
        },
    ];
    for edit in edits {
        let mut case = Case::new(&[[0, 1]], &both);
        let now = case.now;
        let first = case.sent();
        let mut reply = answer(&first[0].frame);
        edit(&mut reply);
        let taken = case.exchange.on_reply(first[0].node, reply, &both, now);
        assert_eq!(taken, Taken::Retried);
        let again = case.sent();
        for out in first[1..].iter().chain(&again) {
            case.exchange.on_reply(out.node, answer(&out.frame), &both, now);
        }
        case.assert_exact();
    }
}
