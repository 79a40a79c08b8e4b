//! How far each process is while a mesh comes up: a spinner each on a terminal,
//! one line per change anywhere else.

use std::fmt;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::up::console::Console;

/// Without a terminal, a process's changes are shown no more often than this.
const LINE_EVERY: Duration = Duration::from_secs(1);
const TICK: Duration = Duration::from_millis(80);

/// What a process answers when asked whether it is ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It does not answer yet.
    Starting,
    /// Not ready, for a reason.
    NotReady(String),
    Ready,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Starting => "starting",
            Self::NotReady(reason) => reason,
            Self::Ready => "ready",
        })
    }
}

/// The progress of all processes. Bars vanish with it.
pub struct Progress {
    console: Console,
    began: Instant,
    rows: Vec<Row>,
}

struct Row {
    id: String,
    bar: Option<ProgressBar>,
    stage: Stage,
    shown: Option<Instant>,
}

impl Progress {
    /// Of the processes called `ids`, which are known by their places from here on.
    pub fn new(console: &Console, ids: impl Iterator<Item = String>) -> Self {
        let row = |id: String| {
            let bar = console.has_bars().then(|| console.bars().add(bar(&id)));
            Row { id, bar, stage: Stage::Starting, shown: None }
        };
        Self { console: console.clone(), began: Instant::now(), rows: ids.map(row).collect() }
    }

    /// The process at `place` is at `stage`.
    pub fn show(&mut self, place: usize, stage: Stage) {
        let row = &mut self.rows[place];
        if row.stage == stage {
            return;
        }
        row.stage = stage;
        let took = self.began.elapsed().as_secs_f64();
        match (&row.stage, &row.bar) {
            (Stage::Ready, bar) => {
                if let Some(bar) = bar {
                    bar.finish_and_clear();
                }
                self.console.say(&format!("{} is ready after {took:.1} s", row.id));
            }
            (stage, Some(bar)) => bar.set_message(stage.to_string()),
            (Stage::Starting, None) => {}
            (Stage::NotReady(reason), None) => {
                if row.shown.is_none_or(|at| at.elapsed() >= LINE_EVERY) {
                    self.console.say(&format!("{}: {reason}", row.id));
                    row.shown = Some(Instant::now());
                }
            }
        }
    }

    /// Says what the process at `place` is still waited for; bars say it anyway.
    pub fn remind(&self, place: usize) {
        if !self.console.has_bars() {
            let Row { id, stage, .. } = &self.rows[place];
            self.console.notice(&format!("still waiting for {id}: {stage}"));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        for bar in self.rows.iter().filter_map(|row| row.bar.as_ref()) {
            bar.finish_and_clear();
        }
    }
}

fn bar(id: &str) -> ProgressBar {
    let style = ProgressStyle::default_spinner();
    // The template is fixed and parses; the other style would do as well.
    let style = style
        .template("{spinner} {prefix:<13} {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_spinner());
    let bar = ProgressBar::new_spinner().with_style(style).with_prefix(id.to_owned());
    bar.set_message(Stage::Starting.to_string());
    bar.enable_steady_tick(TICK);
    bar
}
