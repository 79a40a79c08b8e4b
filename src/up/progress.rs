//! How far each process is while a mesh comes up: a spinner each on a terminal,
//! one line per change anywhere else.

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

/// The progress of all processes. Bars vanish with it.
pub struct Progress {
    console: Console,
    began: Instant,
    rows: Vec<Row>,
}

struct Row {
    bar: Option<ProgressBar>,
    stage: Option<Stage>,
    shown: Option<Instant>,
}

impl Progress {
    pub fn new(console: &Console, processes: usize) -> Self {
        let row = || Row {
            bar: console.has_bars().then(|| console.bars().add(bar())),
            stage: None,
            shown: None,
        };
        let rows = (0..processes).map(|_| row()).collect();
        Self { console: console.clone(), began: Instant::now(), rows }
    }

    /// Process number `place`, called `id`, is at `stage`.
    pub fn show(&mut self, place: usize, id: &str, stage: Stage) {
        let row = &mut self.rows[place];
        if row.stage.as_ref() == Some(&stage) {
            return;
        }
        let text = match &stage {
            Stage::Starting => "starting".to_owned(),
            Stage::NotReady(reason) => reason.clone(),
            Stage::Ready => format!("ready after {:.1} s", self.began.elapsed().as_secs_f64()),
        };
        match &row.bar {
            Some(bar) => {
                bar.set_prefix(id.to_owned());
                bar.set_message(text.clone());
                if stage == Stage::Ready {
                    // One name less in the picture; the line stays above the bars.
                    bar.finish_and_clear();
                    self.console.say(&format!("{id} is {text}"));
                }
            }
            None if stage == Stage::Starting => {}
            None => {
                let recently = row.shown.is_some_and(|at| at.elapsed() < LINE_EVERY);
                if recently && stage != Stage::Ready {
                    return;
                }
                self.console.say(&format!("{id}: {text}"));
                row.shown = Some(Instant::now());
            }
        }
        row.stage = Some(stage);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        for bar in self.rows.iter().filter_map(|row| row.bar.as_ref()) {
            bar.finish_and_clear();
        }
    }
}

fn bar() -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    // Not reached: the template is fixed and parses.
    let plain = ProgressStyle::default_spinner();
    bar.set_style(
        plain
            .template("{spinner} {prefix:<13} {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_spinner()),
    );
    bar.enable_steady_tick(TICK);
    bar
}
