//! Whether a node is sent work: closed (it is), ejected for a while, or probed
//! by one frame on which its return depends. Pure: time comes in.

use std::time::{Duration, Instant};

/// Failures of the hard kind in a row that eject a node.
const HARD: u32 = 3;
/// Time over which the share of successes is taken, in pieces.
const WINDOW: Duration = Duration::from_secs(5);
const PIECES: usize = 5;
/// Answers in the window before their share of successes counts.
const ENOUGH: u32 = 20;
/// Successes of a hundred answers below which a node is ejected.
const LEAST_PERCENT: u32 = 80;
/// The first ejection; each further one takes twice as long, up to a limit.
const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(30);
/// A node that behaves for so long begins anew with the first.
const FORGIVEN: Duration = Duration::from_secs(30);

/// How a frame failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// No answer in time, a broken stream, an answer that is wrong.
    Hard,
    /// It says that it is too busy, or that it cannot: counted, no more.
    Soft,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Closed,
    /// Left alone until then, where others own its experts too.
    Ejected(Instant),
    /// One frame is under way.
    Probing,
}

/// See the module's text.
#[derive(Clone, Debug)]
pub(super) struct Breaker {
    pub state: State,
    hard: u32,
    /// Ejections since it was last forgiven.
    ejections: u32,
    closed: Instant,
    window: [Piece; PIECES],
}

/// Answers of a part of the window.
#[derive(Clone, Copy, Debug)]
struct Piece {
    began: Instant,
    good: u32,
    bad: u32,
}

impl Breaker {
    pub fn new(now: Instant) -> Self {
        let window = [Piece { began: now, good: 0, bad: 0 }; PIECES];
        Self { state: State::Closed, hard: 0, ejections: 0, closed: now, window }
    }

    /// A frame would be welcome, be it as a probe.
    pub fn admits(&self, now: Instant) -> bool {
        match self.state {
            State::Closed => true,
            State::Ejected(until) => now >= until,
            State::Probing => false,
        }
    }

    /// A frame leaves for the node. After an ejection it is the probe.
    pub fn sent(&mut self, now: Instant) {
        if matches!(self.state, State::Ejected(until) if now >= until) {
            self.state = State::Probing;
        }
    }

    /// The probe is gone without an answer or a failure: another one may go.
    pub fn probe_lost(&mut self, now: Instant) {
        if self.state == State::Probing {
            self.state = State::Ejected(now);
        }
    }

    pub fn succeeded(&mut self, now: Instant) {
        self.hard = 0;
        match self.state {
            State::Probing => {
                self.state = State::Closed;
                self.closed = now;
            }
            State::Closed if now.saturating_duration_since(self.closed) >= FORGIVEN => {
                self.ejections = 0;
            }
            State::Closed => {}
            // A late answer is no probe.
            State::Ejected(_) => return,
        }
        self.piece(now).good += 1;
    }

    /// Returns whether this ejected the node.
    pub fn failed(&mut self, failure: Failure, now: Instant) -> bool {
        match self.state {
            State::Ejected(_) => return false,
            State::Probing => {}
            State::Closed => {
                self.piece(now).bad += 1;
                self.hard += u32::from(failure == Failure::Hard);
                let recent = |piece: &&Piece| now.saturating_duration_since(piece.began) < WINDOW;
                let recent = self.window.iter().filter(recent);
                let (good, all) = recent.fold((0, 0), |(good, all), piece| {
                    (good + piece.good, all + piece.good + piece.bad)
                });
                if self.hard < HARD && (all < ENOUGH || good * 100 >= all * LEAST_PERCENT) {
                    return false;
                }
            }
        }
        let time = FIRST.saturating_mul(1 << self.ejections.min(8)).min(LONGEST);
        self.state = State::Ejected(now + time);
        self.ejections += 1;
        self.hard = 0;
        self.window = [Piece { began: now, good: 0, bad: 0 }; PIECES];
        true
    }

    /// The window's current piece.
    fn piece(&mut self, now: Instant) -> &mut Piece {
        let newest = (0..PIECES).max_by_key(|&at| self.window[at].began).unwrap_or(0);
        let length = WINDOW / PIECES as u32;
        if now.saturating_duration_since(self.window[newest].began) < length {
            return &mut self.window[newest];
        }
        let oldest = (0..PIECES).min_by_key(|&at| self.window[at].began).unwrap_or(0);
        self.window[oldest] = Piece { began: now, good: 0, bad: 0 };
        &mut self.window[oldest]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ejected_for(breaker: &Breaker, now: Instant) -> Option<Duration> {
        match breaker.state {
            State::Ejected(until) => Some(until - now),
            _ => None,
        }
    }

    #[test]
    fn three_hard_failures_in_a_row_eject_and_a_success_between_does_not() {
        let now = Instant::now();
        let mut breaker = Breaker::new(now);
        for failure in [Failure::Hard, Failure::Hard] {
            assert!(!breaker.failed(failure, now));
        }
        breaker.succeeded(now);
        assert!(!breaker.failed(Failure::Hard, now) && !breaker.failed(Failure::Hard, now));
        assert!(breaker.failed(Failure::Hard, now));
        assert_eq!(ejected_for(&breaker, now), Some(FIRST));
    }

    #[test]
    fn refusals_count_against_the_rate_only() {
        let now = Instant::now();
        let mut breaker = Breaker::new(now);
        for _ in 0..16 {
            breaker.succeeded(now);
        }
        for _ in 0..3 {
            assert!(!breaker.failed(Failure::Soft, now), "19 answers are not enough");
        }
        assert!(!breaker.failed(Failure::Soft, now), "16 of 20 are 80 %");
        assert!(breaker.failed(Failure::Soft, now), "16 of 21 are not");
    }

    #[test]
    fn what_is_older_than_the_window_does_not_count() {
        let start = Instant::now();
        let mut breaker = Breaker::new(start);
        (0..16).for_each(|_| breaker.succeeded(start));
        (0..3).for_each(|_| _ = breaker.failed(Failure::Soft, start));
        let later = start + WINDOW;
        assert!((0..19).all(|_| !breaker.failed(Failure::Soft, later)), "19 in the window");
        assert!(breaker.failed(Failure::Soft, later));
    }

    #[test]
    fn ejections_double_up_to_a_limit_and_are_forgiven() {
        let mut now = Instant::now();
        let mut breaker = Breaker::new(now);
        let mut times = Vec::new();
        (0..3).for_each(|_| _ = breaker.failed(Failure::Hard, now));
        for _ in 0..7 {
            let time = ejected_for(&breaker, now).unwrap();
            times.push(time.as_secs());
            assert!(!breaker.admits(now + time - Duration::from_millis(1)));
            now += time;
            assert!(breaker.admits(now));
            breaker.sent(now);
            assert!(!breaker.admits(now), "one probe");
            assert!(breaker.failed(Failure::Hard, now));
        }
        assert_eq!(times, [1, 2, 4, 8, 16, 30, 30]);
        now += LONGEST;
        breaker.sent(now);
        breaker.succeeded(now);
        assert_eq!(breaker.state, State::Closed);
        now += FORGIVEN;
        breaker.succeeded(now);
        (0..3).for_each(|_| _ = breaker.failed(Failure::Hard, now));
        assert_eq!(ejected_for(&breaker, now), Some(FIRST));
    }
}
