//! Rows and messages in memory that a router and its nodes share, through real processes: the bits are those
//! of rows in messages, whoever does not want it is served all the same, and neither a router
//! that lies about places or spoils a ring nor a node that dies with them does harm.

use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::BytesMut;
use mesh::link::stream::{self, Reader, StreamError, Writer};
use mesh::near::Shortcut;
use mesh::shared::rings::{BOTH, Put};
use mesh::transport::Endpoint;
use model::{Checkpoint, Numerics, Routed};
use proto::v1::expert_control_client::ExpertControlClient;
use proto::v1::{DescribeRequest, DispatchFrame, Dtype, ErrorCode, SharedRows};
use proto::wire;
use router::exchange::{Combine, Wire};

use crate::forms::dispatcher;
use crate::identity::scores;
use crate::nodes::node;
use crate::support::evil::{Evil, EvilNode};
use crate::support::fixture::tiny;
use crate::support::process::signal;
use crate::support::{Fixture, Sandbox, block_on};

#[test]
fn shared_or_in_messages_the_bits_are_the_same() {
    block_on(async {
        let fixture = Fixture::load("plain");
        let longest = fixture.prompts.iter().max_by_key(|prompt| prompt.tokens.len()).unwrap();
        for (key, value) in [("wire", "exact"), ("wire", "fp8"), ("combine", "node")] {
            let mut want = None;
            for (router, node) in
                [("off", "off"), ("auto", "auto"), ("off", "auto"), ("auto", "off")]
            {
                let both = router == "auto" && node == "auto";
                let plan = Sandbox::of(&fixture.dir).numerics("f32").expert_nodes(2);
                let plan = plan.router(key, format!("{value:?}"));
                let plan = plan.router("shared_rows", format!("{router:?}"));
                let mesh = plan.node("shared_rows", format!("{node:?}")).start().await;
                let got = scores(&mesh, &longest.tokens).await;
                assert!(
                    *want.get_or_insert_with(|| got.clone()) == got,
                    "{value}, {router}, {node}"
                );
                let metrics = mesh.metrics("router-0").await;
                let none = "moemesh_router_row_bytes_total{way=\"shared\"} 0\n";
                assert_eq!(!metrics.contains(none), both, "{value}, {router}, {node}: {metrics}");
                let way = if both { "up, rows in shared memory" } else { "up" };
                let nodes = mesh.router_status().await.nodes;
                assert!(nodes.iter().all(|node| node.detail == way), "{nodes:?}");
                mesh.stop();
            }
        }
    });
}

#[test]
fn a_router_that_lies_about_places_is_refused_by_name() {
    block_on(async {
        let fixture = Fixture::load("plain");
        let mesh = Sandbox::of(&fixture.dir).numerics("f32").start().await;
        let mut control = ExpertControlClient::new(node(&mesh, 0));
        let about = control.describe(DescribeRequest {}).await.unwrap().into_inner();
        let mine = about.owned.iter().find(|layer| layer.layer == 1).unwrap().experts[0];
        let width = about.hidden as usize * 4;
        let count = 64;
        let frame = |ticket| DispatchFrame {
            ticket,
            layer: 1,
            dtype: Dtype::F32 as i32,
            hidden: about.hidden,
            slot_counts: vec![1; count],
            experts: vec![mine; count],
            ..Default::default()
        };
        let rows = 1f32.to_le_bytes().repeat(count * width / 4);
        let endpoint = Endpoint::Unix(mesh.socket("expert-node-0"));
        let open = async |shortcut| stream::open(&endpoint, None, shortcut).await.unwrap();
        let send = |writer: &Writer, frame: &DispatchFrame, rows: &[u8]| {
            let mut buffer = BytesMut::new();
            wire::put(&mut buffer, frame, rows.len(), |buffer| buffer.extend_from_slice(rows));
            assert!(writer.send(buffer.freeze()));
        };

        let (writer, mut reader) = open(Shortcut::Auto).await;
        let room = writer.room().expect("the node takes what it is handed");
        send(&writer, &frame(1), &rows);
        let want = reader.next().await.unwrap().rows;
        assert_eq!(want.len(), rows.len());
        let bytes = rows.len() as u64;
        let sound = SharedRows { at: 0, rows_bytes: bytes, results_bytes: bytes };
        let end = room.segment().size() as u64;
        let lies = [
            SharedRows { at: u64::MAX, ..sound },
            SharedRows { at: end - bytes + 1, ..sound },
            SharedRows { rows_bytes: u64::MAX, ..sound },
            SharedRows { rows_bytes: bytes - 4, ..sound },
            SharedRows { results_bytes: end + 1, ..sound },
            SharedRows { results_bytes: u64::MAX, ..sound },
        ];
        for (ticket, lie) in (2..).zip(lies) {
            send(&writer, &DispatchFrame { shared: Some(lie), ..frame(ticket) }, &[]);
            let error = reader.next().await.unwrap().error.unwrap();
            assert_eq!(error.code, ErrorCode::Invalid as i32, "{lie:?}: {}", error.message);
            // A neighbour of the same stream.
            let mut place = room.place(ticket + 100, rows.len(), rows.len()).unwrap();
            place.put(&rows);
            let shared = Some(place.said());
            send(&writer, &DispatchFrame { shared, ..frame(ticket + 100) }, &[]);
            let reply = reader.next().await.unwrap();
            assert_eq!((reply.shared_bytes, reply.rows), (bytes, want.clone()));
        }
        // Both at once, and too little room for results, which then come in the reply.
        send(&writer, &DispatchFrame { shared: Some(sound), ..frame(20) }, &rows);
        let error = reader.next().await.unwrap().error.unwrap();
        assert_eq!(error.code, ErrorCode::Invalid as i32);
        let mut place = room.place(21, rows.len(), rows.len() - 1).unwrap();
        place.put(&rows);
        send(&writer, &DispatchFrame { shared: Some(place.said()), ..frame(21) }, &[]);
        let reply = reader.next().await.unwrap();
        assert_eq!((reply.shared_bytes, reply.rows), (0, want.clone()));
        // Not finite in the copy.
        let mut place = room.place(22, rows.len(), rows.len()).unwrap();
        place.put(&vec![0xff; rows.len()]);
        send(&writer, &DispatchFrame { shared: Some(place.said()), ..frame(22) }, &[]);
        let error = reader.next().await.unwrap().error.unwrap();
        assert_eq!(error.code, ErrorCode::NonFinite as i32);

        // A stream that has handed nothing over has no places.
        let (writer, mut reader) = open(Shortcut::Off).await;
        assert!(writer.room().is_none());
        send(&writer, &DispatchFrame { shared: Some(sound), ..frame(30) }, &[]);
        let error = reader.next().await.unwrap().error.unwrap();
        assert!(error.message.contains("of which the stream has 0"), "{}", error.message);
        mesh.stop();
    });
}

#[test]
fn a_router_that_spoils_a_ring_loses_its_stream_and_no_more() {
    block_on(async {
        let mut mesh = Sandbox::of(tiny()).start().await;
        let mut control = ExpertControlClient::new(node(&mesh, 0));
        let about = control.describe(DescribeRequest {}).await.unwrap().into_inner();
        let layer = about.owned[0].layer;
        let frame = |ticket| {
            let (hidden, experts) = (about.hidden, vec![about.owned[0].experts[0]]);
            let dtype = Dtype::Bf16 as i32;
            let slot_counts = vec![1];
            let head = DispatchFrame {
                ticket,
                layer,
                dtype,
                hidden,
                slot_counts,
                experts,
                ..Default::default()
            };
            let rows = vec![0x3c; 2 * hidden as usize];
            let mut buffer = BytesMut::new();
            wire::put(&mut buffer, &head, rows.len(), |buffer| buffer.extend_from_slice(&rows));
            buffer.freeze()
        };
        let endpoint = Endpoint::Unix(mesh.socket("expert-node-0"));
        let open = async || {
            let (writer, reader) = stream::open(&endpoint, None, Shortcut::Auto).await.unwrap();
            assert!(writer.has_rings());
            (writer, reader)
        };
        // As a router that is awake: by ring or socket, as it comes.
        let answer = async |writer: &Writer, reader: &mut Reader| loop {
            if let Some(reply) = writer.look() {
                return Ok(reply);
            }
            let socket = tokio::time::timeout(Duration::from_micros(50), reader.next()).await;
            if let Ok(reply) = socket {
                return reply;
            }
        };
        let ask = async |writer: &Writer, reader: &mut Reader, ticket: u64, near: &mut u32| {
            match writer.put(&frame(ticket)) {
                Put::There => *near += 1,
                Put::Knock => writer.knock(),
                Put::Not => assert!(writer.send(frame(ticket))),
            }
            let reply = answer(writer, reader).await?;
            assert_eq!((reply.ticket, reply.error.as_ref()), (ticket, None));
            Ok::<_, StreamError>(reply.rows)
        };

        // Two rings: the router's, then the node's; in each, what is written and what is read.
        const RING: usize = BOTH / 2;
        const READ: usize = 128;
        const SPOILT: [(usize, u64); 4] =
            [(0, 3), (0, u64::MAX), (RING + READ, 1 << 40), (RING + READ, 7)];
        let mut want = None;
        for (round, (at, value)) in SPOILT.into_iter().enumerate() {
            let (writer, mut reader) = open().await;
            let mut near = 0;
            for ticket in 0..500 {
                let rows = ask(&writer, &mut reader, ticket, &mut near).await.unwrap();
                assert_eq!(*want.get_or_insert_with(|| rows.clone()), rows);
            }
            assert!(near > 100, "{near} of 500 frames went by the ring");
            let counter = writer.room().unwrap().segment().counter(at);
            let mut ticket = 500;
            let ended = loop {
                // Its own end sets it right again.
                counter.store(value, Ordering::Relaxed);
                match ask(&writer, &mut reader, ticket, &mut near).await {
                    Ok(_) => ticket += 1,
                    Err(ended) => break ended.to_string(),
                }
                assert!(ticket < 5000, "round {round}: the stream goes on");
            };
            assert!(ended.contains("a shared ring is said to hold"), "round {round}: {ended}");
            // Whoever comes next is served.
            let (writer, mut reader) = open().await;
            ask(&writer, &mut reader, 1, &mut near).await.unwrap();
        }
        assert!(mesh.nodes[0].ended().is_none(), "the node lives on");
        mesh.stop();
    });
}

#[test]
fn replies_in_the_ring_come_before_the_end_of_the_stream() {
    block_on(async {
        let mesh = Sandbox::of(tiny()).start().await;
        let path = mesh.dir.join("brief.sock");
        let _brief = EvilNode::start(&path, node(&mesh, 0), Evil::Brief).await;
        let endpoint = Endpoint::Unix(path);
        let (writer, mut reader) = stream::open(&endpoint, None, Shortcut::Auto).await.unwrap();
        assert!(writer.has_rings() && writer.look().is_none(), "it is awake from now on");
        for ticket in 1..=3 {
            let frame = DispatchFrame { ticket, ..Default::default() };
            let mut buffer = BytesMut::new();
            wire::put(&mut buffer, &frame, 0, |_| {});
            assert!(writer.send(buffer.freeze()));
        }
        for ticket in 1..=3 {
            assert_eq!(reader.next().await.unwrap().ticket, ticket);
        }
        assert!(reader.next().await.is_err());
        mesh.stop();
    });
}

#[test]
fn nodes_that_stop_die_and_come_late_spoil_no_place() {
    const ROWS: usize = 256;
    let mut mesh = block_on(Sandbox::of(tiny()).expert_nodes(2).replicas(2).start());
    let checkpoint = Checkpoint::open(tiny()).unwrap();
    let config = checkpoint.config();
    let (hidden, experts, top_k) = (config.hidden, config.experts, config.top_k);
    let form = (Wire::Exact, Combine::Router);
    let mut dispatcher = dispatcher(&mesh, &checkpoint, Numerics::Bf16, form);
    let chosen: Vec<u32> = (0..ROWS)
        .flat_map(|row| {
            let mut chosen: Vec<u32> =
                (0..top_k).map(|k| ((row + k * 7) % experts) as u32).collect();
            chosen.sort_unstable();
            chosen
        })
        .collect();
    // Two batches in turns, so that what is left of one is wrong for the other.
    let batches: Vec<Vec<u8>> = (0..2)
        .map(|batch| {
            let value = |at: usize| 0x3f80 + ((at * (batch + 3)) % 120) as u16;
            (0..ROWS * hidden).flat_map(|at| value(at).to_le_bytes()).collect()
        })
        .collect();
    let weights = vec![0.25; ROWS * top_k];
    let routed = |rows| Routed { rows, count: ROWS, top_k, experts: &chosen, weights: &weights };
    // Ready is who has one owner of everything.
    while dispatcher.ways() != ["up, rows in shared memory"; 2] {
        dispatcher.round_trip(&routed(&batches[0])).unwrap();
    }
    let mut results = |batch: usize| -> Vec<u8> {
        dispatcher.round_trip(&routed(&batches[batch])).unwrap();
        (0..ROWS * top_k).flat_map(|slot| dispatcher.row(slot).to_vec()).collect()
    };
    let want = [results(0), results(1)];
    assert!(want[0] != want[1]);

    let mut victim = mesh.nodes.remove(1);
    let harm = std::thread::spawn(move || {
        let pause = |time| std::thread::sleep(Duration::from_millis(time));
        for kill in [false, true, false, true] {
            // With a frame in work, which another node is asked for as well.
            signal(victim.id(), "STOP");
            pause(400);
            if kill {
                victim.kill();
                victim.restart();
            } else {
                signal(victim.id(), "CONT");
            }
            pause(1200);
        }
        victim
    });
    let mut rounds = 0;
    while !harm.is_finished() || rounds < 10 {
        assert!(results(rounds % 2) == want[rounds % 2], "round {rounds} differs");
        rounds += 1;
    }
    mesh.nodes.push(harm.join().unwrap());
    block_on(mesh.wait_idle());
}
