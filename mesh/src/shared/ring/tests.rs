//! Rings under two threads with a mapping each, and under vandals.

use std::thread;

use proptest::prelude::*;

use super::*;
use crate::shared::rings::{Put, Rings};

/// The two ends of a segment, each with a mapping of its own as two processes have.
fn mappings() -> (Arc<Segment>, Arc<Segment>) {
    let (one, handed) = Segment::create().unwrap();
    (Arc::new(one), Arc::new(Segment::adopt(handed).unwrap()))
}

fn ring() -> (Writer, Reader) {
    let (one, other) = mappings();
    (Writer::new(one, BYTES), Reader::new(other, BYTES))
}

fn next(reader: &mut Reader) -> Result<Option<Vec<u8>>, Nonsense> {
    let mut message = Vec::new();
    Ok(reader.next()?.map(|length| {
        reader.take(length, &mut message);
        message
    }))
}

/// A message that says which it is and how long, with all of its bytes.
fn message(number: u64) -> Vec<u8> {
    let length = 8 + (number.wrapping_mul(0x9e37_79b9) >> 7) as usize % 3000;
    let mut message = number.to_le_bytes().to_vec();
    message.resize(length, number as u8);
    message
}

proptest! {
    /// As a queue in one process would do it, whatever the lengths, until there is no room.
    #[test]
    fn it_is_a_queue(steps in prop::collection::vec(prop::option::of(0usize..=LONGEST), 1..200)) {
        let (mut writer, mut reader) = ring();
        let mut model = std::collections::VecDeque::new();
        for (number, step) in steps.into_iter().enumerate() {
            let Some(length) = step else {
                prop_assert_eq!(next(&mut reader).unwrap(), model.pop_front());
                continue;
            };
            let message = vec![number as u8; length];
            let held: u64 = model.iter().map(|held: &Vec<u8>| taken_by(held.len())).sum();
            let fits = held + taken_by(length) <= ROOM as u64;
            prop_assert_eq!(writer.put(&message).unwrap(), fits);
            if fits {
                model.push_back(message);
            }
        }
        while let Some(want) = model.pop_front() {
            prop_assert_eq!(next(&mut reader).unwrap(), Some(want));
        }
        prop_assert_eq!(next(&mut reader).unwrap(), None);
    }

    /// Whatever the other end writes, wherever and whenever: messages within bounds, or an error.
    #[test]
    fn vandals_are_survived(
        writes in prop::collection::vec((0usize..BYTES / 8, prop_oneof![
            any::<u64>(), 0u64..70_000, (0u64..9000).prop_map(|n| 8 * n), Just(u64::MAX),
        ]), 1..60),
        counters in prop::collection::vec((any::<bool>(), 0u64..9000), 1..60),
    ) {
        let (one, other) = mappings();
        let mut writer = Writer::new(one.clone(), 0);
        let mut reader = Reader::new(other, 0);
        for ((at, value), (which, count)) in writes.into_iter().zip(counters) {
            one.write(8 * at, &value.to_le_bytes());
            let which = if which { WRITTEN } else { READ };
            one.counter(which).store(8 * count, Ordering::Relaxed);
            // All of a ring at most is read before it is at its end or makes no sense.
            let ends = (0..=ROOM / WORD).any(|_| match next(&mut reader) {
                Ok(Some(message)) => {
                    assert!(message.len() <= LONGEST);
                    false
                }
                Ok(None) | Err(_) => true,
            });
            prop_assert!(ends);
            let _ = writer.put(&[1; 100]);
        }
    }
}

#[test]
fn what_cannot_be_is_named() {
    let (one, other) = mappings();
    let (mut writer, mut reader) = (Writer::new(one.clone(), 0), Reader::new(other, 0));
    assert_eq!(writer.put(&[7; LONGEST + 1]), Ok(false), "too long");
    assert_eq!(writer.put(&[7; 20]), Ok(true));
    for count in [1, ROOM as u64 + 8, u64::MAX] {
        one.counter(WRITTEN).store(count, Ordering::Relaxed);
        assert_eq!(next(&mut reader), Err(Nonsense::Count(count)));
    }
    one.counter(WRITTEN).store(32, Ordering::Relaxed);
    for length in [25, LONGEST as u64 + 1, u64::MAX] {
        one.write(MESSAGES, &length.to_le_bytes());
        assert_eq!(next(&mut reader), Err(Nonsense::Length { length, holds: 32 }));
    }
    one.write(MESSAGES, &20u64.to_le_bytes());
    assert_eq!(next(&mut reader), Ok(Some(vec![7; 20])));
    // A reader that has read what was never written.
    one.counter(READ).store(1 << 40, Ordering::Relaxed);
    let mut put = || writer.put(&[7; LONGEST / 2]);
    let refused = (0..9).find_map(|_| put().err());
    assert!(matches!(refused, Some(Nonsense::Count(_))), "{refused:?}");
}

#[test]
fn two_threads_pass_every_message_on_whole_and_in_order() {
    const MESSAGES: u64 = 200_000;
    let (mut writer, mut reader) = ring();
    let writing = thread::spawn(move || {
        for number in 0..MESSAGES {
            let message = message(number);
            while !writer.put(&message).unwrap() {
                thread::yield_now();
            }
        }
    });
    for number in 0..MESSAGES {
        let got = loop {
            match next(&mut reader).unwrap() {
                Some(got) => break got,
                None => thread::yield_now(),
            }
        };
        assert!(got == message(number), "message {number} is another");
    }
    writing.join().unwrap();
    assert_eq!(next(&mut reader), Ok(None));
}

/// Both ends of a connection: each takes some, sleeps, and is woken; the channels are its stream.
#[test]
fn nobody_sleeps_while_a_message_waits() {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::Duration;
    const MESSAGES: u64 = 100_000;
    /// Sends back what it is sent, or sends first; every message by ring or stream, exactly once.
    fn end(
        rings: &Rings,
        stream: &Sender<Vec<u8>>,
        from: &Receiver<Vec<u8>>,
        first: bool,
    ) -> [u64; 3] {
        let send = |number: u64, ways: &mut [u64; 3]| {
            let message = message(number);
            let put = rings.put(&message).unwrap();
            ways[put as usize] += 1;
            match put {
                Put::There => {}
                Put::Knock => stream.send(Vec::new()).unwrap(),
                Put::Not => stream.send(message).unwrap(),
            }
        };
        let mut ways = [0; 3];
        for number in 0..MESSAGES {
            if first {
                send(number, &mut ways);
            }
            let mut looks = 0;
            let got = loop {
                if rings.look() {
                    break rings.take().unwrap().unwrap().to_vec();
                }
                let told = from.try_recv().unwrap_or_default();
                if !told.is_empty() {
                    break told;
                }
                looks += 1;
                // Soon now and late then, so that it falls asleep in every moment of the other's.
                if looks > number % 40 && rings.sleep() {
                    let told = from.recv_timeout(Duration::from_secs(60)).expect("woken");
                    if !told.is_empty() {
                        break told;
                    }
                }
            };
            assert!(got == message(number), "message {number} is another");
            if !first {
                send(number, &mut ways);
            }
        }
        ways
    }
    let (one, other) = mappings();
    let (to_server, from_client) = channel();
    let (to_client, from_server) = channel();
    let server = thread::spawn(move || {
        end(&Rings::server(&other).unwrap(), &to_client, &from_client, false)
    });
    let client = end(&Rings::client(&one), &to_server, &from_server, true);
    for ways in [client, server.join().unwrap()] {
        assert!(ways[Put::There as usize] > 0 && ways[Put::Not as usize] > 0, "{ways:?}");
    }
}
