//! The exchange against scripted and random networks: whatever is lost, late,
//! doubled or refused, every slot gets exactly its own result or an error.

use mesh::placement::ExpertGrid;
use proptest::prelude::*;
use proto::v1::{DispatchError, Dtype};
use proto::wire::{self, Messages};

use super::*;

const LAYER: LayerId = LayerId(3);
const SHAPE: Shape =
    Shape { hidden: 2, dtype: Dtype::F32, top_k: 2, wire: Wire::Exact, combine: Combine::Router };
const PATIENCE: Patience = Patience {
    attempt: Duration::from_millis(500),
    expert_wait: Duration::from_secs(30),
    busy: Duration::from_millis(5),
};
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
    rows: Vec<u8>,
    experts: Vec<u32>,
    now: Instant,
}

impl Case {
    fn new(experts: &[[u32; 2]], placement: &Placement) -> Self {
        let now = Instant::now();
        let rows: Vec<u8> = (0..experts.len())
            .flat_map(|row| [100.0 * row as f32, 0.0])
            .flat_map(f32::to_le_bytes)
            .collect();
        let experts = experts.concat();
        let mut exchange = Exchange::new(SHAPE, PATIENCE, now, 0);
        exchange.begin(LAYER, &experts, String::new(), placement, now);
        Self { exchange, rows, experts, now }
    }

    fn sent(&mut self) -> Vec<Sent> {
        let outbox = std::mem::take(&mut self.exchange.outbox);
        let read = |out: Outgoing| {
            let mut wire = bytes::BytesMut::new();
            self.exchange.encode(out.ticket, &self.rows, &[], &mut wire);
            let mut messages = Messages::new(1 << 20);
            messages.push(wire.freeze());
            let mut frame = DispatchFrame::default();
            wire::read(messages.take().unwrap().unwrap(), &mut frame).unwrap();
            let shape = frame::Shape { hidden: 2, experts: EXPERTS, top_k: 2 };
            frame::check(&frame, shape).unwrap();
            assert_eq!(frame.ticket, out.ticket.0);
            Sent { node: out.node, frame }
        };
        outbox.into_iter().map(read).collect()
    }

    fn assert_exact(&self) {
        assert!(self.exchange.is_done());
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
        let taken = case.exchange.on_reply(out.node, reply, &table, now).unwrap();
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
    let late = case.exchange.on_reply(lost.node, answer(&lost.frame), &kept, now).unwrap();
    assert_eq!(late, Taken::Stale);
    for out in sent[1..].iter().chain(&again) {
        case.exchange.on_reply(out.node, answer(&out.frame), &kept, now).unwrap();
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
    let taken = case.exchange.on_reply(sent[1].node, forged, &table, now).unwrap();
    assert_eq!(taken, Taken::Stale);
    for _ in 0..2 {
        for out in &sent {
            case.exchange.on_reply(out.node, answer(&out.frame), &table, now).unwrap();
        }
    }
    case.assert_exact();
}

#[test]
fn a_missing_owner_is_waited_for_and_then_an_error() {
    let half = placement(&[(0, &[0, 1, 2])]);
    let mut case = Case::new(&[[0, 5]], &half);
    let now = case.now;
    for out in case.sent() {
        case.exchange.on_reply(out.node, answer(&out.frame), &half, now).unwrap();
    }
    let soon = now + Duration::from_secs(10);
    case.exchange.on_time(&half, soon).unwrap();
    assert!(!case.exchange.is_done());
    let error = case.exchange.on_time(&half, now + PATIENCE.expert_wait).unwrap_err();
    assert!(
        matches!(error, ExchangeError::NoOwner { layer: LAYER, expert: ExpertId(5), .. }),
        "{error}"
    );

    let full = placement(&[(0, &[0, 1, 2]), (1, &[5])]);
    case.exchange.on_placement(&full, soon);
    for out in case.sent() {
        case.exchange.on_reply(out.node, answer(&out.frame), &full, soon).unwrap();
    }
    case.assert_exact();
}

#[test]
fn refusals_go_elsewhere_or_end_the_step() {
    let both = placement(&[(0, &[0, 1]), (1, &[0, 1])]);
    for code in [ErrorCode::Busy, ErrorCode::Draining, ErrorCode::NotResident] {
        let mut case = Case::new(&[[0, 1]], &both);
        let now = case.now;
        let first = case.sent();
        let reply = refuse(&first[0].frame, code);
        let taken = case.exchange.on_reply(first[0].node, reply, &both, now).unwrap();
        assert_eq!(taken, Taken::Retried);
        let again = case.sent();
        assert!(!again.is_empty() && again.iter().all(|out| out.node != first[0].node));
    }
    let mut case = Case::new(&[[0, 1]], &both);
    let now = case.now;
    let first = case.sent();
    let reply = refuse(&first[0].frame, ErrorCode::Invalid);
    let error = case.exchange.on_reply(first[0].node, reply, &both, now).unwrap_err();
    assert!(matches!(error, ExchangeError::Refused { code: ErrorCode::Invalid, .. }));
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
        let taken = case.exchange.on_reply(first[0].node, reply, &both, now).unwrap();
        assert_eq!(taken, Taken::Retried);
        let again = case.sent();
        for out in first[1..].iter().chain(&again) {
            case.exchange.on_reply(out.node, answer(&out.frame), &both, now).unwrap();
        }
        case.assert_exact();
    }
}

proptest! {
    /// Random loss, delay, duplication, refusals, crashes and returns: always
    /// the exact result once the network heals.
    #[test]
    fn a_bad_network_never_changes_a_result(
        rows in prop::collection::vec((0..EXPERTS, 1..EXPERTS), 1..12),
        events in prop::collection::vec((0u8..8, any::<prop::sample::Index>()), 0..60),
    ) {
        let experts: Vec<[u32; 2]> =
            rows.iter().map(|&(a, d)| { let b = (a + d) % EXPERTS; [a.min(b), a.max(b)] }).collect();
        let all: &[u32] = &[0, 1, 2, 3, 4, 5];
        let healthy = placement(&[(0, all), (1, &[0, 1, 2]), (2, &[3, 4, 5])]);
        let mut table = healthy.clone();
        let mut case = Case::new(&experts, &table);
        let mut flying = case.sent();
        for (kind, index) in events {
            let now = case.now;
            if !flying.is_empty() {
                let at = index.index(flying.len());
                match kind {
                    0..=2 => {
                        let out = flying.swap_remove(at);
                        case.exchange.on_reply(out.node, answer(&out.frame), &table, now).unwrap();
                    }
                    3 => {
                        let out = &flying[at];
                        case.exchange.on_reply(out.node, answer(&out.frame), &table, now).unwrap();
                    }
                    4 => {
                        let out = flying.swap_remove(at);
                        let reply = refuse(&out.frame, ErrorCode::Busy);
                        case.exchange.on_reply(out.node, reply, &table, now).unwrap();
                    }
                    5 => {
                        let node = flying[at].node;
                        let left: Vec<_> = [(0, all), (1, &all[..3]), (2, &all[3..])]
                            .into_iter().filter(|&(n, _)| n != node.0).collect();
                        table = placement(&left);
                        case.exchange.on_down(node, &table, now);
                    }
                    _ => {}
                }
            }
            if kind == 6 {
                table = healthy.clone();
                case.exchange.on_placement(&table, now);
            }
            if kind == 7 {
                case.now += Duration::from_millis(120);
                case.exchange.on_time(&table, case.now).unwrap();
            }
            flying.extend(case.sent());
        }
        case.exchange.on_placement(&healthy, case.now);
        for _ in 0..200 {
            flying.extend(case.sent());
            for out in flying.drain(..) {
                case.exchange.on_reply(out.node, answer(&out.frame), &healthy, case.now).unwrap();
            }
            if case.exchange.is_done() {
                break;
            }
            case.now += Duration::from_millis(50);
            case.exchange.on_time(&healthy, case.now).unwrap();
        }
        case.assert_exact();
    }
}
